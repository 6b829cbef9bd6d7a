"""Named arrays and one text in a safetensors file, all under one digest: surrogates, and the index of a store.

The file is read as it stands, and nothing in it is believed that its form or its digest does not bear out: each array
lies inside the file, aligned, and together they are all of it. The digest finds accidents; whoever writes a file can
write one that agrees with itself, so what the text and the arrays say is for their reader to check.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.store.files.disk import Disk
from gradstore.store.schema import NEWEST, hash_of, raw

_DTYPES = {
    "BOOL": np.dtype(bool),
    **{f"{kind.upper()}{8 * size}": np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
}
_LONGEST_HEADER = 1 << 24
_DIGEST = "digest"


@dataclass(frozen=True)
class TensorFile:
    """What such a file holds.

    Attributes:
        text: what is said of the arrays.
        arrays: by name; views of one buffer.
        sealed: whether it has a digest, and then it is right; files of earlier versions may have none.
    """

    text: str
    arrays: Mapping[str, np.ndarray]
    sealed: bool


def under_digest(name: str, text: str, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The metadata to write with arrays: a text of that name, and the digest of all."""
    return {name: text, _DIGEST: _digest(text, arrays)}


def read_tensors(path: Path, name: str, most: int, disk: Disk | None = None) -> TensorFile:
    """Read a whole file, once, and copied nowhere.

    Args:
        path: the file.
        name: of its text.
        most: bytes that such a file may have.
        disk: where bytes come from.

    Returns:
        What it holds; bytes of the file are in memory.

    Raises:
        ValueError: it is no such file, or does not match its digest.
        MissingFileError: there is none.
        UnsafeError: a link, pipe or device stands in its place.
    """
    disk = disk or Disk()
    with disk.open(path) as fd:
        size = os.fstat(fd).st_size
        if not 8 <= size <= most:
            raise ValueError(f"{size} bytes where at most {most} are possible")
        content = np.empty(size, np.uint8)
        disk.read_into(fd, raw(content), 0, path)
    try:
        metadata, arrays = _parse(content)
        text = metadata[name]
        if set(metadata) - {name, _DIGEST} or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("other metadata")
        sealed = _DIGEST in metadata
        if sealed and metadata[_DIGEST] != _digest(text, arrays):
            raise ValueError("it does not match its digest")
        return TensorFile(text, arrays, sealed)
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"no {name} of a safetensors file") from error


def plain_json(text: str, depth: int = 8) -> Any:
    """Read a JSON value that is not nested deeper than `depth`.

    Returns:
        The value.

    Raises:
        ValueError: it is, or it is no JSON.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("values within values") from error
    _require_shallow(value, depth)
    return value


def _require_shallow(value: Any, depth: int) -> None:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if inner and depth == 0:
        raise ValueError("values within values")
    for item in inner:
        _require_shallow(item, depth - 1)


def _parse(content: np.ndarray) -> tuple[Mapping[str, Any], dict[str, np.ndarray]]:
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    if start > min(len(content), _LONGEST_HEADER):
        raise ValueError("no header")
    header = json.loads(content[8:start].tobytes().decode())
    metadata, arrays, at = header.pop("__metadata__"), {}, start
    for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        low, high = entry["data_offsets"]
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        sizes = all(isinstance(size, int) and size >= 0 for size in (low, high, *shape))
        if not sizes or start + low != at or high - low != math.prod(shape) * dtype.itemsize or at % dtype.itemsize:
            raise ValueError(f"the place of {name!r:.40}")
        at = start + high
        arrays[name] = content[start + low : at].view(dtype).reshape(shape)
    if at != len(content):
        raise ValueError("another length than its header says")
    return metadata, arrays


def _digest(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hash_of(NEWEST)()
    digest.update(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, str(array.dtype), list(array.shape)], sort_keys=True).encode())
        digest.update(raw(array) if array.size else b"")
    return digest.hexdigest()
