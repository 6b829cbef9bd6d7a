"""The demo's page: its measurements in words and headline numbers."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from gradstore.demo.demo_result import DemoResult
from gradstore.demo.digits import TARGET
from gradstore.explain.forensics import Forensics
from gradstore.report.views import DemoPage, Fact, ForensicsPage
from gradstore.search.topk import TopK


def demo_page(result: DemoResult, results: Sequence[Forensics], clean: TopK) -> DemoPage:
    """Lay out the page of a run.

    Args:
        result: what the run measured.
        results: forensics of the same queries, one a kernel.
        clean: some clean test images beside their neighbours.

    Returns:
        What `render` fills its template with.
    """
    first = results[0]
    stores = [neighbours.queries for neighbours in first.neighbours]
    topk = replace(clean.page(), title="Clean digits, and what they rest on")
    return DemoPage(
        story=_story(int(first.poisoned.sum()), len(first.train)),
        facts=_facts(result),
        forensics=ForensicsPage(
            train=first.train.split,
            train_size=len(first.train),
            train_poisoned=int(first.poisoned.sum()),
            queries=tuple(store.split for store in stores),
            verdicts=tuple(found.verdict(cases=3, culprits=8) for found in results),
        ),
        topk=topk,
        provenance=(*topk.provenance, *_provenance(result)),
    )


def _story(poisoned: int, n: int) -> str:
    return (
        f"{poisoned:,} of {n:,} images of handwritten digits got a bright square in one corner and the label {TARGET}, "
        "and a small network was trained on them. What it says of a digit with such a square rests on those images: "
        "by its gradients, they are the training images most similar to it."
    )


def _facts(result: DemoResult) -> tuple[Fact, ...]:
    kernel, confusion = next(iter(result.confusions.items()))
    poisoned, clean = confusion.tp + confusion.fn, confusion.fp + confusion.tn
    return (
        Fact(
            _percent(result.clean_accuracy),
            "of clean digits read right",
            f"{result.clean_correct} of {result.clean} test images",
        ),
        Fact(
            _percent(result.attack_success),
            f"of stamped digits read as {TARGET}",
            f"{result.attacked_as_target} of {result.attacked} test images",
        ),
        Fact(
            _percent(confusion.tp / poisoned),
            "of stamped digits flagged",
            f"{confusion.tp} of {poisoned}, and {confusion.fp} of {clean} clean ones ({kernel})",
        ),
        Fact(
            f"{result.residual_mean:.4f}",
            "mean error of a similarity",
            f"|projected − exact| over {result.pairs:,} pairs, K = {result.proj_dim:,}",
        ),
    )


def _provenance(result: DemoResult) -> tuple[tuple[str, str], ...]:
    return (
        ("seed", str(result.seed)),
        ("seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in result.stages.items())),
        ("project", str(Path(result.report).with_name("project.py"))),
        ("versions", f"Python {platform.python_version()}, torch {torch.__version__}"),
        ("written", datetime.now(timezone.utc).isoformat(sep=" ", timespec="minutes")),
    )


def _percent(share: float) -> str:
    """One decimal, and 100 % only where it is all of them."""
    return "100 %" if share == 1 else f"{min(share, 0.999):.1%}".replace("%", " %")
