"""Rules of products that sum over shared axes: `x @ W` and `W @ x` of any batch, `addmm`, and einsum of two operands.

All are one: with y = Σ x · W over labelled axes, the gradient of W is Σ x · δ over all axes that W does not have, but
for the examples'.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradstore.jacobians.row_owners import FIRST, FOLDED, FOLDED_LAST, SECOND, by_example, deltas_by_example
from gradstore.jacobians.terms import Term
from gradstore.jacobians.uses import Batch, Use, kept_or_reduced, reduced, wide

_LETTERS = "abcdefghijklmnopqrstuvw"
_FOLD, _CLASS = "x", "z"  # labels that equations here do not have otherwise


def matmul(input: Tensor, other: Tensor) -> Use | None:
    """A matrix product, batched or not."""
    labels = _product(input.ndim, other.ndim)
    return None if labels is None else _contraction((input, other), labels, ("input", "other"))


def matrix_times(input: Tensor, mat2: Tensor) -> Use | None:
    """`torch.mm` and `torch.bmm`."""
    labels = _product(input.ndim, mat2.ndim)
    return None if labels is None else _contraction((input, mat2), labels, ("input", "mat2"))


def matrix_times_vector(input: Tensor, vec: Tensor) -> Use | None:
    """`torch.mv`."""
    return _contraction((input, vec), ("ab", "b", "a"), ("input", "vec"))


def sparse_times(mat1: Tensor, mat2: Tensor) -> Use | None:
    """`torch.sparse.mm`, of sparse examples."""
    return _contraction((mat1, mat2), ("ab", "bc", "ac"), ("mat1", "mat2"))


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Use | None:
    """`β b + α x W`, as a linear layer whose weight is [inputs, outputs]."""
    use = _contraction((mat1, mat2), ("ab", "bc", "ac"), ("mat1", "mat2"), alpha)
    shape = tuple(input.shape)
    if use is None or (len(shape) == 2 and shape[0] != 1):
        return use

    def bias(deltas: Tensor, _: Batch) -> Tensor:
        total = wide(deltas).sum(2) * beta
        return total.sum(-1, keepdim=True) if math.prod(shape) == 1 else total

    return replace(use, terms={**use.terms, "input": reduced(shape, bias)})


def einsum(equation: str, first: Any, second: Any = None) -> Use | None:
    """An einsum of two operands, each label once in each, without ellipsis."""
    given, arrow, output = equation.replace(" ", "").partition("->")
    left, comma, right = given.partition(",")
    if not (arrow and comma and isinstance(first, Tensor)) or not (left + right + output).isalpha():
        return None
    translate = {label: _LETTERS[i] for i, label in enumerate(dict.fromkeys(left + right))}
    labels = ["".join(translate[label] for label in part) for part in (left, right, output)]
    return _contraction((first, second), (labels[0], labels[1], labels[2]), ("first", "second"))


def _product(left: int, right: int) -> tuple[str, str, str] | None:
    """Labels of a matrix product of operands with so many axes."""
    if left == 0 or right == 0 or left == right == 1:
        return None
    batch = _LETTERS[: max(left, right, 2) - 2]
    ours = "v" if left == 1 else batch[len(batch) - left + 2 :] + "uv"
    theirs = "v" if right == 1 else batch[len(batch) - right + 2 :] + "vw"
    return ours, theirs, batch + "u" * (left > 1) + "w" * (right > 1)


def _contraction(
    operands: tuple[Tensor, Tensor], labels: tuple[str, str, str], roles: tuple[str, str], factor: float = 1
) -> Use | None:
    """The use of those operands that have no axis of examples."""
    output = labels[2]
    if not output or any(len(set(part)) < len(part) for part in labels):
        return None
    x, y = (_dense(operand) for operand in operands)
    terms: dict[str, Callable[[Batch], Term]] = {}
    found: list[str] = []
    for role, own, own_labels, other, other_labels in (
        (roles[0], x, labels[0], y, labels[1]),
        (roles[1], y, labels[1], x, labels[0]),
    ):
        own, own_labels = _without_broadcast(own, own_labels, other_labels)
        sizes = dict(zip(own_labels, own.shape, strict=True))
        wanted = [sizes.get(label, size) for label, size in zip(other_labels, other.shape, strict=True)]
        fits = all(have in (1, want) for have, want in zip(other.shape, wanted, strict=True))
        possible = [how for how, axis in _AXIS.items() if _belongs(output, axis, own_labels, other_labels)]
        if possible and fits and own_labels and set(own_labels) <= set(output + other_labels):
            gradient = _Gradient(own_labels, other_labels, output, other.expand(wanted), factor)
            terms[role] = _maker(tuple(own.shape), gradient)
            found += possible
    order = tuple(how for how in _AXIS if how in found)
    return Use("matrix product", deltas_by_example, order, terms, (x, y)) if terms else None


def _without_broadcast(own: Tensor, labels: str, other: str) -> tuple[Tensor, str]:
    """An operand without axes of size 1, along which it is repeated and so the gradient is summed."""
    axes = [a for a, label in enumerate(labels) if own.shape[a] == 1 and label in other]
    return own.squeeze(axes), "".join(label for a, label in enumerate(labels) if a not in axes)


_AXIS = {FIRST: 0, SECOND: 1, FOLDED: 0, FOLDED_LAST: 0}


def _belongs(output: str, axis: int, own: str, other: str) -> bool:
    """Whether an axis of the output can be that of the examples: the other operand's, and not the parameter's."""
    return axis < len(output) and output[axis] not in own and output[axis] in other


def _maker(shape: tuple[int, ...], gradient: _Gradient) -> Callable[[Batch], Term]:
    def term(batch: Batch) -> Term:
        return kept_or_reduced(batch, shape, gradient.of(batch))

    return term


class _Gradient:
    """The gradient of one operand, by labels: its own, the other operand's and the output's."""

    def __init__(self, own: str, other_labels: str, output: str, other: Tensor, factor: float) -> None:
        self._own, self._labels, self._output = own, other_labels, output
        self._other, self._factor = other, factor

    def of(self, batch: Batch) -> Callable[[Tensor, int, int], Tensor]:
        """Make some rows of the gradient from deltas [n, c, …] as `deltas_by_example` has them."""
        second = batch.arrangement == SECOND
        example = self._output[_AXIS[batch.arrangement]]
        fold = "" if second else _FOLD
        rest = self._labels.replace(example, "")
        first_axis = self._other.movedim(self._labels.index(example), 0)
        other = first_axis if second else by_example(first_axis, batch.n, batch.arrangement)
        labels = example + fold + rest, example + _CLASS + fold + self._output.replace(example, "")
        equation = f"{labels[0]},{labels[1]}->{example}{_CLASS}{self._own}"

        def make(deltas: Tensor, first: int, last: int) -> Tensor:
            parts = []
            for tensor, names in zip((wide(other), wide(deltas)), labels, strict=True):
                axis = names.find(self._own[0])
                parts.append(tensor if axis < 0 else tensor.narrow(axis, first, last - first))
            found = torch.einsum(equation, *parts).flatten(2)
            return found * self._factor if self._factor != 1 else found

        return make


def _dense(operand: Tensor) -> Tensor:
    return operand.detach().to_dense() if operand.is_sparse else operand.detach()


CONTRACTIONS: dict[Any, Callable[..., Use | None]] = {
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    torch.mm: matrix_times,
    Tensor.mm: matrix_times,
    torch.bmm: matrix_times,
    Tensor.bmm: matrix_times,
    torch.mv: matrix_times_vector,
    Tensor.mv: matrix_times_vector,
    torch.addmm: addmm,
    Tensor.addmm: addmm,
    torch.einsum: einsum,
    torch.sparse.mm: sparse_times,
}
"""The rule of each function that is a product over shared axes."""

MATRIX_PRODUCTS = {function for function, rule in CONTRACTIONS.items() if rule in (matmul, matrix_times)}
"""Those of two operands."""
