"""The reference projection: blockwise torch on any device, the standard that the fast paths are tested against.

Its result does not depend on the order in which a matrix product adds up, and so not on the rows beside a row, the
number of threads, the device or the BLAS: gradients are rounded to integers on a power-of-two grid per (row, tile) so
fine that it is invisible in float32, and every partial sum of the float64 product then is an integer below 2^53, hence
exact. Signs take one such product a tile, and a sparse P the sums alone. Entries of any other size are rounded to
multiples of 2^-23 (normals are below 8, so 26 bits), which leaves 17 bits for the gradient; a second product carries
the next 17. `Kind.grid` says so.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from gradstore.projection.entries import Entries
from gradstore.projection.kind_record import Grid

# Of P in float64; the words behind it are a few percent more for signs, as much for normals.
TILE_BYTES = 32 << 20
_SMALLEST_EXPONENT = -900  # keeps 2^(bits - exponent) finite; what is rounded away is far below float32's range


def accumulate(entries: Entries, out: Tensor, block: Tensor, start: int, first_k: int) -> None:
    """Add ``block @ P[first_k : first_k + K', start : start + p].T`` to ``out`` in place.

    Args:
        entries: the matrix P.
        out: float32 [rows, K'].
        block: any float dtype [rows, p], on the device of ``out``.
        start: flat parameter index of the first column; any non-negative integer.
        first_k: the row of P that column 0 of ``out`` belongs to.

    Holds one tile of P (32 MB and as much again while it is made), 8 bytes for each value of ``out`` and 32 for each of
    rows * 4096.
    """
    device = block.device if block.device.type != "mps" else torch.device("cpu")  # Metal has no float64
    (rows, columns), count, grid = block.shape, out.shape[1], entries.record.grid
    step = TILE_BYTES // (8 * grid.depth)
    total = torch.zeros(rows, count, dtype=torch.float64, device=device)
    for begin, end in _tiles(start, start + columns, grid.depth):
        limbs, unit = _integers(block[:, begin - start : end - start].to(device), grid)
        for k in range(0, count, step):
            stop_k = min(k + step, count)
            tile = range(first_k + k, first_k + stop_k), range(begin, end)
            if entries.record.sparse is None:
                total[:, k:stop_k] += _exact_product(limbs, unit, entries, *tile)
            else:
                total[:, k:stop_k] += _exact_sums(limbs, unit, entries, *tile)
    out += total.to(out)


def _tiles(start: int, stop: int, depth: int) -> list[tuple[int, int]]:
    """[start, stop) cut at multiples of ``depth``, so that tiles do not depend on where a block begins."""
    edges = [start, *range((start // depth + 1) * depth, stop, depth), stop]
    return [(a, b) for a, b in pairwise(edges) if a < b]


def _integers(gradients: Tensor, grid: Grid) -> tuple[list[Tensor], Tensor]:
    """Gradients as integers in float64, in limbs of falling weight, and the unit [rows, 1] of the first limb."""
    rest = gradients.double()
    exponent = torch.frexp(rest.abs().amax(dim=1, keepdim=True)).exponent.clamp(min=_SMALLEST_EXPONENT)
    rest = torch.ldexp(rest, grid.limb_bits - exponent)
    limbs = []
    for _ in range(grid.limbs):
        limbs.append(torch.round(rest))
        rest = (rest - limbs[-1]).mul_(2.0**grid.limb_bits)
    return limbs, torch.ldexp(torch.ones_like(rest[:, :1]), exponent - grid.limb_bits)


def _exact_sums(limbs: list[Tensor], unit: Tensor, entries: Entries, ks: range, ps: range) -> Tensor:
    """``gradients @ P[ks, ps].T`` in float64 for a sparse P, by sums that are exact whatever their order."""
    grid, (limb,) = entries.record.grid, limbs
    k, value = entries.nonzeros(ks.start, ks.stop, torch.arange(ps.start, ps.stop, device=limb.device))
    inside = (k >= ks.start) & (k < ks.stop)
    value = torch.where(inside, value / grid.unit, 0.0)
    place = (k - ks.start).clamp_(0, len(ks) - 1)
    total = torch.zeros(len(ks), len(limb), dtype=torch.float64, device=limb.device)
    for of_block, values in zip(place, value, strict=True):
        total.index_add_(0, of_block, limb.T * values[:, None])
    return total.T * (unit * grid.unit)


def _exact_product(limbs: list[Tensor], unit: Tensor, entries: Entries, ks: range, ps: range) -> Tensor:
    """``gradients @ P[ks, ps].T`` in float64 by products that are exact whatever their order of summation."""
    grid = entries.record.grid
    tile = entries.tile(ks.start, ks.stop, ps.start, ps.stop, limbs[0].device)
    if grid.unit != 1.0:
        tile, unit = torch.round(tile / grid.unit), unit * grid.unit
    total = limbs[0] @ tile.T
    for number, limb in enumerate(limbs[1:], 1):
        total += (limb @ tile.T).mul_(2.0 ** (-number * grid.limb_bits))
    return total.mul_(unit)
