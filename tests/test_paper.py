"""The paper's experiments: loaders of its data sets, its architectures, its attack, its thought experiment."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch.func import functional_call, grad, vmap

import gradstore as gs
from gradstore.store.feature_store import FeatureStore

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.paper import generated, loaders, networks
from benchmarks.paper.adversarial import ATTACKS, network_decision, pgd, sigmoid_mlp, tangent_svm
from benchmarks.paper.experiment import KERNELS, Experiment, Outputs, affordable, dense, run, surrogate
from benchmarks.paper.forensic import nearest
from benchmarks.paper.order import minimum_of_sgd
from benchmarks.paper.recipes.badnet_cifar10 import stamped
from benchmarks.paper.recipes.runner import RECIPES, run_recipes
from benchmarks.paper.tables import over_seeds, read_csv
from benchmarks.paper.thought_experiment import SIGMA, convergence, pairs
from gradstore.errors import CorruptError, ProjectError, UnsafeError


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (networks.BadNetCNN, 820_394),
        (lambda: networks.resnet((2, 2, 2, 2)), 11_173_962),
        (lambda: networks.resnet((3, 4, 6, 3)), 21_282_122),
        (networks.mobilenet_v2, 2_236_682),
    ],
    ids=["BadNet", "ResNet18", "ResNet34", "MobileNetV2"],
)
def test_architectures_have_the_published_size(build, parameters: int) -> None:
    model = build().eval()
    found = sum(p.numel() for p in model.parameters())
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert found == parameters


def test_small_networks_have_one_logit() -> None:
    assert networks.SmallMLP()(torch.zeros(3, 1, 28, 28)).shape == (3, 1)
    assert networks.SmallCNN()(torch.zeros(3, 1, 28, 28)).shape == (3, 1)
    assert networks.SmallCNN(3, 32, repeats=2)(torch.zeros(3, 3, 32, 32)).shape == (3, 1)


def test_loaders_read_what_the_formats_say(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("mnist", "cifar"):
        (tmp_path / name).mkdir()
    generated.write_mnist(tmp_path / "mnist", rng)
    generated.write_cifar10(tmp_path / "cifar", rng)
    x, y = loaders.mnist(tmp_path / "mnist", "train")
    assert (x.shape, y.tolist()[:4]) == ((60, 1, 28, 28), [0, 1, 0, 1])
    assert x[1, 0, 16:22, 4:24].mean() > 0.6 > x[1, 0, 4:10, 4:24].mean()
    x, y = loaders.cifar10(tmp_path / "cifar", "train")
    assert (x.shape, sorted(set(y.tolist()))) == ((60, 3, 32, 32), list(range(10)))
    assert 0 <= float(x.min()) < float(x.max()) <= 1
    two, labels = loaders.two_of((x, y), (3, 7), 2)
    assert labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(two[2], x[(y == 7).nonzero()[0, 0]])


def test_a_batch_that_names_code_is_refused(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self):
            return (print, ("harm",))

    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Harm(), b"labels": []}, protocol=2))
    with pytest.raises(UnsafeError, match="names code"):
        loaders.cifar10(tmp_path, "test")
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(
        bytes((0, 0, 8, 3, 0, 0, 0, 9, 0, 0, 0, 28, 0, 0, 0, 28)) + bytes(8)
    )
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1, 0, 0, 0, 9)) + bytes(9))
    with pytest.raises(CorruptError, match="cut short"):
        loaders.mnist(tmp_path, "test")
    with pytest.raises(ProjectError, match="is missing"):
        loaders.cola(tmp_path, "train")


def test_cola_lines(tmp_path: Path) -> None:
    (tmp_path / "in_domain_train.tsv").write_text('gj04\t1\t\tIt "is" so.\ngj04\t0\t*\tSo is.\n')
    sentences, labels = loaders.cola(tmp_path, "train")
    assert (sentences, labels.tolist()) == (['It "is" so.', "So is."], [1, 0])


def test_the_square_covers_rows_and_columns_25_to_28() -> None:
    marked = stamped(torch.zeros(1, 3, 32, 32))[0]
    assert marked[:2].sum() == 2 * 16
    assert marked[2].sum() == 0
    assert marked[0, 25:29, 25:29].min() == 1


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch.func.jvp's own
def test_the_machine_on_the_tangent_kernel_is_scikit_learns() -> None:
    torch.manual_seed(0)
    model, x, y = sigmoid_mlp(8), torch.rand(30, 1, 8, 8), torch.arange(30) % 2
    theta = {name: p.detach() for name, p in model.named_parameters()}
    one = lambda p, image: functional_call(model, p, (image[None],))[0, 0]  # noqa: E731
    rows = torch.cat([g.flatten(1) for g in vmap(grad(one), (None, 0))(theta, x).values()], 1).double().numpy()
    train, test = rows[:20], rows[20:]
    scale = (train**2).sum(1).mean()
    svm = SVC(C=100.0, kernel="precomputed").fit(train @ train.T / scale, y[:20].numpy())
    expected = svm.decision_function(test @ train.T / scale)
    found = tangent_svm(model, x[:20], y[:20])(x[20:]).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_the_attack_stays_in_its_ball_and_lowers_the_margin() -> None:
    torch.manual_seed(1)
    model, x = sigmoid_mlp(8), torch.rand(20, 1, 8, 8)
    decide, signs = network_decision(model), torch.ones(20)
    moved = pgd(decide, x, signs, 0.1)
    assert float((moved - x).abs().max()) <= 0.1 + 1e-6
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1
    assert bool((decide(moved) < decide(x)).all())
    assert torch.equal(pgd(decide, x, signs, 0), x)
    assert {victim for _, victim in ATTACKS.values()} == {"network", "svm"}


def test_clusters_hold_pearson_near_one_but_not_tau() -> None:
    independent, dependent = (pair.measures() for pair in pairs(rate=1.0))
    assert independent["Pearson"] > 0.98
    assert dependent["Pearson"] > 0.98
    assert independent["Kendall"] == pytest.approx(1 / 2, abs=0.02)
    assert dependent["Kendall"] == pytest.approx(3 / 4, abs=0.02)


def test_tau_converges_slowest_as_the_noise_vanishes() -> None:
    for found in convergence():
        ratio = found["sigma"] / SIGMA
        if ratio <= 1:  # beyond, the clusters overlap
            expected = 1 / 2 + np.arcsin(1 / np.sqrt(1 + ratio**2)) / np.pi
            assert found["Kendall"] == pytest.approx(expected, abs=0.02)
        assert found["Kendall"] < found["Spearman"] < 1
        assert found["Kendall"] < found["Pearson"] < 1


def test_the_nearest_come_in_order_and_ties_by_row() -> None:
    gram = np.array([[0.9, 0.8, 0.1, 0.85], [0.1, 0.1, 0.1, 0.1]])
    assert nearest(gram, gram, 3, "trntk").tolist() == [[0, 3, 1], [0, 1, 2]]


def test_means_over_seeds_carry_their_errors() -> None:
    assert over_seeds([1.0, 2.0, 3.0], 2) == "2.00 ± 0.58"
    assert over_seeds([0.01, None], 1, percent=True) == "1.0 (1 n/a)"
    assert over_seeds([None]) == "n/a"


QUICK = ("mlp_mnist2", "cnn_fmnist2", "cnn_cifar2")


def _smoke(name: str, out: Path | None, **changes: object) -> list[dict[str, object]]:
    settings = {"options": {}, "smoke": True, "proj_dim": 64, "seeds": 1, "memory": "2GB", **changes}
    run_recipes(name, None, out, lambda line: None, **settings)  # type: ignore[arg-type]
    return [] if out is None else read_csv(out / f"{name}.csv")


@pytest.mark.soak
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_from_files_to_its_table(
    name: str, amount: Callable[[int, int], int], tmp_path: Path
) -> None:
    if name not in QUICK and not amount(0, 1):
        pytest.skip("half a minute and 3 GB; `make soak` runs it")
    rows = _smoke(name, tmp_path)
    kernels = RECIPES[name][1]
    assert [(row["kernel"], row["backend"]) for row in rows] == [
        (k, b) for k in kernels for b in ("sgd", "multinomial")
    ]
    measure = "tau clean" if name == "badnet_cifar10" else "tau"
    assert all(-1 <= float(str(row[measure])) <= 1 for row in rows)
    assert f"{rows[0]['parameters']:,} parameters" in (tmp_path / f"{name}.md").read_text()


def test_bert_reads_sentences_and_keeps_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(folder: Path, rng: np.random.Generator) -> None:
        generated.write_sentences(folder, rng, 12, 6)
        generated.write_bert(
            folder / "bert-base-uncased",
            vocab_size=200,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
        )

    monkeypatch.setitem(RECIPES, "bert_cola", (small, RECIPES["bert_cola"][1]))  # type: ignore[arg-type]
    assert len(_smoke("bert_cola", tmp_path)) == 2 * len(RECIPES["bert_cola"][1])


def test_seeds_add_up_and_a_seed_counts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "mlp_mnist2", (generated.write_mnist, ("ck",)))  # type: ignore[arg-type]
    assert [row["seed"] for row in _smoke("mlp_mnist2", tmp_path, seeds=2)] == [0, 0, 1, 1]
    rows = _smoke("mlp_mnist2", tmp_path, options={"seed": "1"}, seeds=2)
    assert [row["seed"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert (tmp_path / "mlp_mnist2.md").read_text().count("| 3 |") == 2
    other = _smoke("mlp_mnist2", tmp_path, options={"epochs": "2"})
    assert [(row["seed"], row["options"]) for row in other] == [(0, "epochs=2")] * 2  # settings are not mixed
    capsys.readouterr()
    _smoke("mlp_mnist2", None)
    assert "its numbers say nothing" in capsys.readouterr().out


def test_the_poisoned_recipe_has_both_test_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = lambda folder, rng: generated.write_cifar10(folder, rng, n=4, m=10)  # noqa: E731
    monkeypatch.setitem(RECIPES, "badnet_cifar10", (few, ("ck",)))  # type: ignore[arg-type]
    for row in _smoke("badnet_cifar10", tmp_path):
        assert row["tp"] + row["fn"] == 9  # type: ignore[operator]  # all of the ten but the target's
        assert 0 <= row["fp"] <= 10  # type: ignore[operator]
        assert {"tau clean", "tau poisoned", "r_miss clean", "tad poisoned"} <= set(row)


def test_a_surrogate_that_needs_too_much_memory_has_no_row(capsys: pytest.CaptureFixture[str]) -> None:
    outputs = Outputs(np.arange(9) % 2, np.zeros((9, 2)))
    found = Experiment(None, {"train": outputs}, {"ck": {"train": np.eye(9)}})  # type: ignore[arg-type]
    assert affordable(found, "ck", "multinomial", "1KB") is None
    assert "no multinomial surrogate of ck: --memory: too little memory" in capsys.readouterr().err
    assert affordable(found, "ck", "multinomial", "1MB") is not None


def test_kernels_left_in_files_are_those_in_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.standard_normal((24, 1, 28, 28))).float(), torch.arange(24) % 2
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset
    project = gs.Project(
        networks.SmallMLP(width=10).eval(), {"train": data(x[:16], y[:16]), "test": data(x[16:], y[16:])}
    )
    there = run(project, tmp_path / "a", proj_dim=64, stored=True)
    here = run(project, tmp_path / "b", proj_dim=64)
    for kernel in KERNELS:
        for split in ("train", "test"):
            stored = there.grams[kernel][split]
            if isinstance(stored, FeatureStore):
                stored = dense(stored, there.grams[kernel]["train"], kernel)  # type: ignore[arg-type]
            np.testing.assert_allclose(stored[:], here.grams[kernel][split], atol=1e-6)
        pair = (nearest(e.grams[kernel]["test"], e.grams[kernel]["train"], 3, kernel) for e in (there, here))
        np.testing.assert_array_equal(*pair)
        answers = (surrogate(e, kernel, "multinomial").predict_proba(e.grams[kernel]["test"]) for e in (there, here))
        np.testing.assert_allclose(*answers, atol=2e-3)


def test_the_minimum_of_sgds_objective_is_logistic_regressions() -> None:
    rng = np.random.default_rng(0)
    x, labels, alpha = rng.standard_normal((40, 40)), np.arange(40) % 3, 1e-2
    weights, intercept = minimum_of_sgd(x, labels, alpha)
    for c in range(3):
        mine = labels == c
        sample_weights = np.where(mine, 40 / (3 * mine.sum()), 1.0)
        own = LogisticRegression(C=1 / (alpha * 40), tol=1e-8, max_iter=5000).fit(x, mine, sample_weights)
        np.testing.assert_allclose(weights[c], own.coef_[0], atol=1e-4)
        assert intercept[c] == pytest.approx(own.intercept_[0], abs=1e-4)
