"""Numbers and foreign text as a page prints them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable

from gradstore.report.views import Explanation, VoteCount

LONGEST = 600
"""Characters of a text example that a page shows."""

_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = {"\u200c", "\u200d"}


def visible(value: str) -> str:
    """Replace every character that could hide or reorder text, or that UTF-8 cannot carry.

    Control and format characters (escape, null, bidirectional overrides), line separators and lone surrogates become
    U+FFFD. Line feeds, tabs, and the joiners that scripts and emoji need, stay.

    Returns:
        `value` without them.
    """
    if value.isascii() and value.isprintable():
        return value
    return "".join(map(_visible_character, value))


def _visible_character(character: str) -> str:
    harmless = character in "\n\t" or character in _JOINERS or unicodedata.category(character) not in _INVISIBLE
    return character if harmless else "\ufffd"


def shortened(value: str) -> str:
    """The first `LONGEST` characters, with an ellipsis where something was left out."""
    return value if len(value) <= LONGEST else value[: LONGEST - 1].rstrip() + "…"


def thousands(number: int) -> str:
    """`1347` as `1,347`."""
    return f"{number:,}"


def count(number: int, one: str, many: str) -> str:
    """`1 query`, `12 queries`."""
    return f"{number:,} {one if number == 1 else many}"


def similarity(value: float) -> str:
    """Three decimals where a kernel is normalised, four significant digits where it is not."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def error_of(standard_error: float, value: float) -> str:
    """A standard error in the precision of the value it belongs to."""
    return f"{standard_error:.3f}" if abs(value) < 10 else f"{standard_error:.2g}"


def scale(explanations: Iterable[Explanation]) -> float:
    """Similarity that a full bar stands for: 1, or the largest shown where a kernel is not normalised."""
    shown = [abs(near.similarity) for item in explanations for near in item.neighbours]
    return max([1.0, *(value for value in shown if math.isfinite(value))])


def tallest(histogram: Iterable[VoteCount]) -> int:
    """Queries that a full bar of a histogram stands for."""
    return max((bar.clean + bar.poisoned for bar in histogram), default=1) or 1


def width(value: float, full: float) -> str:
    """Length of a bar in per cent of its track; nothing for negative values and for what is not a number."""
    share = value / full if math.isfinite(value) else 0.0
    return f"{100 * min(max(share, 0.0), 1.0):.2f}"
