"""The entries of the random matrix P (version 1): a pure function of (seed, kind, stream, k, p).

P is never stored. Entry (k, p) comes from a counter-based generator; `kind_record.py` says which counter, and each
kind's module what becomes of the generator's words. Nothing depends on the device, the batch, the threads or the
projected dimension K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradstore.projection.kind_record import Kind
from gradstore.projection.kinds import kind_of
from gradstore.projection.philox import MASK32, philox4x32_10, split_key

WORDS = 4  # of a counter


@dataclass(frozen=True)
class Entries:
    """The matrix P of one (kind, seed, stream), read at any index or as dense tiles.

    Attributes:
        kind: a name of `kinds.KINDS`.
        seed: in [0, 2^64).
        stream: in [0, 2^31); 0 unless classes are given independent projections.
    """

    kind: str
    seed: int
    stream: int

    @property
    def record(self) -> Kind:
        """What is particular to the kind."""
        return kind_of(self.kind)

    @property
    def period(self) -> int:
        """How many consecutive p share one counter."""
        return self.record.period

    @property
    def domain(self) -> int:
        """The fourth word of every counter."""
        return self.record.domain(self.stream)

    def at(self, k: Tensor, p: Tensor) -> Tensor:
        """Entries P[k, p] of broadcastable int64 indices, float64 of the broadcast shape."""
        k, p = torch.broadcast_tensors(k, p)
        words = self._words(p.div(self.period, rounding_mode="floor"), k)
        return self.record.at(words, k, p.remainder(self.period))

    def tile(self, first_k: int, stop_k: int, start: int, stop: int, device: torch.device) -> Tensor:
        """P[first_k:stop_k, start:stop] as float64 on ``device``; holds about 16 bytes an entry on the way."""
        return self.columns(torch.arange(first_k, stop_k, device=device), start, stop)

    def columns(self, k: Tensor, start: int, stop: int) -> Tensor:
        """P[k, start:stop] of int64 k [m], float64 [m, stop - start] on its device; holds what `tile` does."""
        first, last = start // self.period, -(-stop // self.period)
        values = self._values(torch.arange(first, last, device=k.device), k)
        offset = start - first * self.period
        return values[:, offset : offset + stop - start]

    def strips(self, k: Tensor, starts: Tensor, width: int) -> Tensor:
        """P[k, s : s + width] for every s of ``starts``: equal strips of columns, wherever they begin.

        Args:
            k: int64 [m].
            starts: int64 [s], on the device of ``k``.
            width: columns of a strip.

        Returns:
            float64 [m, s, width]; holds about 32 bytes for each of m * s * (width + 2 * period) entries.
        """
        first = starts.div(self.period, rounding_mode="floor")
        touched = (width + 2 * self.period - 2) // self.period  # at most, wherever a strip begins
        values = self._values((first[:, None] + torch.arange(touched, device=k.device)).flatten(), k)
        inside = (starts - first * self.period)[:, None] + torch.arange(width, device=k.device)
        return values.view(len(k), len(starts), -1).gather(2, inside.expand(len(k), -1, -1))

    def nonzeros(self, first_k: int, stop_k: int, p: Tensor) -> tuple[Tensor, Tensor]:
        """The non-zeros of some columns in the blocks of rows that [first_k, stop_k) touches, of a sparse P.

        Args:
            first_k: the first row.
            stop_k: behind the last one.
            p: int64 [m], columns.

        Returns:
            Their rows k, int64 [blocks, m], some of which may be outside [first_k, stop_k), and values float64
            [blocks, m]; holds about 60 bytes for each.
        """
        sparse = self.record.sparse
        assert sparse is not None, f"{self.kind} is dense"
        first, last = first_k // sparse.block, -(-stop_k // sparse.block)
        of_counter = WORDS * sparse.block
        counters = torch.arange(first_k // of_counter, -(-stop_k // of_counter), device=p.device)[:, None]
        row, value = sparse.nonzero(self._words(p, counters * of_counter).transpose(1, 2))
        j = counters * WORDS + torch.arange(WORDS, device=p.device)
        k = row.add_((j * sparse.block)[:, :, None]).flatten(0, 1)
        used = slice(first % WORDS, first % WORDS + last - first)
        return k[used], value.flatten(0, 1)[used]

    def sums(self, first_k: int, stop_k: int, p: Tensor, values: Tensor) -> Tensor:
        """P[first_k:stop_k, p] @ values of columns p [m], values any float dtype [m], of a sparse P, in float64."""
        k, value = self.nonzeros(first_k, stop_k, p)
        block = self.record.sparse.block if self.record.sparse is not None else 1
        first = first_k // block * block
        total = torch.zeros(len(k) * block, dtype=torch.float64, device=p.device)
        for of_block, sign in zip(k, value, strict=True):
            total.index_add_(0, of_block - first, sign * values)
        return total[first_k - first : stop_k - first]

    def _values(self, b: Tensor, k: Tensor) -> Tensor:
        """All entries that the counters b [blocks] and k [m] make, [m, blocks * period]."""
        return self.record.entries(self._words(b, k[:, None]), k[:, None]).flatten(1)

    def _words(self, b: Tensor, k: Tensor) -> Tensor:
        """The words of counters, [..., 4] for b and k broadcastable to [...]."""
        # Filled on the device: a number copied to it would make the host wait for all that is queued there.
        domain = torch.full((), self.domain, device=b.device)
        counter = (b & MASK32, b >> 32, self.record.row(k), domain)
        return torch.stack(philox4x32_10(counter, split_key(self.seed)), dim=-1)
