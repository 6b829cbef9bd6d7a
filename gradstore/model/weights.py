"""Loading weights without running code: safetensors, or a state_dict that holds nothing but tensors."""

from __future__ import annotations

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gradstore.errors import CorruptError, ProjectError, UnsafeError


def load_weights(model: nn.Module, path: Path) -> None:
    """Put the weights in `path` into `model`.

    Args:
        model: any module.
        path: a `.safetensors` file, or a state_dict saved by `torch.save`, which is read with `weights_only=True`
            whatever the environment says.

    Raises:
        ProjectError: no such file, or tensors that do not fit the model; lists the first few.
        UnsafeError: a checkpoint that would have to run code to load, or that is compressed.
        CorruptError: the file is damaged, or none of weights.
    """
    if not path.is_file():
        raise ProjectError("the weights file does not exist", where=path, hint="Check `weights=` in the project file")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_state_dict(path)
    tied = _tied_names(model)
    _require_fit(model, state, tied, path)
    repeated = {
        name: state[other] for name, others in tied.items() for other in others if name not in state and other in state
    }
    try:
        model.load_state_dict({**state, **repeated})
    except Exception as error:  # of a dtype that torch cannot convert, or of a model's own loading
        raise ProjectError("the weights cannot be put into the model", where=path, got=_clause(error)) from error


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # whatever a damaged file makes safetensors or torch raise
        raise _damaged("this is no safetensors file, or a damaged one", path, error) from error


def _read_state_dict(path: Path) -> Mapping[str, Tensor]:
    _require_unexpanded(path)
    try:
        # An explicit weights_only=True wins over TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, which changes only the default.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on unusual pickles, which are then refused in our own words
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeError(
            "this checkpoint is more than tensors, so loading it could run code",
            where=path,
            expected="a state_dict, or safetensors",
            got=_clause(error),
            hint="Where you trust it, save `model.state_dict()` with safetensors.torch.save_file and name that file",
        ) from error
    except Exception as error:  # whatever a damaged file makes torch's reader raise
        raise _damaged("this is no checkpoint, or a damaged one", path, error) from error
    named = isinstance(state, Mapping) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise ProjectError(
            "this file holds no state_dict",
            where=path,
            expected="a mapping of names to tensors",
            got=type(state).__name__,
        )
    return state


def _require_unexpanded(path: Path) -> None:
    """Refuse an archive that would take more memory than it has bytes; torch writes none."""
    try:
        with zipfile.ZipFile(path) as archive:
            expanded = sum(member.file_size for member in archive.infolist())
    except Exception:  # it is no archive, or a damaged one, as torch will say
        return
    if expanded > path.stat().st_size:
        raise UnsafeError(
            "this checkpoint is compressed, so loading it could take any amount of memory",
            where=path,
            expected="an archive as torch.save writes it",
            got=f"{expanded} bytes in {path.stat().st_size}",
            hint="Where you trust it, unpack it and pack it again without compression",
        )


def _damaged(what: str, path: Path, error: Exception) -> CorruptError:
    return CorruptError(what, where=path, got=_clause(error), hint="Copy it again from where it was written")


def _clause(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__


def _require_fit(model: nn.Module, state: Mapping[str, Tensor], tied: Mapping[str, set[str]], path: Path) -> None:
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    strange = [f"{_short(name)} {kind}" for name, value in state.items() if (kind := _strangeness(value))]
    missing = [name for name in own if name not in state and not tied.get(name, set()) & set(state)]
    extra = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in state
        if name in own and not strange and state[name].shape != own[name].shape
    ]
    dtypes = [
        f"{name} {state[name].dtype} for {own[name].dtype}"
        for name in state
        if name in own and not torch.can_cast(state[name].dtype, own[name].dtype)
    ]
    wrong = [f"missing {n}" for n in missing] + [f"unknown {_short(n)}" for n in extra]
    wrong += [f"shape {s}" for s in shapes] + [f"kind {s}" for s in strange] + [f"dtype {d}" for d in dtypes]
    if wrong:
        raise ProjectError(
            "the weights do not fit the model",
            where=path,
            expected=f"{len(own)} tensors of the model's names and shapes",
            got="; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""),
            hint="Check that `model=` is built with the same options as when it was trained",
        )


def _strangeness(value: Tensor) -> str:
    """What keeps a tensor from being a plain array of numbers; "" for nothing."""
    kinds = {
        "nested": value.is_nested,
        "quantised": value.is_quantized,
        "sparse": value.layout != torch.strided,
        "without values": value.device.type != "cpu",
        f"a {type(value).__name__}": type(value) not in (Tensor, nn.Parameter),
    }
    return next((kind for kind, holds in kinds.items() if holds), "")


def _short(name: str) -> str:
    return name if len(name) <= 60 else name[:57] + "…"


def _tied_names(model: nn.Module) -> dict[str, set[str]]:
    """For each name, the other names of the same tensor; safetensors stores a shared tensor once."""
    groups: dict[int, set[str]] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        groups.setdefault(id(tensor), set()).add(name)
    return {name: names - {name} for names in groups.values() for name in names}
