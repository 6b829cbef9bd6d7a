"""Which rows an argument means: masks and indices of every kind, and what could be read in two ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import clustered, write_store
from torch import nn
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import ProjectError, UsageError
from gradstore.indices import chosen_row, chosen_rows, class_indices, row_mask
from gradstore.store.import_features import Provenance, import_features
from gradstore.store.row_list import read_row_list

N = 6
INTEGERS = [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64]


def as_given(values: list, data: st.DataObject) -> Any:
    """The same values as a list, a tuple, an array or a tensor."""
    kind = data.draw(st.sampled_from(["list", "tuple", "scalars", "array", "strided", "tensor"]))
    boolean = bool(values) and isinstance(values[0], bool)
    dtype = bool if boolean else data.draw(st.sampled_from(INTEGERS))
    array = np.array(values, dtype)
    if kind == "tensor":
        return torch.tensor(values, dtype=torch.bool if boolean else torch.int64)
    strided = np.repeat(array, 2)[::2]
    return {"list": values, "tuple": tuple(values), "scalars": list(array), "array": array, "strided": strided}[kind]


@settings(deadline=None, derandomize=True)
@given(st.data())
def test_every_way_to_name_rows_means_the_same(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40))
    mask = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    expected = [i for i, wanted in enumerate(mask) if wanted]
    found = chosen_rows(as_given(mask, data), n, where="rows")
    assert found.dtype == np.int64
    assert found.tolist() == expected
    assert row_mask(as_given(mask, data), n, where="rows").tolist() == mask
    start, stop, step = (data.draw(st.none() | st.integers(-50, 50).filter(bool)) for _ in range(3))
    assert chosen_rows(slice(start, stop, step), n, where="rows").tolist() == list(range(n))[start:stop:step]

    rows = data.draw(st.lists(st.integers(-3, n + 3), max_size=50))
    wrong = [row for row in rows if not 0 <= row < n]
    ambiguous = len(rows) == n and set(rows) <= {0, 1} and len(set(rows)) < n
    if wrong or ambiguous:
        with pytest.raises(UsageError, match="zeros and ones" if ambiguous else rf"no such row .*got {wrong[0]}\)"):
            chosen_rows(rows, n, where="rows")
    else:
        assert chosen_rows(as_given(rows, data), n, where="rows").tolist() == rows


@pytest.mark.parametrize(
    "rows",
    [None, slice(None), range(N), range(2, 5), range(4, 0, -2), 3, np.int8(3), torch.tensor(3), np.where([0, 1, 1])],
)
def test_all_of_them_a_range_or_one(rows: Any) -> None:
    everything = rows is None or isinstance(rows, slice)
    expected = list(range(N)) if everything else np.atleast_1d(np.squeeze(rows)).tolist()
    assert chosen_rows(rows, N, where="rows").tolist() == expected


def test_a_range_or_slice_is_never_a_mask() -> None:
    for rows in (range(2), slice(0, 2)):
        assert row_mask(rows, 2, where="here").tolist() == [True, True]


MASK = r"\(expected 6 booleans, or row indices below 6, got "
REFUSED: list[tuple[Any, str]] = [
    (
        [0, 1, 0, 0, 1, 1],
        rf"6 zeros and ones are likelier a mask .*{MASK}int64 \[6\]\)\. A mask is boolean: .astype\(bool\)",
    ),
    (np.array([0, 1, 0, 0, 1, 1], np.uint8), "6 zeros and ones are likelier a mask"),
    (torch.ones(N, dtype=torch.int64), "6 zeros and ones are likelier a mask"),
    (np.ones(5, bool), rf"the mask is for another number of rows {MASK}5 booleans\)"),
    (np.ones(7, bool), "the mask is for another number of rows"),
    (np.ones((6, 1), bool), r"got \[6, 1\] booleans"),
    (True, r"got the single boolean True\)"),
    ([True, 2], r"neither a mask nor indices of rows .*got \[True, 2\]\)"),
    ([1.0, 2.0], rf"neither a mask nor indices of rows {MASK}float64 \[2\]\)\. Indices are integers: .astype\(int\)"),
    (np.array([0.0, 1, 1, 0, 0, 1]), r"float64 \[6\]\)\. A mask is boolean: .astype\(bool\)"),
    (2.0, r"got float64 \[\]"),
    (torch.rand(3), r"got float32 \[3\]"),
    (torch.rand(3).bfloat16(), "neither a mask nor indices of rows"),
    ([[1, 2]], r"got int64 \[1, 2\]\)\. Give one dimension: .ravel\(\)"),
    ([[1], [2, 3]], "neither a mask nor indices of rows"),
    ([1, None], r"got \[1, None\]\)\. Give a list, a range"),
    ([2**70], "neither a mask nor indices of rows"),
    ("0:3", "got '0:3'"),
    ({1, 2}, r"got \{1, 2\}"),
    ((i for i in range(3)), "got <generator"),
    (np.ma.array([1, 2], mask=[0, 1]), "neither a mask nor indices of rows"),
    (slice(0.5, 2), r"got slice\(0.5, 2, None\)"),
    ([-1], r"no such row \(expected 0 to 5, got -1\)\. Rows are counted from 0; a slice can count from the end"),
    ([0, 6], r"no such row \(expected 0 to 5, got 6\)\.$"),
    (np.array([2**63], np.uint64), r"no such row .*got 9223372036854775808"),
    (range(2, 10**15), r"no such row .*got 6\)"),
]


@pytest.mark.parametrize(("rows", "message"), REFUSED)
def test_what_is_no_choice_of_rows_is_refused(rows: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        chosen_rows(rows, N, where="--rows")
    assert str(caught.value).startswith("--rows: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError):
        row_mask(rows, N, where="--rows")


def test_a_set_of_rows_names_each_once() -> None:
    assert row_mask([4, 0], N, where="here").tolist() == [True, False, False, False, True, False]
    assert not row_mask([], N, where="here").any()
    with pytest.raises(UsageError, match=r"here: a row is named twice \(expected every row once, got 4\)"):
        row_mask([4, 0, 4], N, where="here")
    with pytest.raises(UsageError, match="neither a mask nor indices"):
        row_mask(None, N, where="here")  # type: ignore[arg-type]
    for rows in ([0, 1], [1, 0], [1, 1]):  # of two rows, they could be either
        with pytest.raises(UsageError, match="2 zeros and ones"):
            row_mask(rows, 2, where="here")
    assert chosen_rows([1, 0], 2, where="here").tolist() == [1, 0]
    assert row_mask(0, 1, where="here").tolist() == [True]  # an integer is no mask
    with pytest.raises(UsageError, match="1 zeros and ones"):
        row_mask([0], 1, where="here")


def test_one_row() -> None:
    assert [chosen_row(row, N, where="row") for row in (5, np.uint8(2), torch.tensor(0))] == [5, 2, 0]
    for row in (6, -1, 1.0, True, np.True_, torch.tensor(True), "1", None, [1]):
        with pytest.raises(UsageError, match=r"row: no such row \(expected 0 to 5, got "):
            chosen_row(row, N, where="row")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="none, for there are no rows"):
        chosen_row(0, 0, where="row")


LABELS = [
    [0, 2, -1],
    np.array([0, 2, -1], np.int8),
    np.array([0, 2, -1], object),
    torch.tensor([0.0, 2.0, -1.0], requires_grad=True),
    np.ma.array([0, 2, -1], mask=False),
]


@pytest.mark.parametrize("labels", LABELS)
def test_labels_are_whole_numbers(labels: Any) -> None:
    np.testing.assert_array_equal(class_indices(labels, where="y"), np.array([0, 2, -1]), strict=True)


@pytest.mark.parametrize(
    "labels",
    [
        [[1], [2, 3]],
        np.array([1, None], object),
        torch.rand(3).bfloat16(),
        torch.eye(3).to_sparse(),
        np.array([2**63], np.uint64),
        np.ma.array([0, 1], mask=[0, 1]),
        "cat",
    ],
)
def test_what_are_no_labels_is_refused(labels: Any) -> None:
    with pytest.raises(UsageError, match=r"^y: labels are (no indices of classes|masked) \(expected whole numbers"):
        class_indices(labels, where="y")


@pytest.mark.parametrize("wrong", [1.5, float("nan"), float("inf"), 1e300, "cat", None])
def test_labels_that_would_be_rounded_are_refused_everywhere(wrong: Any, stores: tuple, tmp_path: Path) -> None:
    message = r"labels are no indices of classes \(expected whole numbers, got "
    labels = [0, 1, 2] * 3 + [wrong] * 3
    with pytest.raises(UsageError, match=message):
        gs.KernelGLM().fit(stores[1], labels)
    model = gs.KernelGLM(alpha=1.0).fit(stores[0])
    with pytest.raises(UsageError, match=message):
        gs.evaluate(model, stores[1], labels, bootstrap=0)
    np.save(tmp_path / "grads.npy", np.ones((12, 4), np.float32))
    with pytest.raises(UsageError, match=message):
        import_features(tmp_path / "grads.npy", tmp_path / "out", Provenance("trak", "mine"), labels=labels)


# -- everywhere --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder, features = tmp_path_factory.mktemp("rows"), clustered(60, 3, 32)
    return write_store(folder / "train", features[:48]), write_store(folder / "test", features[48:])


@pytest.fixture(scope="module")
def project() -> gs.Project:
    torch.manual_seed(0)
    data = {name: TensorDataset(torch.randn(12, 4), torch.arange(12) % 3) for name in ("train", "test")}
    return gs.Project(model=nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), splits=data)


Choose = Callable[[Any], np.ndarray]


@pytest.fixture(params=["topk", "certified", "session", "exact rows", "exact columns", "fresh"])
def choose(request: pytest.FixtureRequest, stores: tuple, project: gs.Project, tmp_path: Path) -> Choose:
    """A public call that chooses among 12 rows, as a table with a row for each."""
    if request.param in ("topk", "certified"):
        mode = {"topk": "exact"}.get(request.param, request.param)
        return lambda rows: gs.topk(*stores, 3, rows=rows, mode=mode).similarity
    if request.param == "session":
        return lambda rows: gs.Session(stores[0]).topk(stores[1], 3, rows=rows).similarity
    if request.param == "exact rows":
        return lambda rows: gs.exact_gram(project, "train", "test", rows_a=rows)
    if request.param == "exact columns":
        return lambda rows: gs.exact_gram(project, "train", "test", rows_b=rows).T
    train = gs.featurize(project, split="train", out=tmp_path / "train", proj_dim=16)
    return lambda rows: gs.featurize_queries(project, train, split="test", rows=rows).features[:]


def test_rows_are_chosen_alike_everywhere(choose: Choose) -> None:
    everything = choose(None)
    mask = np.isin(np.arange(12), [2, 3, 7])
    for rows in (mask, mask.tolist(), torch.from_numpy(mask), [2, 3, 7], np.array([2, 3, 7], np.uint8)):
        np.testing.assert_allclose(choose(rows), everything[[2, 3, 7]], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(choose(range(9, 1, -3)), everything[[9, 6, 3]], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(choose(slice(-2, None)), everything[-2:], rtol=1e-6, atol=1e-6)
    for wrong in (mask.astype(int), mask.astype(float), mask[:-1], [-1], [12], [1.5], "0:3"):
        with pytest.raises(UsageError):
            choose(wrong)


def test_poisoned_rows_are_a_set(stores: tuple, tmp_path: Path) -> None:
    mask = np.isin(np.arange(48), [5, 9, 40])
    expected = gs.forensics(*stores, poisoned=mask).votes
    np.save(tmp_path / "mask.npy", mask)
    np.save(tmp_path / "rows.npy", np.flatnonzero(mask))
    (tmp_path / "rows.txt").write_text("9\n5\n40\n")
    files = [read_row_list(tmp_path / name, 48, what="poisoned rows") for name in ("mask.npy", "rows.npy", "rows.txt")]
    for rows in (mask.tolist(), torch.from_numpy(mask), [40, 5, 9], *files):
        np.testing.assert_array_equal(gs.forensics(*stores, poisoned=rows).votes, expected)
    for wrong in (mask.astype(int), mask.astype(float), mask[1:], [5, 5], [-1], [48]):
        with pytest.raises(UsageError, match="--poisoned: "):
            gs.forensics(*stores, poisoned=wrong)
    np.save(tmp_path / "wrong.npy", mask.astype(int))
    np.savetxt(tmp_path / "wrong.txt", mask.astype(int), fmt="%d")
    for name in ("wrong.npy", "wrong.txt"):
        with pytest.raises(UsageError, match=f"{name}: 48 zeros and ones are likelier a mask") as caught:
            read_row_list(tmp_path / name, 48, what="poisoned rows")
        assert ("One row index a line" in str(caught.value)) == name.endswith(".txt")
    (tmp_path / "none.txt").write_text("\n")
    assert not read_row_list(tmp_path / "none.txt", 48, what="poisoned rows").any()
    data = TensorDataset(torch.zeros(4, 2), torch.zeros(4).long())
    with pytest.raises(ProjectError, match=r"Project\(poisoned\['train'\]\): 4 zeros and ones"):
        gs.Project(model=nn.Linear(2, 3), splits={"train": data}, poisoned={"train": [0, 1, 1, 0]}).poisoned_mask(
            "train"
        )
