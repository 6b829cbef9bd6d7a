"""Gram matrices of stores, larger than memory: tiles by chunked matrix products, to an iterator or to a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import overload

import numpy as np
import torch

from gradstore.arithmetic.chooser import choose_arithmetic, runs_on_gpu
from gradstore.arithmetic.product import Operand, multiply
from gradstore.kernels.definitions import Kernel, projected_kernel
from gradstore.kernels.feature_map import FeatureMap, require_served
from gradstore.kernels.gram_file import Report, write_tiles
from gradstore.kernels.gram_matrix import Gram
from gradstore.kernels.gram_tiles import Grid, Skip, Tile, nothing, plan_grid
from gradstore.machine.byte_counts import parse_bytes
from gradstore.machine.devices import choose_device, full_float32
from gradstore.machine.threads import Workers, worker_count
from gradstore.store.files.disk import Disk
from gradstore.store.present_rows import present_rows
from gradstore.store.rows import Rows, require_comparable

# What a worker reads at a time, and what it converts at a time: little enough for the second-level cache of a core.
_STRIP_BYTES = 4 << 20
_CACHED_BYTES = 3 << 20
# Bytes that converting one feature takes beside what is read: three float32 arrays.
_VALUE_BYTES = 12


@overload
def gram(
    a: Rows,
    b: Rows | None = ...,
    kernel: str = ...,
    *,
    out: None = ...,
    memory: int | str = ...,
    arithmetic: str = ...,
    device: str = ...,
    progress: Report | None = ...,
    disk: Disk | None = ...,
) -> Iterator[Tile]: ...


@overload
def gram(
    a: Rows,
    b: Rows | None = ...,
    kernel: str = ...,
    *,
    out: str | os.PathLike[str],
    memory: int | str = ...,
    arithmetic: str = ...,
    device: str = ...,
    progress: Report | None = ...,
    disk: Disk | None = ...,
) -> Gram: ...


def gram(
    a: Rows,
    b: Rows | None = None,
    kernel: str = "proj-trntk",
    *,
    out: str | os.PathLike[str] | None = None,
    memory: int | str = "2GB",
    arithmetic: str = "auto",
    device: str = "auto",
    progress: Report | None = None,
    disk: Disk | None = None,
) -> Iterator[Tile] | Gram:
    """The matrix of kernel values between the rows of two stores, or any two `Rows`, [n, m].

    Rows of `a` are held a group at a time while those of `b` pass by. As many workers as cores read, check, convert and
    multiply, each with one thread; the next blocks are made while the last one is multiplied. Only two groups' worth of
    features is ever in memory, whatever the stores' size; the larger the memory, the fewer passes over `b`: about
    n · D · 4 bytes / memory in float32, and half of that for float16 features in bfloat16x2.

    Args:
        a: rows of the matrix.
        b: its columns; None for `a` itself, which computes one half and mirrors it.
        kernel: a name in `gradstore.kernels.definitions.PROJECTED`; one that is fitted is fitted on `b`.
        out: HDF5 file to write the matrix to. None returns an iterator of tiles, each on or above the diagonal where b
            is None. A run that was interrupted is continued by the same call.
        memory: bytes, or text like "2GB", that operands and tiles may take.
        arithmetic: how rows are multiplied; the file records which it was.
            "float32": by BLAS, a cosine right to about 1e-6.
            "bfloat16x2": rows as they are stored, on the processor's matrix unit; a cosine is right to 3e-6, at worst
            to `gradstore.arithmetic.bfloat16_limbs.error_bound`. Rows are held in half the memory, and it is some three
            times as fast.
            "int8": rows rounded to 8 bits, typically 1e-4 off, bounds in `gradstore.arithmetic.int8`; a row that would
            lose too much is refused. Twice as fast as float32 where there is no matrix unit, and a fifth faster than
            bfloat16x2 where there is one.
            "auto": bfloat16x2 where this process has a matrix unit, else float32. It is the default since both are as
            right as a float16 feature, whose own rounding moves a cosine by 1e-6, and the projection by 1/sqrt(K). The
            bits depend on the machine, as those of float32 already do with its BLAS.
        device: "auto", "cpu", "cuda" or "cuda:<index>". On a GPU rows are multiplied in float32, not TF32; groups and
            tiles are held there, within what is free. "auto" takes one where it is there and the arithmetic allows it.
        progress: called after every tile that is written, with the number of finished cells and of all cells.
        disk: where the file goes; for tests.

    Returns:
        Tiles of float32 values, or the written file. Rows and columns of absent rows keep their places, and are NaN.

    Raises:
        UsageError: an unknown kernel or arithmetic, a kernel that a store's layout cannot serve, an unfinished store
            (the missing rows are named), too little memory, or rounding would lose too much.
        MismatchError: the stores are not of one model and one projection, or `out` is another matrix.
        NoSpaceError: the matrix does not fit the disk; said before anything is computed.
        NonFiniteError: a row of norm zero, for which a cosine is undefined; it is named.
        CorruptError: a row does not match its digest.

    Example:
        >>> matrix = gs.gram(train, out="gram.h5")
        >>> matrix.shape, matrix[:2].dtype
        ((24, 24), dtype('float32'))
    """
    tiles = StoreTiles(a, b, projected_kernel(kernel), parse_bytes(memory), arithmetic, device)
    if out is None:
        return tiles.tiles()
    return write_tiles(
        Path(out), (tiles.grid.n, tiles.grid.m), tiles.attributes(), tiles.tiles, progress=progress, disk=disk
    )


class StoreTiles:
    """The tiles of one kernel between two `Rows`.

    Attributes:
        phi: the feature map.
        grid: how the matrix is cut.
        strip: rows that a worker reads at a time.
        in_place: they are read into the operand, and multiplied as they are.
        dtype: in which an operand holds values.
        device: where they are multiplied.
        together: rows that it converts at a time, so few that all passes over them stay in a core's cache.
    """

    def __init__(
        self,
        a: Rows,
        b: Rows | None,
        kernel: Kernel,
        memory: int,
        arithmetic: str = "auto",
        device: str = "cpu",
    ) -> None:
        self.symmetric = b is None or a == b
        self.a, self.b = a, a if b is None else b
        self.device = choose_device("cpu" if device == "auto" and not runs_on_gpu(arithmetic) else device)
        self.kernel, self.arithmetic = kernel, choose_arithmetic(arithmetic, self.device)
        for store in (self.a, self.b):
            require_served(kernel, store)
        require_comparable(self.a, self.b)
        n, c, K = self.a.shape
        self.phi = FeatureMap.of(kernel, present_rows(self.b), memory)
        self.in_place = self.arithmetic.as_stored and self.phi.as_stored and self.a.schema.dtype != "int8"
        few_bits = self.a.schema.dtype != "float32" and self.phi.as_stored
        self.dtype = torch.float16 if few_bits else torch.float32
        row = self.a.schema.row_bytes
        share = memory // 16 // worker_count()
        self.strip = max(1, min(_STRIP_BYTES, share) // row)
        converting = _VALUE_BYTES * c * K + self.phi.making
        self.together = max(1, min(_CACHED_BYTES, share) // converting)
        always, each = self.arithmetic.workspace_bytes(K)
        making = always + self.strip * row + self.together * converting
        self.grid: Grid = plan_grid(
            n,
            len(self.b),
            symmetric=self.symmetric,
            held=self.arithmetic.bytes_a_row(self.phi.length, self.dtype),
            loading=worker_count() * each,
            value=28,
            memory=_within(self.device, memory),
            fixed=worker_count() * making,
        )

    def tiles(self, skip: Skip = nothing) -> Iterator[Tile]:
        """Compute the tiles that are not to be skipped; each row's digest is checked when the row is first read."""
        return (self._tiles if self.device.type == "cpu" else self._tiles_there)(Workers(), skip)

    def _tiles(self, workers: Workers, skip: Skip) -> Iterator[Tile]:
        with workers:
            load_a, load_b = self._readers(workers)
            yield from self.grid.tiles(self._side_by_side(load_a), load_b, partial(multiply, workers=workers), skip)

    def _tiles_there(self, workers: Workers, skip: Skip) -> Iterator[Tile]:
        """On a GPU: blocks are made in worker threads and moved there while the last one is multiplied."""
        with workers, full_float32(self.device):
            load_a, load_b = (partial(self._moved, load) for load in self._readers(workers))
            yield from self.grid.tiles(load_a, load_b, multiply, skip)

    def _moved(self, load: Load, rows: range) -> Operand:
        return load(rows).to(self.device)

    def attributes(self) -> dict[str, str | int]:
        """What the matrix is, for its file."""
        return {
            "kernel": self.kernel.name,
            "formula": self.kernel.formula,
            "symmetric": int(self.symmetric),
            "arithmetic": self.arithmetic.choice.name,
            "fingerprint": self.a.fingerprint,
            "split_a": self.a.split,
            "split_b": self.b.split,
            "data_a": _data_digest(self.a),
            "data_b": _data_digest(self.b),
        }

    def _empty(self, rows: int) -> Operand:
        shape, normalised = (rows, self.phi.segments, self.phi.K), self.kernel.normalised
        return self.arithmetic.empty(*shape, normalised=normalised, dtype=self.dtype)

    def _readers(self, workers: Workers) -> tuple[Load, Load]:
        a = self._reader(self.a, workers)
        return a, a if self.symmetric else self._reader(self.b, workers)

    def _reader(self, store: Rows, workers: Workers) -> Load:
        checked = np.zeros(len(store), bool)

        def load(rows: range, made: Operand | None = None) -> Operand:
            made = made or self._empty(len(rows))
            check = not checked[rows.start : rows.stop].all()
            strips = [range(at, min(at + self.strip, rows.stop)) for at in range(rows.start, rows.stop, self.strip)]
            workers.map(lambda strip: self._fill(made, strip.start - rows.start, store, strip, check=check), strips)
            checked[rows.start : rows.stop] = True
            return made

        return load

    def _side_by_side(self, load: Load) -> Callable[[range], Operand]:
        """Loads the blocks of a group into parts of one operand, so that they are multiplied together."""
        group: list[Operand] = []

        def load_part(rows: range) -> Operand:
            place = rows.start % self.grid.group
            if place == 0:
                group.clear()  # before another is made
                group.append(self._empty(min(self.grid.group, len(self.a) - rows.start)))
            return load(rows, group[0].part(place, place + len(rows)))

        return load_part

    def _fill(self, made: Operand, place: int, store: Rows, rows: range, *, check: bool) -> None:
        """Read some rows and make them the operand's rows from `place` on."""
        columns = store.schema.empty(len(rows))
        if self.in_place:
            columns["features"] = made.values[place : place + len(rows)].view(columns["features"].shape).numpy()
        store.read(rows.start, rows.stop, out=columns, check=check)
        columns["absent"] = store.absent[rows.start : rows.stop]  # annotations have a say in it
        for at in range(0, len(rows), self.together):
            some = slice(at, at + self.together)
            part = {name: column[some] for name, column in columns.items()}
            values, factors = self.phi.stored(part, store.where)
            if self.in_place:
                made.set_worth(place + at, factors)
            else:
                made.fill(place + at, values.float(), factors, rows[some])


Load = Callable[..., Operand]
"""Reads some rows, into an operand that may be given."""


def _within(device: torch.device, memory: int) -> int:
    """A budget that is free on the device as well, some of it left to others."""
    return min(memory, int(0.9 * torch.cuda.mem_get_info(device)[0])) if device.type == "cuda" else memory


def _data_digest(store: Rows) -> str:
    """32 digits that stand for what an identity says of the data."""
    return sha256(json.dumps(store.data, sort_keys=True).encode()).hexdigest()[:32]
