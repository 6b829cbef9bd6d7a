"""The entries of the random matrix P (version 1): a pure function of (seed, kind, stream, k, p).

P is never stored. Entry (k, p) comes from ``philox4x32_10(counter, key)`` with the counter
(b mod 2^32, b div 2^32, k, 2*stream + kind):

- Rademacher (kind 0): ``b = p div 128``; bit ``p mod 32`` of word ``(p div 32) mod 4``; 1 is +1, 0 is -1.
- Gaussian (kind 1): ``b = p div 4``; four normals by Box-Muller from the four words; entry ``p mod 4``.

Nothing depends on the device, the batch, the threads or the projected dimension K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gradstore.projection.philox import MASK32, Counter, philox4x32_10, split_key

KINDS = ("rademacher", "gaussian")
_PERIOD = {"rademacher": 128, "gaussian": 4}
_BITS = torch.arange(8)
_SIGNS_OF_BYTE = (((torch.arange(256)[:, None] >> _BITS) & 1) * 2 - 1).double()


@dataclass(frozen=True)
class Entries:
    """The matrix P of one (kind, seed, stream), read at any index or as dense tiles.

    Attributes:
        kind: "rademacher" or "gaussian".
        seed: in [0, 2^64).
        stream: in [0, 2^31); 0 unless classes are given independent projections.
    """

    kind: str
    seed: int
    stream: int

    @property
    def period(self) -> int:
        """How many consecutive p share one counter."""
        return _PERIOD[self.kind]

    def at(self, k: Tensor, p: Tensor) -> Tensor:
        """Entries P[k, p] of broadcastable int64 indices, float64 of the broadcast shape."""
        k, p = torch.broadcast_tensors(k, p)
        words = torch.stack(self._words(p.div(self.period, rounding_mode="floor"), k), dim=-1)
        if self.kind == "rademacher":
            word = words.gather(-1, ((p >> 5) & 3).unsqueeze(-1)).squeeze(-1)
            return ((word >> (p & 31)) & 1).double() * 2 - 1
        return _normals(words).gather(-1, (p & 3).unsqueeze(-1)).squeeze(-1)

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

    def _values(self, b: Tensor, k: Tensor) -> Tensor:
        """All entries that the counters b [blocks] and k [m] make, [m, blocks * period]."""
        words = torch.stack(self._words(b, k[:, None]), dim=-1)
        return _signs(words) if self.kind == "rademacher" else _normals(words).flatten(1)

    def _words(self, b: Tensor, k: Tensor) -> Counter:
        # Filled on the device: a number copied to it would make the host wait for all that is queued there.
        domain = torch.full((), 2 * self.stream + KINDS.index(self.kind), device=b.device)
        return philox4x32_10((b & MASK32, b >> 32, k, domain), split_key(self.seed))


def _signs(words: Tensor) -> Tensor:
    """Words [K, blocks, 4] to signs [K, 128 * blocks]: each byte looked up in a 256 x 8 table of signs."""
    bytes_ = (words.unsqueeze(-1) >> torch.arange(0, 32, 8, device=words.device)) & 255
    return torch.nn.functional.embedding(bytes_.flatten(1), _signs_of_byte(words.device)).flatten(1)


@cache
def _signs_of_byte(device: torch.device) -> Tensor:
    return _SIGNS_OF_BYTE.to(device)


def _normals(words: Tensor) -> Tensor:
    """Words [..., 4] to standard normals [..., 4] by Box-Muller, in float64."""
    uniform = (words.double() + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0::2]))
    angle = (2.0 * math.pi) * uniform[..., 1::2]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(-2)
