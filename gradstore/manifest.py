"""`store.json`: what a store is, which shards it has, and a digest over itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gradstore.disk import Disk
from gradstore.errors import CorruptError, UsageError
from gradstore.schema import BULK, DTYPES, FORMAT, FORMAT_VERSION, Schema

MANIFEST = "store.json"
MANIFEST_LIMIT = 64 << 20


@dataclass(frozen=True)
class Shard:
    """One published feature file.

    Attributes:
        index: place in the store; the file is `shard-<index>.h5`.
        rows: number of rows.
        size: bytes of the file.
        offsets: first byte of each dataset.
        header: SHA-256 of every byte outside the datasets.
        columns: SHA-256 of each small dataset as a whole, so that one column can be read and checked by itself;
            `digest` among them, which in turn covers every byte of every row.
    """

    index: int
    rows: int
    size: int
    offsets: Mapping[str, int]
    header: str
    columns: Mapping[str, str]

    @property
    def file(self) -> str:
        """File name; never read from the manifest, so that a manifest cannot name another file."""
        return f"shard-{self.index:05d}.h5"


@dataclass(frozen=True)
class Manifest:
    """The whole of `store.json`.

    Attributes:
        identity: what must agree before rows may be mixed (see `gradstore.fingerprint`).
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

    @property
    def missing(self) -> tuple[int, ...]:
        """Indices of the shards that are not published yet."""
        present = {shard.index for shard in self.shards}
        return tuple(i for i in range(self.shard_count) if i not in present)

    def rows_of(self, index: int) -> range:
        """Rows that shard `index` covers."""
        start = index * self.shard_rows
        return range(start, min(start + self.shard_rows, self.n))

    def with_shard(self, shard: Shard) -> Manifest:
        """The manifest after `shard` is published, in place of an earlier one of the same index."""
        others = [other for other in self.shards if other.index != shard.index]
        return replace(self, shards=tuple(sorted([*others, shard], key=lambda s: s.index)))

    def to_bytes(self) -> bytes:
        """Deterministic JSON that ends with its own digest."""
        content = {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        return _dump({**content, "digest": _digest(content)})


def read_manifest(path: Path, disk: Disk) -> Manifest:
    """The manifest of the store at `path`.

    Raises:
        UsageError: there is no store.
        CorruptError: the manifest is damaged or of another version.
    """
    file = path / MANIFEST
    try:
        data = disk.read_file(file, MANIFEST_LIMIT)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            "this is not a gradstore store", where=path, expected=f"a directory with {MANIFEST}", hint=_what_is_there(path)
        ) from None
    except OSError as error:
        raise CorruptError("the manifest cannot be read", where=file, got=error.strerror) from error
    return _parse(data, file)


def write_manifest(path: Path, manifest: Manifest, disk: Disk) -> None:
    """Replace the manifest atomically and durably."""
    disk.replace_file(path / MANIFEST, manifest.to_bytes())


def _parse(data: bytes, file: Path) -> Manifest:
    try:
        content = json.loads(data)
        digest = content.pop("digest")
        matches = digest == _digest(content) and data == _dump({**content, "digest": digest})
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CorruptError("the manifest is not what was written", where=file, hint=_RESTORE) from error
    if not matches:
        raise CorruptError("the manifest does not match its digest", where=file, hint=_RESTORE)
    if (content.get("format"), content.get("version")) != (FORMAT, FORMAT_VERSION):
        raise CorruptError(
            "this format version cannot be read",
            where=file,
            expected=f"{FORMAT} {FORMAT_VERSION}",
            got=f"{content.get('format')} {content.get('version')}",
            hint="Use the gradstore release that wrote it",
        )
    try:
        return _validated(content)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError("the manifest has a field that cannot be", where=file, got=error, hint=_RESTORE) from error


_RESTORE = "Restore the file from a copy, or featurize into a new directory"


def _validated(content: dict[str, Any]) -> Manifest:
    """Build the manifest, checking each number that later becomes a position, a size or a loop bound."""
    schema = dict(content["schema"])
    schema["preview"] = tuple(_natural(size, "preview") for size in schema["preview"])
    for name in ("c", "K", "classes"):
        _natural(schema[name], name, 1)
    if schema["dtype"] not in DTYPES or not isinstance(schema["truth"], bool):
        raise ValueError(f"dtype {schema['dtype']!r}, truth {schema['truth']!r}")
    shards = tuple(Shard(**shard) for shard in content["shards"])
    manifest = Manifest(
        identity=dict(content["identity"]),
        fingerprint=str(content["fingerprint"]),
        schema=Schema(**schema),
        n=_natural(content["n"], "n", 1),
        shard_rows=_natural(content["shard_rows"], "shard_rows", 1),
        group=_natural(content["group"], "group", 1),
        split=str(content["split"]),
        classes=tuple(str(name) for name in content["classes"]),
        preview=str(content["preview"]),
        shards=shards,
    )
    if len(manifest.classes) != manifest.schema.classes:
        raise ValueError(f"{len(manifest.classes)} class names for {manifest.schema.classes} classes")
    last = -1
    for shard in shards:
        _check_shard(manifest, shard, last)
        last = shard.index
    return manifest


def _check_shard(manifest: Manifest, shard: Shard, last: int) -> None:
    """Each dataset lies inside the file, and no two overlap."""
    if not last < _natural(shard.index, "shard index") < manifest.shard_count:
        raise ValueError(f"shard {shard.index} out of order")
    if shard.rows != len(manifest.rows_of(shard.index)):
        raise ValueError(f"shard {shard.index} has {shard.rows} rows")
    columns = manifest.schema.columns
    names = {column.name for column in columns}
    if set(shard.offsets) != names or set(shard.columns) != names - set(BULK):
        raise ValueError(f"datasets of shard {shard.index}")
    extents = sorted((_natural(shard.offsets[col.name], "offset"), shard.rows * col.row_bytes) for col in columns)
    end = 0
    for offset, size in extents:
        if offset < end:
            raise ValueError(f"overlapping datasets in shard {shard.index}")
        end = offset + size
    if end > _natural(shard.size, "size"):
        raise ValueError(f"shard {shard.index} is smaller than its datasets")


def _natural(value: object, name: str, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 62:
        raise ValueError(f"{name} = {value!r}")
    return value


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dump(content)).hexdigest()


def _what_is_there(path: Path) -> str:
    if not path.exists():
        return "Nothing exists at this path"
    if not path.is_dir():
        return "It is a file"
    names = sorted(child.name for child in path.iterdir())[:5]
    return "It contains " + (", ".join(names) if names else "nothing")
