"""Compiled parts of the package: plain C libraries beside the modules that call them, and the SIMD levels they offer.

They are built when the package is installed and a C++ compiler is there; one build serves every Python. Without them
the same is done by torch and numpy, more slowly. ``GRADSTORE_SIMD`` forces a level; "none" goes without all of them.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

NOT_BUILT = "it was not built: no C++ compiler worked when gradstore was installed"
"""Why there is no library, where there is no file."""
FORBIDDEN = "GRADSTORE_SIMD=none forbids it"
"""Why there is no library, where it must not be used."""


@dataclass(frozen=True)
class Library:
    """A loaded library.

    Attributes:
        file: its functions.
        path: where it is.
        levels: number of each SIMD level that this processor has, by name, fastest first.
    """

    file: ctypes.CDLL
    path: str
    levels: dict[str, int]

    def level(self) -> str:
        """The name of the level in use: that of ``GRADSTORE_SIMD`` where it is one, else the fastest."""
        wanted = os.environ.get("GRADSTORE_SIMD", "")
        return wanted if wanted in self.levels else next(iter(self.levels))


def load(folder: Path, prefix: str, interface: int) -> Library | str:
    """The library of a folder, or why there is none; read from its file once.

    Args:
        folder: of the file ``_native``.
        prefix: of its functions ``…_interface``, which returns a number, and ``…_level``, which names levels.
        interface: the number that it must return.
    """
    return FORBIDDEN if os.environ.get("GRADSTORE_SIMD") == "none" else _read(folder, prefix, interface)


@cache
def _read(folder: Path, prefix: str, interface: int) -> Library | str:
    built = [folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((str(path) for path in built if path.exists()), None)
    if path is None:
        return NOT_BUILT
    try:
        file = ctypes.CDLL(path)
        names, found = getattr(file, f"{prefix}_level"), getattr(file, f"{prefix}_interface")()
    except (OSError, AttributeError) as error:
        return f"it does not load: {error}"
    if found != interface:
        return f"it was built from another version of gradstore: interface {found}, not {interface}"
    names.restype = ctypes.c_char_p
    levels, flag, index = {}, ctypes.c_int(), 0
    while name := names(index, ctypes.byref(flag)):
        if flag.value:
            levels[name.decode()] = index
        index += 1
    return Library(file, path, levels)
