"""Streams of a CUDA device: products run beside the work they come from, and copies beside both.

On a CPU there is one queue, and everything here happens in turn and costs nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

import torch
from torch import Tensor


class Beside:
    """A second stream, so that a block is projected while the next one is made.

    The host runs ahead of the device: without a limit it would queue, and hold, every block of a batch.

    As a context manager it leaves nothing under way: when the body ends, the current stream waits for the second one;
    when it raises, the host does. Torch's allocator knows only the stream on which memory was asked for, so what the
    second stream reads and writes could otherwise be given to others, above all after running out of memory. The names
    of what it writes must outlive the body.

    Args:
        device: where the work is; on a CPU it is done at once.
        ahead: pieces of work that may be unfinished. What they read is held until they are done.
    """

    def __init__(self, device: torch.device, ahead: int = 2) -> None:
        self._ahead = ahead
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._unfinished: deque[tuple[torch.cuda.Event, object]] = deque()

    def __enter__(self) -> Beside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._drain()
            return
        try:
            self.join()
        except BaseException:
            self._drain()
            raise

    def run(self, work: Callable[[], object], reads: object) -> None:
        """Do `work` after all that is queued on the current stream so far.

        Args:
            work: queues kernels; what it allocates belongs to the second stream.
            reads: what it reads of the current stream's memory, which must not be given to others meanwhile.
        """
        if self._stream is None:
            work()
            return
        while len(self._unfinished) >= self._ahead:
            event, held = self._unfinished.popleft()
            event.synchronize()
            del held  # only now
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            work()
        self._unfinished.append((self._stream.record_event(), reads))

    def join(self) -> None:
        """Have the current stream wait for all of it; memory that was read may then be used again."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._unfinished.clear()

    def _drain(self) -> None:
        if self._stream is not None:
            _drain(self._stream)
            self._unfinished.clear()


class Handover:
    """What one thread's current stream has queued so far, for another thread to take over from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """In the other thread: work and copies that follow what was queued, beside whatever is queued after it.

        However the body ends, the host waits until they are done: they read memory of another stream.
        """
        if self._done is None:
            yield
            return
        stream = torch.cuda.Stream(self._device)
        stream.wait_event(self._done)
        with torch.cuda.stream(stream):
            try:
                yield
            except BaseException:
                _drain(stream)
                raise
            stream.synchronize()


def _drain(stream: torch.cuda.Stream) -> None:
    """Have the host wait for a stream while an exception is on its way, which stays the one that is raised."""
    with suppress(Exception):  # a device that has failed says so at every call
        stream.synchronize()


def to_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors on the CPU, from a CUDA device through pinned memory, which torch keeps for the next copy."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return tensors
    copies = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors)
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return copies
