"""What is projected: three networks trained on handwritten digits, and small models that are hard for a sparse P."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gradstore as gs
from benchmarks.bench_jacobians import digits_cnn, resnet18
from benchmarks.bert import Bert
from gradstore.demo.preparation import train
from gradstore.projection.kinds import KINDS

TEST, GREYS = 450, 17
FEW = 24  # examples of which every pair is compared


@dataclass(frozen=True)
class Case:
    """A model and its data.

    Attributes:
        name: in the tables' files.
        title: on the page.
        project: from a folder where weights are kept.
        examples: of which every pair is compared.
        seeds: kind -> P to K = 10240 that are drawn, as many as take some minutes.
        rows: split -> examples that explanations are compared on; empty for none.
    """

    name: str
    title: str
    project: Callable[[Path], gs.Project]
    examples: int = FEW
    seeds: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 1000))
    rows: Mapping[str, int] = field(default_factory=dict)


def digits() -> tuple[Tensor, Tensor]:
    """(images float32 [1797, 1, 8, 8] within [-1, 1], labels int64 [1797]), shuffled."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images, dtype=torch.float32)[order, None] / 8 - 1, torch.tensor(data.target)[order]


def enlarged(images: Tensor) -> Tensor:
    """[n, 3, 32, 32]."""
    return F.interpolate(images, (32, 32), mode="bilinear").expand(-1, 3, -1, -1).contiguous()


def sentences(images: Tensor) -> Tensor:
    """A token for each pixel, which says where it is and how bright, int64 [n, 64]."""
    levels = (8 * (images + 1)).round().long().flatten(1)
    return GREYS * torch.arange(levels.shape[1]) + levels


def small_bert() -> nn.Module:
    """As large as BERT-mini: 11 M parameters, two classes."""
    return Bert(width=256, layers=4, heads=4)


def _trained(
    name: str,
    build: Callable[[], nn.Module],
    shown: Callable[[Tensor], Tensor] = lambda images: images,
    of: Callable[[Tensor], Tensor] = lambda labels: labels,
    epochs: int = 20,
    learning_rate: float = 3e-3,
) -> Callable[[Path], gs.Project]:
    """A network and the digits as it sees them; its weights are trained once, from seed 0, and kept."""

    def project(folder: Path) -> gs.Project:
        images, labels = digits()
        inputs, labels = shown(images), of(labels)
        splits = {
            "train": TensorDataset(inputs[TEST:], labels[TEST:]),
            "test": TensorDataset(inputs[:TEST], labels[:TEST]),
        }
        weights = folder / f"{name}.safetensors"
        if not weights.exists():
            save_file(train(build, splits["train"], 0, epochs=epochs, learning_rate=learning_rate), weights)
        model = build()
        model.load_state_dict(load_file(weights))
        return gs.Project(model=model.eval(), splits=splits)

    return project


def _untrained(build: Callable[[], nn.Module], inputs: Callable[[], Tensor]) -> Callable[[Path], gs.Project]:
    """A model as it is drawn, and inputs."""

    def project(folder: Path) -> gs.Project:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, rows = build().eval(), inputs()
        return gs.Project(model=model, splits={"train": TensorDataset(rows, torch.zeros(len(rows), dtype=torch.long))})

    return project


def _bags() -> Tensor:
    """Eight words of each example, int64 [n, 8], drawn as often as in a text: the k-th in proportion to 1/k."""
    return torch.multinomial(1 / torch.arange(1.0, 2001).expand(FEW, -1), 8)


def _columns() -> Tensor:
    """Ten columns as a table has them that nobody scaled: logarithms normal, from column to column another size."""
    return torch.exp(2 * torch.randn(1, 10) + 0.5 * torch.randn(FEW, 10))


TRAINED = (
    Case(
        "digits",
        "digits CNN",
        _trained("digits", digits_cnn),
        seeds={"rademacher": 300, "gaussian": 60, "sjlt": 750},
        rows={"train": 400, "test": 200},
    ),
    Case(
        "resnet18",
        "ResNet18",
        _trained("resnet18", resnet18, enlarged, epochs=2),
        examples=8,
        seeds={"rademacher": 20, "gaussian": 2, "sjlt": 100},
        rows={"train": 40, "test": 20},
    ),
    Case(
        "bert",
        "small BERT",
        _trained("bert", small_bert, sentences, lambda labels: labels % 2, epochs=6, learning_rate=5e-4),
        seeds={"rademacher": 40, "gaussian": 10, "sjlt": 200},
        rows={"train": 128, "test": 64},
    ),
)
HARD = (
    Case(
        "few",
        "MLP of 58 parameters",
        _untrained(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), lambda: torch.randn(FEW, 4)),
    ),
    Case("table", "linear, 10 columns of unlike size", _untrained(lambda: nn.Linear(10, 2), _columns)),
    Case("bag", "linear, bag of 8 words", _untrained(lambda: nn.EmbeddingBag(2000, 2, mode="sum"), _bags)),
    Case("alone", "linear, one-hot input", _untrained(lambda: nn.Linear(FEW, 1, bias=False), lambda: torch.eye(FEW))),
    Case("onehot", "linear and a bias, one-hot input", _untrained(lambda: nn.Linear(FEW, 1), lambda: torch.eye(FEW))),
)
CASES = {case.name: case for case in (*TRAINED, *HARD)}
