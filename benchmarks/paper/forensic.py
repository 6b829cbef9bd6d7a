"""Table 3: does the k-nearest vote under a kernel find poisoned queries, and is its surrogate faithful on them?"""

from __future__ import annotations

import numpy as np

import gradstore as gs
from benchmarks.paper.experiment import BACKENDS, Experiment, Similarities, affordable, judge
from gradstore.demo.digits import TARGET
from gradstore.explain.forensics import wilson


def forensic_rows(
    found: Experiment,
    seed: int,
    k: int = 5,
    threshold: int = 3,
    target: int = TARGET,
    experiment: str = "badnet-digits",
    memory: str = "2GB",
) -> list[dict[str, object]]:
    """One row for each kernel and backend; splits "clean" and "poisoned".

    Args:
        found: kernels of a poisoned project.
        seed: of the rows.
        k: neighbours that vote.
        threshold: votes from which a query is flagged.
        target: the attacker's class, which counts as the correct one of a poisoned query.
        experiment: name for the rows.
        memory: of a surrogate; one that needs more has no row.
    """
    rows = []
    mask = found.project.poisoned_mask("train")
    for kernel, grams in found.grams.items():
        flagged = {
            split: mask[nearest(grams[split], grams["train"], k, kernel)].sum(axis=1) >= threshold
            for split in ("clean", "poisoned")
        }
        tp, fp, fn = (int(v.sum()) for v in (flagged["poisoned"], flagged["clean"], ~flagged["poisoned"]))
        precision, recall = wilson(tp, tp + fp), wilson(tp, tp + fn)
        for backend in BACKENDS:
            model = affordable(found, kernel, backend, memory)
            if model is None:
                continue
            row: dict[str, object] = {
                "table": 3,
                "experiment": experiment,
                "kernel": kernel,
                "backend": backend,
                "seed": seed,
                "precision": None if precision is None else precision.value,
                "recall": None if recall is None else recall.value,
                "tp": tp,
                "fp": fp,
                "fn": fn,
            }
            for split, outputs in ((s, found.outputs[s]) for s in ("clean", "poisoned")):
                labels = outputs.labels if split == "clean" else np.full(len(outputs.labels), target)
                measures = judge(found, model, kernel, split, labels).measures
                for name in ("tau", "tad", "r_miss", "network_accuracy"):
                    row[f"{name} {split}"] = getattr(measures, name).value
            rows.append(row)
    return rows


def nearest(queries: Similarities, train: Similarities, k: int, kernel: str) -> np.ndarray:
    """The k most similar training rows of each query, int64 [m, k]; ties by row."""
    if isinstance(queries, gs.Rows) and isinstance(train, gs.Rows):
        return gs.topk(train, queries, k, kernel).indices
    blocks = (queries[at : at + 1000] for at in range(0, len(queries), 1000))
    return np.concatenate([np.argsort(-block, axis=1, kind="stable")[:, :k] for block in blocks])
