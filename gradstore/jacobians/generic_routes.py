"""Which route serves a parameter that no rule covers: the first of three that gives the right gradient of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from gradstore.jacobians.by_autograd import by_example, by_loop, by_torch_func
from gradstore.jacobians.subject import Inputs, Subject
from gradstore.machine.out_of_memory import is_out_of_memory

Exact = Callable[[Subject, list[str], Inputs, Tensor], list[Tensor]]
Try = Callable[[Exact, list[str]], dict[str, bool]]

_TRIED_EACH = 4  # parameters that are tried one by one, though they fail together as others did

WORDS: dict[Exact, str] = {
    by_torch_func: "torch.func",
    by_example: "autograd by example",
    by_loop: "autograd loop",
}
"""What each is called."""


def generic_routes(names: Sequence[str], right: Try) -> dict[str, Exact]:
    """Choose a route for each of some parameters.

    Args:
        names: of the parameters.
        right: (route, names) -> whether the route gives the right gradient of each; may raise anything.

    Returns:
        By name; the loop, which is the definition, serves what the others do not.
    """
    exact: dict[str, Exact] = dict.fromkeys(names, by_loop)
    for route in (by_torch_func, by_example):
        left = [name for name in names if exact[name] is by_loop]
        exact |= dict.fromkeys(_served(route, left, right), route)
    return exact


def _served(route: Exact, names: list[str], right: Try, failed: str | None = None) -> list[str]:
    # A parameter on which the route fails costs no other. How it failed with these and others together is `failed`.
    if not names:
        return []
    error = _tried(route, names, right)
    if isinstance(error, list):
        return error
    if len(names) == 1 or (error == failed and _alike(route, names, right, failed)):
        return []
    half = len(names) // 2
    return [*_served(route, names[:half], right, error), *_served(route, names[half:], right, error)]


def _alike(route: Exact, names: list[str], right: Try, failed: str) -> bool:
    """Whether a failure is no matter of some parameters: of many, the first, middle and last fail so by themselves."""
    if len(names) <= _TRIED_EACH:
        return False
    some = (names[0], names[len(names) // 2], names[-1])
    return all(_tried(route, [name], right) == failed for name in some)


def _tried(route: Exact, names: list[str], right: Try) -> list[str] | str:
    """Those parameters of which a route gives the right gradient, or how it fails."""
    try:
        return [name for name, good in right(route, names).items() if good]
    except Exception as error:  # vmap refuses models in many ways, and models raise what they like under it
        if is_out_of_memory(error):
            raise
        return str(error)
