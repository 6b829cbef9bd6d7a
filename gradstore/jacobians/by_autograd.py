"""Routes that serve any model, whatever its layers: torch.func over examples, and autograd of one example at a time.

Both return, for each asked parameter, the product of cotangents with the per-example Jacobian:
`J[i, k] = ∂(Σ_c cotangents[k, c] · logits_c(x_i)) / ∂θ`. The loop
is the definition that everything else is checked with.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.utils._pytree import tree_map

from gradstore.jacobians.subject import Inputs, Subject, length, take


def by_loop(subject: Subject, names: list[str], inputs: Inputs, cotangents: Tensor) -> list[Tensor]:
    """Looped autograd: one forward pass per example, one backward pass per example and cotangent.

    Args:
        subject: the model; call inside `subject.ready()`.
        names: parameters to differentiate.
        inputs: n examples.
        cotangents: [k, classes] in the logits' dtype.

    Returns:
        One Tensor [n, k, size] per name, in the parameter's dtype. Holds those and one example's graph.
    """
    parameters = [subject.parameters[name] for name in names]
    out = [p.new_zeros(length(inputs), len(cotangents), p.numel()) for p in parameters]
    for i, k, gradients in one_by_one(subject, names, inputs, cotangents):
        for values, gradient in zip(out, gradients, strict=True):
            if gradient is not None:
                values[i, k] = gradient.reshape(-1)
    return out


def one_by_one(
    subject: Subject, names: list[str], inputs: Inputs, cotangents: Tensor
) -> Iterator[tuple[int, int, Sequence[Tensor | None]]]:
    """Differentiate the logits of one example at a time; the arguments are those of `by_loop`.

    Yields:
        (example, cotangent, gradient of each name or None), in order. Holds one example's graph and one gradient of
        every name.
    """
    parameters = [subject.parameters[name] for name in names]
    for i in range(length(inputs)):
        logits = subject.logits(take(inputs, slice(i, i + 1)))[0]
        if not logits.requires_grad:
            continue
        for k, cotangent in enumerate(cotangents):
            found = torch.autograd.grad(logits, parameters, cotangent, retain_graph=True, allow_unused=True)
            yield i, k, [None if gradient is None else dense(gradient) for gradient in found]


def by_example(subject: Subject, names: list[str], inputs: Inputs, cotangents: Tensor) -> list[Tensor]:
    """Autograd of one example at a time, of all cotangents at once: `by_loop` with its backward passes vectorised.

    The arguments are those of `by_loop`. Backward passes that cannot be vectorised raise RuntimeError.

    Returns:
        As `by_loop`. Holds that and one example's graph, with a layer's or two's output gradients for every cotangent.
    """
    parameters = [subject.parameters[name] for name in names]
    out = [p.new_zeros(length(inputs), len(cotangents), p.numel()) for p in parameters]
    for i in range(length(inputs)):
        logits = subject.logits(take(inputs, slice(i, i + 1)))[0]
        if not logits.requires_grad:
            continue
        with quiet_vmap():
            found = torch.autograd.grad(logits, parameters, cotangents, is_grads_batched=True, allow_unused=True)
        for values, gradient in zip(out, found, strict=True):
            if gradient is not None:
                values[i] = gradient.reshape(len(cotangents), -1)
    return out


def by_torch_func(subject: Subject, names: list[str], inputs: Inputs, cotangents: Tensor) -> list[Tensor]:
    """`torch.func`: one forward pass vectorised over examples, then one VJP vectorised over cotangents.

    The arguments are those of `by_loop`. Models that `torch.func.vmap` cannot run raise RuntimeError or what their own
    code raises.

    Returns:
        As `by_loop`. Holds that and the graph of all n examples.
    """
    parameters = {name: subject.parameters[name].detach() for name in names}
    # the others are detached too, or they would grow a second graph
    constants = {name: p.detach() for name, p in subject.parameters.items() if name not in names}

    def logits(values: dict[str, Tensor], example: Inputs) -> Tensor:
        alone = tree_map(lambda tensor: tensor[None], example)
        return subject.with_parameters(constants | values, lambda other: other.logits(alone))[0]

    def rows(example: Inputs) -> dict[str, Tensor]:
        pull_back = vjp(lambda values: logits(values, example), parameters)[1]
        return vmap(pull_back)(cotangents)[0]

    with quiet_vmap():
        found = vmap(rows, randomness="same")(inputs)
    shapes = {name: (length(inputs), len(cotangents), p.numel()) for name, p in parameters.items()}
    return [found[name].reshape(shapes[name]) for name in names]


def dense(gradient: Tensor) -> Tensor:
    """A gradient as values, where autograd gives only those of the rows that occur."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def vectorised_grad(output: Tensor, inputs: Sequence[Any], cotangents: Tensor) -> list[Tensor | None]:
    """Several backward passes in one, each operation of which takes all cotangents; the graph is kept.

    `torch.autograd.grad(…, is_grads_batched=True)` would run softmaxes and activations, among others, one cotangent at
    a time (torch 2.13); `torch.func.vmap` does not.

    Args:
        output: […], with its graph.
        inputs: tensors or graph edges to differentiate with respect to.
        cotangents: [k, …].

    Returns:
        [k, …] for each input; None where the output does not depend on it.

    Raises:
        RuntimeError: of a backward pass that cannot be vectorised; one of the user's own raises what it likes.
    """
    reached: list[int] = []

    def pull_back(cotangent: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(output, inputs, cotangent, retain_graph=True, allow_unused=True)
        reached[:] = [place for place, gradient in enumerate(found) if gradient is not None]
        return [gradient for gradient in found if gradient is not None]

    with quiet_vmap():
        several = vmap(pull_back)(cotangents)
    gradients = dict(zip(reached, several, strict=True))
    return [gradients.get(place) for place in range(len(inputs))]


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Within: vmap does not report layers that it runs one example at a time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
