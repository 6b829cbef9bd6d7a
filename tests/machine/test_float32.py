"""Float32 is float32 whatever the user has told torch, by either of its names; and what was told stays."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import gradstore as gs
from gradstore.machine.devices import full_float32
from gradstore.search.index.indexed_rows import IndexedRows
from gradstore.search.index.store_index import open_index
from gradstore.search.request import Request

MATMUL = torch.backends.cuda.matmul
GPU, CPU = torch.device("cuda"), torch.device("cpu")
NEW = hasattr(MATMUL, "fp32_precision")


BACKENDS = torch.backends
NEWER = [
    (name, where)
    for name, where in (
        *((name, getattr(BACKENDS, name, BACKENDS)) for name in ("everything", "cudnn", "mkldnn")),
        ("cuda.matmul", MATMUL),
        *((f"cudnn.{kind}", getattr(BACKENDS.cudnn, kind, None)) for kind in ("conv", "rnn")),
        *((f"mkldnn.{kind}", getattr(BACKENDS.mkldnn, kind, None)) for kind in ("matmul", "conv", "rnn")),
    )
    if hasattr(where, "fp32_precision")
]


def state() -> dict[str, object]:
    """Every precision by its newer name, and by the older ones, which cannot always be read."""

    def read(older):
        try:
            return older()
        except RuntimeError:
            return "cannot be read"

    return {
        **{name: where.fp32_precision for name, where in NEWER},
        "products": read(torch.get_float32_matmul_precision),
        "products on a GPU": read(lambda: MATMUL.allow_tf32),
        "convolutions on a GPU": read(lambda: BACKENDS.cudnn.allow_tf32),
    }


@pytest.fixture(autouse=True)
def as_it_was():
    newer = [(where, where.fp32_precision) for _, where in NEWER]
    yield
    for where, _ in newer:
        where.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    for where, value in newer:
        where.fp32_precision = value


SETTINGS = [
    lambda: setattr(MATMUL, "allow_tf32", True),
    lambda: setattr(MATMUL, "allow_tf32", False),
    lambda: torch.set_float32_matmul_precision("high"),
    lambda: torch.set_float32_matmul_precision("medium"),
    lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    *((lambda p=precision: setattr(MATMUL, "fp32_precision", p)) for precision in ("tf32", "ieee", "none") if NEW),
]


NEW_SETTINGS = {
    "everything": lambda value: setattr(BACKENDS, "fp32_precision", value),
    "cudnn": lambda value: setattr(BACKENDS.cudnn, "fp32_precision", value),
    "cudnn.conv": lambda value: setattr(BACKENDS.cudnn.conv, "fp32_precision", value),
    "mkldnn": lambda value: setattr(BACKENDS.mkldnn, "fp32_precision", value),
    "mkldnn.matmul": lambda value: setattr(BACKENDS.mkldnn.matmul, "fp32_precision", value),
    "mkldnn.conv": lambda value: setattr(BACKENDS.mkldnn.conv, "fp32_precision", value),
}
if NEW:
    SETTINGS += [partial(set_, "bf16" if name.startswith("mkldnn") else "tf32") for name, set_ in NEW_SETTINGS.items()]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("device", [GPU, CPU], ids=str)
def test_what_the_user_set_is_put_aside_and_back(setting, device):
    setting()
    before = state()
    with full_float32(device):
        inside = state()
    assert state() == before
    mine = ("cuda.", "cudnn.") if device == GPU else ("mkldnn.",)
    assert {inside[name] for name, _ in NEWER if name.startswith(mine)} <= {"ieee"}
    if device == GPU:  # torch takes no product while its settings disagree
        assert inside["products"] == "highest"
        assert not inside["products on a GPU"]
        assert not inside["convolutions on a GPU"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_results_are_the_same_whatever_the_user_set(setting, tmp_path):
    """So is what the user set; torch's own `cudnn.flags` and `get_float32_matmul_precision` fail with some of it."""
    usual = results(tmp_path / "usual")
    setting()
    before = state()
    found = results(tmp_path / "so")
    assert [name for name, values in usual.items() if values != found[name]] == []
    assert state() == before


def results(folder):
    """Bits of features, of exact kernels and of an index's upper bounds."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = torch.nn.Conv2d(2, 32, 3), torch.nn.ReLU(), torch.nn.Flatten(2), torch.nn.Linear(36, 64)
        model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(64 * 32, 3))
    data = torch.utils.data.TensorDataset(torch.randn(40, 2, 8, 8, generator=generator), torch.arange(40) % 3)
    project = gs.Project(model=model, splits={"train": data})
    store = gs.featurize(project, split="train", out=folder, proj_dim=64, dtype="float32")
    index = open_index(store, size=20)
    rows, chosen = IndexedRows(index, 10**9), np.arange(40)
    request = Request(store, store, chosen, (index.phi,) * 40, index.phi.kernel, 3, store)
    upper = [rows.upper_bounds(group, 3)[0].tobytes() for _, group in rows.batches(request)]
    exact = {name: gs.exact_gram(project, "train", kernel=name).tobytes() for name in ("ck", "trntk")}
    return {"features": store.features[:].tobytes(), "logits": store.logits.tobytes(), "bounds": upper, **exact}


def test_it_is_put_back_after_an_error():
    MATMUL.allow_tf32 = True

    def fail():
        with full_float32(GPU):
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert MATMUL.allow_tf32


@pytest.mark.skipif(not NEW, reason="this torch has one name for the products of CPUs and GPUs")
def test_a_cpu_leaves_what_is_of_gpus():
    MATMUL.allow_tf32 = True
    with full_float32(CPU):
        assert MATMUL.allow_tf32
