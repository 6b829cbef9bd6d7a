"""Reading and writing `store.json`; what is read was perhaps written by someone else, so every field is checked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from gradstore.errors import CorruptError, UsageError
from gradstore.store.files.disk import Disk, MissingFileError
from gradstore.store.files.journal import DAMAGED, JOURNAL, RESTORE, Journal, read_journal, remove_journal
from gradstore.store.files.layout import gaps
from gradstore.store.files.manifest import MANIFEST, Manifest, Shard
from gradstore.store.identity import fingerprint_of
from gradstore.store.schema import BULK, DTYPES, FORMAT, LAYOUTS, ONE_ROW, VERSIONS, Schema

# Bounds on what one manifest may make gradstore hold. 100,000 shards are some 100 MB on the disk; to read them takes
# 2 seconds of one core, and 430 MB meanwhile (`benchmarks/bench_shards.py`).
FILE_BYTES = 192 << 20
"""Bytes that `store.json` may have, and `store.journal`."""
_CONTAINERS = 1_000_000
_SHARDS = 100_000
_ROW_BYTES = 1 << 30
_NUMBER = 1 << 56
_DEPTH = 8

_TAIL = re.compile(rb',\n "digest": "([0-9a-f]{64})"\n\}\n\Z')
_TAIL_BYTES = 82
_HEX64 = re.compile(r"[0-9a-f]{64}\Z")
_STRANGE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)  # what strange values raise
_RESTORE = "Restore the file from a copy, or featurize into a new directory"


def read_manifest(path: Path, disk: Disk) -> Manifest:
    """Read the manifest of the store at `path`, with what its journal adds.

    Returns:
        The manifest; its numbers can be relied on.

    Raises:
        UsageError: there is no store.
        CorruptError: the manifest or the journal is damaged, of another version, or says what cannot be.
        UnsafeError: one is a symbolic link or no regular file.
    """
    file = path / MANIFEST
    try:
        journal = read_journal(path, disk, FILE_BYTES)  # first: see there
        data = disk.read_file(file, FILE_BYTES)
    except MissingFileError:
        _refuse_no_store(path)
    except UsageError:
        if path.is_dir():
            raise
        _refuse_no_store(path)
    manifest = parse_manifest(data, file)
    return _with_entries(manifest, journal.entries, path) if journal.manifest == _digest_in(data) else manifest


def write_manifest(path: Path, manifest: Manifest, disk: Disk) -> Journal:
    """Replace the manifest, and what was added to the one before, atomically and durably.

    Returns:
        Its journal, which is empty, and to which the shards that are published from now on may be added.
    """
    data = manifest.to_bytes()
    disk.replace_file(path / MANIFEST, data)
    remove_journal(path, disk)
    return Journal(path, _digest_in(data), disk)


def require_storable(texts: Iterable[str], *, where: str) -> None:
    """Refuse names that could be written but not read again.

    Raises:
        UsageError: one is longer than 4096 bytes, or no text that UTF-8 has.
    """
    for text in texts:
        try:
            _text(text, "a name")
        except ValueError:
            raise UsageError(
                "a name cannot be stored", where=where, expected="at most 4096 bytes of UTF-8", got=repr(text)[:60]
            ) from None


def parse_manifest(data: bytes, file: Path) -> Manifest:
    """Read a manifest from its bytes; `file` is for messages.

    Returns:
        The manifest; its numbers can be relied on.

    Raises:
        CorruptError: the bytes do not match their digest, are of another version, or say what cannot be.
    """
    tail = _tail(data)
    if tail is None or hashlib.sha256(memoryview(data)[: tail.start()]).hexdigest().encode() != tail.group(1):
        raise CorruptError(
            "the manifest is not what was written: it does not match its digest", where=file, hint=_RESTORE
        )
    try:
        content = _loads(data)
        _require_version(content, file)
        return _manifest(content)
    except _STRANGE as error:
        raise CorruptError("the manifest says what cannot be", where=file, got=_clause(error), hint=_RESTORE) from error


def _with_entries(manifest: Manifest, entries: Iterable[bytes], path: Path) -> Manifest:
    """The manifest after its journal, of whose entries the last one of a shard counts."""
    shards, shard = {shard.index: shard for shard in manifest.shards}, None
    try:
        for entry in entries:
            shard = _shard(manifest, _loads(entry), -1, shard)
            shards[shard.index] = shard
    except _STRANGE as error:
        raise CorruptError(DAMAGED, where=path / JOURNAL, got=_clause(error), hint=RESTORE) from error
    return replace(manifest, shards=tuple(shards[index] for index in sorted(shards)))


def _tail(data: bytes) -> re.Match[bytes] | None:
    return _TAIL.search(data, len(data) - _TAIL_BYTES)


def _digest_in(data: bytes) -> str:
    tail = _tail(data)
    return "" if tail is None else tail[1].decode()


def _loads(data: bytes) -> dict[str, Any]:
    if data.count(b"{") + data.count(b"[") > _CONTAINERS:
        raise ValueError("too many values")
    return json.loads(data, object_pairs_hook=_no_duplicates, parse_float=_refuse, parse_constant=_refuse)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name that occurs twice")
    return content


def _refuse(number: str) -> NoReturn:
    raise ValueError(f"the number {number[:20]}")


def _require_version(content: Mapping[str, Any], file: Path) -> None:
    if content["format"] != FORMAT or content["version"] not in VERSIONS:
        raise CorruptError(
            "this format version cannot be read",
            where=file,
            expected=f"{FORMAT} {' or '.join(map(str, VERSIONS))}",
            got=f"{str(content['format'])[:20]} {str(content['version'])[:20]}",
            hint="Use the gradstore release that wrote it",
        )
    _natural(content["version"], "version")


def _manifest(content: dict[str, Any]) -> Manifest:
    """Build the manifest, checking each number that later becomes a position, a size or a loop bound."""
    names = {"format", "version", "digest", "identity", "fingerprint", "schema", "n", "shard_rows", "group"}
    _require_names(content, names | {"split", "classes", "preview", "shards"}, "the manifest", {"removed"})
    manifest = Manifest(
        identity=content["identity"],
        fingerprint=_text(content["fingerprint"], "fingerprint"),
        schema=_schema(content["schema"], content["version"]),
        n=_natural(content["n"], "n", 1),
        shard_rows=_natural(content["shard_rows"], "shard_rows", 1),
        group=_natural(content["group"], "group", 1),
        split=_text(content["split"], "split"),
        classes=tuple(_text(name, "class name") for name in _listed(content["classes"], "classes")),
        preview=_text(content["preview"], "preview"),
    )
    _check_identity(manifest)
    manifest = replace(manifest, removed=_spans(content.get("removed", []), manifest))
    if len(manifest.classes) != manifest.schema.classes:
        raise ValueError(f"{len(manifest.classes)} class names for {manifest.schema.classes} classes")
    if manifest.shard_count > _SHARDS:
        raise ValueError(f"{manifest.shard_count} shards")
    shards: list[Shard] = []
    for entry in _listed(content["shards"], "shards"):
        before = shards[-1] if shards else None
        shards.append(_shard(manifest, entry, -1 if before is None else before.index, before))
    return replace(manifest, shards=tuple(shards))


def _spans(content: Any, manifest: Manifest) -> tuple[tuple[int, int], ...]:
    """Stretches of rows, in order and apart from one another."""
    spans, last = [], -1
    for entry in _listed(content, "removed"):
        first, stop = (_natural(row, "removed row", 0, manifest.n + 1) for row in _listed(entry, "removed"))
        if not last < first < stop:
            raise ValueError("removed rows out of order")
        spans.append((first, stop))
        last = stop
    if spans and not manifest.schema.has_inputs:
        raise ValueError("removed rows in a version that has none")
    return tuple(spans)


def _schema(content: Any, version: int) -> Schema:
    _require_names(content, {"c", "K", "classes", "dtype", "preview", "truth"}, "schema")
    schema = Schema(
        c=_natural(content["c"], "c", 1),
        K=_natural(content["K"], "K", 1),
        classes=_natural(content["classes"], "classes", 1),
        dtype=_choice(content["dtype"], DTYPES),
        preview=tuple(_natural(size, "preview", 1) for size in _listed(content["preview"], "preview")),
        truth=content["truth"],
        version=version,
    )
    if not isinstance(schema.truth, bool) or len(schema.preview) > 3 or schema.row_bytes > _ROW_BYTES:
        raise ValueError(f"rows of {schema.row_bytes} bytes, truth {schema.truth!r}")
    return schema


def _check_identity(manifest: Manifest) -> None:
    """What later code reads of the identity is there, and agrees with the schema."""
    identity, schema = manifest.identity, manifest.schema
    _check_plain(identity)
    projection, parameters = identity["projection"], identity["parameters"]
    _text(projection["kind"], "projection kind")
    _natural(projection["seed"], "seed", 0, 1 << 64)
    _natural(projection["version"], "projection version", 1)
    _natural(parameters["count"], "parameters")
    _listed(parameters["blocks"], "parameters")
    agreed = {
        "K": (projection["K"], schema.K),
        "classes": (identity["classes"], schema.classes),
        "dtype": (identity["dtype"], schema.dtype),
        "class axis": (schema.c, 1 if _choice(identity["layout"], LAYOUTS) in ONE_ROW else schema.classes),
        "length": (identity["data"]["length"], manifest.n),
        "fingerprint": (manifest.fingerprint, fingerprint_of(identity)),
    }
    for name, (said, meant) in agreed.items():
        if said != meant:
            raise ValueError(f"{name} {str(said)[:40]} beside {str(meant)[:40]}")


def _check_plain(value: Any, depth: int = 0) -> None:
    """Nothing but text, integers, lists and named values, not too deep."""
    if depth > _DEPTH:
        raise ValueError("values within values")
    if isinstance(value, str):
        _text(value, "text")
    elif isinstance(value, dict):
        for name, item in value.items():
            _text(name, "name")
            _check_plain(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, depth + 1)
    elif not isinstance(value, (int, bool)):
        raise ValueError(f"a {type(value).__name__}")


def _shard(manifest: Manifest, content: Any, last: int, like: Shard | None) -> Shard:
    """One entry: in order, each dataset inside the file, and no two overlapping.

    Args:
        manifest: what the store is.
        content: the entry, as JSON has it.
        last: index below which it may not be.
        like: another shard, already checked: most have the same places, which are then checked once, and held once.

    Returns:
        The shard.

    Raises:
        ValueError: it says what cannot be, as do KeyError, TypeError and AttributeError.
    """
    _require_names(
        content, {"index", "rows", "size", "offsets", "header", "columns"}, "a shard", {"revision", "computation"}
    )
    index = _natural(content["index"], "shard index")
    if not last < index < manifest.shard_count:
        raise ValueError(f"shard {index} out of order")
    rows, size = _natural(content["rows"], "rows", 1), _natural(content["size"], "size", 1)
    if rows != len(manifest.rows_of(index)):
        raise ValueError(f"shard {index} has {rows} rows")
    alike = like is not None and (rows, size, content["offsets"]) == (like.rows, like.size, like.offsets)
    offsets = like.offsets if like is not None and alike else _offsets(manifest.schema, content["offsets"], rows, size)
    columns = content["columns"]
    if like is None or not isinstance(columns, dict) or columns.keys() != like.columns.keys():
        names = {column.name for column in manifest.schema.columns if column.name not in BULK}
        _require_names(columns, names, f"the columns of shard {index}")
    if not all(map(_HEX64.match, columns.values())):
        raise ValueError("a digest that is none")
    revision, computation = (_natural(content.get(name, 0), name) for name in ("revision", "computation"))
    return Shard(index, rows, size, offsets, _hex(content["header"]), columns, revision, computation)


def _offsets(schema: Schema, content: Any, rows: int, size: int) -> dict[str, int]:
    _require_names(content, {column.name for column in schema.columns}, "the offsets of a shard")
    offsets = {name: _natural(offset, "offset") for name, offset in content.items()}
    if any(start > stop for start, stop in gaps(schema.columns, rows, offsets, size)):
        raise ValueError("datasets of a shard overlap or leave the file")
    return offsets


def _require_names(content: Any, names: set[str], where: str, perhaps: Set[str] = frozenset()) -> None:
    if not isinstance(content, dict) or set(content) - perhaps != names:
        raise ValueError(f"other fields in {where}")


def _listed(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is no list")
    return value


def _natural(value: Any, name: str, least: int = 0, stop: int = _NUMBER) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < stop:
        raise ValueError(f"{name} = {str(value)[:24]}" if not isinstance(value, int) else f"{name} out of range")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or len(value.encode()) > 4096:  # encode() refuses lone surrogates
        raise ValueError(f"{name} is no short text")
    return value


def _choice(value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{str(value)[:24]} is none of {', '.join(choices)}")
    return str(value)


def _hex(value: Any) -> str:
    if not isinstance(value, str) or not _HEX64.match(value):
        raise ValueError("a digest that is none")
    return value


def _clause(error: Exception) -> str:
    return (
        f"no {error}"
        if isinstance(error, KeyError)
        else str(error).splitlines()[0][:100]
        if str(error)
        else type(error).__name__
    )


def _refuse_no_store(path: Path) -> NoReturn:
    expected = f"a directory with {MANIFEST}"
    raise UsageError(
        "this is not a gradstore store", where=path, expected=expected, hint=_what_is_there(path)
    ) from None


def _what_is_there(path: Path) -> str:
    if not path.exists():
        return "Nothing exists at this path"
    if not path.is_dir():
        return "It is a file"
    names = sorted(child.name for child in path.iterdir())[:5]
    return "It contains " + (", ".join(names) if names else "nothing")
