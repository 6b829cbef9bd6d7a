"""Tables 1-5 and the figures that rest on them, on scikit-learn's digits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.paper.digits_data import PAIRS, DigitsMLP, poisoned, ten_classes, two_classes
from benchmarks.paper.experiment import BACKENDS, KERNELS, Experiment, Judged, judge, run, surrogate
from benchmarks.paper.forensic import forensic_rows
from benchmarks.paper.order import order_rows
from benchmarks.paper.published import BERT, FAULTS, POISONED, SMALL
from benchmarks.paper.tables import markdown, summary
from gradstore.demo.digits import SmallCNN
from gradstore.explain.faithfulness import Faithfulness

MEASURES = {"network acc %": "network_accuracy", "TAD %": "tad", "τ": "tau"}
FURTHER = {
    "R² Φ¹": "r2_phi1",
    "R² Φ²": "r2_phi2",
    "R² Φ³": "r2_phi3",
    "Pearson p": "pearson",
    "Spearman": "spearman",
    "R² ln p": "r2_log_p_phi1",
    "R_miss": "r_miss",
    "τ unsaturated": "tau_unsaturated",
}
PERCENT = ("network_accuracy", "tad")


@dataclass
class Collected:
    """What the runs gave: rows of every table, and what the figures draw."""

    rows: list[dict[str, object]] = field(default_factory=list)
    binary: dict[str, list[Judged]] = field(default_factory=dict)
    ten: list[tuple[Experiment, dict[str, Judged]]] = field(default_factory=list)


def collect(seeds: int, say: Callable[[str], None], *, proj_dim: int = 10240) -> Collected:
    """Train, compute every kernel, fit and judge; a minute or two a seed."""
    found = Collected()
    for seed in range(seeds):
        for name, build, pair in _binary_tasks():
            say(f"seed {seed}: {name}")
            experiment = _run(two_classes(pair, seed, build), ("trntk",), seed, proj_dim)
            for backend in BACKENDS:
                judged = _judged(found, experiment, "trntk", backend, seed, table=1, experiment_name=name)
                if backend == "multinomial":
                    found.binary.setdefault(name, []).append(judged)
        say(f"seed {seed}: cnn-digits10 under every kernel")
        experiment = _run(ten_classes(seed), KERNELS, seed, proj_dim)
        drawn = {}
        for kernel in KERNELS:
            for backend in BACKENDS:
                judged = _judged(found, experiment, kernel, backend, seed, table=2, experiment_name="cnn-digits10")
                drawn[f"{kernel} {backend}"] = judged
                target = {"sgd": "predictions", "multinomial": "probabilities"}[backend]
                _judged(
                    found, experiment, kernel, backend, seed, table=5, experiment_name="cnn-digits10", target=target
                )
        found.ten.append((experiment, drawn))
        say(f"seed {seed}: trNTK and CK under every fit")
        found.rows += order_rows(experiment, seed)
        say(f"seed {seed}: poisoned digits under every kernel")
        found.rows += forensic_rows(_run(poisoned(seed), KERNELS, seed, proj_dim), seed)
    return found


def report(found: Collected) -> str:
    """Tables 1-5 as Markdown."""
    one = [row for row in found.rows if row["table"] == 1]
    two = [row for row in found.rows if row["table"] == 2]
    one += [row for row in two if row["kernel"] == "trntk"]
    three, five = ([row for row in found.rows if row["table"] == table] for table in (3, 5))
    first = summary(one, ("experiment", "backend"), MEASURES, PERCENT)
    second = _beside(
        summary(two, ("kernel", "backend"), MEASURES, PERCENT), {k: v[0] for k, v in BERT.items()}, "published τ, BERT"
    )
    third = summary(three, ("kernel", "backend"), _FORENSIC, ("tad clean", "tad poisoned"))
    third = _beside(third, {k: f"{v[1]}, {v[0]}" for k, v in POISONED.items()}, "paper's scripts: τ clean, poisoned")
    small = "; ".join(f"{name}: acc {a}, TAD {t}, τ {k}" for name, (a, t, k) in SMALL.items())
    return "\n".join(
        [
            markdown("Table 1. trNTK surrogates of several networks", first, [f"Published: {small}."]),
            markdown("Table 2. Every kernel on one network", second),
            markdown("Table 3. Forensics on poisoned digits", third, [*_CHOICES, *FAULTS]),
            markdown("Table 4. Further measures", summary(two, ("kernel", "backend"), FURTHER)),
            markdown(
                "Table 5. Surrogates of the network's own outputs",
                summary(five, ("kernel", "backend", "target"), MEASURES, PERCENT),
            ),
        ]
    )


_FORENSIC = {
    "precision": "precision",
    "recall": "recall",
    "τ clean": "tau clean",
    "τ poisoned": "tau poisoned",
    "TAD clean %": "tad clean",
    "TAD poisoned %": "tad poisoned",
    "R_miss clean": "r_miss clean",
    "R_miss poisoned": "r_miss poisoned",
}
_CHOICES = (
    "A query is flagged when at least 3 of its 5 most similar training digits are poisoned.",
    "The correct class of a clean query is its true label, of a poisoned one the attacker's target.",
)


def _binary_tasks() -> list[tuple[str, Callable, tuple[int, int]]]:
    builds = (("mlp", DigitsMLP), ("cnn", SmallCNN), ("cnn", SmallCNN), ("cnn", SmallCNN))
    return [(f"{n}-{a}v{b}", build, (a, b)) for (n, build), (a, b) in zip(builds, PAIRS, strict=True)]


def _run(project: object, kernels: tuple[str, ...], seed: int, proj_dim: int) -> Experiment:
    with tempfile.TemporaryDirectory() as folder:
        return run(project, Path(folder), kernels=kernels, proj_dim=proj_dim, seed=seed)  # type: ignore[arg-type]


def _judged(
    found: Collected,
    experiment: Experiment,
    kernel: str,
    backend: str,
    seed: int,
    *,
    table: int,
    experiment_name: str,
    target: str = "labels",
) -> Judged:
    model = surrogate(experiment, kernel, backend, target=target)
    judged = judge(experiment, model, kernel)
    found.rows.append(
        {
            "table": table,
            "experiment": experiment_name,
            "kernel": kernel,
            "backend": backend,
            "target": target,
            "seed": seed,
            "converged": model.converged_,
            "iterations": model.n_iter_,
            **values(judged.measures),
            **{f"r2_{curve.name}": curve.r2.value for curve in judged.curves},
            "r2_log_p_phi1": judged.curves[0].r2_log_p.value,
        }
    )
    return judged


def values(measures: Faithfulness) -> dict[str, float | None]:
    """The measures' values by name."""
    return {name: measure.value for name, measure in measures.measures().items()}


def _beside(table: list[dict[str, str]], published: dict[str, str], heading: str) -> list[dict[str, str]]:
    return [{**row, heading: published.get(row["kernel"], "")} for row in table]


def taus(found: Collected, kernel: str, backend: str) -> np.ndarray:
    """τ of Table 2, float64 [seeds]."""
    rows = [r for r in found.rows if r["table"] == 2 and r["kernel"] == kernel and r["backend"] == backend]
    return np.array([r["tau"] for r in rows], float)
