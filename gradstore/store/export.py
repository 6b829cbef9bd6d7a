"""Export: a store's arrays as one `.npy` or `.safetensors` file, written a block at a time.

A file is a header, the features, and perhaps the small datasets one after another. A new format of that kind is one
function, and one line in `FORMATS`.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from gradstore.errors import UsageError
from gradstore.machine.byte_counts import parse_bytes
from gradstore.store.files.decoding import decoder
from gradstore.store.files.disk import Disk
from gradstore.store.files.output import write_output
from gradstore.store.files.target import target_of
from gradstore.store.files.tensor_header import tensor_header
from gradstore.store.rows import Rows
from gradstore.store.schema import raw


def export(store: Rows, path: str | os.PathLike[str], *, memory: int | str = "256MB", disk: Disk | None = None) -> Path:
    """Write the features of a store, or any `Rows`, as float32 to a file that other tools read.

    Args:
        store: a finished store; every row is checked against its digest.
        path: `FILE.npy` for the features [n, c, K] alone; `FILE.safetensors` for them and every small dataset.
        memory: bytes held while it is written.
        disk: where bytes go.

    Returns:
        the path. The file appears under its name whole, or not at all; one that exists is replaced. Absent rows keep
        their places, and are NaN; in a `.safetensors` file `absent` says why.

    Raises:
        UsageError: another ending, a place where no file can be written, or an unfinished store.
        CorruptError: a row does not match its digest.
        NoSpaceError: the disk has too little room; said before anything is written.
    """
    path = Path(path)
    target_of(path)  # said before anything is read
    layout = FORMATS.get(path.suffix)
    if layout is None:
        raise UsageError("unknown format", where=path, expected=f"a name that ends in {' or '.join(FORMATS)}")
    store.require_complete()
    rows = max(1, parse_bytes(memory) // (store.schema.row_bytes + 4 * store.schema.c * store.schema.K))
    header, small = layout(store)
    size = len(header) + _feature_bytes(store) + sum(array.nbytes for array in small.values())
    return write_output(path, _pieces(store, header, small, rows), size=size, disk=disk)


def _pieces(store: Rows, header: bytes, small: Mapping[str, np.ndarray], rows: int) -> Iterator[bytes | memoryview]:
    yield header
    decode = decoder(math.prod(store.shape))
    for _, block in store.blocks(rows):
        yield raw(decode(block["features"], block["scale"]))
    for array in small.values():
        yield raw(array)


def _small_arrays(store: Rows) -> dict[str, np.ndarray]:
    arrays = {
        "labels": store.labels,
        "logits": store.logits,
        "norms": store.norms,
        "rows": store.rows,
        "sq_norms": store.sq_norms,
    }
    if store.absent.any():
        arrays["absent"] = store.absent
    if store.poisoned is not None:
        arrays["poisoned"] = store.poisoned.astype(np.uint8)
    return arrays


def _feature_bytes(store: Rows) -> int:
    n, c, K = store.shape
    return 4 * n * c * K


def _npy(store: Rows) -> tuple[bytes, dict[str, np.ndarray]]:
    """The features alone."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": store.shape})
    return buffer.getvalue(), {}


def _safetensors(store: Rows) -> tuple[bytes, dict[str, np.ndarray]]:
    """The features, and every small dataset."""
    small = _small_arrays(store)
    shapes = {"features": ("float32", store.shape)}
    shapes.update({name: (str(array.dtype), array.shape) for name, array in small.items()})
    return tensor_header(shapes, {"fingerprint": store.fingerprint, "split": store.split}), small


FORMATS: dict[str, Callable[[Rows], tuple[bytes, dict[str, np.ndarray]]]] = {".npy": _npy, ".safetensors": _safetensors}
"""What each ending of a name stands for: the file's header, and the arrays that follow the features."""
