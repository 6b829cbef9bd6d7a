"""Several processes that each compute whole shards; the coordinator alone holds the lock and lists them.

Workers are forked, so that a model or a dataset that cannot be pickled works, and use one thread each. A shard is
published by its worker under its final name and counts once the coordinator lists it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from gradstore.errors import UsageError
from gradstore.storage.disk import Disk
from gradstore.storage.manifest import Manifest, Shard
from gradstore.storage.shard_writer import ShardWriter, write_shard
from gradstore.writer import StoreWriter

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Job:
    """What a worker inherits from the coordinator."""

    directory: Path
    manifest: Manifest
    disk: Disk
    fill: Callable[[ShardWriter], Any]


_inherited: _Job | None = None


def require_workers(workers: int, device: torch.device) -> int:
    """The number of workers, if it can be used.

    Raises:
        UsageError: below 1, or more than 1 on a device that a forked process cannot use.
    """
    if workers < 1 or (workers > 1 and device.type != "cpu"):
        expected = "at least 1; exactly 1 unless on the CPU"
        raise UsageError("unusable number of workers", where="--workers", expected=expected, got=workers)
    return workers


def write_shards(
    writer: StoreWriter, fill: Callable[[ShardWriter], Result], workers: int, stored: Callable[[Shard, Result], None]
) -> None:
    """Compute the missing shards of a store in `workers` processes.

    Args:
        writer: the coordinator's.
        fill: writes all rows of one shard; called in a worker.
        workers: number of processes; each holds what `fill` does.
        stored: told of each shard when it counts, and of what `fill` returned for it.

    Raises:
        UsageError: a worker was killed; finished shards are kept.
        GradstoreError: what `fill` raised first.
    """
    job = _Job(writer.path, writer.manifest, writer.disk, fill)
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _begin, (job, os.getpid()))
    try:
        with warnings.catch_warnings():
            # Forking a process with threads is deprecated; workers use none of the pools that threads may hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            futures = [pool.submit(_write, index) for index in writer.missing]
        for future in as_completed(futures):
            shard, result = future.result()
            writer.adopt(shard)
            stored(shard, result)
        pool.shutdown()
    except BaseException as error:
        processes = set(multiprocessing.active_children()) - others
        for process in processes:
            process.kill()
        # The pool's own thread waits for the same processes: until it ends, one that it has seen die counts as alive.
        pool.shutdown(cancel_futures=True)
        for process in processes:
            process.join()
        writer.clean()
        if isinstance(error, BrokenProcessPool):
            raise UsageError(
                "a worker died",
                where=writer.path,
                got="killed, perhaps for its memory",
                hint="Run the same command again with fewer workers; finished shards are kept",
            ) from error
        raise


def _begin(job: _Job, coordinator: int) -> None:
    global _inherited
    _inherited = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinator decides what Ctrl-C means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    threading.Thread(target=_follow, args=(coordinator,), daemon=True).start()


def _follow(coordinator: int) -> None:
    """End with the coordinator, whose lock a worker would otherwise go on holding."""
    while os.getppid() == coordinator:
        time.sleep(0.2)
    os._exit(1)


def _write(index: int) -> tuple[Shard, Any]:
    assert _inherited is not None
    with write_shard(_inherited.directory, _inherited.manifest, index, _inherited.disk) as shard:
        result = _inherited.fill(shard)
    return shard.shard, result
