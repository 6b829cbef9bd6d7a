"""Independent tasks in several processes.

They are forked, so that a task may close over what cannot be pickled, such as a model or a dataset, and use one thread
each. None outlives the process that began them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_inherited: Callable[[Any], Any] | None = None


def run_in_processes(
    task: Callable[[Item], Result], items: Iterable[Item], workers: int, done: Callable[[Result], None]
) -> None:
    """Run a task on every item, and hand over results as they come.

    Args:
        task: runs in a process of its own, which inherits what it closes over; its result is pickled.
        items: pickled.
        workers: processes; no more than there are items are started.
        done: told of each result, in the calling process.

    Raises:
        concurrent.futures.process.BrokenProcessPool: a process was killed.
        BaseException: what a task or `done` raised first. By then no process is left.
    """
    others, items = set(multiprocessing.active_children()), list(items)
    if not items:
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(min(workers, len(items)), context, _begin, (task, os.getpid()))
    try:
        with warnings.catch_warnings():
            # Forking a process with threads is deprecated; workers use none of the pools that threads may hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            futures = [pool.submit(_run, item) for item in items]
        for future in as_completed(futures):
            done(future.result())
        pool.shutdown()
    except BaseException:
        processes = set(multiprocessing.active_children()) - others
        for process in processes:
            process.kill()
        # The pool's own thread waits for the same processes: until it ends, one that it has seen die counts as alive.
        pool.shutdown(cancel_futures=True)
        for process in processes:
            process.join()
        raise


def _begin(task: Callable[[Any], Any], parent: int) -> None:
    global _inherited
    _inherited = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    """End with the parent, whose locks this process would otherwise go on holding."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _run(item: Any) -> Any:
    assert _inherited is not None
    return _inherited(item)
