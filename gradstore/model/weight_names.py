"""Names of a checkpoint's tensors as the model has them: what wrappers put in front of names is removed.

`DataParallel` and `DistributedDataParallel` put `module.` in front of every name, `torch.compile` `_orig_mod.` where it
was called, and a Lightning module the name of the attribute that holds the model, mostly `model.`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

_COMPILED = re.compile(r"(^|\.)_orig_mod\.")


@dataclass(frozen=True)
class Renaming:
    """What the tensors of a checkpoint are called.

    Attributes:
        names: name in the checkpoint -> name in the model.
        removed: the parts that were removed; empty where the names are as they were.
    """

    names: dict[str, str]
    removed: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A clause for a person; empty where nothing was removed."""
        return f", without {' and '.join(map(repr, self.removed))} in their names" if self.removed else ""


def renamed(given: Iterable[str], own: Iterable[str]) -> Renaming:
    """Remove from a checkpoint's names what wrappers put there, where they then fit the model.

    Args:
        given: names in the checkpoint.
        own: names in the model.

    Returns:
        Of all that can be removed, the least by which most names are the model's: all, where they fit it; where they
        do not, an error can name the few that are in the way.
    """
    known = set(own)
    return max(_tries(list(given)), key=lambda found: len(known & set(found.names.values())))


def _tries(given: list[str]) -> Iterator[Renaming]:
    """As they are; without what `torch.compile` adds; and without one leading part after another that all share."""
    yield (found := Renaming({name: name for name in given}))
    found = _next(found, lambda name: _COMPILED.sub(r"\1", name), "_orig_mod.")
    while True:
        if found.removed:
            yield found
        firsts = {name.partition(".")[0] for name in found.names.values() if "." in name}
        if len(firsts) != 1 or not all("." in name for name in found.names.values()):
            return
        found = _next(found, lambda name: name.partition(".")[2], f"{firsts.pop()}.")


def _next(found: Renaming, shorten: Callable[[str], str], removed: str) -> Renaming:
    """One more part removed; nothing, where that changes no name or makes two of them one."""
    names = {name: shorten(last) for name, last in found.names.items()}
    if names == found.names or len(set(names.values())) < len(names):
        return found
    return Renaming(names, (*found.removed, removed))
