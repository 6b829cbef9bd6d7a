"""A kind of projection is a module of its own and a line of the list: a third one is tried from end to end."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import gradstore
from gradstore import projection
from gradstore.errors import UsageError
from gradstore.projection import Projection
from gradstore.projection.kinds import KINDS, kind_of
from gradstore.projection.philox import philox4x32_10

pytestmark = pytest.mark.numerical

ROOT = Path(__file__).parents[2]
ROW = 2**31  # the first third word of the counters of the third kind
THIRD = f"""
from gradstore.projection.kind_record import Kind

def uniform(words, k):
    return ((words.double() + 0.5) * 2.0**-31 - 1) * 3**0.5

KIND = Kind(name="third", code=0, period=4, entries=uniform, row=lambda k: k + {ROW}, multiple=4)
"""
PROJECT = """
import torch
import gradstore as gs

def project():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, bias=False)
    data = torch.utils.data.TensorDataset(torch.randn(5, 3), torch.arange(5) % 2)
    return gs.Project(model=model, splits={"train": data})
"""


@pytest.fixture
def third(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A third kind, as its module and its line add it; entries uniform on ±sqrt(3)."""
    (tmp_path / "third.py").write_text(THIRD)
    monkeypatch.setattr(projection, "__path__", [*projection.__path__, str(tmp_path)])
    monkeypatch.setitem(KINDS, "third", "uniform")
    monkeypatch.delitem(sys.modules, "gradstore.projection.third", raising=False)
    return "third"


def dense(seed: int, stream: int, K: int, p: int) -> Tensor:
    """The third kind's P [K, p], written out."""
    k, b = torch.arange(K)[:, None], torch.arange(-(-p // 4))
    key = (seed % 2**32, seed // 2**32)
    words = torch.stack(philox4x32_10((b, torch.zeros(()).long(), k + ROW, torch.tensor(2 * stream)), key), dim=-1)
    return (((words.double() + 0.5) / 2**31 - 1) * 3**0.5).flatten(1)[:, :p]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_third_kind_is_projected_on_every_path(third: str, backend: str) -> None:
    P, block = dense(2**40 + 3, 5, 64, 700), torch.randn(3, 700, generator=torch.Generator().manual_seed(0))
    made = Projection(third, 64, seed=2**40 + 3, stream=5, backend=backend)
    torch.testing.assert_close(made.entries(torch.arange(64)[:, None], torch.arange(700)), P)
    torch.testing.assert_close(made.project(block).double(), block.double() @ P.T / 8, rtol=1e-6, atol=1e-6)
    assert made.path(torch.device("cpu")) == "reference"
    assert abs(float(P.mean())) < 0.02
    assert abs(float(P.square().mean()) - 1) < 0.02


def test_a_third_kind_may_say_which_k_it_takes(third: str) -> None:
    text = re.escape("dim: bad dim (expected a multiple of 4 for third, such as 64 or 68, got 66)")
    with pytest.raises(UsageError, match=text):
        Projection(third, 66)


def test_a_third_kind_is_featurized_by_the_command_line(third: str, tmp_path: Path) -> None:
    (tmp_path / "project.py").write_text(PROJECT)
    words = ["featurize", "project.py", "--out", "store", "--projection", third]
    words += ["--proj-dim", "64", "--dtype", "float32"]
    code = (
        "from gradstore import projection; from gradstore.projection.kinds import KINDS\n"
        "projection.__path__.append('.'); KINDS['third'] = 'uniform'\n"
        f"import gradstore_cli; gradstore_cli.main({words})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    store = gradstore.open(tmp_path / "store")
    assert store.card()["projection"] == "third, K = 64, seed 0, version 1"
    torch.manual_seed(0)
    torch.nn.Linear(3, 2, bias=False)
    x = torch.randn(5, 3).double()
    P = dense(0, 0, 64, 6).view(64, 2, 3)  # the gradient of output c is x in row c of the weight
    want = torch.einsum("kci,ni->nck", P, x) / 8
    np.testing.assert_allclose(store.features[:], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_its_module(name: str) -> None:
    kind = kind_of(name)
    assert kind.name == name
    assert kind.code in (0, 1)
    assert 128 % kind.period == 0  # every parameter tensor begins on a counter of its own
    assert not kind.shares_layers or kind.compiled is not None


def test_no_two_kinds_share_a_counter() -> None:
    k = torch.tensor([0, 1, 77, 2**31 - 1])
    for a, b in combinations(map(kind_of, KINDS), 2):
        assert a.code != b.code or not set(a.row(k).tolist()) & set(b.row(k).tolist())


def test_an_unknown_kind_is_refused_with_the_list() -> None:
    text = f"kind: unknown kind (expected one of {', '.join(KINDS)}, got 'x')"
    with pytest.raises(UsageError, match=re.escape(text)):
        kind_of("x")


def test_no_code_knows_a_kind_by_name() -> None:
    """But its own module and the list."""
    own = {ROOT / "gradstore/projection" / f"{name}.py" for name in (*KINDS, "kinds")}
    found = {}
    for path in {*(ROOT / "gradstore").rglob("*.py"), *(ROOT / "cli").glob("*.py")} - own:
        values = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        found[path.name] = [node.lineno for node in values if node.value in tuple(KINDS)]
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert len(found) > 100
