"""What the audit of the projection costs: time inside it over a whole run, with the first audit and without.

    python benchmarks/bench_audit.py                     # rows to benchmarks/results/audit.csv

An audit uses one thread while the others wait, so its wall time is what a run pays. On a GPU, whose work the host
does not wait for, `cuda_runs.py` takes whole runs with and without instead.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from bench_featurize import MODELS
from setting import append_rows
from torch.utils.data import TensorDataset

import gradstore as gs
from gradstore.projection.projection_audit import ProjectionAudit


class Watched(ProjectionAudit):
    """Adds up the seconds of each audit."""

    seconds: list[float] = []  # noqa: RUF012 - one list for all of them

    def __init__(self, *given: object, **named: object) -> None:
        self.seconds.append(0.0)
        self._timed(lambda: super(Watched, self).__init__(*given, **named))

    def look(self, *given: object, **named: object) -> None:
        self._timed(lambda: super(Watched, self).look(*given, **named))

    def compare(self, features: torch.Tensor) -> object:
        return self._timed(lambda: super(Watched, self).compare(features))

    def _timed(self, work):
        began = time.perf_counter()
        result = work()
        self.seconds[-1] += time.perf_counter() - began
        return result


def run(case: str, projection: str, K: int, seed: int) -> dict[str, object]:
    """Featurize one case on a CPU."""
    name, n = case.split(":")
    build, shape = MODELS[name]
    torch.manual_seed(seed)
    model, rows = build(), int(n)
    data = TensorDataset(torch.randn(rows, *shape), torch.randint(0, 10, (rows,)))
    last: dict[str, float] = {}
    Watched.seconds.clear()
    with tempfile.TemporaryDirectory() as folder:
        gs.featurize(
            gs.Project(model=model, splits={"train": data}),
            split="train",
            out=Path(folder) / "store",
            proj_dim=K,
            projection=projection,
            device="cpu",
            progress=lambda state: last.update(seconds=state.seconds),
        )
    whole, audits = last["seconds"], Watched.seconds
    return {
        "model": name,
        "projection": projection,
        "rows": rows,
        "K": K,
        "seconds": round(whole, 2),
        "audits": len(audits),
        "first_ms": round(1e3 * audits[0], 1),
        "share": round(sum(audits) / whole, 5),
        "share_after_the_first": round(sum(audits[1:]) / whole, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=["digits:2560", "resnet18:16"], metavar="MODEL:ROWS")
    parser.add_argument("--projections", nargs="*", default=["rademacher", "gaussian"])
    parser.add_argument("--proj-dim", type=int, default=10240)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import gradstore.featurization.batch

    gradstore.featurization.batch.ProjectionAudit = Watched
    for case in options.cases:
        for projection in options.projections if case.startswith("digits") else options.projections[:1]:
            append_rows("audit", [run(case, projection, options.proj_dim, options.seed)], options.seed)


if __name__ == "__main__":
    main()
