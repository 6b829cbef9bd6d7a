"""Work on several classes at once, each thread by itself.

The layers of a small model take microseconds a class. Cutting each of them over threads costs more in waiting for the
slowest thread than it gains, and where another process has taken a core, every one of thousands of such cuts waits for
the scheduler. The backward passes of different classes need nothing of each other, so whole classes are the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Result = TypeVar("Result")

MOST = 4
"""Threads that share the classes; each holds one class's output gradients, so `bytes_needed` counts them."""

SMALL = 4 << 20
"""Bytes of all layers' outputs below which cutting each layer over threads gains nothing."""


def side_by_side(
    work: Callable[[range], Result], count: int, device: torch.device, *, uncut: bool = False
) -> list[Result]:
    """Call `work` on interleaved shares of `range(count)`, at the same time on a CPU.

    Args:
        work: takes the numbers that are its share; must not depend on who does the others.
        count: how many numbers there are.
        device: where the tensors are; another device than a CPU has its own queue, and gets one share.
        uncut: each share runs each layer by itself, however many threads there are.

    Returns:
        The results, by share. The threads of torch's setting are divided among the shares.

    Raises:
        Exception: what `work` raised first, after all shares have ended.
    """
    threads = torch.get_num_threads()
    shares = max(1, min(threads, count, MOST)) if device.type == "cpu" else 1
    each = 1 if uncut else threads // shares
    if shares == 1:
        with _threads(each):
            return [work(range(count))]

    def alone(share: int) -> Result:
        torch.set_num_threads(each)  # of this thread
        return work(range(share, count, shares))

    with ThreadPoolExecutor(shares - 1) as others, _threads(each):
        futures = [others.submit(alone, share) for share in range(1, shares)]
        first = work(range(0, count, shares))
        return [first, *(future.result() for future in futures)]


@contextmanager
def uncut_if_small(outputs: int) -> Iterator[None]:
    """Inside, this thread runs each layer by itself where all layers' outputs together are below `SMALL` bytes."""
    with _threads(torch.get_num_threads() if outputs >= SMALL else 1):
        yield


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Inside, this thread cuts each layer over so many."""
    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
