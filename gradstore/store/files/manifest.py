"""`store.json`: what a store is, which shards it has, and a digest over itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from gradstore.store.files.layout import ShardLayout, shard_layout
from gradstore.store.schema import FORMAT, Schema

MANIFEST = "store.json"


@dataclass(frozen=True)
class Shard:
    """One published feature file.

    Attributes:
        index: place in the store.
        rows: number of rows.
        size: bytes of the file.
        offsets: first byte of each dataset.
        header: SHA-256 of every byte outside the datasets.
        columns: digest of each small dataset as a whole, so that one column can be read and checked by itself;
            `digest` among them, which in turn covers every byte of every row.
    """

    index: int
    rows: int
    size: int
    offsets: Mapping[str, int]
    header: str
    columns: Mapping[str, str]

    @cached_property
    def line(self) -> str:
        """This shard as one line of JSON; kept, since the manifest is written again after every shard."""
        return json.dumps({f.name: getattr(self, f.name) for f in fields(self)}, sort_keys=True)


@dataclass(frozen=True)
class Manifest:
    """The whole of `store.json`.

    Attributes:
        identity: what must agree before rows may be mixed (see `gradstore.store.identity`).
        fingerprint: digest of the identity without the data.
        schema: shape of a row.
        n: rows of the split.
        shard_rows: rows of a full shard.
        group: rows that are always computed together, which fixes their bits.
        split: name of the split.
        classes: names of the classes.
        preview: "image", "text" or "".
        shards: published shards in ascending order.
    """

    identity: Mapping[str, Any]
    fingerprint: str
    schema: Schema
    n: int
    shard_rows: int
    group: int
    split: str
    classes: tuple[str, ...]
    preview: str = ""
    shards: tuple[Shard, ...] = field(default=())

    @property
    def shard_count(self) -> int:
        """Shards of the finished store."""
        return -(-self.n // self.shard_rows)

    @cached_property
    def missing(self) -> tuple[int, ...]:
        """Indices of the shards that are not published yet."""
        present = {shard.index for shard in self.shards}
        return tuple(i for i in range(self.shard_count) if i not in present)

    def rows_of(self, index: int) -> range:
        """Rows that shard `index` covers."""
        start = index * self.shard_rows
        return range(start, min(start + self.shard_rows, self.n))

    def file_of(self, index: int) -> str:
        """Name the file of a shard; never read from the manifest, so that a manifest cannot name another file.

        Returns:
            Such as `shard-00003.h5`; of a last shard that is not full it carries the number of rows, so that appending
            replaces no file under a reader.
        """
        rows = len(self.rows_of(index))
        return f"shard-{index:05d}.h5" if rows == self.shard_rows else short_name(index, rows)

    def layout_of(self, index: int) -> ShardLayout:
        """The layout that this version of HDF5 gives shard `index`."""
        return shard_layout(self.schema, len(self.rows_of(index)), self.fingerprint, self.split)

    def with_shard(self, shard: Shard) -> Manifest:
        """The manifest after `shard` is published, in place of an earlier one of the same index."""
        others = [other for other in self.shards if other.index != shard.index]
        return replace(self, shards=tuple(sorted([*others, shard], key=lambda s: s.index)))

    def without(self, indices: set[int]) -> Manifest:
        """The manifest in which some shards are missing."""
        return replace(self, shards=tuple(shard for shard in self.shards if shard.index not in indices))

    def to_bytes(self) -> bytes:
        """Deterministic JSON, one field or shard a line, that ends with the SHA-256 of all that comes before."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("schema", "shards")}
        schema = asdict(self.schema)
        content.update(format=FORMAT, version=schema.pop("version"), schema=schema)
        head = "".join(f' "{name}": {json.dumps(content[name], sort_keys=True)},\n' for name in sorted(content))
        lines = ",\n  ".join(shard.line for shard in self.shards)
        body = f'{{\n{head} "shards": [\n  {lines}\n ]'
        return (body + f',\n "digest": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n').encode()


def short_name(index: int, rows: int) -> str:
    """File name of a last shard that is not full."""
    return f"shard-{index:05d}-{rows}.h5"
