"""Run recipes: train, featurize, every kernel, surrogates, measures; a table and a CSV each."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

import gradstore as gs
from benchmarks.paper import generated
from benchmarks.paper.digits import MEASURES, PERCENT, values
from benchmarks.paper.experiment import BACKENDS, judge, run, surrogate
from benchmarks.paper.published import BERT, SMALL
from benchmarks.paper.tables import markdown, summary, write_csv
from benchmarks.setting import setting

FOLDER = Path(__file__).parent
SMALL_KERNELS = ("trntk", "trntk0", "proj-trntk", "proj-pntk", "embedding", "ck")
LARGE_KERNELS = ("proj-trntk", "proj-pntk", "embedding", "ck")


def _few_images(folder: Path, rng: np.random.Generator) -> None:
    """Enough to run a large network on: two training images and one test image a class."""
    generated.write_cifar10(folder, rng, n=4, m=10)


RECIPES: Mapping[str, tuple[Callable[[Path, np.random.Generator], None], Sequence[str]]] = {
    "mlp_mnist2": (generated.write_mnist, SMALL_KERNELS),
    "cnn_mnist2": (generated.write_mnist, SMALL_KERNELS),
    "cnn_fmnist2": (generated.write_mnist, SMALL_KERNELS),
    "cnn_cifar2": (generated.write_cifar10, SMALL_KERNELS),
    "resnet18": (_few_images, LARGE_KERNELS),
    "resnet34": (_few_images, LARGE_KERNELS),
    "mobilenetv2": (_few_images, LARGE_KERNELS),
    "bert_cola": (generated.write_cola, LARGE_KERNELS),
    "badnet_cifar10": (generated.write_cifar10, LARGE_KERNELS),
}
"""Name -> what writes a small data set of its format, and the kernels; exact ones where they take hours, not weeks."""

LAYERS = {"bert_cola": r"bert\.encoder\.layer\.\d+\.output\.LayerNorm"}
"""Modules of the embedding kernel where not every module gives one row an example."""

_SMOKE = {"epochs": "1"}


def run_recipes(
    name: str | None,
    data: Path | None,
    out: Path,
    say: Callable[[str], None],
    *,
    options: Mapping[str, str],
    smoke: bool,
    proj_dim: int,
) -> None:
    """Run one recipe on the user's data, or one or all on generated files.

    Raises:
        SystemExit: there is no such recipe, or no data.
    """
    names = list(RECIPES) if name is None and smoke else [name]
    if any(wanted not in RECIPES for wanted in names):
        raise SystemExit(f"unknown recipe {name}; there are {', '.join(RECIPES)}")
    if not smoke and data is None:
        raise SystemExit("--data names the folder of the data set; --smoke runs on small generated files")
    for wanted in names:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made) if smoke else data
            given = dict(options)
            if smoke:
                RECIPES[wanted][0](Path(made), np.random.default_rng(0))
                given = {**_SMOKE, **given}
            began = time.perf_counter()
            run_recipe(wanted, Path(str(folder)), out, given, proj_dim=64 if smoke else proj_dim, say=say)
            say(f"{wanted}: {time.perf_counter() - began:.0f} s")


def run_recipe(
    name: str, data: Path, out: Path, options: Mapping[str, str], *, proj_dim: int, say: Callable[[str], None]
) -> None:
    """One experiment; writes `<name>.md` and `<name>.csv` to `out` and prints the table."""
    say(f"{name}: training")
    project = gs.load_project(FOLDER / f"{name}.py", {"data": str(data), **options})
    parameters = sum(p.numel() for p in project.model.parameters())
    say(f"{name}: kernels of {parameters:,} parameters")
    with tempfile.TemporaryDirectory() as folder:
        found = run(project, Path(folder), kernels=RECIPES[name][1], proj_dim=proj_dim, layers=LAYERS.get(name))
    rows: list[dict[str, object]] = []
    if "poisoned" in found.queries:
        from benchmarks.paper.forensic import forensic_rows

        rows = forensic_rows(found, 0, target=4)
        measures = {name: name for name in ("precision", "recall", "tau clean", "tau poisoned", "tad clean")}
    else:
        measures = dict(MEASURES)
        for kernel in found.grams:
            for backend in BACKENDS:
                judged = judge(found, surrogate(found, kernel, backend), kernel).measures
                rows.append({"kernel": kernel, "backend": backend, **values(judged)})
    out.mkdir(parents=True, exist_ok=True)
    write_csv(
        out / f"{name}.csv", [{"experiment": name, "parameters": parameters, **row, **setting(0)} for row in rows]
    )
    text = markdown(name, summary(rows, ("kernel", "backend"), measures, PERCENT), _published(name))
    (out / f"{name}.md").write_text(text)
    print(text)


def _published(name: str) -> list[str]:
    key = name.replace("_", "-")
    if key in SMALL:
        accuracy, tad, tau = SMALL[key]
        return [f"Published for trNTK, 100 seeds: accuracy {accuracy} %, TAD {tad} %, τ {tau}."]
    if name == "bert_cola":
        return [f"Published for {kernel}: τ {tau}, TAD {tad}." for kernel, (tau, tad) in BERT.items()]
    return []
