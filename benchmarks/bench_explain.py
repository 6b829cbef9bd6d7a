"""Fit a surrogate and attribute many queries, in this checkout and in another one in turn, on the same store.

    git worktree add ../before COMMIT    # and install it there, in a .venv of its own
    python -m benchmarks.bench_explain --beside ../before      # rows to results/explain_fit.csv, explain_attribute.csv
    python -m benchmarks.bench_explain --beside ../before --rows 4000 --repeats 1

Every measurement is a fresh process; the checkouts take turns. `wall_s` and `cpu_s` are of the work, not of imports.
`attribute` is of `--queries` queries; of a checkout that attributes one at a time it is so many calls, or with `--few`
as many of them. `apart` is how far the surrogates' logits of the queries are from this checkout's, and `loss` is the
objective that both minimise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


def fit(folder: Path, alpha: float, memory: str) -> dict[str, object]:
    """One fit in this process; the surrogate stays in the folder."""
    import gradstore as gs

    train = gs.open(folder / "train")
    model = gs.KernelGLM(alpha=alpha, memory=memory)
    wall, cpu = time.perf_counter(), time.process_time()
    model.fit(train)
    took = _since(wall, cpu)
    model.save(folder / "surrogate.safetensors")
    return {
        "n": len(train),
        "D": model.n_features_in_,
        "alpha": alpha,
        "memory": memory,
        **took,
        "iterations": model.n_iter_,
        "converged": model.converged_,
        "loss": model.loss_,
        "apart": _apart(folder, model.logits(gs.open(folder / "test"))),
    }


def attribute(folder: Path, queries: int, few: int) -> dict[str, object]:
    """So many attributions in this process, of the surrogate in the folder."""
    import gradstore as gs

    model, asked = gs.KernelGLM.load(folder / "surrogate.safetensors"), gs.open(folder / "test")
    together = hasattr(gs, "attributions")
    count = queries if together else min(few, queries)
    wall, cpu = time.perf_counter(), time.process_time()
    found = gs.attributions(model, asked, range(count)) if together else map(_one(gs, model, asked), range(count))
    for each in found:
        each.top(5)
    took = _since(wall, cpu)
    return {
        "n": model.coef_.shape[1],
        "D": model.n_features_in_,
        "queries": count,
        **took,
        "wall_s_a_query": round(took["wall_s"] / count, 3),
    }


def _since(wall: float, cpu: float) -> dict[str, float]:
    return {"wall_s": round(time.perf_counter() - wall, 2), "cpu_s": round(time.process_time() - cpu, 2)}


def _one(gs: object, model: object, asked: object) -> object:
    return lambda row: gs.attribute(model, asked, row)  # type: ignore[attr-defined]


def _apart(folder: Path, logits: object) -> float:
    """Largest difference from the logits that the first fit left in the folder; 0 of the first."""
    import numpy as np

    kept = folder / "logits.npy"
    if not kept.exists():
        np.save(kept, logits)
    return float(np.abs(np.load(kept) - logits).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, required=True, help="another checkout, with a .venv")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--K", type=int, default=2048)
    parser.add_argument("--alpha", type=float, default=1e-4)
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--few", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the stores go; they are kept there, and taken if they exist")
    parser.add_argument("--stage", choices=["fit", "attribute"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage == "fit":
        print(json.dumps(fit(given.folder, given.alpha, given.memory)))
    elif given.stage == "attribute":
        print(json.dumps(attribute(given.folder, given.queries, given.few)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure(given, (given.folder or Path(folder)).resolve())


def measure(given: argparse.Namespace, folder: Path) -> None:
    """All measurements, the checkouts in turn."""
    from benchmarks.bench_surrogate import write
    from benchmarks.setting import append_rows

    if not (folder / "train").exists():
        folder.mkdir(exist_ok=True)
        write(folder, given.rows, given.K)
    (folder / "logits.npy").unlink(missing_ok=True)
    for stage in ("fit", "attribute"):
        for _ in range(given.repeats):
            for checkout in (HERE, given.beside.resolve()):
                found = run(checkout, stage, folder, given)
                append_rows(f"explain_{stage}", [{"commit": commit(checkout), **found}], seed=0)


def run(checkout: Path, stage: str, folder: Path, given: argparse.Namespace) -> dict[str, object]:
    """One stage in a fresh process of a checkout; this file runs there too."""
    python = sys.executable if checkout == HERE else str(checkout / ".venv/bin/python")
    names = ("alpha", "memory", "queries", "few")
    options = [word for name in names for word in (f"--{name}", str(getattr(given, name)))]
    command = [python, __file__, "--beside", str(checkout), "--stage", stage, "--folder", str(folder), *options]
    out = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(checkout)}
    )
    return dict(json.loads(out.stdout.splitlines()[-1]))


def commit(checkout: Path) -> str:
    """Its commit, with a + where files differ from it."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty=+"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    main()
