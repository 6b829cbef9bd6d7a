"""Work beside the main stream: its order and what it holds, with stand-ins for streams; on a CPU, all at once."""

from __future__ import annotations

import weakref
from contextlib import contextmanager

import pytest
import torch

from gradstore.streams import Beside, Handover, to_host

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")


class Device:
    """Stands for torch.cuda; writes down what is asked of its streams."""

    def __init__(self):
        self.log, self.events = [], 0
        self.inside = [Stream(self, "main")]

    def current_stream(self, device):
        return self.inside[-1]

    def make_stream(self, device):
        return Stream(self, "second")

    @contextmanager
    def stream(self, stream):
        self.inside.append(stream)
        yield
        self.inside.pop()

    def work(self, name):
        self.log.append(f"{name} on {self.inside[-1].name}")


class Stream:
    def __init__(self, owner, name):
        self.owner, self.name, self.device = owner, name, GPU

    def wait_stream(self, other):
        self.owner.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.owner.log.append(f"{self.name} waits for event {event.number}")

    def record_event(self):
        self.owner.events += 1
        return Event(self.owner, self.owner.events)

    def synchronize(self):
        self.owner.log.append(f"host waits for {self.name}")


class Event:
    def __init__(self, owner, number):
        self.owner, self.number = owner, number

    def synchronize(self):
        self.owner.log.append(f"host waits for event {self.number}")


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
    with Handover(CPU).taken():
        done.append(2)
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
