"""What happens to files that nobody trusts: strange values in their headers, and damage anywhere in their bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Place = tuple[Any, ...]


def places(value: Any, path: Place = ()) -> Iterator[Place]:
    """The path of every value in nested ones."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from places(item, (*path, name))


STRANGE = [
    *(-1, 0, 1, 2, 3, 7, 255, 4096, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**30, -(2**63)),
    *(
        None,
        True,
        False,
        "",
        "x",
        "../../etc/passwd",
        "\ud800",
        "\0",
        "a" * 5000,
        [],
        {},
        [[]],
        [1, 2],
        {"a": 1},
        1.5,
        1e308,
    ),
]


def with_strange_value(rng: np.random.Generator, content: dict[str, Any], spots: list[Place]) -> dict[str, Any]:
    content = json.loads(json.dumps(content))
    spot = spots[rng.integers(1, len(spots))]
    owner = content
    for name in spot[:-1]:
        owner = owner[name]
    if rng.random() < 0.15:
        del owner[spot[-1]]
    else:
        owner[spot[-1]] = STRANGE[rng.integers(len(STRANGE))]
    return content


def spliced(rng: np.random.Generator, data: bytes) -> bytes:
    a, b, c = sorted(int(x) for x in rng.integers(0, len(data), 3))
    kinds = (
        data[:a],
        data[:a] + data[b:],
        data[:b] + data[a:],
        data[:a] + rng.bytes(b - a) + data[b:],
        data[:a] + data[b:c] + data[a:b] + data[c:],
    )
    return kinds[rng.integers(len(kinds))]


def flipped(rng: np.random.Generator, data: bytes) -> bytes:
    """One bit, or up to eight, of the whole file or of its first 4 kB."""
    body = bytearray(data)
    end = len(body) if rng.random() < 0.5 else min(len(body), 4096)
    for _ in range(1 if rng.random() < 0.7 else 8):
        body[rng.integers(end)] ^= 1 << rng.integers(8)
    return bytes(body)


def with_strange_length(rng: np.random.Generator, data: bytes) -> bytes:
    """A number of 4 or 8 bytes, where one may stand for a size or a place, replaced by another."""
    size = int(rng.choice([4, 8]))
    at = int(rng.integers(0, max(1, min(len(data), 4096) - size))) // size * size
    value = int(rng.choice([0, 1, 255, 2**31 - 1, 2**31, 2**32 - 1])) if size == 4 else int(rng.integers(2**63))
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """A file flipped, cut, with parts moved, inserted, overwritten, or with other lengths; never the same."""
    while True:
        change = (flipped, flipped, spliced, with_strange_length)[rng.integers(4)](rng, data)
        if change != data:
            return change


def endless(path: Path) -> None:
    """A link to a device without end in the place of a file."""
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    """A terabyte of which nothing is on the medium."""
    path.touch()
    os.truncate(path, 1 << 40)
