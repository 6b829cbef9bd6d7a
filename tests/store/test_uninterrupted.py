"""Signals wait for the end of work that they must not cut in two, and none is lost."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gradstore.errors import UsageError
from gradstore.store.files import layout
from gradstore.store.files.layout import file_layout
from gradstore.store.files.uninterrupted import uninterrupted
from gradstore.store.schema import Column

NUMBERS = [signal.SIGINT, signal.SIGTERM]


class StopError(Exception):
    """What the handler of a test raises."""


@pytest.fixture(params=NUMBERS)
def number(request: pytest.FixtureRequest) -> Iterator[int]:
    def stop(*_: object) -> None:
        raise StopError

    before = signal.signal(request.param, stop)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_waits_for_the_end(number: int) -> None:
    handler, done = signal.getsignal(number), []

    def work() -> None:
        with uninterrupted():
            signal.raise_signal(number)
            done.append("all")

    with pytest.raises(StopError):
        work()
    assert done == ["all"]
    assert signal.getsignal(number) is handler


def test_a_signal_that_is_ignored_stays_so(number: int) -> None:
    signal.signal(number, signal.SIG_IGN)
    with uninterrupted():
        signal.raise_signal(number)
    assert signal.getsignal(number) == signal.SIG_IGN


def test_errors_pass_and_handlers_are_restored(number: int) -> None:
    handler = signal.getsignal(number)
    with pytest.raises(UsageError), uninterrupted():
        raise UsageError("no such thing")
    assert signal.getsignal(number) is handler


def test_other_threads_leave_handlers_alone(number: int) -> None:
    handler = signal.getsignal(number)

    def look() -> bool:
        with uninterrupted():
            return signal.getsignal(number) is handler

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(look).result()


def test_a_header_is_composed_whole(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """HDF5 calls the image back; an error raised within such a call came out as another one, or not at all."""
    image, finished = layout._SparseImage, []

    def interrupted(method: Callable[..., object]) -> Callable[..., object]:
        def call(self: object, *arguments: object) -> object:
            signal.raise_signal(number)
            found = method(self, *arguments)
            finished.append(method.__name__)
            return found

        return call

    columns = [Column("values", (3,), np.dtype("float32"), "n k", "numbers")]
    expected = file_layout(columns, 5, {"format": "x"})
    monkeypatch.setattr(image, "write", interrupted(image.write))
    with pytest.raises(StopError):
        file_layout(columns, 5, {"format": "x"})
    assert finished
    monkeypatch.undo()
    assert file_layout(columns, 5, {"format": "x"}) == expected
