"""Several processes that each compute whole shards; the coordinator alone holds the lock and lists them.

A shard is published by its worker under its final name and counts once the coordinator lists it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

from gradstore.engine.process_pool import run_in_processes
from gradstore.errors import UsageError
from gradstore.store.files.manifest import Shard
from gradstore.store.files.shard_writer import ShardWriter, write_shard
from gradstore.store.store_writer import StoreWriter

Result = TypeVar("Result")


def require_workers(workers: int, device: torch.device) -> int:
    """Refuse a number of workers that cannot be used.

    Returns:
        The number.

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
    manifest = writer.manifest

    def compute(index: int) -> tuple[Shard, Result]:
        with write_shard(writer.path, manifest, index, writer.disk, writer.computation) as shard:
            result = fill(shard)
        return shard.shard, result

    def adopt(found: tuple[Shard, Result]) -> None:
        writer.adopt(found[0])
        stored(*found)

    try:
        run_in_processes(compute, writer.missing, workers, adopt)
    except BaseException as error:
        writer.clean()
        if isinstance(error, BrokenProcessPool):
            raise UsageError(
                "a worker died",
                where=writer.path,
                got="killed, perhaps for its memory",
                hint="Run the same command again with fewer workers; finished shards are kept",
            ) from error
        raise
