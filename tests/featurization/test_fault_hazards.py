"""F13, F14, S6: what models, data and labels may do to a store. Each is handled, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradstore_cli
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Record
from gradstore_cli.output import printable
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import gradstore as gs
from gradstore.errors import ProjectError
from gradstore.store.feature_store import FeatureStore

N, K = 20, 256
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3


class Net(nn.Module):
    """Two layers with a hook for what goes on between them."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor] = lambda m, h: h, extra: nn.Module | None = None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
        self.extra, self.between = extra, between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, torch.tanh(self.first(x))))


def frozen() -> Net:
    net = Net()
    net.first.requires_grad_(False)
    return net


def tied() -> Net:
    net = Net(lambda m, h: F.linear(F.linear(h, m.first.weight.T, None), m.extra.weight), nn.Linear(6, 5))
    net.extra.weight = net.first.weight  # type: ignore[union-attr]
    return net


def count_calls(module: nn.Module, h: Tensor) -> Tensor:
    module.calls = getattr(module, "calls", 0) + 1
    return h * module.calls


COUNTED = [0]


def count_elsewhere(module: nn.Module, h: Tensor) -> Tensor:
    COUNTED[0] += 1
    return h * COUNTED[0]


HANDLED: dict[str, Callable[[], nn.Module]] = {
    "state": lambda: Net(count_calls),
    "built in train mode": lambda: Net().train(),
    "dropout": lambda: Net(lambda m, h: m.extra(h), nn.Dropout(0.5)),
    "in-place activation": lambda: Net(lambda m, h: h.mul(2).relu_()),
    "in-place sum": lambda: Net(lambda m, h: h.mul(2).add_(1)),
    "frozen parameters": frozen,
    "an unused layer": lambda: Net(extra=nn.Linear(2, 2)),
    "tied weights": tied,
    "batch statistics": lambda: Net(lambda m, h: m.extra(h), nn.BatchNorm1d(5)),
    "float64 inside": lambda: Net(lambda m, h: h.double().sin().float()),
}
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "train mode in forward": (lambda: Net(lambda m, h: m.train() and h), "a module is in train mode"),
    "functional dropout": (lambda: Net(lambda m, h: F.dropout(h, 0.5)), "the model computes other logits for row"),
    "noise": (lambda: Net(lambda m, h: h + torch.randn_like(h)), "the model computes other logits for row 0"),
    "state elsewhere": (lambda: Net(count_elsewhere), "the model computes other logits for row 0 the second time"),
    "rows that see one another": (lambda: Net(lambda m, h: h - h.mean(0)), "neighbours|depend"),
}


def expected(model: nn.Module) -> Tensor:
    """Features by one backward pass a row and class, each parameter at its own place in P."""
    model.eval()
    named = list(model.named_parameters())
    for _, parameter in named:
        parameter.requires_grad_(True)
    logits, rows, start = model(X), torch.zeros(N * 3, K), 0
    outputs = [logits[i, c] for i in range(N) for c in range(3)]
    for _, parameter in named:
        grads = [torch.autograd.grad(o, parameter, retain_graph=True, allow_unused=True)[0] for o in outputs]
        block = torch.stack([torch.zeros(parameter.numel()) if g is None else g.flatten() for g in grads])
        rows += gs.Projection(dim=K).project(block, start)
        start += -(-parameter.numel() // 128) * 128
    return rows.reshape(N, 3, K)


def featurize(out: Path, model: nn.Module, data: Any = None, **more: Any) -> FeatureStore:
    project = gs.Project(model=model, splits={"train": TensorDataset(X, Y) if data is None else data}, **more)
    return gs.featurize(project, split="train", out=out, proj_dim=K, dtype="float32")


@pytest.mark.parametrize("name", HANDLED)
def test_hazards_of_models_are_handled(name: str, tmp_path: Path, record: Record) -> None:
    store = featurize(tmp_path / "s", HANDLED[name]())
    want = expected(HANDLED[name]()).detach().numpy()
    assert np.linalg.norm(store.features[:] - want) < 1e-5 * np.linalg.norm(want)
    record("F13", "hazards of models", injected=1, recovered=1, refused=0, silent=0, control="see the next test")


def test_the_hazards_matter(record: Record) -> None:
    """The control: left in train mode, dropout gives other gradients each time."""
    model = HANDLED["dropout"]().train()
    first, *others = (torch.autograd.grad(model(X)[0, 0], model.first.weight)[0] for _ in range(20))
    assert not all(torch.equal(first, other) for other in others)  # two draws of a few units may well agree


@pytest.mark.parametrize("name", REFUSED)
def test_hazards_of_models_are_refused(name: str, tmp_path: Path, record: Record) -> None:
    build, message = REFUSED[name]
    with pytest.raises(ProjectError, match=message):
        featurize(tmp_path / "s", build())
    assert not list(tmp_path.glob("s/*.h5"))
    control = "train mode left on: two runs differ"
    record("F13", "hazards of models", injected=1, recovered=0, refused=1, silent=0, control=control)


class Rows(Dataset):
    """Twenty rows made by a function of the row and of how often the data were read."""

    def __init__(self, make: Callable[[int, int], Any], length: int = N) -> None:
        self.make, self.length, self.reads = make, length, 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: int) -> Any:
        self.reads += 1
        return self.make(row, self.reads)


