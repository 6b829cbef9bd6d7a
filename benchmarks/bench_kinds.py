"""What the kind of projection does: residuals of kernels, neighbours, surrogates, forensics, and where tails hurt.

    python -m benchmarks.bench_kinds --folder F                     # everything: hours of one core, or less if --share
    python -m benchmarks.bench_kinds --folder F --share 0.1         # a tenth of the seeds
    python -m benchmarks.bench_kinds --folder F --parts residuals --cases digits bert
    python -m benchmarks.bench_kinds --write                        # the tables of docs/sparse.md and its picture

The gradients of a few examples are computed once and multiplied by many P of each kind. Every pair's cosine is compared
with that of the gradients themselves, in float64 (`exactness/statistics.py`). Explanations are compared on whole stores
(`exactness/explained.py`), those of the demo's poisoned digits also with the truth. A run replaces the rows of what it
ran in `results/kinds.csv`, `kinds_cdf.csv` and `kinds_explained.csv`. The folder keeps weights and what was drawn, so
that a run with more seeds only adds them. Seconds are those of `bench_featurize.py`.

The picture needs matplotlib: `pip install ".[plots]"`.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.exactness.explained import compare, shortened
from benchmarks.exactness.gradients import BLOCK, KERNELS, gradients, kept_grams
from benchmarks.exactness.models import CASES, Case
from benchmarks.exactness.page import PAGE, with_tables
from benchmarks.exactness.picture import draw
from benchmarks.exactness.statistics import Sample, ratio, samples, spread, summary, tail
from benchmarks.setting import RESULTS, setting
from gradstore.demo.preparation import trained_project
from gradstore.projection.kinds import DEFAULT, KINDS

DRAWN_K, DIMENSIONS = 10240, (1024, 2048, 4096, 10240)
DRAWN = KERNELS[0], DRAWN_K  # of the picture
DEMO, DEMO_SEEDS, DEMO_DIMENSIONS = "demo", 5, (1024, 4096, 10240)
EXPLAINED_K = 4096  # of the larger models


def residuals(case: Case, share: float, folder: Path) -> None:
    """Draw, and put the case's rows into kinds.csv and kinds_cdf.csv."""
    found = gradients(case.project(folder), case.examples)
    seeds = {kind: round(share * case.seeds[kind]) for kind in KINDS}
    drawn = {
        kind: kept_grams(found, kind, DRAWN_K, count, folder / case.name) for kind, count in seeds.items() if count
    }
    about = {
        "case": case.name,
        "examples": found.n,
        "classes": found.classes,
        "columns": sum(values.shape[1] for _, values in found.pieces),
    }
    rows, curves = [], []
    for (place, kernel), dim in product(enumerate(KERNELS), DIMENSIONS):
        each = samples({kind: grams[place] for kind, grams in drawn.items()}, found.exact[kernel], dim // BLOCK)
        for kind, measured in _measured(each).items():
            key = {"case": case.name, "kernel": kernel, "kind": kind, "K": dim}
            rows.append({**about, **key, "seeds": seeds[kind], **measured, **setting(0)})
            if (kernel, dim) == DRAWN:
                curves += [{**key, "share": f"{s:.4g}", "residual": f"{x:.4g}"} for s, x in tail(each[kind])]
    replace(RESULTS / "kinds.csv", rows, ("case",))
    replace(RESULTS / "kinds_cdf.csv", curves, ("case",))


def _measured(each: Mapping[str, Sample]) -> dict[str, dict[str, object]]:
    """What is said of the residuals of every kind, beside those of signs."""
    base, most = each[DEFAULT], min(len(sample.plain) for sample in each.values())
    unit = spread(base)
    found = {}
    for kind, sample in each.items():
        value, error = ratio(sample, base)
        found[kind] = {
            "draws": len(sample.plain),
            "batches": len(sample.batches),
            **{name: f"{number:.5g}" for name, number in summary(sample, unit, most).items()},
            "ratio": f"{value:.5f}",
            "ratio_se": f"{error:.2g}",
        }
    return found


def explanations(case: Case, kinds: Sequence[str], folder: Path) -> None:
    """Put the case's rows into kinds_explained.csv."""
    project = shortened(case.project(folder), case.rows)
    settings = [(kind, EXPLAINED_K, 0) for kind in kinds]
    about = {"case": case.name, "seed": 0, **{f"{split}_rows": count for split, count in case.rows.items()}}
    replace(RESULTS / "kinds_explained.csv", [*_explained(about, compare(project, settings))], ("case", "seed", "kind"))


def demo(share: float, kinds: Sequence[str], folder: Path) -> None:
    """The same of the demo, several times over: another split, network and projection a seed."""
    for seed in range(max(1, round(share * DEMO_SEEDS))):
        project = trained_project(folder / f"demo-{seed}", seed, print)
        settings = [(kind, dim, seed) for kind in kinds for dim in DEMO_DIMENSIONS]
        about = {"case": DEMO, "seed": seed, **{f"{s}_rows": len(project.splits[s]) for s in ("train", "test")}}
        replace(
            RESULTS / "kinds_explained.csv", [*_explained(about, compare(project, settings))], ("case", "seed", "kind")
        )


def _explained(about: dict[str, Any], rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    columns = ("kind", "K", "kernel", "top5", "tau", "precision", "recall", "fp", "fn")
    for row in rows:
        full = {**about, **{name: row.get(name, "") for name in columns}}
        print("  ".join(f"{name} {value}" for name, value in full.items()), flush=True)
        yield {**full, **{k: v for k, v in setting(0).items() if k != "seed"}}


def replace(path: Path, rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
    """Put rows into a table in the place of those that agree with one of them in the keys."""
    new = {tuple(str(row[key]) for key in keys) for row in rows}
    kept = [row for row in read(path) if tuple(row[key] for key in keys) not in new]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows([*kept, *rows])


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where weights and draws are kept")
    parser.add_argument(
        "--parts", nargs="+", choices=("residuals", "explanations"), default=("residuals", "explanations")
    )
    parser.add_argument("--cases", nargs="+", choices=(*CASES, DEMO), default=(*CASES, DEMO))
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=tuple(KINDS), help="of explanations")
    parser.add_argument("--share", type=float, default=1.0, help="of the seeds")
    parser.add_argument("--write", action="store_true", help="write the page and the picture from the tables")
    options = parser.parse_args()
    if options.write:
        tables = {name: read(RESULTS / f"{name}.csv") for name in ("kinds", "kinds_explained", "featurize")}
        PAGE.write_text(with_tables(PAGE.read_text(), tables))
        draw(read(RESULTS / "kinds_cdf.csv"), PAGE.with_name("sparse.png"))
        return
    if options.folder is None:
        parser.error("--folder is needed to run")
    options.folder.mkdir(parents=True, exist_ok=True)
    for case in (CASES[name] for name in options.cases if name in CASES):
        if "residuals" in options.parts:
            residuals(case, options.share, options.folder)
        if "explanations" in options.parts and case.rows:
            explanations(case, options.kinds, options.folder)
    if "explanations" in options.parts and DEMO in options.cases:
        demo(options.share, options.kinds, options.folder)


if __name__ == "__main__":
    main()
