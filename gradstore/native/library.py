"""The compiled library: where it is, which SIMD level it uses and why, and calls of its functions.

It is built from ``src/`` when the package is installed and a C++ compiler is there. Its interface is plain C, so one
build serves every Python and needs no Python header. Without it torch and numpy do the same, more slowly.
``GRADSTORE_SIMD`` (amx, avx512, avx2, neon, plain) forces a level, for tests and for comparison; "none" goes without
the library.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from gradstore.errors import UsageError

INTERFACE = 7  # of gradstore_interface() in src/levels.cpp
_NOT_BUILT = "it was not built: no C++ compiler worked when gradstore was installed"
_FORBIDDEN = "GRADSTORE_SIMD=none forbids it"
_REBUILD = "install a C++ compiler (g++ or clang++), then install gradstore again"


@dataclass(frozen=True)
class Library:
    """The loaded library.

    Attributes:
        file: its functions.
        path: where it is.
        levels: number of each SIMD level that this processor has, by name, fastest first.
    """

    file: ctypes.CDLL
    path: str
    levels: dict[str, int]


@dataclass(frozen=True)
class Status:
    """What is in use of the compiled library.

    Attributes:
        level: the SIMD level in use, or "" without the library.
        levels: every level that this processor can run, fastest first.
        path: the compiled file, if there is one.
        why: the reason why the library is not used, or "".
        hint: how to get the faster code, or "".
    """

    level: str = ""
    levels: tuple[str, ...] = ()
    path: str = ""
    why: str = ""
    hint: str = ""


def load() -> Library | str:
    """The library, or why there is none; read from its file once."""
    return _FORBIDDEN if os.environ.get("GRADSTORE_SIMD") == "none" else _read(Path(__file__).parent)


def available() -> bool:
    """Whether the library can be used."""
    return isinstance(load(), Library)


def levels() -> tuple[str, ...]:
    """SIMD levels that this processor can run, fastest first; none without the library."""
    library = load()
    return tuple(library.levels) if isinstance(library, Library) else ()


def level() -> str:
    """Find the level in use.

    Returns:
        That of ``GRADSTORE_SIMD``, else the fastest; "" without the library.

    Raises:
        UsageError: this processor lacks the level that ``GRADSTORE_SIMD`` names, or there is none of that name.
    """
    found = levels()
    wanted = os.environ.get("GRADSTORE_SIMD") or next(iter(found), "")
    return _one_of(found, wanted, "GRADSTORE_SIMD") if found else ""


def status() -> Status:
    """Find which level is in use here, and why.

    Returns:
        The level, every other that there is, and how to get a faster one.

    Raises:
        UsageError: as `level` does.
    """
    library, used = load(), level()
    if isinstance(library, str):
        return Status(why=library, hint=_how_to_get(library))
    found = tuple(library.levels)
    hint = "" if used == found[0] else "unset GRADSTORE_SIMD to use the fastest level"
    return Status(used, found, library.path, hint=hint)


def call(name: str, job: ctypes.Structure, *more: int, simd: str | None = None) -> int:
    """Call a function of the library for a job, in this thread and without the interpreter lock.

    Args:
        name: of the function, without ``gradstore_``.
        job: what it is to do.
        more: arguments that follow the level.
        simd: a level instead of the one in use.

    Returns:
        What it returned; undefined where it returns nothing.

    Raises:
        UsageError: there is no library, or this processor lacks the level.
    """
    library = load()
    if isinstance(library, str):
        raise UsageError("no compiled code", where="backend", got=library, hint=_how_to_get(library))
    used = _one_of(tuple(library.levels), simd, "level") if simd else level()
    return int(getattr(library.file, f"gradstore_{name}")(ctypes.byref(job), library.levels[used], *more))


def _one_of(found: tuple[str, ...], name: str, where: str) -> str:
    if name not in found:
        raise UsageError("SIMD level not available", where=where, expected=f"one of {', '.join(found)}", got=repr(name))
    return name


def _how_to_get(why: str) -> str:
    """What to do about the reason why there is no library."""
    return "unset GRADSTORE_SIMD" if why == _FORBIDDEN else _REBUILD


@cache
def _read(folder: Path) -> Library | str:
    built = [folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((str(path) for path in built if path.exists()), None)
    if path is None:
        return _NOT_BUILT
    try:
        file = ctypes.CDLL(path)
        names, found = file.gradstore_level, file.gradstore_interface()
    except (OSError, AttributeError) as error:
        return f"it does not load: {error}"
    if found != INTERFACE:
        return f"it was built from another version of gradstore: interface {found}, not {INTERFACE}"
    names.restype = ctypes.c_char_p
    levels, flag, index = {}, ctypes.c_int(), 0
    while name := names(index, ctypes.byref(flag)):
        if flag.value:
            levels[name.decode()] = index
        index += 1
    return Library(file, path, levels)
