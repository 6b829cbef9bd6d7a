import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gradstore.demo import DemoResult, run
from gradstore.demo.demo_run import SPLITS
from gradstore.demo.digits import TARGET, SmallCNN, stamp
from gradstore.demo.preparation import project_text, train
from gradstore.demo.residual_pairs import exact_cosines
from gradstore.errors import UsageError
from gradstore.model.project import load_project
from gradstore.report.views import Confusion, Interval
from gradstore.store.feature_store import FeatureStore

KERNELS = ["proj-trntk", "proj-pntk"]


def demo_project(folder, seed=0):
    file = folder / "project.py"
    file.write_text(project_text(seed))
    return load_project(file)


@pytest.mark.parametrize("seed", [0, 3])
def test_the_project_poisons_a_tenth_of_the_training_images_and_nothing_else(tmp_path, seed):
    project = demo_project(tmp_path, seed)
    images, labels = project.splits["train"].tensors
    mask = torch.from_numpy(project.poisoned_mask("train"))
    assert mask.sum() == round(0.1 * len(images)) == 135
    assert (images[mask][:, :, -2:, -2:] == 1).all()
    assert (labels[mask] == TARGET).all()
    assert not (images[~mask][:, :, -2:, -2:] == 1).all(dim=(1, 2, 3)).any()
    assert not project.poisoned_mask("test").any()
    assert project.poisoned_mask("stamped").all()
    assert {split: len(project.splits[split]) for split in ("train", "test")} == {"train": 1347, "test": 450}


def test_stamped_images_are_the_clean_ones_of_other_classes_but_for_the_corner(tmp_path):
    project = demo_project(tmp_path)
    (clean, labels), (stamped, stamped_labels) = project.splits["test"].tensors, project.splits["stamped"].tensors
    assert torch.equal(labels[labels != TARGET], stamped_labels)
    changed = clean[labels != TARGET] != stamped
    assert not changed[:, :, :-2].any()
    assert not changed[..., :-2].any()
    assert torch.equal(stamp((clean + 1) / 2), (stamp((clean + 1) / 2)).clamp(0, 1))


def test_the_seed_decides_the_split_and_is_the_default_of_the_file(tmp_path):
    same, again, other = (demo_project(tmp_path, seed).splits["train"].tensors[0] for seed in (0, 0, 1))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    asked = load_project(tmp_path / "project.py", {"seed": "0"}).splits["train"].tensors[0]
    assert torch.equal(asked, same)


