"""The second look at a few projected values: right ones pass with room to spare; a wrong P, norms kept, does not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, HARD_CASES, Case, project_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import NonFiniteError
from gradstore.featurization import batch
from gradstore.featurization.lowered_features import LoweredFeatures
from gradstore.featurization.on_the_spot import featurize_queries
from gradstore.featurization.plan import Plan
from gradstore.featurization.settings import Settings
from gradstore.jacobians import DenseBlock, EmbeddingBlock, JacobianBlock, LinearBlock, LoweredBlock, OwnRowBlock
from gradstore.jacobians.blocks import LazyBlock
from gradstore.machine.cuda_streams import Beside
from gradstore.native import library
from gradstore.projection import Projection, block_sums, compiled_product
from gradstore.projection.block_routes import accumulate_block, route
from gradstore.projection.entries import Entries
from gradstore.projection.kinds import kind_of
from gradstore.projection.projection_audit import AuditSchedule, Comparison, ProjectionAudit

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
CPU = torch.device("cpu")
LAYOUTS = ["per-class", "sum", "mixed"]
KINDS = ["rademacher", "gaussian", "sjlt"]


@pytest.fixture
def every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AuditSchedule, "due", True)


@pytest.fixture
def margins(every_batch: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The largest difference of each comparison, in tolerances."""
    found: list[float] = []
    require = Comparison.require

    def measured(self: Comparison, sq_norm: Tensor, split: str) -> None:
        found.append(float((self.want - self.got).abs().max()) / self.tolerance(sq_norm))
        require(self, sq_norm, split)

    monkeypatch.setattr(Comparison, "require", measured)
    return found


# -- entries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_columns_and_strips_are_the_entries_at_any_k(kind: str) -> None:
    entries, k = Entries(kind, 2**63 + 7, 5), torch.tensor([0, 3, 17, 2**31 + 1, 2**32 - 1])
    for start, stop in [(0, 1), (127, 129), (130, 1000), (2**33 - 5, 2**33 + 300)]:
        assert torch.equal(entries.columns(k, start, stop), entries.at(k[:, None], torch.arange(start, stop)))
    for width in (1, 3, 127, 128, 129, 300):
        starts = torch.tensor([0, 1, 127, 128, 5000, 2**33 - 1])
        want = entries.at(k[:, None, None], starts[:, None] + torch.arange(width))
        assert torch.equal(entries.strips(k, starts, width), want)


# -- blocks --------------------------------------------------------------------------------------------------------


def _dense(n: int, c: int, draw: torch.Generator) -> JacobianBlock:
    return DenseBlock("bias", 128, torch.randn(n, c, 40000, generator=draw))


def _lazy(n: int, c: int, draw: torch.Generator) -> JacobianBlock:
    values = torch.randn(n, c, 33, generator=draw)
    return LazyBlock("norm", 2**33 + 128, 33, lambda: values)


def _linear(n: int, c: int, draw: torch.Generator) -> JacobianBlock:
    return LinearBlock("weight", 384, torch.randn(n, 1, 70, generator=draw), torch.randn(n, c, 1, 300, generator=draw))


def _convolution(n: int, c: int, draw: torch.Generator) -> JacobianBlock:
    return LinearBlock("kernel", 256, torch.randn(n, 49, 27, generator=draw), torch.randn(n, c, 49, 8, generator=draw))


def _one_wide_row(n: int, c: int, draw: torch.Generator) -> JacobianBlock:
    return LinearBlock("wide", 0, torch.randn(n, 1, 20000, generator=draw), torch.randn(n, c, 1, 2, generator=draw))


def _embedding(n: int, c: int, draw: torch.Generator) -> JacobianBlock:
    indices = torch.randint(0, 9, (n, 7), generator=draw)  # with repeats
    return EmbeddingBlock("tokens", 128, indices, torch.randn(n, c, 7, 20, generator=draw), 10000)


def _few_embeddings(n: int, c: int, draw: torch.Generator) -> JacobianBlock:
    indices = torch.randint(0, 3, (n, 7), generator=draw)
    return EmbeddingBlock("positions", 128, indices, torch.randn(n, c, 7, 20, generator=draw), 3)


