"""Work that a signal must not cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the end of the context, where their handlers are called.

    For short work inside libraries that call back into Python: they lose the exception of a handler that runs within
    such a call, or turn it into another. Handlers run in the main thread only; in others nothing need be done. Where
    the work itself fails, its error is raised and the signal is dropped.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[tuple[int, FrameType | None]] = []
    handlers = {number: signal.getsignal(number) for number in _NUMBERS}
    with ExitStack() as stack:  # which restores every handler, even where one is called meanwhile and raises
        for number, handler in handlers.items():
            if handler is not None:  # not installed by Python: cannot be put back
                stack.callback(signal.signal, number, handler)
                signal.signal(number, lambda *arguments: seen.append(arguments))
        yield
    for caught, frame in seen:
        handler = handlers[signal.Signals(caught)]
        if callable(handler):
            handler(caught, frame)
        elif handler == signal.SIG_DFL:
            signal.raise_signal(caught)
