"""Factory strings of FAISS that are known to work here: for some, FAISS itself ends the process or never answers."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from gradstore.errors import UsageError
from gradstore.store.files.confined import answer_of

# IndexRaBitQFastScan returns wrong neighbours without an error from this many dimensions on (faiss 1.15.1).
_FAST_SCAN_LIMIT = 4096
_LONGEST = 200
_TRIAL = Path(__file__).with_name("factory_trial.py")
_MEMORY, _SECONDS = 32 << 30, 20


def require_sound(factory: str, width: int) -> None:
    """Refuse a string of which FAISS makes no working index; tried once a process, in another one.

    Args:
        factory: a FAISS factory string.
        width: dimensions of the vectors.

    Raises:
        UsageError: FAISS refuses it; or an index of a few random vectors crashes, hangs, takes more than 3 GB or writes
            a file; or its answers would be wrong at this width.
    """
    if not 0 < len(factory) <= _LONGEST or not factory.isascii() or not factory.isprintable():
        _refuse(factory, f"at most {_LONGEST} plain characters")
    if "rabitqfs" in factory.lower() and width >= _FAST_SCAN_LIMIT:
        raise UsageError(
            "this FAISS index returns wrong neighbours at so many dimensions",
            where="--faiss",
            expected=f"RaBitQ, or fewer than {_FAST_SCAN_LIMIT} dimensions",
            got=f"{factory}, {width} dimensions",
        )
    against = _tried(factory, width)
    if against:
        _refuse(factory, got=against)


@lru_cache(maxsize=256)
def _tried(factory: str, width: int) -> str:
    found: Any = answer_of(_TRIAL, str(width), factory, memory=_MEMORY, seconds=_SECONDS)
    return found if isinstance(found, str) else "an answer that is none"


def refuse_with(factory: str, error: Exception) -> NoReturn:
    """Refuse where FAISS says something only with the store's own vectors, such as that they are too few."""
    lines = str(error).strip().splitlines()
    _refuse(factory, got=lines[-1].strip() if lines else type(error).__name__)


def _refuse(factory: str, expected: str | None = None, got: str | None = None) -> NoReturn:
    shown = repr(factory if len(factory) <= 60 else factory[:57] + "…")
    raise UsageError(
        "FAISS refuses this index",
        where="--faiss",
        expected=expected,
        got=shown if got is None else f"{shown}: {got}",
        hint="IVF256,Flat and HNSW32 are such strings",
    ) from None
