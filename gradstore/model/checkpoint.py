"""The tensors of a checkpoint, however it is kept: a file, a training run's file, shards with an index, or a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gradstore.errors import CorruptError, ProjectError, UnsafeError, shown
from gradstore.model.checkpoint_file import read_checkpoint_file

_IN_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What a Hugging Face folder keeps its weights in; the first that is there."""
_USUAL = ("state_dict", "model_state_dict", "model")  # what training scripts and Lightning call the weights
_LONGEST_INDEX = 64 << 20  # bytes; one of 100,000 tensors has 10 MB
_LONGEST_NAME = 255  # bytes of a file's
_NAMED = 3  # names that an error lists


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, on the CPU.

    Attributes:
        path: the file that they come from, or the index of several.
        tensors: all of them.
        entry: of a file that holds more, the entry that they are; "" where they are all.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    entry: str = ""


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the weights that a path leads to, without running code.

    Args:
        path: a file as `read_checkpoint_file` takes it, whose weights may be an entry among others; an index of shards
            (`.index.json`), which are files beside it; or a folder with one of these under Hugging Face's names.

    Returns:
        The tensors, all of them in memory.

    Raises:
        ProjectError: nothing is there; the file holds no state_dict, or several; or a shard is missing, or holds other
            tensors than the index says.
        UnsafeError: it would have to run code to load, is compressed, or its index names a shard elsewhere.
        CorruptError: a file is damaged, or none of weights.
    """
    file = _in_folder(path) if path.is_dir() else path
    if not file.is_file():
        raise ProjectError("the weights file does not exist", where=path, hint="Check `weights=` in the project file")
    if file.name.endswith(".index.json"):
        return Checkpoint(file, _read_shards(file))
    return _weights_in(read_checkpoint_file(file), file)


def _in_folder(folder: Path) -> Path:
    for name in _IN_FOLDER:
        if (folder / name).is_file():
            return folder / name
    raise ProjectError(
        "the weights file does not exist",
        where=folder,
        expected=f"a folder with one of {', '.join(_IN_FOLDER)}",
        hint="Check `weights=` in the project file",
    )


def _weights_in(content: Any, path: Path) -> Checkpoint:
    """What of a file's content is weights: all, or the one entry that is."""
    if _is_weights(content):
        return Checkpoint(path, content)
    entries = [name for name, value in content.items() if _is_weights(value) and value] if _is_named(content) else []
    chosen = entries if len(entries) == 1 else [name for name in entries if name in _USUAL]
    if len(chosen) == 1:
        return Checkpoint(path, content[chosen[0]], chosen[0])
    if entries:
        raise ProjectError(
            "this file holds several state_dicts",
            where=path,
            expected=f"one, or one under a usual name: {', '.join(_USUAL)}",
            got=_few(entries),
            hint="Save the one that is the model's as a file of its own",
        )
    raise ProjectError(
        "this file holds no state_dict",
        where=path,
        expected="a mapping of names to tensors, or an entry that is one",
        got=f"entries {_few(list(content))}" if _is_named(content) and content else type(content).__name__,
    )


def _is_named(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _is_weights(value: Any) -> bool:
    return _is_named(value) and all(isinstance(tensor, Tensor) for tensor in value.values())


def _read_shards(index: Path) -> Mapping[str, Tensor]:
    """The tensors of all shards, each from the one that the index names for it."""
    places = _weight_map(index)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        file = index.parent / shard
        if not file.is_file():
            raise ProjectError(
                "a shard that the index names does not exist", where=index, got=shown(shard), hint="Copy all shards"
            )
        content = _weights_in(read_checkpoint_file(file), file).tensors
        own = {name for name, place in places.items() if place == shard}
        _require_same_names(index, shard, lacking=own - set(content), further=set(content) - own)
        tensors.update(content)
    return tensors


def _require_same_names(index: Path, shard: str, *, lacking: set[str], further: set[str]) -> None:
    if lacking or further:
        what = "lacks tensors that the index has there" if lacking else "holds tensors that the index has not there"
        raise ProjectError(
            f"a shard {what}",
            where=index.parent / shard,
            expected=f"those of {index.name}",
            got=_few(sorted(lacking or further)),
            hint="The shards and the index are of one saving; copy all of them again",
        )


def _weight_map(index: Path) -> dict[str, str]:
    """Name of each tensor -> name of its shard, a file beside the index."""
    places = _parsed(index)
    if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
        raise CorruptError(
            "this is no index of shards",
            where=index,
            expected="a weight_map of names to files",
            got=type(places).__name__,
            hint="Copy it again from where it was written",
        )
    for shard in places.values():
        # A link is followed, as everywhere: caches of weights are full of links.
        if shard in ("", "..") or Path(shard).name != shard or len(shard.encode(errors="replace")) > _LONGEST_NAME:
            raise UnsafeError(
                "the index names what is no file beside it", where=index, expected="names of files", got=shown(shard)
            )
    return places


def _parsed(index: Path) -> Any:
    try:
        if index.stat().st_size > _LONGEST_INDEX:
            raise ValueError(f"{index.stat().st_size} bytes")
        return json.loads(index.read_bytes(), object_pairs_hook=_without_repeats)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptError(
            "this is no index of shards, or a damaged one",
            where=index,
            got=" ".join(str(error).split())[:120] or type(error).__name__,
            hint="Copy it again from where it was written",
        ) from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, which may have a name twice and then means nothing."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:60]} is there twice")
        found[name] = value
    return found


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(name if len(name) <= 60 else name[:59] + "…" for name in names[:_NAMED]) + more
