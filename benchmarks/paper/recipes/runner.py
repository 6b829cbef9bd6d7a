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
from benchmarks.paper.experiment import BACKENDS, Experiment, affordable, judge, run
from benchmarks.paper.forensic import forensic_rows
from benchmarks.paper.published import BERT, SMALL
from benchmarks.paper.recipes.badnet_cifar10 import TARGET
from benchmarks.paper.tables import Row, markdown, read_csv, summary, write_csv
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

FORENSIC = {name: name for name in ("precision", "recall", "tau clean", "tau poisoned", "tad clean")}

_SMOKE = {"epochs": "1"}


def run_recipes(
    name: str | None,
    data: Path | None,
    out: Path | None,
    say: Callable[[str], None],
    *,
    options: Mapping[str, str],
    smoke: bool,
    proj_dim: int,
    seeds: int,
    memory: str,
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
            given = {"seed": "0", **(_SMOKE if smoke else {}), **options}
            if smoke:
                RECIPES[wanted][0](Path(made), np.random.default_rng(0))
            began = time.perf_counter()
            found: list[dict[str, object]] = []
            for seed in range(int(given["seed"]), int(given["seed"]) + seeds):
                given["seed"] = str(seed)
                found += recipe_rows(
                    wanted, Path(str(folder)), given, proj_dim=64 if smoke else proj_dim, memory=memory, say=say
                )
            print(report(wanted, found, out, generated=smoke))
            say(f"{wanted}: {time.perf_counter() - began:.0f} s")


def recipe_rows(
    name: str, data: Path, options: Mapping[str, str], *, proj_dim: int, memory: str, say: Callable[[str], None]
) -> list[dict[str, object]]:
    """One experiment with one seed: a row for each kernel and backend.

    Weights, stores and Gram files stay in `data`, so that a run that was interrupted is continued.
    """
    say(f"{name}: training, {', '.join(f'{key} {value}' for key, value in options.items())}")
    project = gs.load_project(FOLDER / f"{name}.py", {"data": str(data), **options})
    parameters = sum(p.numel() for p in project.model.parameters())
    say(f"{name}: kernels of {parameters:,} parameters")
    given = ",".join(f"{key}={value}" for key, value in sorted(options.items()) if key != "seed")
    seed = int(options["seed"])
    folder = data / "-".join(filter(None, (name, f"seed{seed}", given, f"K{proj_dim}")))
    found = run(
        project,
        folder,
        kernels=RECIPES[name][1],
        proj_dim=proj_dim,
        seed=seed,
        layers=LAYERS.get(name),
        stored=True,
        memory=memory,
    )
    what = {"experiment": name, "parameters": parameters, "K": proj_dim, "options": given}
    if "poisoned" in found.queries:
        rows = forensic_rows(found, seed, target=TARGET, experiment=name, memory=memory)
    else:
        rows = [row for kernel in found.grams for backend in BACKENDS for row in _row(found, kernel, backend, memory)]
    return [{**what, **row, **setting(seed)} for row in rows]


def _row(found: Experiment, kernel: str, backend: str, memory: str) -> list[dict[str, object]]:
    """How faithful one surrogate is; nothing where it needs more memory."""
    model = affordable(found, kernel, backend, memory)
    if model is None:
        return []
    return [{"kernel": kernel, "backend": backend, **values(judge(found, model, kernel).measures)}]


def report(name: str, rows: Sequence[Row], out: Path | None, *, generated: bool) -> str:
    """The table in the paper's shape, means over seeds; with `out` it and `<name>.csv` are written there.

    Rows of the file that are of the same settings and other seeds stay and count.
    """
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        rows = [*_others(read_csv(out / f"{name}.csv"), rows), *rows]
        write_csv(out / f"{name}.csv", rows)
    measures = FORENSIC if "precision" in rows[0] else MEASURES
    notes = _published(name)
    if generated:
        notes = [*notes, "Run on a few generated examples: it shows that the recipe runs, and its numbers say nothing."]
    title = f"{name}, {rows[0]['parameters']:,} parameters"
    text = markdown(title, summary(rows, ("kernel", "backend"), measures, PERCENT), notes)
    if out is not None:
        (out / f"{name}.md").write_text(text)
    return text


def _others(known: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    seeds = {row["seed"] for row in new}
    return [
        row
        for row in known
        if row["seed"] not in seeds and (row["K"], row["options"] or "") == (new[0]["K"], new[0]["options"])
    ]


def _published(name: str) -> list[str]:
    key = name.replace("_", "-")
    if key in SMALL:
        accuracy, tad, tau = SMALL[key]
        return [f"Published for trNTK, 100 seeds: accuracy {accuracy} %, TAD {tad} %, τ {tau}."]
    if name == "bert_cola":
        return [f"Published for {kernel}: τ {tau}, TAD {tad}." for kernel, (tau, tad) in BERT.items()]
    return []