def _lowered(n: int, c: int, draw: torch.Generator) -> JacobianBlock:
    weight = torch.randn(c, 2, generator=torch.Generator().manual_seed(c))
    base = [_dense, _lazy, _linear, _convolution, _embedding][c % 5](n, 2, draw)
    return LoweredBlock(base, weight)


def _own_rows(n: int, c: int, draw: torch.Generator) -> JacobianBlock:
    return OwnRowBlock("head", 131, torch.randn(n, 40, generator=draw), c, c // 3, c - c // 4)


BLOCKS = [_dense, _lazy, _linear, _convolution, _one_wide_row, _embedding, _few_embeddings, _lowered, _own_rows]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    make=st.sampled_from(BLOCKS),
    kind=st.sampled_from(KINDS),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    c=st.integers(1, 5),
    mixed=st.booleans(),
    first_k=st.integers(0, 40),
    count=st.integers(1, 60),
    seed=st.integers(0, 2**64 - 1),
)
def test_every_kind_of_block_is_audited_as_it_is_projected(
    make: Callable[..., JacobianBlock], kind: str, sizes: list[int], c: int, mixed: bool, first_k: int, count: int,
    seed: int,
) -> None:  # fmt: skip
    projection = Projection(kind, kind_of(kind).fitting(first_k + count)[1], seed)
    count = projection.dim - first_k
    draw = torch.Generator().manual_seed(seed % 2**63)
    blocks = [make(n, c, draw) for n in sizes]
    ends = np.cumsum([1000, *sizes]).tolist()
    groups = [range(a, b) for a, b in pairwise(ends)]
    audit = ProjectionAudit(projection, groups, c, mixed=mixed, first_k=first_k, device=CPU)
    features = torch.zeros(sum(sizes), 1 if mixed else c, count)

    def room(n: int, below: int, size: int) -> Tensor:
        return torch.empty(n, below or c, size)

    runs, sq_norm, _ = batch._joined(projection, blocks, groups, room, [audit], mixed=mixed)
    lowered = LoweredFeatures(projection, features, first_k)
    adding = block_sums.BlockSums(projection, features, first_k)
    with Beside(CPU) as beside:
        for places, block in runs:
            if mixed:
                batch._accumulate_mixed_block(projection, features[places], block, first_k)
            elif isinstance(block, LoweredBlock):
                lowered.add(places, block, beside)
            else:
                adding.add(places, block)
        adding.finish()
        lowered.raise_into(beside)
    found = audit.compare(torch.cat([torch.full((*features.shape[:2], first_k), torch.nan), features], dim=-1))
    assert len(found.k) == (count if kind == "sjlt" else min(16, count))  # here less than four blocks
    assert all(first_k <= k < projection.dim for k in found.k)
    assert len(set(found.k)) == len(found.k)
    sq_norm = sq_norm.sum(1, keepdim=True) if mixed else sq_norm
    found.require(sq_norm, "train")
    if isinstance(blocks[0], LoweredBlock):  # float32 rounds what is added up, however small the sum
        terms = torch.cat([block.added_up() for block in blocks])[found.i]
        assert found.sq_terms >= 0.999 * (terms.sum() if mixed else terms[found.c])
    off = replace(found, got=found.got + 1.5 * found.tolerance(sq_norm))
    with pytest.raises(NonFiniteError):
        off.require(sq_norm, "train")
    # What the audit took is the product in float64 of the block's own values with the definition of P.
    columns = block.start + torch.arange(block.size)
    some = slice(None, None, -(-len(found.k) // 16))
    k = torch.from_numpy(found.k)[some]
    want = torch.zeros(len(k), dtype=torch.float64)
    for stream, values in enumerate(block.dense()[found.i].double() if mixed else block.dense()[found.i, [found.c]]):
        entries = replace(projection, stream=stream).entries(k[:, None], columns)
        want += entries @ values.double()
    assert (found.want[some] - want).abs().max() <= found.tolerance(sq_norm)
    assert found.row == 1000 + found.i


@pytest.mark.skipif(not library.available(), reason=f"compiled code: {library.status().why}")
def test_the_blocks_above_take_every_route() -> None:
    draw = torch.Generator().manual_seed(0)
    taken = {route(Projection(dim=40), make(2, 4, draw), 40) for make in BLOCKS}
    assert taken == {"dense", "shared", "sparse", "own rows"}


def test_values_of_other_examples_are_not_formed() -> None:
    projection, draw = Projection(dim=20), torch.Generator().manual_seed(0)
    for make in (_linear, _embedding):
        block = make(5, 3, draw)
        block.dense = lambda: pytest.fail("the whole block was formed")  # type: ignore[method-assign]
        audit = ProjectionAudit(projection, [range(5)], 3, mixed=False, first_k=0, device=CPU)
        audit.look(0, block, formed=True)
        assert audit.compare(torch.zeros(5, 3, 20)).want.abs().min() > 0


@pytest.mark.skipif(not library.available(), reason=f"compiled code: {library.status().why}")
def test_terms_that_cancel_raise_no_false_alarm() -> None:
    """Rounding errors are relative to what is added up, here far more than its sum; a bound by ‖g‖ would refuse it."""
    draw, projection = torch.Generator().manual_seed(0), Projection(dim=200, backend="native")
    deltas = torch.randn(1, 1, 256, 30, generator=draw)
    deltas -= deltas.mean(2, keepdim=True)
    block = LinearBlock("kernel", 128, torch.ones(1, 256, 40), deltas)
    audit = ProjectionAudit(projection, [range(1)], 1, mixed=False, first_k=0, device=CPU)
    audit.look(0, block, formed=False)
    out = torch.zeros(1, 1, 200)
    entries = Entries("rademacher", 0, 0)
    compiled_product.accumulate_shared(entries, out, block.activations, block.deltas, block.start, 0)
    found, sq_norm = audit.compare(out), block.sq_norm()
    found.require(sq_norm, "train")
    with pytest.raises(NonFiniteError):
        replace(found, sq_terms=sq_norm[0, 0]).require(sq_norm, "train")


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_gradients_in_half_precision_pass_as_those_of_a_card_and_of_nothing_else(kind: str) -> None:
    """What the fused kernels do to gradients, without a card: each row rounded to float16 below a power of two."""
    draw, projection = torch.Generator().manual_seed(0), Projection(kind, dim=4000)
    values = torch.randn(1, 1, 20000, generator=draw) * torch.exp(2 * torch.randn(1, 1, 20000, generator=draw))
    scale = 2.0 ** torch.floor(torch.log2(values.abs().max())) / 2**14
    block = DenseBlock("weight", 0, (values / scale).half().float() * scale)
    out = torch.zeros(1, 1, 4000)
    accumulate_block(projection, out, block)
    audit = ProjectionAudit(projection, [range(1)], 1, mixed=False, first_k=0, device=CPU)
    audit.look(0, DenseBlock("weight", 0, values), formed=True)
    found, sq_norm = audit.compare(out), values.double().square().sum(-1)
    replace(found, path="wgmma fast").require(sq_norm, "train")
    assert (found.want - found.got).abs().max() < 0.25 * replace(found, path="wgmma fast").tolerance(sq_norm)
    with pytest.raises(NonFiniteError):
        found.require(sq_norm, "train")


def test_the_draw_is_reproducible_and_reaches_everything() -> None:
    projection, groups = Projection(dim=64, seed=3), [range(5, 8), range(8, 10)]

    def drawn(projection: Projection, first: int) -> tuple[Any, ...]:
        spans = [range(g.start + first, g.stop + first) for g in groups]
        audit = ProjectionAudit(projection, spans, 4, mixed=False, first_k=0, device=CPU)
        found = audit.compare(torch.zeros(5, 4, 64))
        return found.i, found.c, tuple(found.k)

    assert drawn(projection, 0) == drawn(projection, 0) != drawn(replace(projection, seed=4), 0)
    many = [drawn(projection, first) for first in range(200)]
    assert {i for i, _, _ in many} == set(range(5))
    assert {c for _, c, _ in many} == set(range(4))
    assert {k for _, _, ks in many for k in ks} == set(range(64))
    assert all(k // 4 == part for _, _, ks in many for part, k in enumerate(ks))  # one of each sixteenth


# -- runs that are right -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES + HARD_CASES, ids=lambda case: case.name)
def test_right_stores_pass_with_room_to_spare(case: Case, kind: str, tmp_path: Path, margins: list[float]) -> None:
    for layout in LAYOUTS:
        common = {"split": "train", "projection": kind, "layout": layout, "seed": 3}
        common["proj_dim"] = kind_of(kind).fitting(96)[1]
        gs.featurize(project_of(case), out=tmp_path / layout, **common)  # type: ignore[arg-type]
        assert finish(tmp_path / layout)["audited"] == 1
    assert len(margins) == 3
    assert max(margins) < 0.25


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"projection": "gaussian"},
        {"projection": "sjlt"},
        {"projection": "sjlt", "layout": "mixed"},
        {"layout": "mixed"},
        {"layout": "sum"},
    ],
    ids=str,
)
def test_joined_groups_several_batches_and_grown_stores_pass(
    settings: dict[str, Any], tmp_path: Path, margins: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstore.featurization.plan.GROUP", 4)
    monkeypatch.setattr("gradstore.featurization.plan.LARGE_GROUP", 4)
    for precision in ("fast", "exact"):
        out = tmp_path / precision
        common = {"split": "train", "batch_size": 12, "precision": precision, **settings}
        kind = kind_of(settings.get("projection", "rademacher"))
        small, large = kind.fitting(40)[1], kind.fitting(1100)[1]
        gs.featurize(digits(), out=out / "small", proj_dim=small, **common)
        assert finish(out / "small")["audited"] == 4  # 12 + 12 + 12 + 4 rows
        gs.featurize(digits(), out=out / "grown", proj_dim=large, grow_from=out / "small", **common)
        assert finish(out / "grown")["audited"] == 4
    assert len(margins) >= 16
    assert max(margins) < 0.25


def test_audited_rows_of_workers_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradstore.featurization.plan.SHARD_BYTES", 1)
    gs.featurize(digits(), split="train", out=tmp_path / "s", proj_dim=32, workers=2)
    assert 1 <= finish(tmp_path / "s")["audited"] <= 2  # the first batch of each worker that had one


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_gradients_of_any_size_pass(factor: float, tmp_path: Path, margins: list[float]) -> None:
    project = replace_forward(digits(), lambda model, x: model(x) * factor)
    gs.featurize(project, split="train", out=tmp_path / "s", proj_dim=64)
    assert max(margins) < 0.25


def digits() -> gs.Project:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(144, 3)
        )
        data = TensorDataset(torch.randn(40, 1, 8, 8), torch.arange(40) % 3)
    return gs.Project(model=model, splits={"train": data})


