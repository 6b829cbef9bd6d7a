"""Byte counts as people write them."""

from __future__ import annotations

import operator
import re

from gradstore.errors import UsageError, shown

PROMISED = 256 * 10**6
"""Bytes from which on a budget is kept, as is tested by measured peaks.

Below, plans are cut to the budget as well, and refused where they do not fit; but then what the C library keeps of
freed memory, tens of megabytes, is no small part of it."""
AUTO = "auto"
"""The budget of which a command itself decides how large it is."""
_MOST = 10**18
# What glibc may keep at the end of a heap, of which each thread has one.
_KEPT = 64 << 20
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}


def parse_bytes(value: int | str, *, or_auto: bool = False) -> int:
    """Read a number of bytes: "2GB", "512 MiB", "1e9" or a plain number.

    Args:
        value: the number.
        or_auto: whether "auto" would have been an answer too, which the caller knows; for errors.

    Returns:
        Bytes; a budget of so many is kept from `PROMISED` up.

    Raises:
        UsageError: it is no positive number of bytes, or one that no machine has.
    """
    count = _count(value)
    if count is None or not 1 <= count <= _MOST:
        expected = "for example 2GB or 512MiB" if count is None else f"1 to {_MOST:.0e}"
        expected += f", or {AUTO}" if or_auto else ""
        raise UsageError("not a number of bytes", where="--memory", expected=expected, got=shown(value))
    return int(count)


def _count(value: object) -> float | None:
    """Bytes, any number of them, or None where it is none."""
    if not isinstance(value, str):
        return operator.index(value) if hasattr(value, "__index__") else None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]?i?b?)\s*", value, re.IGNORECASE | re.ASCII)
    unit = match.group(2).upper() if match else "?"
    unit = unit if unit in _UNITS else unit + "B"
    return float(match.group(1)) * _UNITS[unit] if match and unit in _UNITS else None


def spendable(memory: int, threads: int) -> int:
    """Tell how much of a budget a plan may count on, where pieces of many sizes are freed and had again.

    The rest is for what the C library keeps of freed memory, at the end of each thread's heap and between pieces.

    Args:
        memory: the budget.
        threads: that work beside the calling one.

    Returns:
        Bytes.
    """
    return memory - min(memory * 2 // 5, _KEPT * (1 + threads))


def budget_for(spent: int, threads: int) -> int:
    """The least budget of which so many bytes are `spendable`."""
    return min(-(-spent * 5 // 3) + 1, spent + _KEPT * (1 + threads))


def format_bytes(count: float) -> str:
    """Bytes for people, such as "1.50 GB", "20.5 MB", "3.1 kB" or "17 bytes"."""
    for unit, size, digits in (("TB", 1e12, 2), ("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{int(count)} bytes"
