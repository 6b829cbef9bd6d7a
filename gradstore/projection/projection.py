"""`Projection`: the public handle of one random matrix P and the products with it."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradstore.errors import UsageError
from gradstore.native import library
from gradstore.projection import by_definition, compiled_product, trust
from gradstore.projection.device_paths import PRECISIONS
from gradstore.projection.entries import Entries
from gradstore.projection.kinds import DEFAULT, kind_of

ALIGNMENT = 128
BACKENDS = ("auto", "native", "cuda", "reference")


@dataclass(frozen=True)
class Projection:
    """Random projection ``features = P g / sqrt(K)`` with a matrix P that is computed, never stored.

    P is ``K x p`` with independent entries of mean 0 and variance 1, so inner products of features are unbiased
    estimates of inner products of gradients, with a relative error of about ``sqrt(2/K)`` on squared norms
    (Johnson-Lindenstrauss). Each entry is a pure function of (kind, seed, stream, k, p): features of a smaller ``dim``
    are a prefix of those of a larger one (with another scale), and blocks of parameters can be projected one at a time
    and added up.

    The bits of a row's result depend on its own values, ``start`` and the `path` taken (for normals on the CPU, also on
    whether its SIMD level has fused multiply-adds, which "plain" lacks); not on the rows beside it, the number of
    threads, or which rows k are asked for together.

    Args:
        kind: which entries, a name of `gradstore.projection.kinds.KINDS`, which says what they are.
        dim: the projected dimension K, in [1, 2^31]; some kinds take only multiples of a number.
        seed: in [0, 2^64).
        stream: an independent matrix for each number in [0, 2^31), under one seed.
        backend: "native" (compiled code on the CPU, the kernels of `path` on GPUs), "cuda" (kernels on GPUs only),
            "reference" (torch everywhere), or "auto", which takes the first that can be had here.
        precision: of kernels on GPUs: "fast" (gradients rounded to one float16: relative error of a feature vector
            about 2e-4) or "exact" (to two: about 1e-6). A sparse P takes gradients as integers, which moves a row by at
            most 4e-6 or 1e-6 of its norm. The CPU and the reference are always right to float32 rounding.

    Raises:
        UsageError: an argument is out of range.

    Example:
        >>> gs.Projection(dim=4, seed=1).project(torch.ones(2, 300)).shape
        torch.Size([2, 4])
    """

    kind: str = DEFAULT
    dim: int = 10240
    seed: int = 0
    stream: int = 0
    backend: str = "auto"
    precision: str = "fast"

    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        kind = kind_of(self.kind)
        _check_choice("backend", self.backend, BACKENDS)
        _check_choice("precision", self.precision, PRECISIONS)
        _check_range("dim", self.dim, 1, 2**31 + 1)
        if self.dim % kind.multiple:
            nearest = " or ".join(map(str, sorted(set(kind.fitting(self.dim)))))
            expected = f"a multiple of {kind.multiple} for {kind.name}, such as {nearest}"
            raise UsageError("bad dim", where="dim", expected=expected, got=self.dim)
        _check_range("seed", self.seed, 0, 2**64)
        _check_range("stream", self.stream, 0, 2**31)
        if self.backend == "auto":
            other = "cuda" if torch.cuda.is_available() else "reference"
            object.__setattr__(self, "backend", "native" if library.available() else other)

    @property
    def scale(self) -> float:
        """The factor ``1/sqrt(K)`` that makes inner products unbiased."""
        return 1.0 / math.sqrt(self.dim)

    def project(self, block: Tensor, start: int = 0) -> Tensor:
        """Features of a block of gradients.

        Args:
            block: [rows, p] of any float dtype; column j is parameter ``start + j``.
            start: flat index of the first parameter, a multiple of 128 (every parameter tensor begins on one).

        Returns:
            float32 [rows, dim] on the device of ``block``, scaled by ``1/sqrt(dim)``.

        Raises:
            UsageError: ``block`` is not a 2-D float tensor, or ``start`` is negative or not a multiple of 128.
        """
        _check_block(block)
        if start < 0 or start % ALIGNMENT:
            raise UsageError("bad start of a block", where="start", expected=f"a multiple of {ALIGNMENT}", got=start)
        out = torch.zeros(block.shape[0], self.dim, device=block.device)
        self.accumulate(out, block, start)
        return out.mul_(self.scale)

    def entries(self, k: object, p: object) -> Tensor:
        """Compute unscaled entries ``P[k, p]`` of broadcastable integer indices.

        Returns:
            float64 of the broadcast shape.

        Raises:
            UsageError: an index is not an integer, or k is outside [0, dim), or p is negative.
        """
        rows, columns = _index("k", k, self.dim), _index("p", p, 2**63)
        return self._entries.at(rows, columns.to(rows.device))

    def accumulate(self, out: Tensor, block: Tensor, start: int, *, first_k: int = 0) -> None:
        """Add the unscaled ``block @ P[first_k : first_k + K', start : start + p].T`` to ``out`` in place.

        Args:
            out: float32 [rows, K'], on the device of ``block``.
            block: [rows, p] of any float dtype.
            start: flat index of the first parameter; any non-negative integer.
            first_k: the row of P that the first column of ``out`` belongs to.

        Raises:
            UsageError: shapes, dtypes or indices do not fit.
        """
        _check_block(block)
        if out.dtype != torch.float32 or out.ndim != 2 or out.shape[0] != block.shape[0]:
            got = f"{str(out.dtype).removeprefix('torch.')} {list(out.shape)}"
            raise UsageError("bad output", where="out", expected=f"float32 [{block.shape[0]}, K]", got=got)
        _check_range("start", start, 0, 2**63 - block.shape[1])
        _check_range("first_k", first_k, 0, self.dim - out.shape[1] + 1)
        chosen, source = self._choice(block.device).path, block.detach()
        if chosen is not None:
            product = chosen.product(block.device.index)
            product(self._entries, out, source, start, first_k, self.precision)
        elif self.path(block.device) == "native":
            compiled_product.accumulate(self._entries, out, source, start, first_k)
        else:
            by_definition.accumulate(self._entries, out, source, start, first_k)

    def path(self, device: torch.device) -> str:
        """Name what multiplies by P on a device.

        On a GPU the ways are tried in the order of `device_paths.PATHS`, and the first that proves itself is taken.
        Warns once where a faster one could be had but for something that is missing, or has failed.

        Returns:
            "native", "reference", or on a GPU such as "wgmma fast" or "sums exact".
        """
        chosen = self._choice(device).path
        if chosen is not None:
            return f"{chosen.name} {self.precision}"
        compiled = self.backend == "native" and self._entries.record.compiled is not None
        return "native" if device.type == "cpu" and compiled else "reference"

    def passed_over(self, device: torch.device) -> tuple[str, ...]:
        """Why a GPU does not take each faster path that it could have, a line each."""
        return self._choice(device).passed_over

    def fused(self, device: torch.device) -> bool:
        """Whether P is multiplied by kernels of a GPU, which take few large blocks rather than many small ones."""
        return self._choice(device).path is not None

    def explained(self, device: torch.device) -> AbstractContextManager[None]:
        """Within: where a device fails because the product gave up, the error says so; see `trust.explained`."""
        if self._choice(device).path is None:
            return nullcontext()
        return trust.explained(device.index, self.kind, self.precision)

    def _choice(self, device: torch.device) -> trust.Choice:
        """The path of a GPU; none where there is no GPU, or the reference is asked for."""
        if device.type != "cuda" or self.backend == "reference":
            return trust.Choice(None, ())
        return trust.chosen(device.index, self.kind, self.precision)

    @property
    def _entries(self) -> Entries:
        return Entries(self.kind, self.seed, self.stream)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"unknown {name}", where=name, expected="one of " + ", ".join(choices), got=repr(value))


def _check_range(name: str, value: int, low: int, stop: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < stop:
        raise UsageError(f"bad {name}", where=name, expected=f"an integer in [{low}, {stop})", got=repr(value))


def _check_block(block: Tensor) -> None:
    if block.ndim != 2 or not block.is_floating_point():
        got = f"{str(block.dtype).removeprefix('torch.')} {list(block.shape)}"
        raise UsageError(
            "bad block of gradients", where="block", expected="floats of shape [rows, parameters]", got=got
        )


def _index(name: str, value: object, stop: int) -> Tensor:
    index = torch.as_tensor(value)
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise UsageError("bad index", where=name, expected="integers", got=str(index.dtype).removeprefix("torch."))
    index = index.long()
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < stop:
        got = f"{int(index.min())} to {int(index.max())}"
        raise UsageError("index out of range", where=name, expected=f"integers in [0, {stop})", got=got)
    return index