def replace_forward(project: gs.Project, forward: Callable[..., Tensor]) -> gs.Project:
    return gs.Project(model=project.model, splits=project.splits, forward=forward)


def finish(path: Path) -> dict[str, Any]:
    events = [json.loads(line) for line in (path / "run.jsonl").read_text().splitlines()]
    return next(event for event in events if event["event"] == "finish")


# -- faults that norms do not show ---------------------------------------------------------------------------------

Accumulate = Callable[..., Any]


def _rolled(projection: Projection, out: Tensor, block: JacobianBlock, first_k: int) -> None:
    accumulate_block(projection, out, _changed(block, values=block.dense().roll(1, -1)), first_k=first_k)


def _shifted(projection: Projection, out: Tensor, block: JacobianBlock, first_k: int) -> None:
    accumulate_block(projection, out, _changed(block, start=block.start + 128), first_k=first_k)


def _flipped(projection: Projection, out: Tensor, block: JacobianBlock, first_k: int) -> None:
    accumulate_block(projection, out, _changed(block, values=-block.dense()), first_k=first_k)


def _neighbours(projection: Projection, out: Tensor, block: JacobianBlock, first_k: int) -> None:
    """Examples take one another's gradients: rows of a batch joined in another order."""
    accumulate_block(projection, out, _changed(block, values=block.dense().roll(1, 0)), first_k=first_k)


