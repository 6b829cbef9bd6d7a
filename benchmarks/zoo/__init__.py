"""The zoo: small classifiers of ten classes, as libraries have them and as people write them by hand."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from .entry import Entry

SOURCES = {
    "hand": "hand_written",
    "transformers": "of_transformers",
    "torchvision": "of_torchvision",
    "timm": "of_timm",
}


def entries(source: str) -> tuple[Entry, ...]:
    """All models of one source; none where its library is not installed."""
    if source != "hand" and find_spec(source) is None:
        return ()
    found: tuple[Entry, ...] = import_module(f".{SOURCES[source]}", __name__).ENTRIES
    return found
