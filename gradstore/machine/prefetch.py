"""Read ahead: one item is made in a thread while the one before it is in use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def prefetched(make: Callable[[S], T], requests: Iterable[S]) -> Iterator[tuple[S, T]]:
    """Make things in a thread, each while the one before it is in use.

    An exception of `make` is raised where its item would have come. Leaving the loop early stops the thread after the
    item that it is making.

    Yields:
        (request, make(request)), in order. Besides the item in use one more is held and one is being made.
    """
    # Simple queues alone: a signal whose handler raises within another or an event leaves its lock taken for ever.
    made: SimpleQueue[tuple[str, object]] = SimpleQueue()
    room: SimpleQueue[bool] = SimpleQueue()  # for one item; False: no more is wanted
    room.put(True)

    def hand_over(kind: str, value: object) -> bool:
        wanted = room.get()
        if wanted:
            made.put((kind, value))
        return wanted

    def work() -> None:
        try:
            for request in requests:
                if not hand_over("item", (request, make(request))):
                    return
            hand_over("end", None)
        except BaseException as error:
            hand_over("error", error)

    thread = threading.Thread(target=work, name="gradstore-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = made.get()
            room.put(True)
            if kind == "end":
                return
            if kind == "error":
                raise value  # type: ignore[misc]
            yield value  # type: ignore[misc]
            del value  # it is not to be held while the next one is awaited
    finally:
        with suppress(Empty):  # what was room for the next item
            while True:
                room.get_nowait()
        room.put(False)
        thread.join()
