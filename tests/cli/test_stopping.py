"""Signals that stop a command where they come, without what others wait for being left behind."""

from __future__ import annotations

import _thread
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
from gradstore_cli import stopping


class Lock:
    """A condition's; a signal comes at the moment at which it was taken, as if the system had sent it then."""

    def __init__(self, number: int) -> None:
        self.taken: list[bool] = []
        self.acquire, self.release = (lambda: True), (lambda: None)
        self.__enter__ = partial(_thread.interrupt_main, number)
        self.__exit__ = lambda *_: self.taken.append(False)


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request: pytest.FixtureRequest) -> Iterator[int]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stopping.listen()
    yield request.param
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_that_comes_as_a_lock_is_taken_leaves_it_free(number: int) -> None:
    lock, within = Lock(number), []

    def work() -> None:
        with threading.Condition(lock):  # type: ignore[arg-type]
            within.append(True)
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt) as stop:
        work()
    assert isinstance(stop.value, stopping.Terminated) == (number == signal.SIGTERM)
    assert within
    assert lock.taken == [False]


def test_a_signal_elsewhere_is_raised_at_once(number: int) -> None:
    done = []

    def work() -> None:
        _thread.interrupt_main(number)
        done.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == []
