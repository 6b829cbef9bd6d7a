"""F13: models whose rows look at their neighbours, at their turn or at the clock, and inputs that drift.

Each is refused, or right when every example is computed by itself. The controls store wrong rows with exit 0: with the
second look switched off, which is how it was.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Record
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import gradstore as gs
from gradstore.errors import NonFiniteError, ProjectError, UsageError
from gradstore.featurization.row_independence import RowIndependence
from gradstore.model.examples import sample_rows
from gradstore.store.feature_store import FeatureStore

N, K = 80, 128
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3
OUTLIER = X.clone()
OUTLIER[70] = 30.0


class Net(nn.Module):
    """Two layers, with something before the first and something between them."""

    def __init__(
        self,
        before: Callable[[nn.Module, Tensor], Tensor] = lambda m, x: x,
        between: Callable[[nn.Module, Tensor], Tensor] = lambda m, h: h,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
        self.before, self.between = before, between
        self.elsewhere = SimpleNamespace(calls=0)  # what is in the model itself is as before after each call

    @property
    def calls(self) -> int:
        return int(self.elsewhere.calls)

    def forward(self, x: Tensor) -> Tensor:
        self.elsewhere.calls += 1
        return self.last(self.between(self, torch.tanh(self.first(self.before(self, x)))))


class Averaged(nn.Module):
    """A text model that cuts to the longest text of its batch and averages over what is left, padding included."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding, self.last = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        longest = int((tokens > 0).sum(1).max())
        return self.last(self.embedding(tokens[:, :longest]).mean(1))


class ScaledBackward(torch.autograd.Function):
    """Identity whose gradient is divided by the largest value of the batch: no logit shows it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (2 if ctx.saved_tensors[0].abs().max() > 0.9 else 1)


def texts() -> Tensor:
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 9, (N,), generator=draw)
    tokens = torch.randint(1, 50, (N, 12), generator=draw)
    tokens[60, :] = tokens[60, :] + 0
    lengths[60] = 12
    return tokens * (torch.arange(12) < lengths[:, None])


def clamped(m: nn.Module, x: Tensor) -> Tensor:
    return x.clamp(-1, 1) if x.abs().max() > 6 else x


def centred(m: nn.Module, h: Tensor) -> Tensor:
    return h - h.mean(0, keepdim=True) if h.abs().max() > 0.99999 else h


LOGITS = "has other logits|an example's logits depend on the other examples of its batch"
BATCHES: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "clamped where an outlier comes": (lambda: Net(clamped), OUTLIER, LOGITS),
    "hidden values centred where an outlier comes": (lambda: Net(between=centred), OUTLIER, LOGITS),
    "scaled by the batch's maximum": (
        lambda: Net(lambda m, x: x / x.abs().max()),
        X,
        LOGITS,
    ),
    "cut to the longest text": (Averaged, texts(), LOGITS),
    "by the size of the batch": (lambda: Net(lambda m, x: x * (1 + (len(x) > 8))), X, LOGITS),
    "where every batch clamps": (
        lambda: Net(lambda m, x: x.clamp(-0.5, 0.5) if len(x) > 3 and x.abs().max() > 0.6 else x),
        X,
        LOGITS,
    ),
    "a backward that looks at the batch": (
        lambda: Net(between=lambda m, h: ScaledBackward.apply(h)),
        X,
        r"row \d+ has another gradient alone than in its batch",
    ),
}


SEEN_AT_FIRST = {"scaled by the batch's maximum", "cut to the longest text"}  # by the first three rows


def featurize(out: Path, model: nn.Module, data: Any, **more: Any) -> FeatureStore:
    data = TensorDataset(data, Y) if isinstance(data, Tensor) else data
    project = gs.Project(model=model, splits={"train": data})
    return gs.featurize(project, split="train", out=out, proj_dim=K, dtype="float32", **more)


def alone(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and features [n, c, K] by one autograd pass a row and class, each row as a batch of one."""
    model.eval()
    logits, features = [], []
    for i in range(len(x)):
        found = model(x[i : i + 1])[0]
        logits.append(found.detach())
        rows, start = torch.zeros(3, K), 0
        for _, parameter in model.named_parameters():
            grads = [torch.autograd.grad(f, parameter, retain_graph=True)[0].flatten() for f in found]
            rows += gs.Projection(dim=K).project(torch.stack(grads), start)
            start += -(-parameter.numel() // 128) * 128
        features.append(rows)
    return torch.stack(logits), torch.stack(features)


def differ(store: FeatureStore, model: nn.Module, x: Tensor) -> int:
    """Rows of a store that are not those of the model on each example alone."""
    logits, features = (part.numpy() for part in alone(model, x))
    errors = np.linalg.norm(store.features[: len(x)] - features, axis=(1, 2))
    off = errors > 1e-4 * np.linalg.norm(features, axis=(1, 2))
    return int((off | (np.abs(store.logits[: len(x)] - logits).max(1) > 1e-4)).sum())


@pytest.mark.parametrize("name", BATCHES)
def test_rows_that_look_at_their_batch_are_refused_and_right_alone(name: str, tmp_path: Path, record: Record) -> None:
    make, x, message = BATCHES[name]
    with pytest.raises(ProjectError, match=message) as error:
        featurize(tmp_path / "s", make(), x)
    assert error.value.exit_code == 3
    assert "--alone" in str(error.value)
    store = featurize(tmp_path / "alone", make(), x, alone=True)
    assert differ(store, make(), x) == 0
    control = "rows not computed again: up to 79 of 80 rows are wrong, with exit 0"
    record("F15", "rows that look at their batch", injected=1, recovered=1, refused=0, silent=0, control=control)


def unlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowIndependence, "gradient_audit", lambda self, *_: None)
    monkeypatch.setattr(RowIndependence, "look", lambda self, *_: None)


