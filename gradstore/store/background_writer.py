"""Rows are encoded, hashed and written in the background, while their owner computes the next ones."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from gradstore.store.files.digests import THREADS, row_digests
from gradstore.store.files.manifest import Shard
from gradstore.store.store_writer import StoreWriter

Columns = Mapping[str, np.ndarray]

AHEAD = 2  # batches that may be on their way besides the one being computed


class BackgroundWriter:
    """Writes the missing shards of a store from rows that are handed over in order; made by `in_background`.

    One thread makes every call to the disk, in the order of a writer that waits for each. So a shard is published as
    ever: its rows synced, then its name, then the manifest; and while it is synced, rows of the next one are hashed.

    Args:
        writer: of the store.
        stored: told of each shard when it counts, by that thread.
    """

    def __init__(self, writer: StoreWriter, stored: Callable[[Shard], None]) -> None:
        self._writer, self._stored = writer, stored
        self._schema, self._missing = writer.manifest.schema, writer.missing
        self._rows: queue.SimpleQueue[Future[tuple[Columns, np.ndarray]] | BaseException | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(AHEAD)
        self._given_up = False
        self._error: BaseException | None = None
        self._ended = threading.Event()  # not `join`, which reports a thread as gone when a signal interrupts it
        self._makers = ThreadPoolExecutor(min(THREADS, AHEAD), "gradstore-rows")
        # A daemon, so that it cannot keep alive a process whose main thread is gone; being killed loses nothing stored.
        threading.Thread(target=self._run, name="gradstore-writer", daemon=True).start()

    def write(self, make: Callable[[], Columns]) -> None:
        """Hand over the next rows; waits while `AHEAD` batches are on their way.

        Args:
            make: gives every dataset but `digest`, as `ShardWriter.write` takes them; called in another thread.

        Raises:
            BaseException: what went wrong with rows handed over before, just as it was raised there.
        """
        self._room.acquire()
        self._raise_error()
        self._rows.put(self._makers.submit(self._made, make))

    def finish(self) -> None:
        """Return once every row handed over is stored.

        Raises:
            BaseException: what went wrong, if anything did.
        """
        self._rows.put(None)
        self._wait()
        self._raise_error()

    def abandon(self, cause: BaseException) -> None:
        """Store the shards that were handed over whole, and remove the one begun."""
        self._rows.put(cause)
        self._wait(asked=isinstance(cause, KeyboardInterrupt))

    def _wait(self, asked: bool = False) -> None:
        """Wait for the thread, which must not outlive the writer's lock; asked to stop twice, it stops early."""
        interruption = None
        while not self._ended.is_set():
            try:
                self._ended.wait()
            except KeyboardInterrupt as error:
                self._given_up, asked, interruption = asked, True, error
        self._makers.shutdown(cancel_futures=True)
        if interruption is not None:
            raise interruption

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # -- in the other threads ------------------------------------------------------------------------------------

    def _made(self, make: Callable[[], Columns]) -> tuple[Columns, np.ndarray]:
        columns = self._schema.completed(make())
        return columns, row_digests(self._schema, columns, threads=1)

    def _run(self) -> None:
        try:
            self._write_shards()
        except BaseException as error:
            self._error = error
            self._room.release(AHEAD + 1)  # the owner may be waiting, and is to see the error
        finally:
            self._ended.set()

    def _write_shards(self) -> None:
        for index in self._missing:
            made = self._next()
            if made is None:
                return
            with self._writer.shard(index) as shard:
                while made is not None:
                    shard.write(*made)
                    self._room.release()
                    made = None if shard.full else self._next()
            self._stored(shard.shard)

    def _next(self) -> tuple[Columns, np.ndarray] | None:
        """The next rows; None where no more come. Raises what they, or their owner, raised."""
        item = self._rows.get()
        if self._given_up:
            raise KeyboardInterrupt
        if isinstance(item, BaseException):
            raise item
        return None if item is None else item.result()


@contextmanager
def in_background(
    writer: StoreWriter, stored: Callable[[Shard], None] = lambda shard: None
) -> Iterator[BackgroundWriter]:
    """Store rows while the next ones are computed.

    When the block raises, the shards that were handed over whole are stored, and the one begun is removed.

    Yields:
        A writer that takes rows; every row handed over is stored when the block ends.
    """
    background = BackgroundWriter(writer, stored)
    try:
        yield background
        background.finish()
    except BaseException as error:
        background.abandon(error)
        raise
