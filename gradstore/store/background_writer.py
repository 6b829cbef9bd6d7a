"""Rows are encoded, hashed and written in the background, while their owner computes the next ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue

import numpy as np

from gradstore.store.files.digests import THREADS, row_digests
from gradstore.store.files.manifest import Shard
from gradstore.store.store_writer import StoreWriter

Columns = Mapping[str, np.ndarray]
Rows = tuple[Columns, np.ndarray]

_Box = SimpleQueue["Rows | BaseException"]  # for one batch, once it is made

AHEAD = 2  # batches that may be on their way besides the one being computed


class BackgroundWriter:
    """Writes the missing shards of a store from rows that are handed over in order; made by `in_background`.

    One thread makes every call to the disk, in the order of a writer that waits for each. So a shard is published as
    ever: its rows synced, then its name, then the manifest; and while it is synced, rows of the next one are hashed.

    Threads speak through `SimpleQueue` alone. A signal whose handler raises in the middle of `threading`'s other means,
    or of a future's, leaves their lock taken for ever, and whoever asks for it next waits as long.

    Args:
        writer: of the store.
        stored: told of each shard when it counts, by that thread.
    """

    def __init__(self, writer: StoreWriter, stored: Callable[[Shard], None]) -> None:
        self._writer, self._stored = writer, stored
        self._schema, self._missing = writer.manifest.schema, writer.missing
        self._tasks: SimpleQueue[tuple[Callable[[], Columns], _Box] | None] = SimpleQueue()
        self._rows: SimpleQueue[_Box | BaseException | None] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()
        for _ in range(AHEAD):
            self._room.put(None)
        self._given_up = self._over = False
        self._error: BaseException | None = None
        # Not `join` alone, which reports a thread as gone when a signal interrupts it.
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._makers = min(THREADS, AHEAD)
        self._running, self._counting = 1 + self._makers, threading.Lock()
        # Daemons, so that they cannot keep alive a process whose main thread is gone; killed, they lose nothing stored.
        makers = [(self._make, f"gradstore-rows_{number}") for number in range(self._makers)]
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for work, name in [*makers, (self._run, "gradstore-writer")]
        ]
        for thread in self._threads:
            thread.start()

    def write(self, make: Callable[[], Columns]) -> None:
        """Hand over the next rows; waits while `AHEAD` batches are on their way.

        Args:
            make: gives every dataset but `digest`, as `ShardWriter.write` takes them; called in another thread.

        Raises:
            BaseException: what went wrong with rows handed over before, just as it was raised there.
        """
        self._room.get()
        self._raise_error()
        box: _Box = SimpleQueue()
        self._tasks.put((make, box))
        self._rows.put(box)

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
        """Wait for the threads, which must not outlive the writer's lock; asked to stop twice, they stop early."""
        interruption = None
        while self._running:
            try:
                self._ended.get()
            except KeyboardInterrupt as error:
                self._given_up, asked, interruption = asked, True, error
        for thread in self._threads:  # a daemon on its last steps crashes an interpreter that ends meanwhile
            try:
                thread.join()
            except KeyboardInterrupt as error:
                interruption = error
        if interruption is not None:
            raise interruption

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # -- in the other threads ------------------------------------------------------------------------------------

    def _make(self) -> None:
        """Make rows, until no more are asked for."""
        while (task := self._tasks.get()) is not None:
            make, box = task
            if self._over:
                continue
            try:
                columns = self._schema.completed(make())
                box.put((columns, row_digests(self._schema, columns, threads=1)))
            except BaseException as error:
                box.put(error)
            del task, make, box  # they may hold a batch
        self._end()

    def _run(self) -> None:
        try:
            self._write_shards()
        except BaseException as error:
            self._error = error
        finally:
            for _ in range(AHEAD + 1):  # the owner may be waiting, and is to see the error
                self._room.put(None)
            self._over = True
            for _ in range(self._makers):
                self._tasks.put(None)
            self._end()

    def _end(self) -> None:
        with self._counting:
            self._running -= 1
        self._ended.put(None)

    def _write_shards(self) -> None:
        for index in self._missing:
            made = self._next()
            if made is None:
                return
            with self._writer.shard(index) as shard:
                while made is not None:
                    shard.write(*made)
                    self._room.put(None)
                    made = None if shard.full else self._next()
            self._stored(shard.shard)

    def _next(self) -> Rows | None:
        """The next rows; None where no more come. Raises what they, or their owner, raised."""
        item = self._rows.get()
        if self._given_up:
            raise KeyboardInterrupt
        found = item.get() if isinstance(item, SimpleQueue) else item
        if isinstance(found, BaseException):
            raise found
        return found


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