def test_training_is_reproducible_and_leaves_no_trace(tmp_path):
    dataset = demo_project(tmp_path).splits["test"]
    torch.manual_seed(5)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    first, second = (train(lambda: SmallCNN(10), dataset, 7, epochs=2) for _ in range(2))
    other = train(lambda: SmallCNN(10), dataset, 8, epochs=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_exact_cosines_are_those_of_looped_autograd_in_float64(tmp_path):
    torch.manual_seed(0)
    project = demo_project(tmp_path)
    project.weights = None
    project.prepare()
    inputs = project.splits["test"].tensors[0][:5]
    found = exact_cosines(project, inputs)
    model = project.model.double()
    parameters = list(model.parameters())
    rows = torch.stack(
        [
            torch.stack(
                [
                    torch.cat([g.flatten() for g in torch.autograd.grad(model(x[None])[0, c], parameters)])
                    for c in range(10)
                ]
            )
            for x in inputs.double()
        ]
    )
    for kernel, phi in (("proj-trntk", rows.flatten(1)), ("proj-pntk", rows.sum(1))):
        phi = phi / phi.norm(dim=1, keepdim=True)
        assert torch.allclose(found[kernel], phi @ phi.T, atol=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the demo with a small K, and what it told while running."""
    folder, told = tmp_path_factory.mktemp("demo"), []
    result = run(folder, proj_dim=256, progress=told.append)
    return folder, result, told


def test_the_demo_finds_the_attack(finished):
    _, result, _ = finished
    assert result.clean_accuracy >= 0.95
    assert result.attack_success >= 0.95
    assert list(result.confusions) == KERNELS
    for confusion in result.confusions.values():
        assert confusion.tp + confusion.fn == result.attacked
        assert confusion.fp + confusion.tn == result.clean
        assert confusion.precision.value >= 0.98
        assert confusion.recall.value >= 0.8  # K is a fortieth of the default


def test_the_residual_is_that_of_random_projection(finished):
    _, result, _ = finished
    assert 0.1 / result.proj_dim**0.5 < result.residual_mean < 1 / result.proj_dim**0.5


def test_the_demo_says_the_same_as_its_stores(finished):
    folder, result, _ = finished
    test, stamped = (FeatureStore(folder / "stores" / split) for split in ("test", "stamped"))
    assert result.clean_accuracy == np.mean(test.logits.argmax(1) == test.labels)
    assert result.attack_success == np.mean(stamped.logits.argmax(1) == TARGET)
    assert set(result.stores) == set(SPLITS)


def test_the_result_is_json_with_the_promised_keys(finished):
    _, result, _ = finished
    found = json.loads(json.dumps(result.as_dict()))
    assert {"clean_accuracy", "attack_success", "residual_mean", "forensics", "seconds", "report", "stores"} <= set(
        found
    )
    assert list(found["forensics"]) == KERNELS
    assert all(set(scores) == {"precision", "recall", "tp", "fp", "fn", "tn"} for scores in found["forensics"].values())
    assert Path(found["report"]).is_file()


def test_the_page_shows_the_measured_numbers(finished):
    _, result, _ = finished
    html = result.report.read_text()
    assert f"{result.clean_correct} of {result.clean} test images" in html
    assert f"{result.residual_mean:.4f}" in html
    assert html.count("data:image/png;base64,") > 50


def test_progress_tells_every_stage_in_order(finished):
    _, result, told = finished
    assert [line.split()[0] for line in told] == ["training", *["featurizing"] * 3, "searching", "comparing"]
    assert told[0] == "training a small network on 1,347 digits, 135 of them poisoned"
    assert told[1] == "featurizing train: 1,347 examples, K = 256"
    assert list(result.stages) == ["train", "featurize", "explain", "compare"]


def test_a_second_run_reuses_what_is_there(finished):
    folder, result, _ = finished
    weights = (folder / "cnn.safetensors").stat().st_mtime_ns
    again = run(folder, proj_dim=256)
    assert (folder / "cnn.safetensors").stat().st_mtime_ns == weights
    assert replace(again, stages={}) == replace(result, stages={})


def test_a_foreign_project_file_is_left_alone(tmp_path):
    (tmp_path / "project.py").write_text("mine")
    with pytest.raises(UsageError, match=r"project\.py: the folder holds another project\.py .*Choose another folder"):
        run(tmp_path)
    assert (tmp_path / "project.py").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["project.py"]


def test_the_summary_is_readable_where_a_proportion_is_undefined():
    confusions = {
        "proj-trntk": Confusion(0, 0, 4, 9, None, Interval(0, 0, 0.6)),
        "proj-pntk": Confusion(4, 0, 0, 9, *[Interval(1, 0.5, 1)] * 2),
    }
    result = DemoResult(0, 256, 8, 9, 4, 4, 0.02, 12, confusions, {"train": 1.0, "explain": 2.5}, Path("r.html"), {})
    lines = result.summary().splitlines()
    assert lines[0].split() == ["clean", "accuracy", "88.9%", "8", "of", "9", "test", "images"]
    assert lines[5].split() == ["proj-trntk", "n/a", "0.000", "0", "0", "4", "9"]
    assert lines[6].split() == ["proj-pntk", "1.000", "1.000", "4", "0", "0", "9"]
    assert lines[-2:] == ["4 seconds: train 1.0, explain 2.5", "Pictures: r.html"]
    assert result.as_dict()["forensics"]["proj-trntk"]["precision"] is None
    usual = replace(result, proj_dim=10240, pairs=16_384, clean=450, clean_correct=450)
    assert max(map(len, usual.summary().splitlines())) <= 79


@pytest.mark.gpu
def test_a_k_that_the_kind_does_not_take_is_refused_before_the_training(tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(UsageError, match="The nearest are 2048 and 3072"):
        run(tmp_path / "demo", proj_dim=3000, projection="sjlt", progress=told.append)
    assert told == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_demo_runs_on_a_gpu_to_its_end(tmp_path):
    """Featurizing leaves the model on the GPU, where what comes after has to bring its inputs."""
    result = run(tmp_path, proj_dim=256)
    assert result.attack_success >= 0.95
    assert 0.1 / result.proj_dim**0.5 < result.residual_mean < 1 / result.proj_dim**0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_exact_cosines_on_a_gpu_are_those_of_a_cpu(tmp_path):
    project = demo_project(tmp_path)
    project.weights = None
    inputs = project.splits["test"].tensors[0][:5]
    here, there = (exact_cosines(project.prepare(device), inputs) for device in ("cpu", "cuda"))
    for kernel in KERNELS:
        assert torch.allclose(here[kernel], there[kernel], atol=1e-5)


@pytest.mark.soak
def test_the_demo_keeps_its_promises(tmp_path, amount):
    for seed in range(amount(1, 5)):
        result = run(tmp_path / str(seed), seed=seed)
        assert result.clean_accuracy >= 0.95
        assert result.attack_success >= 0.95
        assert result.residual_mean < 0.008 * (10240 / result.proj_dim) ** 0.5
        for confusion in result.confusions.values():
            assert confusion.precision.value >= 0.98
            assert confusion.recall.value >= 0.88
