"""Exact kernels of a project: Gram matrices by contraction of Jacobian blocks, never holding n · c · p values."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import overload

import numpy as np

from gradstore.errors import UsageError
from gradstore.indices import RowChoice
from gradstore.kernels.definitions import REPRESENTATION, exact_kernel
from gradstore.kernels.exact.example_selection import Selection
from gradstore.kernels.exact.independent_rows import require_independent_rows
from gradstore.kernels.exact.jacobian_tiles import JacobianTiles
from gradstore.kernels.exact.representations import RepresentationTiles
from gradstore.kernels.gram_file import Report, write_tiles
from gradstore.kernels.gram_matrix import Gram
from gradstore.kernels.gram_tiles import Tile
from gradstore.machine.byte_counts import parse_bytes
from gradstore.machine.devices import full_float32
from gradstore.model.project import Project
from gradstore.store.files.disk import Disk


@overload
def exact_gram(
    project: Project,
    a: str = ...,
    b: str | None = ...,
    kernel: str = ...,
    *,
    rows_a: RowChoice | None = ...,
    rows_b: RowChoice | None = ...,
    out: None = ...,
    memory: int | str = ...,
    device: str = ...,
    layers: str | None = ...,
    progress: Report | None = ...,
    disk: Disk | None = ...,
) -> np.ndarray: ...


@overload
def exact_gram(
    project: Project,
    a: str = ...,
    b: str | None = ...,
    kernel: str = ...,
    *,
    rows_a: RowChoice | None = ...,
    rows_b: RowChoice | None = ...,
    out: str | os.PathLike[str],
    memory: int | str = ...,
    device: str = ...,
    layers: str | None = ...,
    progress: Report | None = ...,
    disk: Disk | None = ...,
) -> Gram: ...


def exact_gram(
    project: Project,
    a: str = "train",
    b: str | None = None,
    kernel: str = "trntk",
    *,
    rows_a: RowChoice | None = None,
    rows_b: RowChoice | None = None,
    out: str | os.PathLike[str] | None = None,
    memory: int | str = "2GB",
    device: str = "auto",
    layers: str | None = None,
    progress: Report | None = None,
    disk: Disk | None = None,
) -> np.ndarray | Gram:
    """The matrix of exact kernel values between the examples of two splits (Engel et al., ICLR 2024).

    Jacobian kernels are those of the logits in eval mode with respect to the project's parameters. Rows of `a` are held
    a group at a time in factored form while those of `b` are recomputed and pass by; every block of parameters adds its
    part to a tile. The larger the memory, the fewer times b's Jacobians are computed: once for each group.

    Args:
        project: model, weights and splits.
        a: split of the rows.
        b: split of the columns; None for `a` itself, which computes one half and mirrors it.
        kernel: "trntk" (eq. 5), "trntk0", "pntk" (eq. 6, with its 1/C), "pntk-cosine", "entk" ([n C, m C], the index of
            example i and class c being i C + c), "ck", "embedding" or "embedding-layerwise" (see `representations`).
        rows_a: rows of `a`, as indices in any order or a bool mask; default all.
        rows_b: rows of `b`; default all. Together with b = None, not allowed.
        out: HDF5 file to write the matrix to, continued by the same call where it was interrupted.
        memory: bytes, or text like "2GB", that factors, intermediate values and tiles may take beside model and data.
        device: "auto", "cpu", "cuda" or "cuda:<index>".
        layers: for "ck" the name of the final linear layer, by default found; for "embedding" a regular expression that
            the names of the modules match in full, by default every module without submodules that gives a tensor with
            a row an example.
        progress: called after every tile with the number of values known and of all values.
        disk: where the file goes; for tests.

    Returns:
        float64 [n, m], or the written file. Products are float32 and summed in float64: right to about 1e-6 of
        sqrt(κ(x, x) κ(x', x')).

    Raises:
        UsageError: an unknown kernel, split or row, or too little memory.
        ProjectError: the project is wrong, logits depend on other examples, or the final linear layer cannot be told.
        MismatchError: `out` is another matrix.
        NoSpaceError: the matrix does not fit the disk; said before anything is computed.
        NonFiniteError: a gradient is not finite, or zero where a cosine needs its direction; the row is named.

    Example:
        >>> values = gs.exact_gram(project, "train", "test", rows_a=[0, 1])
        >>> values.shape, values.dtype
        ((2, 8), dtype('float64'))
    """
    chosen = exact_kernel(kernel)
    if b is None and rows_b is not None:
        raise UsageError("rows of the second split without a second split", where="rows_b", hint="Name the split b")
    left = Selection.of(project, a, rows_a, "rows_a")
    right = left if b is None else Selection.of(project, b, rows_b, "rows_b")
    tiles: JacobianTiles | RepresentationTiles
    if kernel in REPRESENTATION:
        tiles = RepresentationTiles(project, left, right, chosen, parse_bytes(memory), device, layers)
    else:
        tiles = JacobianTiles(project, left, right, chosen, parse_bytes(memory), device)
    with full_float32(tiles.device):
        for selection in (left,) if right is left else (left, right):
            require_independent_rows(project, selection, tiles.device)
        if out is not None:
            return write_tiles(
                Path(out), tiles.shape, tiles.attributes(), tiles.tiles, dtype="float64", progress=progress, disk=disk
            )
        return _in_memory(tiles.tiles(), tiles.shape, left is right, progress)


def _in_memory(tiles: Iterator[Tile], shape: tuple[int, int], symmetric: bool, progress: Report | None) -> np.ndarray:
    found = np.empty(shape)
    done = 0
    for tile in tiles:
        rows, columns = tile.rows, tile.columns
        found[rows.start : rows.stop, columns.start : columns.stop] = tile.values
        done += tile.values.size
        if symmetric and rows != columns:
            found[columns.start : columns.stop, rows.start : rows.stop] = tile.values.T
            overlap = max(0, min(rows.stop, columns.stop) - max(rows.start, columns.start))
            done += tile.values.size - overlap**2
        del tile  # before the next one is made
        if progress is not None:
            progress(done, found.size)
    return found