def broken_worker(row: int, reads: int) -> Any:
    if row == 13:
        raise OSError("the network drive is gone")
    return X[row], 0


DATA: dict[str, tuple[Callable[[], Any], str | None]] = {
    "shuffled at each read": (lambda: Rows(lambda i, r: (X[(i + r) % N], 0)), "row 0 read twice differs"),
    "augmented": (lambda: Rows(lambda i, r: (X[i] + 0.01 * torch.randn(6), 0)), "row 0 read twice differs"),
    "labels that change": (lambda: Rows(lambda i, r: (X[i], r % 3)), "row 0 read twice differs"),
    "a length that is too large": (lambda: Rows(lambda i, r: (X[i], 0), N + 1), "row 20 cannot be read"),
    "an exception in a row": (lambda: Rows(broken_worker), "row 13 cannot be read .got OSError: the network drive"),
    "ragged rows": (lambda: Rows(lambda i, r: (X[i][: 6 - (i == 15)], 0)), "rows 0 to 15 do not fit together"),
    "float labels": (lambda: Rows(lambda i, r: (X[i], 1.5)), "the label of row 0 is not a class index"),
    "labels out of range": (lambda: Rows(lambda i, r: (X[i], 3 * (i == 7))), "the label of row 7 is no class"),
    "batches of dicts": (lambda: Rows(lambda i, r: ({"x": X[i]}, int(Y[i]))), None),
    "label -1": (lambda: Rows(lambda i, r: (X[i], -1)), None),
    "no labels": (lambda: Rows(lambda i, r: X[i]), None),
    "numpy rows": (lambda: Rows(lambda i, r: (X[i].numpy(), np.int64(Y[i]))), None),
}


@pytest.mark.parametrize("name", DATA)
def test_hazards_of_data(name: str, tmp_path: Path, record: Record) -> None:
    make, message = DATA[name]
    forward = (lambda m, x: m(x["x"])) if name == "batches of dicts" else None
    if message is None:
        store = featurize(tmp_path / "s", Net(), make(), forward=forward)
        want = expected(Net()).detach().numpy()
        assert np.linalg.norm(store.features[:] - want) < 1e-5 * np.linalg.norm(want)
        assert store.labels.tolist() == ([-1] * N if "label" in name else Y.tolist())
    else:
        with pytest.raises(ProjectError, match=message):
            featurize(tmp_path / "s", Net(), make(), forward=forward)
    handled = int(message is None)
    control = "rows not read twice: augmented rows are stored"
    record("F14", "hazards of data", injected=1, recovered=handled, refused=1 - handled, silent=0, control=control)


def test_without_reading_twice_augmented_rows_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradstore.model.examples.Examples.require_same", lambda *_: None)
    one, two = (featurize(tmp_path / name, Net(), DATA["augmented"][0]()) for name in "ab")
    assert not np.array_equal(one.features[:], two.features[:])


HOSTILE = [
    "\x1b[2Jcat",
    "cat\r\x07",
    "\x9b31mcat",
    "a\x00b",
    "cat\u202egod",
    "<script>alert(1)</script>",
    "=cmd|'/c calc'!A1",
    "+1",
    "-1",
    "@SUM(A1)",
]


@pytest.mark.parametrize("label", HOSTILE)
def test_labels_cannot_reach_the_terminal_the_page_or_the_spreadsheet(
    label: str, tmp_path: Path, record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    featurize(tmp_path / "s", Net(), classes=[label, "dog", "bird"])
    with pytest.raises(SystemExit):
        gradstore_cli.main(
            f"topk {tmp_path / 's'} {tmp_path / 's'} --csv {tmp_path}/k.csv --html {tmp_path}/k.html".split()
        )
    out, page, table = capsys.readouterr().out, (tmp_path / "k.html").read_text(), (tmp_path / "k.csv").read_text()
    assert all(ch.isprintable() or ch == "\n" for ch in out)
    assert not any(ch in page for ch in "\x1b\x9b\x07\x00\u202e")
    assert "<script>alert" not in page
    assert not any(cell[0] in "=+@" for line in table.splitlines() for cell in line.split(","))
    assert (
        printable(label) != label or label.isprintable()
    )  # the control: printed as it is, it would reach the terminal
    control = "printed as they are: 5 of 10 hold control characters"
    record("S6", "labels as injections", injected=1, recovered=1, refused=0, silent=0, control=control)
