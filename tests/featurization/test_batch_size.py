"""Rows a batch: found by timing, halved when memory runs out, invisible in what is stored."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_featurize import files_of
from torch import nn
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import UsageError
from gradstore.featurization.batch_size import BatchSize
from gradstore.machine.out_of_memory import is_out_of_memory

pytestmark = pytest.mark.numerical

FEATURIZE = sys.modules[gs.featurize.__module__]


def project(rows: int = 100) -> gs.Project:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return gs.Project(model=model, splits={"train": TensorDataset(torch.randn(rows, 6), torch.arange(rows) % 3)})


def settled(seconds_a_row: dict[int, float], most: int) -> int:
    batch = BatchSize(16, most)
    for _ in range(10):
        batch.took(batch.rows, seconds_a_row[batch.groups] * batch.rows)
    return batch.groups


def test_a_batch_grows_while_rows_become_no_slower() -> None:
    assert settled({1: 4.0, 2: 3.0, 4: 2.5, 8: 2.0, 16: 1.9}, most=16) == 16
    assert settled({1: 4.0, 2: 3.0, 4: 2.5, 8: 2.0}, most=11) == 8
    assert settled({1: 4.0, 2: 3.0, 4: 5.0, 8: 1.0}, most=64) == 2
    assert settled({1: 1.0, 2: 1.05, 4: 1.2}, most=64) == 1
    assert settled({1: 1.0}, most=1) == 1


def test_batches_cut_short_tell_nothing_and_a_given_size_stays() -> None:
    batch = BatchSize(16, most=8)
    batch.took(7, 100.0)
    assert batch.groups == 1
    fixed = BatchSize(16, most=8, fixed=50)
    fixed.took(48, 1.0)
    assert fixed.rows == 48
    assert BatchSize(16, most=8, fixed=5).rows == 16


def test_halving_ends_the_search_and_stops_at_one_group() -> None:
    batch = BatchSize(16, most=64, fixed=80)
    assert [batch.halve() and batch.groups for _ in range(3)] == [2, 1, False]
    growing = BatchSize(16, most=64)
    growing.took(16, 1.0)
    assert growing.halve()
    growing.took(16, 0.1)
    assert growing.groups == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_torch_itself_says_it_in_these_words() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [MemoryError, lambda: torch.cuda.OutOfMemoryError("CUDA out of memory"), lambda: RuntimeError("not enough memory")],
    ids=["MemoryError", "cuda", "cpu"],
)
def test_out_of_memory_halves_the_batch_and_goes_on_to_the_same_bytes(
    error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstore.featurization.plan.LARGE_GROUP", 16)
    whole = gs.featurize(project(), split="train", out=tmp_path / "a", proj_dim=64)
    real, sizes, notes = FEATURIZE.compute, [], []

    def small_machine(plan: Any, rows: range, group: int, *rest: Any, **named: Any) -> Any:
        sizes.append(-(-len(rows) // group))
        if sizes[-1] > 2:
            raise error()
        return real(plan, rows, group, *rest, **named)

    monkeypatch.setattr(FEATURIZE, "compute", small_machine)
    store = gs.featurize(
        project(), split="train", out=tmp_path / "b", proj_dim=64, batch_size=100, on_note=notes.append
    )
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1, 1]
    assert notes == [
        "out of memory with 96 rows at once; going on with 48",
        "out of memory with 48 rows at once; going on with 16",
    ]
    assert files_of(store.path) == files_of(whole.path)
    logged = [json.loads(line) for line in (tmp_path / "b" / "run.jsonl").read_text().splitlines()]
    assert [event["note"] for event in logged if event["event"] == "note"] == notes


def test_one_group_that_does_not_fit_is_an_error_and_finished_shards_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstore.featurization.plan.SHARD_BYTES", 1)
    real = FEATURIZE.compute

    def fails_later(plan: Any, rows: range, *rest: Any, **named: Any) -> Any:
        if rows.start >= 48:
            raise MemoryError("row 48")
        return real(plan, rows, *rest, **named)

    monkeypatch.setattr(FEATURIZE, "compute", fails_later)
    with pytest.raises(
        UsageError, match=r"^cpu: memory ran out with one group of \d+ rows. .* smaller --memory"
    ) as found:
        gs.featurize(project(), split="train", out=tmp_path / "a", proj_dim=64)
    assert str(found.value.__cause__) == "row 48"
    assert len(gs.open(tmp_path / "a")) == 48


def test_the_timed_search_reaches_large_batches_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradstore.featurization.plan.LARGE_GROUP", 16)
    real, sizes = FEATURIZE.compute, []

    def noted(plan: Any, rows: range, group: int, *rest: Any, **named: Any) -> Any:
        sizes.append(-(-len(rows) // group))
        return real(plan, rows, group, *rest, **named)

    def steady(batch: BatchSize, rows: int, seconds: float) -> None:
        took(batch, rows, 1.0)

    took = BatchSize.took
    monkeypatch.setattr(FEATURIZE, "compute", noted)
    monkeypatch.setattr(BatchSize, "took", steady)
    gs.featurize(project(400), split="train", out=tmp_path / "a", proj_dim=64)
    assert sizes[:4] == [1, 2, 4, 8]
    assert sum(sizes) == 25
