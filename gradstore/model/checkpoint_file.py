"""One file of weights, read without running code; what is no such file is named for what it is."""

from __future__ import annotations

import argparse
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path, PosixPath
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file
from torch import Tensor

from gradstore.errors import CorruptError, UnsafeError

_POINTER = ("this is a git-lfs pointer, which stands in the file's place", "Run `git lfs pull` in its repository")
_PAGE = (
    "this is a web page, saved in the file's place",
    "Download the file itself; what was saved is the page that shows it",
)
_MISTAKEN = {
    b"version https://git-lfs.github.com/spec/": _POINTER,
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
    b"<?xml": _PAGE,
}
"""How a file begins that is saved by mistake: what it is, and what to do."""
_BEGINNING = 64  # bytes by which such a file is known
_LONGEST_HEADER = 16 << 20  # bytes of a safetensors header in which an error's cause is looked for
_PICKLES = 5  # in a file that torch.save wrote before 1.6: magic number, version, system, content, names of storages
_AGAIN = "Copy it again from where it was written"
_INERT = [argparse.Namespace, PosixPath]  # what training scripts put beside weights: values, and no code
_NAMED = 3  # classes that an error lists


def read_checkpoint_file(path: Path) -> Any:
    """Read everything that a file holds, onto the CPU.

    Args:
        path: a `.safetensors` file, or one saved by `torch.save`, which is read with `weights_only=True` whatever the
            environment says. Of objects beside tensors and plain values, arguments of a command line and paths are
            read too.

    Returns:
        A mapping of names to tensors, or whatever was saved.

    Raises:
        UnsafeError: it would have to run code to load, or it is compressed; names the classes it holds.
        CorruptError: it is empty, cut short, damaged, a git-lfs pointer, a web page, or nothing of the kind.
    """
    _require_no_mistake(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_saved(path)


def _require_no_mistake(path: Path) -> None:
    with path.open("rb") as file:
        beginning = file.read(_BEGINNING).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if path.stat().st_size == 0:
        raise CorruptError("the weights file is empty", where=path, hint=_AGAIN)
    for start, (what, hint) in _MISTAKEN.items():
        if beginning.startswith(start):
            raise CorruptError(what, where=path, expected="weights", got=f"{path.stat().st_size} bytes", hint=hint)


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # whatever a damaged file makes safetensors or torch raise
        whole, size = _whole_size(path), path.stat().st_size
        if whole > size:
            raise _cut_short(path, f"{whole} bytes") from error
        raise _damaged("this is no safetensors file, or a damaged one", path, error) from error


def _whole_size(path: Path) -> int:
    """Bytes that a safetensors file has by its own header; 0 where that cannot be told."""
    with path.open("rb") as file:
        length, begins = int.from_bytes(file.read(8), "little"), file.read(1)
        if begins != b"{" or length > _LONGEST_HEADER:
            return 0
        text = begins + file.read(length - 1)
    if len(text) < length:
        return 8 + length
    try:
        entries = [entry for name, entry in json.loads(text).items() if name != "__metadata__"]
        return 8 + length + max(int(entry["data_offsets"][1]) for entry in entries)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError):
        return 0


def _read_saved(path: Path) -> Any:
    _require_plain_archive(path)
    try:
        # An explicit weights_only=True wins over TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, which changes only the default.
        with warnings.catch_warnings(), _inert_allowed():
            warnings.simplefilter("ignore")  # on unusual pickles, which are then refused in our own words
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes torch's reader raise
        if _is_cut(path) or "unexpected EOF" in str(error):
            raise _cut_short(path, "a checkpoint to its end") from error
        if isinstance(error, pickle.UnpicklingError):
            raise _unsafe(path, _what_it_holds(path, error)) from error
        raise _damaged("this is no checkpoint, or a damaged one", path, error) from error


def _inert_allowed() -> AbstractContextManager[object]:
    """Within: classes that hold values alone are read. Before torch 2.5, they are refused as others are."""
    allow = getattr(torch.serialization, "safe_globals", None)
    return nullcontext() if allow is None else allow(_INERT)


def _is_cut(path: Path) -> bool:
    """Whether the end of an archive, or of an old file's pickles or tensors, is what is missing."""
    with path.open("rb") as file:
        beginning = file.read(4)
        file.seek(0)
        if beginning.startswith(b"\x80"):
            return _ends_early(file, path.stat().st_size)
    try:
        return beginning == b"PK\x03\x04" and not zipfile.is_zipfile(path)
    except Exception:  # its end is there, and damaged
        return False


def _ends_early(file: BinaryIO, size: int) -> bool:
    """Whether a file ends within one of the pickles with which an old one begins; reads them, and does nothing else."""
    try:
        for _ in range(_PICKLES):
            if file.tell() == size:
                break
            for _ in pickletools.genops(file):
                pass
    except Exception:  # of pickletools' own kinds, by where it stands
        return file.tell() == size
    return False


def _what_it_holds(path: Path, error: pickle.UnpicklingError) -> str:
    """The classes and functions that a pickle names, or what torch says of it where they cannot be listed."""
    try:
        found = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # of an old pickle, or a torch before 2.5
        found = re.findall(r"GLOBAL (\S+)", str(error))[:1]
    if not found:
        said = re.search(r"error:\s*(\S.*)", str(error))
        return said[1][:120] if said else type(error).__name__
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(name[:60] for name in found[:_NAMED]) + more


def _require_plain_archive(path: Path) -> None:
    """Refuse an archive that holds a program, or takes more memory than it has bytes; `torch.save` writes none."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception:  # it is no archive, or a damaged one, as torch will say
        return
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise _unsafe(path, "a TorchScript program")
    expanded = sum(member.file_size for member in members)
    if expanded > path.stat().st_size:
        raise UnsafeError(
            "this checkpoint is compressed, so loading it could take any amount of memory",
            where=path,
            expected="an archive as torch.save writes it",
            got=f"{expanded} bytes in {path.stat().st_size}",
            hint="Where you trust it, unpack it and pack it again without compression",
        )


def _unsafe(path: Path, holds: str) -> UnsafeError:
    return UnsafeError(
        "this checkpoint is more than tensors, so loading it could run code",
        where=path,
        expected="a state_dict, or safetensors",
        got=holds,
        hint="Where you trust it, load it by hand, save the `state_dict()` with safetensors.torch.save_file and name "
        "that file",
    )


def _cut_short(path: Path, expected: str) -> CorruptError:
    got = f"{path.stat().st_size} bytes"
    return CorruptError("this file is cut short", where=path, expected=expected, got=got, hint=_AGAIN)


def _damaged(what: str, path: Path, error: Exception) -> CorruptError:
    return CorruptError(what, where=path, got=_clause(error), hint=_AGAIN)


def _clause(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__
