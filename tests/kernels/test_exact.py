"""Exact kernels against dense float64 Jacobians of `torch.func.jacrev`, and identities among them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, HARD_CASES, Case, SmallCNN, mlp, rows
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.errors import MismatchError, NonFiniteError, ProjectError, UsageError
from gradstore.kernels.gram_matrix import open_gram
from gradstore.model.parameters import parameter_blocks

pytestmark = [
    pytest.mark.numerical,
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # of jacrev, the reference
]
ALL = pytest.mark.parametrize("case", CASES + HARD_CASES, ids=lambda case: case.name)
NTK = ["trntk", "trntk0", "pntk", "pntk-cosine", "entk"]


class Rows:
    """A batch as a dataset."""

    def __init__(self, inputs: Any, n: int) -> None:
        self.inputs, self.n = inputs, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Any, int]:
        if isinstance(self.inputs, Tensor):
            return self.inputs[i], 0
        return {name: value[i] for name, value in self.inputs.items()}, 0


def project_of(case: Case, n: int, m: int, dtype: torch.dtype) -> gs.Project:
    splits = {"train": Rows(case.batch(n, 1, dtype), n), "test": Rows(case.batch(m, 2, dtype), m)}
    forward = case.forward or (lambda model, x: model(x))
    return gs.Project(model=case.model(dtype=dtype), splits=splits, forward=forward, parameters=case.parameters)


def dense_jacobian(case: Case, inputs: Any, n: int) -> Tensor:
    """[n, c, p] in float64, one example at a time."""
    model = case.model(dtype=torch.float64)
    names = [block.name for block in parameter_blocks(model, case.parameters)]
    values = {name: value.detach() for name, value in model.named_parameters() if name in names}

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, example: Any) -> Tensor:
            return case.logits(self.inner, example)

    called = Called()
    found = []
    for i in range(n):
        example = rows(inputs, i, i + 1)
        jacobian = jacrev(
            lambda p, x=example: functional_call(called, {f"inner.{k}": v for k, v in p.items()}, (x,))[0]
        )(values)
        found.append(torch.cat([jacobian[name].detach().reshape(case.classes, -1) for name in names], dim=1))
    return torch.stack(found)


def dense_kernel(kernel: str, a: Tensor, b: Tensor) -> np.ndarray:
    """Straight from the definitions in Engel et al. (ICLR 2024)."""
    pairs = torch.einsum("icp,jdp->icjd", a, b)
    if kernel == "entk":
        return pairs.flatten(2).flatten(0, 1).numpy()
    if kernel in ("trntk", "trntk0"):
        value = torch.einsum("icjc->ij", pairs)
        norms = (a.square().sum((1, 2)).sqrt(), b.square().sum((1, 2)).sqrt())
    else:
        value = pairs.sum((1, 3))
        norms = (a.sum(1).norm(dim=1), b.sum(1).norm(dim=1))
    if kernel == "pntk":
        return (value / a.shape[1]).numpy()
    return (value if kernel == "trntk0" else value / torch.outer(*norms)).numpy()


def require_close(found: np.ndarray, expected: np.ndarray, diagonal_a: np.ndarray, diagonal_b: np.ndarray) -> None:
    """To 1e-5 of sqrt(κ(x, x) κ(x', x'))."""
    error = np.abs(found - expected) / np.sqrt(np.outer(diagonal_a, diagonal_b))
    assert error.max() < 1e-5, error.max()


@ALL
def test_every_kernel_equals_the_dense_jacobians(case: Case) -> None:
    n, m = 6, 4
    # In float64, so that what is compared is the contraction and not the network's own rounding.
    project = project_of(case, n, m, torch.float64)
    a, b = (dense_jacobian(case, case.batch(k, seed, torch.float64), k) for k, seed in ((n, 1), (m, 2)))
    for kernel in NTK:
        diagonals = [np.diag(dense_kernel(kernel, side, side)) for side in (a, b)]
        require_close(gs.exact_gram(project, "train", "test", kernel), dense_kernel(kernel, a, b), *diagonals)
    own = gs.exact_gram(project, "train")
    require_close(own, dense_kernel("trntk", a, a), np.ones(n), np.ones(n))
    np.testing.assert_array_equal(own, own.T)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_float32_model_is_as_near_as_its_own_rounding(case: Case) -> None:
    project = project_of(case, 5, 4, torch.float32)
    a, b = (dense_jacobian(case, case.batch(k, seed, torch.float64), k) for k, seed in ((5, 1), (4, 2)))
    require_close(gs.exact_gram(project, "train", "test"), dense_kernel("trntk", a, b), np.ones(5), np.ones(4))


@pytest.fixture(scope="module")
def cnn() -> gs.Project:
    torch.manual_seed(0)
    images = torch.randn(90, 1, 8, 8)
    labels = torch.arange(90) % 4
    splits = {"train": TensorDataset(images[:60], labels[:60]), "test": TensorDataset(images[60:], labels[60:])}
    return gs.Project(model=SmallCNN(), splits=splits)


def test_kernels_by_hand() -> None:
    """F^c(x) = w_c · x has g^c(x) = x in the place of w_c; of x = (1, 2) and x' = (3, 1), ⟨x, x'⟩ = 5.

    Eq. 4: 5 where the classes are the same, 0 elsewhere. Eq. 5: (5 + 5) / (√(5 + 5) √(10 + 10)). Eq. 6: 10 / 2.
    """
    model = nn.Linear(2, 2, bias=False)
    x = torch.tensor([[1.0, 2], [3, 1]])
    project = gs.Project(model=model, splits={"train": TensorDataset(x, torch.zeros(2).long())})
    expected = {"trntk": 10 / 200**0.5, "trntk0": 10.0, "pntk": 5.0, "pntk-cosine": 1 / 2**0.5}
    for kernel, value in expected.items():
        assert gs.exact_gram(project, kernel=kernel)[0, 1] == pytest.approx(value)
    np.testing.assert_allclose(gs.exact_gram(project, kernel="entk")[:2, 2:], 5 * np.eye(2), atol=1e-6)


def test_the_kernel_is_the_sum_over_parameter_tensors(cnn: gs.Project) -> None:
    """App. D: trNTK⁰ = Σ_l trNTK_l⁰, and trNTK divides it by the square roots of its diagonal on either side."""
    names = [name for name, _ in cnn.model.named_parameters()]
    parts = [replace(cnn, parameters=re.escape(name)) for name in names]
    summed = sum((gs.exact_gram(part, kernel="trntk0") for part in parts), np.zeros((60, 60)))
    np.testing.assert_allclose(summed, gs.exact_gram(cnn, kernel="trntk0"), rtol=1e-5, atol=1e-5 * summed.max())
    root = np.diag(1 / np.sqrt(np.diag(summed)))
    np.testing.assert_allclose(root @ summed @ root, gs.exact_gram(cnn, kernel="trntk"), atol=5e-6)


def test_the_identities_between_kernels(cnn: gs.Project) -> None:
    full = gs.exact_gram(cnn, kernel="entk")
    trace0, cosine = gs.exact_gram(cnn, kernel="trntk0"), gs.exact_gram(cnn, kernel="trntk")
    summed, angle = gs.exact_gram(cnn, kernel="pntk"), gs.exact_gram(cnn, kernel="pntk-cosine")
    blocks = full.reshape(60, 4, 60, 4)
    np.testing.assert_allclose(np.trace(trace0), np.trace(full), rtol=1e-6)
    np.testing.assert_allclose(np.einsum("icjc->ij", blocks), trace0, atol=1e-5 * trace0.max())
    np.testing.assert_allclose(blocks.sum((1, 3)) / 4, summed, atol=1e-5 * summed.max())
    for value, normalised in ((trace0, cosine), (summed, angle)):
        norms = np.sqrt(np.diag(value))
        np.testing.assert_allclose(value / np.outer(norms, norms), normalised, atol=1e-5)
        np.testing.assert_array_equal(np.diag(normalised), 1.0)
    for matrix in (full, trace0, cosine, summed, angle):
        assert np.linalg.eigvalsh(matrix).min() > -1e-5 * np.abs(matrix).max(), "positive semidefinite"


@pytest.mark.parametrize("kernel", NTK)
def test_values_do_not_depend_on_how_the_work_is_cut(cnn: gs.Project, kernel: str) -> None:
    whole = gs.exact_gram(cnn, "train", "test", kernel, memory="1GB")
    cut = gs.exact_gram(cnn, "train", "test", kernel, memory="12MB")
    np.testing.assert_allclose(cut, whole, atol=1e-6 * np.abs(whole).max())


def test_a_part_of_the_rows_is_a_part_of_the_matrix(cnn: gs.Project) -> None:
    whole = gs.exact_gram(cnn, "train", "test")
    part = gs.exact_gram(cnn, "train", "test", rows_a=[50, 3, 3], rows_b=np.arange(5))
    np.testing.assert_allclose(part, whole[[50, 3, 3], :5], atol=1e-6)


@pytest.mark.parametrize("kernel", ["trntk", "entk", "embedding"])
def test_a_matrix_on_disk_is_the_one_in_memory(cnn: gs.Project, kernel: str, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    written = gs.exact_gram(
        cnn, kernel=kernel, out=tmp_path / "gram.h5", memory="20MB", progress=lambda *step: steps.append(step)
    )
    assert steps[-1][0] == steps[-1][1] == written.shape[0] * written.shape[1]
    in_memory: list[tuple[int, int]] = []
    expected = gs.exact_gram(cnn, kernel=kernel, progress=lambda *step: in_memory.append(step))
    assert in_memory[-1][0] == in_memory[-1][1] == expected.size
    np.testing.assert_allclose(written[:], expected, atol=1e-6 * np.abs(expected).max())
    assert open_gram(written.path).kernel == kernel
    with torch.no_grad():
        cnn.model.head.bias += 1
    try:
        with pytest.raises(MismatchError, match="is not the Gram matrix that was asked for"):
            gs.exact_gram(cnn, kernel=kernel, out=tmp_path / "gram.h5")
    finally:
        with torch.no_grad():
            cnn.model.head.bias -= 1


# -- representations -------------------------------------------------------------------------------------------------


def cosine(a: Tensor, b: Tensor) -> np.ndarray:
    return (nn.functional.normalize(a.double(), dim=1) @ nn.functional.normalize(b.double(), dim=1).T).numpy()


def test_the_conjugate_kernel_is_the_cosine_of_the_final_layers_input(cnn: gs.Project) -> None:
    model = cnn.model.eval()
    with torch.no_grad():
        a, b = (model.features(cnn.splits[split].tensors[0]).flatten(1) for split in ("train", "test"))
    np.testing.assert_allclose(gs.exact_gram(cnn, "train", "test", "ck"), cosine(a, b), atol=1e-6)
    np.testing.assert_allclose(gs.exact_gram(cnn, "train", kernel="ck", layers="head"), cosine(a, a), atol=1e-6)


def test_the_embedding_kernel_sums_the_grams_of_layers(cnn: gs.Project) -> None:
    model = cnn.model.eval()
    outputs: dict[str, list[Tensor]] = {}
    for split in ("train", "test"):
        x = cnn.splits[split].tensors[0]
        outputs[split] = []
        with torch.no_grad():
            for layer in model.features:
                x = layer(x.clone())
                outputs[split].append(x.flatten(1).clone())
            outputs[split].append(model.head(x.flatten(1)))
    # ReLU works in place here, so the norm before it is seen as it came out, before the ReLU
    a, b = outputs["train"], outputs["test"]
    summed = sum((x.double() @ y.double().T for x, y in zip(a, b, strict=True)), torch.zeros(1)).numpy()
    own = [sum((x.double().square().sum(1) for x in side), torch.zeros(1)).sqrt().numpy() for side in (a, b)]
    np.testing.assert_allclose(gs.exact_gram(cnn, "train", "test", "embedding"), summed / np.outer(*own), atol=2e-6)
    squares = [np.stack([x.double().square().sum(1).numpy() for x in side], 1) for side in (a, b)]
    written = summed / np.sqrt(squares[0] @ squares[1].T)
    np.testing.assert_allclose(gs.exact_gram(cnn, "train", "test", "embedding-layerwise"), written, atol=2e-6)
    chosen = gs.exact_gram(cnn, "train", "test", "embedding", layers=r"features\.(0|4)|head")
    x, y = (torch.cat([side[0], side[4], side[-1]], 1) for side in (a, b))
    np.testing.assert_allclose(chosen, cosine(x, y), atol=2e-6)
    np.testing.assert_array_equal(np.diag(gs.exact_gram(cnn, kernel="embedding")), 1.0)


def test_the_embedding_kernel_of_app_b_by_hand() -> None:
    """Two layers h¹ = x and h² = W x of x = (1, 0) and (1, 1), with W = diag(2, 0):

    h¹: (1, 0), (1, 1); h²: (2, 0), (2, 0); squared norms (1, 4) and (2, 4)
    E(0, 0) = (1 + 4) / sqrt(1·1 + 4·4), E(1, 1) = (2 + 4) / sqrt(2·2 + 4·4), E(0, 1) = (1 + 4) / sqrt(1·2 + 4·4)
    """
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[2.0, 0], [0, 0]]))
    x = torch.tensor([[1.0, 0], [1, 1]])
    project = gs.Project(model=model, splits={"train": TensorDataset(x, torch.zeros(2).long())})
    expected = [[5 / 17**0.5, 5 / 18**0.5], [5 / 18**0.5, 6 / 20**0.5]]
    np.testing.assert_allclose(gs.exact_gram(project, kernel="embedding-layerwise"), expected, rtol=1e-6)
    cosines = [[1, 5 / 30**0.5], [5 / 30**0.5, 1]]
    np.testing.assert_allclose(gs.exact_gram(project, kernel="embedding"), cosines, rtol=1e-6)


def test_examples_without_a_layer_in_common_are_named() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(1, 1))  # x = 1 gives (1, 0), x = -1 gives (0, 1)
    with torch.no_grad():
        model[1].weight.fill_(-1)
        model[1].bias.fill_(1)
    x = torch.tensor([[1.0], [-1]])
    project = gs.Project(model=model, splits={"train": TensorDataset(x, torch.zeros(2).long())})
    with pytest.raises(NonFiniteError, match="rows 0 and 1 have no layer in common"):
        gs.exact_gram(project, kernel="embedding-layerwise")
    assert gs.exact_gram(project, kernel="embedding")[0, 1] == 0


def test_a_module_called_twice_and_one_never_called() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.unused, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(self.inner(x).tanh()))

    torch.manual_seed(0)
    x = torch.randn(9, 4)
    project = gs.Project(model=Twice(), splits={"train": TensorDataset(x, torch.zeros(9).long())})
    with torch.no_grad():
        first = project.model.inner(x)
        second = project.model.inner(first.tanh())
        h = torch.cat([first, second, project.model.head(second)], 1)
    np.testing.assert_allclose(gs.exact_gram(project, kernel="embedding"), cosine(h, h), atol=1e-6)
    with pytest.raises(ProjectError, match=r"model\.unused: the module is not called"):
        gs.exact_gram(project, kernel="embedding", layers="unused|head")


@pytest.mark.parametrize("n", [9, 7, 1], ids=["any", "as many as tokens", "one"])
def test_the_default_embedding_leaves_out_what_has_no_row_an_example(n: int) -> None:
    """The positions of the transformer have 7 rows, one a token, whatever the batch."""
    case = next(case for case in CASES if case.name == "transformer-dict")
    project = project_of(case, n, 2, torch.float32)
    whole = gs.exact_gram(project, kernel="embedding")
    leaves = [name for name, module in case.model().named_modules() if not any(module.children())]
    assert "positions" in leaves
    pattern = "tokens|head|" + "|".join(n for n in leaves if n.startswith("encoder") and _is_called(case, n))
    np.testing.assert_allclose(whole, gs.exact_gram(project, kernel="embedding", layers=pattern), atol=1e-6)
    assert np.linalg.eigvalsh(whole).min() > -1e-5
    if n == 9:
        with pytest.raises(
            ProjectError, match=r"model\.positions: the module's representation is not one row an example"
        ):
            gs.exact_gram(project, kernel="embedding", layers="positions|head")


def _is_called(case: Case, name: str) -> bool:
    model, calls = case.model(), []
    model.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    with torch.no_grad():
        case.logits(model, case.batch(2))
    return bool(calls)


# -- bad input -------------------------------------------------------------------------------------------------------


def small_project(model: nn.Module, x: Tensor) -> gs.Project:
    return gs.Project(model=model, splits={"train": TensorDataset(x, torch.zeros(len(x)).long())})


def test_unusable_arguments_are_named(cnn: gs.Project) -> None:
    with pytest.raises(UsageError, match=r"proj-trntk needs stores, not a project \(expected one of trntk, trntk0"):
        gs.exact_gram(cnn, kernel="proj-trntk")
    with pytest.raises(UsageError, match="trntk needs a project, not a store"):
        gs.gram(None, kernel="trntk")
    with pytest.raises(UsageError, match="unknown split"):
        gs.exact_gram(cnn, "train", "valid")
    with pytest.raises(UsageError, match=r"no such row of split 'train' \(expected 0 to 59, got 60\)"):
        gs.exact_gram(cnn, rows_a=[60])
    with pytest.raises(UsageError, match="rows of the second split without a second split"):
        gs.exact_gram(cnn, rows_b=[0])
    for kernel in ("trntk", "embedding"):
        with pytest.raises(UsageError, match=r"too little memory \(expected at least"):
            gs.exact_gram(cnn, kernel=kernel, memory="1KB")


def test_layers_that_do_not_exist_are_named(cnn: gs.Project) -> None:
    with pytest.raises(UsageError, match=r"no such module .*Linear layers are head"):
        gs.exact_gram(cnn, kernel="ck", layers="tail")
    with pytest.raises(UsageError, match=r"no module has such a name .*features\.0"):
        gs.exact_gram(cnn, kernel="embedding", layers="tail")
    with pytest.raises(UsageError, match="not a regular expression"):
        gs.exact_gram(cnn, kernel="embedding", layers="(")
    convolutional = nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten())
    with pytest.raises(ProjectError, match=r"no linear layer gives the logits.*Name the final layer with --layers"):
        gs.exact_gram(small_project(convolutional, torch.randn(4, 1, 8, 8)), kernel="ck")


def test_a_gradient_that_is_zero_or_not_finite_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    x = torch.randn(5, 3)
    x[3] = 0
    project = small_project(model, x)
    with pytest.raises(NonFiniteError, match=r"split 'train': the gradients of row 3 are zero, so trntk is undefined"):
        gs.exact_gram(project)
    with pytest.raises(NonFiniteError, match="the representation of row 3 has no direction"):
        gs.exact_gram(project, kernel="ck")
    assert not gs.exact_gram(project, kernel="trntk0")[3].any()
    x[2] = torch.nan
    with pytest.raises(NonFiniteError, match="row 2"):
        gs.exact_gram(small_project(model, x), rows_a=[0, 2])


def test_a_model_is_left_as_it_was() -> None:
    model = mlp().train()
    project = small_project(model, torch.randn(5, 6))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for kernel in ("trntk", "ck", "embedding"):
        gs.exact_gram(project, kernel=kernel)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
