"""Work beside the main stream: its order and what it holds, with stand-ins for streams; on a CPU, all at once."""

from __future__ import annotations

import weakref
from contextlib import contextmanager

import pytest
import torch

from gradstore.machine.cuda_streams import Beside, Handover, to_host

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")


class Device:
    """Stands for torch.cuda; writes down what is asked of its streams."""

    def __init__(self):
        self.log, self.events = [], 0
        self.failed = False  # a device that has failed raises at every call
        self.inside = [Stream(self, "main")]

    def current_stream(self, device):
        return self.inside[-1]

    def make_stream(self, device):
        return Stream(self, "second")

    @contextmanager
    def stream(self, stream):
        self.inside.append(stream)
        try:
            yield
        finally:
            self.inside.pop()

    def work(self, name):
        self.log.append(f"{name} on {self.inside[-1].name}")

    def note(self, line):
        self.log.append(line)
        if self.failed:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Stream:
    def __init__(self, owner, name):
        self.owner, self.name, self.device = owner, name, GPU

    def wait_stream(self, other):
        self.owner.note(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.owner.log.append(f"{self.name} waits for event {event.number}")

    def record_event(self):
        self.owner.events += 1
        return Event(self.owner, self.owner.events)

    def synchronize(self):
        self.owner.note(f"host waits for {self.name}")


class Event:
    def __init__(self, owner, number):
        self.owner, self.number = owner, number

    def synchronize(self):
        self.owner.note(f"host waits for event {self.number}")


@pytest.fixture
def cuda(monkeypatch):
    found = Device()
    monkeypatch.setattr(torch.cuda, "Stream", found.make_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", found.current_stream)
    monkeypatch.setattr(torch.cuda, "stream", found.stream)
    return found


def test_work_follows_what_is_queued_and_the_main_stream_follows_the_work(cuda):
    beside = Beside(GPU)
    beside.run(lambda: cuda.work("product"), reads=None)
    cuda.work("next block")
    beside.join()
    assert cuda.log == ["second waits for main", "product on second", "next block on main", "main waits for second"]


def test_the_host_runs_ahead_by_two_and_holds_what_they_read(cuda):
    class Block:
        pass

    beside, held = Beside(GPU, ahead=2), []
    for number in range(4):
        block = Block()
        held.append(weakref.ref(block))
        beside.run(lambda number=number: cuda.work(f"product {number}"), reads=block)
        del block
    assert [reference() is not None for reference in held] == [False, False, True, True]
    assert cuda.log.index("host waits for event 1") < cuda.log.index("product 2 on second")
    assert cuda.log.index("host waits for event 2") < cuda.log.index("product 3 on second")
    assert "host waits for event 3" not in cuda.log
    beside.join()
    assert not any(reference() for reference in held)


class Stop(BaseException):
    """Stands for Ctrl-C."""


def test_without_an_exception_the_host_does_not_wait(cuda):
    with Beside(GPU) as beside:
        beside.run(lambda: cuda.work("product"), reads=None)
    assert cuda.log == ["second waits for main", "product on second", "main waits for second"]


@pytest.mark.parametrize("error", [MemoryError("out of memory"), Stop()], ids=["error", "stop"])
@pytest.mark.parametrize("place", ["work", "body"])
def test_an_exception_leaves_nothing_under_way_when_memory_is_freed(cuda, place, error):
    def fail():
        cuda.work("half a product")
        raise error

    class Memory:
        def __del__(self):
            cuda.log.append("memory is freed")

    def project():
        features = Memory()
        with Beside(GPU) as beside:
            beside.run(lambda: cuda.work("product"), reads=Memory())
            if place == "work":
                beside.run(fail, reads=features)
            raise error

    with pytest.raises(type(error)) as raised:
        project()
    assert raised.value is error
    del raised
    error.__traceback__ = None  # frames that hold the features
    waits = cuda.log.index("host waits for second")
    assert cuda.log.count("host waits for second") == 1
    assert waits > max(i for i, line in enumerate(cuda.log) if line.endswith("on second"))
    assert [line for line in cuda.log[:waits] if line == "memory is freed"] == []
    assert cuda.log.count("memory is freed") == 2
    assert cuda.inside[-1].name == "main"


def test_a_device_that_fails_while_it_is_waited_for_does_not_hide_what_failed_first(cuda):
    error = MemoryError("out of memory")

    def project():
        with Beside(GPU) as beside:
            beside.run(lambda: cuda.work("product"), reads=None)
            cuda.failed = True
            raise error

    with pytest.raises(MemoryError) as raised:
        project()
    assert raised.value is error
    assert cuda.log[-1] == "host waits for second"


@pytest.mark.parametrize("at", ["run", "join"])
def test_a_device_that_fails_inside_is_waited_for_and_reported(cuda, at):
    def begin():
        with Beside(GPU, ahead=1) as beside:
            beside.run(lambda: cuda.work("product"), reads=None)
            cuda.failed = True
            if at == "run":
                beside.run(lambda: cuda.work("product"), reads=None)

    with pytest.raises(RuntimeError, match="illegal memory access"):
        begin()
    assert cuda.log[-2:] == [{"run": "host waits for event 1", "join": "main waits for second"}[at], cuda.log[-1]]
    assert cuda.log[-1] == "host waits for second"


@pytest.mark.parametrize("failed", [False, True], ids=["device works", "device failed"])
@pytest.mark.parametrize("error", [MemoryError("out of memory"), Stop()], ids=["error", "stop"])
def test_a_thread_that_raises_has_waited_for_its_copies(cuda, error, failed):
    def take():
        with Handover(GPU).taken():
            cuda.work("copy")
            cuda.failed = failed
            raise error

    with pytest.raises(type(error)) as raised:
        take()
    assert raised.value is error
    assert cuda.log == ["second waits for event 1", "copy on second", "host waits for second"]
    assert cuda.inside[-1].name == "main"


def test_another_thread_takes_over_after_what_was_queued(cuda):
    handover = Handover(GPU)
    cuda.work("next batch")
    with handover.taken():
        cuda.work("copy")
    assert cuda.log == ["next batch on main", "second waits for event 1", "copy on second", "host waits for second"]


def test_on_a_cpu_everything_happens_at_once():
    done, beside = [], Beside(CPU)
    beside.run(lambda: done.append(1), reads=None)
    assert done == [1]
    beside.join()
    with Beside(CPU) as beside, Handover(CPU).taken():
        beside.run(lambda: done.append(2), reads=None)
    with pytest.raises(MemoryError), Beside(CPU), Handover(CPU).taken():
        raise MemoryError
    tensors = torch.ones(3), torch.zeros(2)
    assert all(a is b for a, b in zip(to_host(*tensors), tensors, strict=True))
    assert done == [1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_sums_beside_the_main_stream_are_right():
    out, beside = torch.zeros(1000, 1000, device="cuda"), Beside(torch.device("cuda:0"))
    for number in range(1, 51):
        block = torch.full((1000, 1000), float(number), device="cuda")
        beside.run(lambda block=block: out.add_(block), reads=block)
        del block
    beside.join()
    handover = Handover(out.device)
    with handover.taken():
        (copy,) = to_host(out)
    assert copy.is_pinned()
    assert (copy == 50 * 51 / 2).all()
