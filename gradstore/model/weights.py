"""Putting a checkpoint's weights into the model, where they fit it; and their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gradstore.errors import ProjectError
from gradstore.model.checkpoint import read_checkpoint
from gradstore.model.weight_names import Renaming, renamed

_NAMED = 5  # of what does not fit


def load_weights(model: nn.Module, path: Path) -> tuple[str, ...]:
    """Put the weights in `path` into `model`.

    Args:
        model: any module.
        path: a file, an index of shards or a folder, as `read_checkpoint` takes it. From names, the prefixes that
            wrappers put there (`module.`, `_orig_mod.`, `model.`) are removed where they then fit the model.

    Returns:
        Lines that say which entry of the file was taken, and what was removed from names; none where it is a plain
        state_dict of the model's names.

    Raises:
        ProjectError: no such file, or tensors that do not fit the model; lists the first few.
        UnsafeError: a checkpoint that would have to run code to load, that is compressed, or names files elsewhere.
        CorruptError: the file is damaged, or none of weights.
    """
    found, tied = read_checkpoint(path), _tied_names(model)
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    naming = renamed(found.tensors, own)
    state = {naming.names[name]: value for name, value in found.tensors.items()}
    _require_fit(own, state, tied, naming, found.path)
    repeated = {
        name: state[other] for name, others in tied.items() for other in others if name not in state and other in state
    }
    try:
        model.load_state_dict({**state, **repeated})
    except Exception as error:  # of a dtype that torch cannot convert, or of a model's own loading
        got = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ProjectError("the weights cannot be put into the model", where=found.path, got=got[0][:120]) from error
    if not found.entry and not naming.removed:
        return ()
    which = f"the entry {found.entry!r} of" if found.entry else "those of"
    return (f"weights: {which} {found.path.name}{naming}",)


def _missing(own: Mapping[str, Tensor], tied: Mapping[str, set[str]], names: set[str]) -> list[str]:
    return [name for name in own if name not in names and not tied.get(name, set()) & names]


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _require_fit(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    tied: Mapping[str, set[str]],
    naming: Renaming,
    path: Path,
) -> None:
    strange = [f"{_short(name)} {kind}" for name, value in state.items() if (kind := _strangeness(value))]
    missing = _missing(own, tied, set(state))
    unknown = [_short(name) for name in state if name not in own]
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
    differing = [] if strange or shapes else _differing(state, tied)
    wrong = [f"missing {n}" for n in missing] + [f"unknown {n}" for n in unknown]
    wrong += [f"shape {s}" for s in shapes] + [f"kind {s}" for s in strange] + [f"dtype {d}" for d in dtypes]
    wrong += [f"tied in the model, other values in the file {names}" for names in differing]
    if wrong:
        counts = f"{len(missing)} missing, {len(unknown)} unknown: " if len(missing) + len(unknown) > _NAMED else ""
        some = _of_each_kind(wrong)
        more = [f"and {len(wrong) - len(some)} more"] if len(wrong) > len(some) else []
        raise ProjectError(
            f"the weights do not fit the model{naming}",
            where=path,
            expected=f"{len(own)} tensors of the model's names and shapes",
            got=counts + "; ".join([*some, *more]),
            hint="Check that `model=` is built with the same options as when it was trained",
        )


def _of_each_kind(wrong: Sequence[str]) -> list[str]:
    """A few of what is wrong, at least one of each kind, in their order."""
    first = {line.split()[0]: i for i, line in reversed(list(enumerate(wrong)))}.values()
    others = [i for i in range(len(wrong)) if i not in first]
    return [wrong[i] for i in sorted([*first, *others[: max(_NAMED - len(first), 0)]])]


def _differing(state: Mapping[str, Tensor], tied: Mapping[str, set[str]]) -> list[str]:
    """Pairs of names that are one tensor in the model and have other bytes in the checkpoint."""
    pairs = [(a, b) for a, others in tied.items() for b in others if a < b and a in state and b in state]
    return [
        f"{a} and {b}"
        for a, b in pairs
        if state[a].dtype != state[b].dtype or not torch.equal(_bytes(state[a]), _bytes(state[b]))
    ]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


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
