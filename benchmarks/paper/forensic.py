"""Table 3: does the k-nearest vote under a kernel find poisoned queries, and is its surrogate faithful on them?"""

from __future__ import annotations

import numpy as np

from benchmarks.paper.experiment import BACKENDS, Experiment, judge, surrogate
from gradstore.demo.digits import TARGET
from gradstore.forensics import wilson


def forensic_rows(
    found: Experiment, seed: int, k: int = 5, threshold: int = 3, target: int = TARGET
) -> list[dict[str, object]]:
    """One row for each kernel and backend; splits "clean" and "poisoned".

    Args:
        target: the attacker's class, which counts as the correct one of a poisoned query.
    """
    rows = []
    mask = found.project.poisoned_mask("train")
    for kernel, grams in found.grams.items():
        flagged = {split: votes(grams[split], mask, k) >= threshold for split in ("clean", "poisoned")}
        tp, fp, fn = (int(v.sum()) for v in (flagged["poisoned"], flagged["clean"], ~flagged["poisoned"]))
        precision, recall = wilson(tp, tp + fp), wilson(tp, tp + fn)
        for backend in BACKENDS:
            model = surrogate(found, kernel, backend)
            row: dict[str, object] = {
                "table": 3,
                "experiment": "badnet-digits",
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


def votes(gram: np.ndarray, poisoned: np.ndarray, k: int) -> np.ndarray:
    """Poisoned among the k most similar training rows of each query, int64 [m]; ties by row."""
    nearest = np.argsort(-gram, axis=1, kind="stable")[:, :k]
    return poisoned[nearest].sum(axis=1)
