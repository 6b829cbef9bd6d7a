"""Byte counts as people write them."""

from __future__ import annotations

import re

from gradstore.errors import UsageError

PROMISED = 256 * 10**6
"""Bytes from which on a budget is kept, as is tested by measured peaks.

Below, plans are cut to the budget as well, and refused where they do not fit; but then what the C library keeps of
freed memory, tens of megabytes, is no small part of it."""
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


def parse_bytes(value: int | str) -> int:
    """Read a number of bytes: "2GB", "512 MiB", "1e9" or a plain number.

    Returns:
        Bytes; a budget of so many is kept from `PROMISED` up.

    Raises:
        UsageError: it is no positive number of bytes.
    """
    if isinstance(value, int):
        count = float(value)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]?i?b?)\s*", value, re.IGNORECASE)
        unit = match.group(2).upper() if match else "?"
        unit = unit if unit in _UNITS else unit + "B"
        if match is None or unit not in _UNITS:
            raise UsageError(
                "not a number of bytes", where="--memory", expected="for example 2GB or 512MiB", got=repr(value)
            )
        count = float(match.group(1)) * _UNITS[unit]
    if count < 1:
        raise UsageError("not a number of bytes", where="--memory", expected="at least 1", got=repr(value))
    return int(count)


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
