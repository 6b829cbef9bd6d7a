"""The kinds of projection: which entries P has. The one list of them.

A new kind is a module of its name beside this one, whose `KIND` says everything that is particular to it (see `Kind`),
and one line below. This module imports no torch, so that the command line can name the kinds without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from gradstore.errors import UsageError

if TYPE_CHECKING:
    from gradstore.projection.kind_record import Kind

KINDS = {  # by name: what the entries are, for people
    "rademacher": "+1 and -1",
    "gaussian": "standard normal",
    "sjlt": "one ±32 in each column and 1024 rows, sparse",
}
DEFAULT = "rademacher"
BY_DEVICE = "auto"  # no kind: `kind_choice.chosen_kind` picks one


def kind_of(name: str) -> Kind:
    """Look up a kind by name.

    Returns:
        Its record.

    Raises:
        UsageError: there is none of this name; lists those there are.
    """
    if name not in tuple(KINDS):
        raise UsageError("unknown kind", where="kind", expected="one of " + ", ".join(KINDS), got=repr(name))
    kind: Kind = import_module(f"{__package__}.{name}").KIND
    return kind