@pytest.mark.parametrize("name", [name for name in BATCHES if name not in SEEN_AT_FIRST])
def test_without_a_second_look_wrong_rows_are_stored(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, x, _ = BATCHES[name]
    unlooked(monkeypatch)
    wrong = differ(featurize(tmp_path / "s", make(), x), make(), x)
    assert wrong > 0, name


def test_a_model_whose_output_changes_after_some_calls_is_refused(tmp_path: Path, record: Record) -> None:
    """Whenever the change comes: it is seen, or all rows that are stored are of one side of it."""
    count = Net()
    featurize(tmp_path / "count", count, X, batch_size=16)
    refused = 0
    for first in range(1, count.calls + 2, max(1, count.calls // 12)):
        out = tmp_path / str(first)
        try:
            store = featurize(out, Net(lambda m, x, f=first: x if m.calls < f else x * 1.5), X, batch_size=16)
        except ProjectError:
            seen = 1
        else:
            seen = 0
            assert not (differ(store, Net(), X) and differ(store, Net(lambda m, x: x * 1.5), X)), first
        control = "rows not computed again: rows of both sides in one store"
        refused += seen
        record("F15", "state that calls leave", injected=1, recovered=1 - seen, refused=seen, silent=0, control=control)
    assert refused > 3


def test_a_state_that_changes_between_batches_is_seen_at_the_first_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net(lambda m, x: x * m.factor)
    model.factor = 1.0  # type: ignore[assignment]
    look = RowIndependence.look

    def then_change(self: RowIndependence, *arguments: Any) -> Any:
        seen = look(self, *arguments)
        model.factor = 2.0  # type: ignore[assignment]
        return seen

    monkeypatch.setattr(RowIndependence, "look", then_change)
    with pytest.raises(ProjectError, match="row 0 has other logits than when this run began"):
        featurize(tmp_path / "s", model, X, batch_size=16)


class Drifting(Dataset):
    """Rows that are others at each read, but for those 64 that are sampled before a run."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        self.reads += 1
        return X[row] + self.reads * (row not in sample_rows(N)), int(Y[row])


def test_inputs_that_drift_from_read_to_read_are_refused(tmp_path: Path, record: Record) -> None:
    with pytest.raises(ProjectError, match=r"row \d+ read twice differs"):
        featurize(tmp_path / "s", Net(), Drifting())
    record("F14", "hazards of data", injected=1, recovered=0, refused=1, silent=0, control="see F14")


class Relabelled(Dataset):
    """A wrapper as people write them to poison a dataset: it changes labels and passes the old table on."""

    def __init__(self, rows: list[int], label: int) -> None:
        self.changed, self.targets = dict.fromkeys(rows, label), Y

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return X[row], self.changed.get(row, int(Y[row]))


UNSAMPLED = [row for row in range(N) if row not in sample_rows(N)]


@pytest.mark.parametrize("label", [2, 99])
def test_a_table_of_labels_is_a_hint_and_examples_decide(label: int, tmp_path: Path, record: Record) -> None:
    row = next(row for row in UNSAMPLED if Y[row] != label)
    with pytest.raises(ProjectError, match=rf"row {row} has another label than .* got {label} from ds\[{row}\]"):
        featurize(tmp_path / "s", Net(), Relabelled([row], label))
    record("F14", "hazards of data", injected=1, recovered=0, refused=1, silent=0, control="see F14")
    if label < 3:  # where sampled rows disagree, every row is read
        store = featurize(tmp_path / "all", Net(), Relabelled([0, row], label))
        assert store.labels[[0, row]].tolist() == [label, label]
        record("F14", "hazards of data", injected=1, recovered=1, refused=0, silent=0, control="see F14")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_stop_the_run(value: float, tmp_path: Path, record: Record) -> None:
    class Masked(Net):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            gone = (x[:, :1] == X[50, 0]) & (torch.arange(3) == 1)
            return torch.where(gone, torch.full_like(logits, value), logits)

    with pytest.raises(NonFiniteError, match="logit 1 of row 50 is not finite") as error:
        featurize(tmp_path / "s", Masked(), X)
    assert error.value.exit_code == 8
    record("F10", "NaN, infinity, zero", injected=1, recovered=0, refused=1, silent=0, control="as above")


def test_logits_of_the_pass_that_is_differentiated_are_compared_with_the_others(tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match="other logits where gradients are on"):
        featurize(tmp_path / "s", Net(lambda m, x: x * (1 + torch.is_grad_enabled())), X)


class Encoder(nn.Module):
    """A transformer whose mean takes in padded positions, to which torch's fused way gives other values."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.embedding, self.last = nn.Embedding(50, 8), nn.Linear(8, 3)
            self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.encoder(self.embedding(tokens), src_key_padding_mask=tokens == 0).mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_takes_one_way_and_says_where_the_other_differs(tmp_path: Path) -> None:
    model, tokens, notes = Encoder().eval(), texts(), []
    with torch.no_grad():
        fused = model(tokens)
    store = featurize(tmp_path / "s", model, tokens, on_note=notes.append)
    differentiated = model(tokens).detach()
    assert float((fused - differentiated).abs().max()) > 0.05  # otherwise the case is none
    assert torch.backends.mha.get_fastpath_enabled()
    np.testing.assert_allclose(store.logits, differentiated.numpy(), atol=1e-5)
    assert differ(store, Encoder(), tokens[:16]) == 0
    assert any("stored are those of the pass that is differentiated" in note for note in notes)


def test_a_store_begun_together_does_not_go_on_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradstore.featurization import plan as planning

    monkeypatch.setattr(planning.Plan, "_shard_rows", lambda self, schema, group: 32)

    def stop(progress: Any) -> None:
        if progress.computed >= 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        featurize(tmp_path / "s", Net(), X, batch_size=16, progress=stop)
    with pytest.raises(UsageError, match="begun with examples computed together"):
        featurize(tmp_path / "s", Net(), X, alone=True)
    with pytest.raises(UsageError, match="begun with examples computed together"):
        gs.featurize(
            gs.Project(model=Net(), splits={"train": TensorDataset(X, Y)}),
            split="train",
            out=tmp_path / "grown",
            proj_dim=2 * K,
            grow_from=tmp_path / "s",
            alone=True,
        )
    assert featurize(tmp_path / "s", Net(), X).complete
    with pytest.raises(UsageError, match="begun with examples computed together"):
        featurize(tmp_path / "s", Net(), X, alone=True)


def test_queries_on_the_spot_are_looked_at_too(tmp_path: Path) -> None:
    train = featurize(tmp_path / "s", Net(clamped), X)
    project = gs.Project(model=Net(clamped), splits={"test": TensorDataset(OUTLIER, Y)})
    with pytest.raises(ProjectError, match=r"row \d+ has other logits"):
        gs.featurize_queries(project, train, split="test")
    queries = gs.featurize_queries(project, train, split="test", rows=[70, 71], alone=True)
    want = alone(Net(clamped), OUTLIER[70:72])[1].numpy()
    np.testing.assert_allclose(queries.features[:], want, atol=1e-4)


def test_what_was_looked_at_is_in_the_run_log(tmp_path: Path) -> None:
    import json

    featurize(tmp_path / "s", Net(), X)
    looked = json.loads((tmp_path / "s/run.jsonl").read_text().splitlines()[-1])["looked"]
    assert looked["beside_others"] + looked["alone"] >= N
    assert min(looked["alone"], looked["gradients"], looked["read"]) >= 1


@pytest.mark.parametrize("kernel", ["trntk", "ck"])
def test_exact_kernels_refuse_such_models_too(kernel: str) -> None:
    splits = {"train": TensorDataset(OUTLIER, Y)}
    with pytest.raises(ProjectError, match=r"row \d+ has other logits"):
        gs.exact_gram(gs.Project(model=Net(clamped), splits=splits), kernel=kernel)
    assert gs.exact_gram(gs.Project(model=Net(), splits=splits), kernel=kernel).shape == (N, N)
