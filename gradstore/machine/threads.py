"""Worker threads, one a core, each computing with one thread: none waits for another inside a product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

S = TypeVar("S")
T = TypeVar("T")

_MAX_WORKERS = 16


class Workers:
    """A pool of threads that compute with one thread each; use as a context.

    Jobs are begun in the order in which they are handed in, whoever hands them in. A thread that sets its own number of
    threads sets that of threads which start later too, and with some builds of MKL the whole process's; leaving the
    context sets back what was.

    Attributes:
        count: how many threads there are.
    """

    def __init__(self, count: int | None = None) -> None:
        """So many, or as many as torch computes with, at most 16."""
        self._threads = torch.get_num_threads()
        self.count = count or worker_count()

    def map(self, work: Callable[[S], T], jobs: Iterable[S]) -> list[T]:
        """The results in order; of several errors, the one of the earliest job is raised."""
        return list(self._pool.map(work, jobs))

    def __enter__(self) -> Workers:
        """Start the pool; its threads start with their first job."""
        single = partial(torch.set_num_threads, 1)
        self._pool = ThreadPoolExecutor(self.count, "gradstore-worker", initializer=single)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop the jobs that are not begun and wait for those that are."""
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)


def worker_count() -> int:
    """How many threads `Workers` has where no other number is asked for."""
    return min(torch.get_num_threads(), _MAX_WORKERS)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """No threads within an operation of torch: small ones take less time than threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Linear algebra libraries use one thread each, where a worker a core is used: none waits for another."""
    with one_torch_thread(), threadpool_limits(1):  # the limits hold for torch too, so it is asked before them
        yield
