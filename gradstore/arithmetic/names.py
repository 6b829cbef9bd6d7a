"""The arithmetics by the names that people choose them by: what help says of them, and what errors list.

Nothing but text, so that the command line prints its help without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradstore.errors import UsageError


@dataclass(frozen=True)
class Choice:
    """One thing to choose.

    Attributes:
        name: the same in Python, on the command line and in files.
        summary: when to choose it, a phrase for help; may be empty.
    """

    name: str
    summary: str = ""

    def __str__(self) -> str:
        """As help lists it."""
        return f"{self.name}, {self.summary}" if self.summary else self.name


FLOAT32 = Choice("float32")
BFLOAT16X2 = Choice(
    "bfloat16x2", "for processors with a matrix unit (AMX), as right as float16 features and faster than float32"
)
INT8_ROWS = Choice("int8", "about 1e-4 off, for processors without one")
INT8_DIGITS = Choice("int8")
BFLOAT16 = Choice("bfloat16", "for processors with a matrix unit (AMX)")
CUDA = Choice("cuda", "for a GPU")

ARITHMETICS = (
    Choice("auto", "which is bfloat16x2 where it can be used, and else float32"),
    FLOAT32,
    BFLOAT16X2,
    INT8_ROWS,
)
"""Of Gram matrices."""
ENGINES = (Choice("auto", "which measures"), FLOAT32, INT8_DIGITS, BFLOAT16, CUDA)
"""Of a search; its answers are the same by each."""


def require_one_of(choices: Sequence[Choice], name: str, where: str) -> None:
    """Refuse a name that is none of some choices.

    Args:
        choices: what there is.
        name: what was asked for.
        where: the option, such as "--engine".

    Raises:
        UsageError: lists them.
    """
    names = [choice.name for choice in choices]
    if name not in names:
        what = f"unknown {where.removeprefix('--')}"
        raise UsageError(what, where=where, expected=f"one of {', '.join(names)}", got=repr(name))