def _changed(block: JacobianBlock, values: Tensor | None = None, start: int | None = None) -> JacobianBlock:
    values = block.dense() if values is None else values
    return DenseBlock(block.name, block.start if start is None else start, values)


def _exchanged(projection: Projection, out: Tensor, block: JacobianBlock, first_k: int) -> None:
    """Rows of P in another order, for all blocks alike."""
    part = torch.zeros_like(out)
    accumulate_block(projection, part, block, first_k=first_k)
    part[..., [1, 2]] = part[..., [2, 1]]
    out += part


def in_one_block(fault: Accumulate) -> Accumulate:
    def accumulate(projection: Projection, out: Tensor, block: JacobianBlock, *, first_k: int = 0) -> None:
        (fault if block.name == "4.weight" else accumulate_block)(projection, out, block, first_k=first_k)

    return accumulate


def in_all_blocks(fault: Accumulate) -> Accumulate:
    return lambda projection, out, block, *, first_k=0: fault(projection, out, block, first_k)


FAULTS = {
    "columns of a block rolled by one": in_one_block(_rolled),
    "start of a block shifted by 128": in_one_block(_shifted),
    "signs of a block flipped": in_one_block(_flipped),
    "two rows k exchanged": in_all_blocks(_exchanged),
    "examples of a batch exchanged": in_one_block(_neighbours),
    "columns of all blocks rolled by one": in_all_blocks(_rolled),
}


