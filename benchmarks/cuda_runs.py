"""Whole runs on a GPU for `bench_cuda.py`: what featurizing takes, and where the time goes."""

from __future__ import annotations

import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from cuda_timing import SEED, K, Recorder

import gradstore as gs
from gradstore.projection.projection_audit import AuditSchedule


def featurized(model: torch.nn.Module, inputs: torch.Tensor, classes: int) -> dict[str, float]:
    """Seconds that featurize spends on its rows, and where."""
    data = torch.utils.data.TensorDataset(inputs, torch.randint(0, classes, (len(inputs),)))
    last: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        gs.featurize(
            gs.Project(model=model, splits={"train": data}),
            split="train",
            out=Path(folder) / "store",
            proj_dim=K,
            device="cuda",
            progress=lambda state: last.update(seconds=state.seconds, **state.busy),
        )
    return last


def not_audited(model: torch.nn.Module, inputs: torch.Tensor, classes: int) -> float:
    """Seconds of a run in which no batch is audited."""
    before, AuditSchedule.due = AuditSchedule.due, property(lambda self: False)  # type: ignore[assignment]
    try:
        return featurized(model, inputs, classes)["seconds"]
    finally:
        AuditSchedule.due = before  # type: ignore[method-assign]


def large_models() -> tuple:
    """Name, model, inputs by their number, classes, examples of the whole data set and of a measurement."""
    from bench_jacobians import resnet18
    from bert import LENGTH, VOCABULARY, Bert

    torch.manual_seed(SEED)
    return (
        ("ResNet18, 10 classes", resnet18(), lambda n: torch.randn(n, 3, 32, 32), 10, 60000, 512),
        ("BERT-base, 2 classes", Bert(), lambda n: torch.randint(0, VOCABULARY, (n, LENGTH)), 2, 8192, 320),
    )


def ends(record: Recorder) -> None:
    """Featurize a ResNet18 on CIFAR-shaped data and a BERT-base on tokens, and what the whole would take.

    The first batch of a run is audited whatever it costs, later ones for 0.5 % of the projection's time.
    """
    for name, model, make, classes, whole, n in large_models():
        p = sum(parameter.numel() for parameter in model.parameters())
        featurized(model, make(n // 8), classes)  # compiles, warms up
        torch.cuda.reset_peak_memory_stats()
        found = featurized(model, make(n), classes)
        memory = torch.cuda.max_memory_allocated() / 1e9
        note = ", ".join(f"{key} {value:.1f}" for key, value in found.items())
        record(f"featurize {name}, its first audit included", n / found["seconds"], "rows/s", n, p, note)
        seconds = not_audited(model, make(n), classes)
        record("without audits", n / seconds, "rows/s", n, p, f"{seconds:.2f} s")
        first = max(0.0, found["seconds"] - seconds)
        record(f"extrapolated to {whole} rows", (first + 1.005 * whole * seconds / n) / 60, "min", whole, p)
        record("GPU memory", memory, "GB", n, p)


def profile(record: Recorder) -> None:
    """Which kernels whole runs spend their time in, how long the card has none to run, and where the host is."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    for name, model, make, classes, _, n in large_models():
        not_audited(model, make(n // 8), classes)
        with sampled() as places, profiled(activities=[ProfilerActivity.CUDA]) as found:
            seconds = not_audited(model, make(n // 2), classes)
        kernels = sorted(
            (event.time_range.start, event.time_range.end, event.name)
            for event in found.events()
            if str(event.device_type).endswith("CUDA") and not event.is_user_annotation
        )
        busy, covered = 0.0, float("-inf")
        for begin, end, _ in kernels:
            busy, covered = busy + max(0.0, end - max(begin, covered)), max(covered, end)
        record(f"kernels of {name}, and its plan", len(kernels), "", n // 2)
        record("the card is busy", busy / 1e6, "s", n // 2, note=f"run {seconds:.2f} s")
        times: dict[str, list[float]] = {}
        for begin, end, kernel in kernels:
            times.setdefault(kernel[:90], []).append((end - begin) / 1e3)
        for kernel, spent in sorted(times.items(), key=lambda item: -sum(item[1]))[:18]:
            print(f"{sum(spent):9.1f} ms {len(spent):6} x {kernel}")
        for place, count in places.most_common(14):
            print(f"{count / places.total():6.1%} of the host's time at {place}")


@contextmanager
def sampled() -> Iterator[Counter[str]]:
    """Where this thread is, looked at every few milliseconds: gradstore's own innermost line."""
    places: Counter[str] = Counter()
    ended, thread = threading.Event(), threading.get_ident()

    def look() -> None:
        while not ended.wait(0.003):
            frame = sys._current_frames().get(thread)
            while frame is not None and "/gradstore/" not in frame.f_code.co_filename:
                frame = frame.f_back
            if frame is not None:
                places[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"] += 1

    looker = threading.Thread(target=look, daemon=True)
    looker.start()
    try:
        yield places
    finally:
        ended.set()
        looker.join()
