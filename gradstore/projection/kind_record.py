"""What is particular to a kind of projection, as one record; all other code asks it, and knows no kind by name.

Entry (k, p) comes from ``philox4x32_10(counter, key)`` with the counter

    (b mod 2^32, b div 2^32, row(k), 2 * stream + code),  b = p div period

so `code`, 0 or 1, and `row` keep the counters of one kind apart from those of every other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from gradstore.projection.norm_bands import dense_band


@dataclass(frozen=True)
class Grid:
    """How the reference makes sums exact: gradients in limbs of integers, and entries that are multiples of a unit.

    For the sums to be exact, ``depth * 2^limb_bits * largest entry / unit`` is below 2^53.

    Attributes:
        unit: a power of two, to whose multiples entries are rounded.
        depth: columns of a product.
        limb_bits: of a gradient's limb.
        limbs: of a gradient.
    """

    unit: float
    depth: int
    limb_bits: int
    limbs: int


@dataclass(frozen=True)
class Sparse:
    """What is particular to a P whose columns have one non-zero in each block of rows.

    Attributes:
        block: rows of a block. Word i of a counter serves the blocks j for which ``j mod 4 == i``, and `Kind.row` gives
            the rows of four such blocks the same third word.
        nonzero: words int64 [...] to the row within its block, int64 [...], and the value, float64 [...], of each
            non-zero.
    """

    block: int
    nonzero: Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class AuditCost:
    """What it takes to make entries by their definition, for `projection_audit`.

    Attributes:
        columns: of P that are made at once, for 16 rows: a few megabytes.
        entry: flops of the fast path, on a thread of a CPU, in the time that an audit takes for one entry: 4 ns beside
            10^12 flops a second, or 40 ns beside 10^11. Twice what was measured on a CPU that had just projected (of
            two processors, the faster product).
        block: the same for one block, 0.8 ms.
        rows: of P that an audit multiplies by: spread over all k, or of a sparse P neighbours, a multiple of the rows
            whose non-zeros come from one counter.
    """

    columns: int
    entry: float
    block: float
    rows: int = 16


@dataclass(frozen=True)
class Fused:
    """What the fused CUDA source does for a kind.

    Attributes:
        number: its KIND in ``cuda/src/fragments.cuh``.
        tiles: fragments of P that a warp keeps.
        rows: most rows of gradients in a tile of the output, by precision.
    """

    number: int
    tiles: int
    rows: Mapping[str, int]


def _itself(k: Tensor) -> Tensor:
    return k


def _nothing(K: int) -> str:
    return ""


@dataclass(frozen=True)
class Kind:
    """One kind of entries. What has a default need not be said: the reference then multiplies by P on every device.

    Attributes:
        name: in settings, in identities and on the command line; its module is called so.
        code: added to ``2 * stream`` in the fourth word of the counter; 0 or 1.
        period: how many consecutive p share one counter.
        entries: the words int64 [..., 4] of some counters and their k, broadcastable to [...], to all entries of each,
            float64 [..., period], of mean 0 and variance 1.
        entry: the same words and k, and places [...] in the period, to the one entry in each place, float64 [...];
            None to pick it from all of them.
        row: k to the third word of the counter, in [0, 2^32).
        multiple: what K must be a multiple of.
        sparse: where the non-zeros stand, of a P that is nearly all zeros; None for a dense one.
        integers: entries are integers so small that a product with small integers is exact in float32 on every path.
        grid: of the reference; the default is for entries below 8 in size.
        pace: how many times longer a flop of the fast path takes than one with signs.
        norm_band: K to the least and the greatest ‖P g‖² / (K ‖g‖²) that a right projection has.
        warning: K to what a user should know who chose it, or "".
        audit: what an audit costs.
        compiled: its KIND in ``projection_job.h`` of the compiled product, or, of a sparse P, 0, for there is one such
            product; None where that has none.
        shares_layers: the compiled product can share a layer's projected activations among classes.
        fused: what the fused CUDA source does for it; None where that is nothing.
        triton: whether the Triton product serves it.
    """

    name: str
    code: int
    period: int
    entries: Callable[[Tensor, Tensor], Tensor]
    entry: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    row: Callable[[Tensor], Tensor] = _itself
    multiple: int = 1
    sparse: Sparse | None = None
    integers: bool = False
    grid: Grid = Grid(unit=2.0**-23, depth=512, limb_bits=17, limbs=2)
    pace: float = 1.0
    norm_band: Callable[[int], tuple[float, float]] = dense_band
    warning: Callable[[int], str] = _nothing
    audit: AuditCost = AuditCost(columns=1 << 12, entry=4e3, block=8e7)
    compiled: int | None = None
    shares_layers: bool = False
    fused: Fused | None = None
    triton: bool = False

    def domain(self, stream: int) -> int:
        """The fourth word of the counter, which says the stream, and with the third the kind."""
        return 2 * stream + self.code

    def fitting(self, dim: int) -> tuple[int, int]:
        """The largest K that is at most `dim` and the smallest that is at least that, of those that there are."""
        multiple = self.multiple
        return max(multiple, dim // multiple * multiple), max(multiple, -(-dim // multiple) * multiple)

    def nonzeros(self, K: int) -> int:
        """How many entries of a column are not zero."""
        return K if self.sparse is None else K // self.sparse.block

    def at(self, words: Tensor, k: Tensor, place: Tensor) -> Tensor:
        """The entries in some places [...] of the counters that gave words [..., 4], float64 [...]."""
        if self.entry is not None:
            return self.entry(words, k, place)
        return self.entries(words, k).gather(-1, place.unsqueeze(-1)).squeeze(-1)