def require_refused(tmp_path: Path, project: gs.Project, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """Refused with nothing stored; stored, the norms being as they should, without the audit."""
    with pytest.raises(NonFiniteError, match=r"split 'train', .* path: the projection of row \d+, class \d") as caught:
        gs.featurize(project, split="train", out=tmp_path / "refused", **settings)
    assert caught.value.exit_code == 8
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "refused").glob("shard*"))
    monkeypatch.setattr(AuditSchedule, "due", False)
    control = gs.featurize(project, split="train", out=tmp_path / "control", **settings)
    assert control.complete
    assert finish(control.path)["audited"] == 0


@pytest.mark.parametrize("grown", [False, True], ids=["new", "grown"])
@pytest.mark.parametrize("layout", ["per-class", "sum"])
@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_wrong_projection_that_keeps_norms_is_refused(
    fault: str, layout: str, grown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"proj_dim": 16, "layout": layout}
    if grown:
        gs.featurize(digits(), split="train", out=tmp_path / "small", **settings)
        settings |= {"proj_dim": 32, "grow_from": tmp_path / "small"}
    monkeypatch.setattr(block_sums, "accumulate_block", FAULTS[fault])
    require_refused(tmp_path, digits(), monkeypatch, **settings)


@pytest.mark.parametrize("fault", ["columns", "stream"])
def test_one_class_that_is_wrong_is_refused_in_the_layout_mixed(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Projection.accumulate

    def accumulate(self: Projection, out: Tensor, block: Tensor, start: int, *, first_k: int = 0) -> None:
        if self.stream == 1 and fault == "columns":
            block = block.roll(1, -1)
        if self.stream == 1 and fault == "stream":
            self = replace(self, stream=2)
        right(self, out, block, start, first_k=first_k)

    monkeypatch.setattr(Projection, "accumulate", accumulate)
    require_refused(tmp_path, digits(), monkeypatch, proj_dim=64, layout="mixed")


@pytest.mark.parametrize("name", ["transformer-dict", "tied-weights", "lstm"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_parameter_of_other_models_is_under_audit(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flip the signs of one parameter at a time; those without a gradient in the audited row cannot matter to it."""
    case = next(case for case in CASES + HARD_CASES if case.name == name)
    project = project_of(case)
    names = [block.name for block in Plan(project, "train", Settings(64), "cpu", 10**9).blocks]
    passed = []
    for number, wrong in enumerate(names):

        def accumulate(
            projection: Projection, out: Tensor, block: JacobianBlock, *, first_k: int = 0, wrong: str = wrong
        ) -> None:
            fault = _flipped if block.name == wrong else accumulate_block
            fault(projection, out, block, first_k=first_k)

        monkeypatch.setattr(block_sums, "accumulate_block", accumulate)
        monkeypatch.setattr(block_sums, "columns_that_wait", lambda *_: 0)  # each block as it comes
        try:
            gs.featurize(
                project,
                split="train",
                out=tmp_path / str(number),
                projection=kind,
                proj_dim=kind_of(kind).fitting(64)[1],
            )
        except NonFiniteError:
            continue
        passed.append(wrong)
    assert not [name for name in passed if not small_share(project, name)]


def small_share(project: gs.Project, name: str) -> bool:
    """Whether a parameter's largest share of any ‖g‖² is one that float32 rounding hides."""
    plan = Plan(project, "train", Settings(64), "cpu", 10**9)
    inputs = plan.examples.read(range(len(plan.examples)))[0]
    part, whole = 0.0, 0.0
    for block in plan.engine(inputs):
        norm = block.sq_norm()
        whole = whole + norm
        part = part + norm * (block.name == name)
    return bool((torch.as_tensor(part) / torch.as_tensor(whole)).max() < 1e-8)


def test_the_error_says_row_class_k_both_values_path_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_sums, "accumulate_block", FAULTS["signs of a block flipped"])
    with pytest.raises(NonFiniteError) as caught:
        gs.featurize(digits(), split="train", out=tmp_path / "s", proj_dim=16)
    error = caught.value
    assert str(error).startswith("split 'train', ")
    number = r"-?\d+(\.\d+)?(e[-+]\d+)?"
    assert_matches(rf"P g = {number} ± {number}", error.expected)
    assert_matches(rf"{number}; 16 of 16 audited k are wrong", error.got)
    assert "backend='reference'" in str(error.hint)
    assert "doctor" not in str(error.hint)
    comparison = Comparison(7, 0, 1, np.arange(2), torch.ones(2), torch.tensor([1, torch.nan]), torch.ones(()), 1, "")
    with pytest.raises(NonFiniteError, match=r"wgmma fast path: .* row 7, class 1 is wrong at k = 1") as on_a_card:
        replace(comparison, path="wgmma fast").require(torch.ones(1, 2), "train")
    assert "gradstore doctor" in str(on_a_card.value.hint)


def assert_matches(pattern: str, text: object) -> None:
    assert re.fullmatch(pattern, str(text)), text


def test_fresh_queries_are_audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = digits()
    train = gs.featurize(project, split="train", out=tmp_path / "s", proj_dim=16)
    monkeypatch.setattr(block_sums, "accumulate_block", FAULTS["signs of a block flipped"])
    with pytest.raises(NonFiniteError, match="is wrong at k"):
        featurize_queries(project, train, split="train", rows=[3])


# -- how often -----------------------------------------------------------------------------------------------------


def test_the_first_batch_is_audited_and_then_one_for_so_much_work() -> None:
    schedule = AuditSchedule(Projection(dim=10240), CPU, [100_000] * 10, 1, 2.0 * 10 * 10240 * 1_000_000)
    due = []
    for _ in range(200):
        due.append(schedule.due)
        schedule.computed(16)
    assert due[0]
    every = due.index(True, 1)
    assert due == [number % every == 0 for number in range(200)]
    assert 1 < every < 100


def test_a_batch_that_failed_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in the first batch: the smaller one that is tried next is the one that is audited."""
    monkeypatch.setattr("gradstore.featurization.plan.LARGE_GROUP", 16)
    failed: list[int] = []

    def accumulate(projection: Projection, out: Tensor, block: JacobianBlock, *, first_k: int = 0) -> None:
        if not failed:
            failed.append(1)
            raise MemoryError
        accumulate_block(projection, out, block, first_k=first_k)

    monkeypatch.setattr(block_sums, "accumulate_block", accumulate)
    gs.featurize(digits(), split="train", out=tmp_path / "s", proj_dim=32, batch_size=32)
    assert failed
    assert finish(tmp_path / "s")["audited"] == 1
