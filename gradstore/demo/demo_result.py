"""What a run of the demo measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradstore.report.views import Confusion, Interval


@dataclass(frozen=True)
class DemoResult:
    """Everything is measured by the run, on the data of the run.

    Attributes:
        seed: of the split, the poisoning, the weights' training.
        proj_dim: projected dimension K.
        clean_correct: clean test images classified as labelled.
        clean: clean test images.
        attacked_as_target: stamped test images classified as the attacker's target.
        attacked: stamped test images, none of them of the target class.
        residual_mean: mean |projected - exact| cosine over `pairs`.
        pairs: sampled pairs of a training and a test image, under both kernels.
        confusions: kernel -> flagged queries against the truth.
        stages: stage -> seconds.
        report: the HTML page.
        stores: split -> its store.
    """

    seed: int
    proj_dim: int
    clean_correct: int
    clean: int
    attacked_as_target: int
    attacked: int
    residual_mean: float
    pairs: int
    confusions: Mapping[str, Confusion]
    stages: Mapping[str, float]
    report: Path
    stores: Mapping[str, Path]

    @property
    def clean_accuracy(self) -> float:
        """Share of clean test images classified as labelled."""
        return self.clean_correct / self.clean

    @property
    def attack_success(self) -> float:
        """Share of stamped test images classified as the attacker's target."""
        return self.attacked_as_target / self.attacked

    @property
    def seconds(self) -> float:
        """Seconds of all stages."""
        return sum(self.stages.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; precision and recall are null where undefined."""
        return {
            "clean_accuracy": self.clean_accuracy,
            "attack_success": self.attack_success,
            "residual_mean": self.residual_mean,
            "forensics": {kernel: _scores(confusion) for kernel, confusion in self.confusions.items()},
            "seconds": round(self.seconds, 2),
            "stages": {stage: round(seconds, 2) for stage, seconds in self.stages.items()},
            "seed": self.seed,
            "proj_dim": self.proj_dim,
            "report": str(self.report),
            "stores": {split: str(path) for split, path in self.stores.items()},
        }

    def summary(self) -> str:
        """Several lines for people; the last one names the page."""
        facts = (
            ("clean accuracy", f"{self.clean_accuracy:.1%}", f"{self.clean_correct} of {self.clean} test images"),
            (
                "attack success",
                f"{self.attack_success:.1%}",
                f"{self.attacked_as_target} of {self.attacked} stamped images",
            ),
            (
                "residual",
                f"{self.residual_mean:.4f}",
                f"mean |projected - exact| of {self.pairs:,} cosines, K {self.proj_dim}",
            ),
        )
        lines = [f"{name:<16}{value:>9}   {note}" for name, value, note in facts]
        lines += ["", f"{'forensics':<16}{'precision':>9}{'recall':>9}{'tp':>7}{'fp':>5}{'fn':>5}{'tn':>6}"]
        lines += [_line(kernel, confusion) for kernel, confusion in self.confusions.items()]
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.stages.items())
        return "\n".join([*lines, "", f"{self.seconds:.0f} seconds: {stages}", f"Pictures: {self.report}"])


def _scores(confusion: Confusion) -> dict[str, float | int | None]:
    return {
        "precision": None if confusion.precision is None else confusion.precision.value,
        "recall": None if confusion.recall is None else confusion.recall.value,
        "tp": confusion.tp,
        "fp": confusion.fp,
        "fn": confusion.fn,
        "tn": confusion.tn,
    }


def _line(kernel: str, confusion: Confusion) -> str:
    precision, recall = _share(confusion.precision), _share(confusion.recall)
    return (
        f"  {kernel:<16}{precision:>9}{recall:>8}{confusion.tp:>6}{confusion.fp:>5}{confusion.fn:>5}{confusion.tn:>6}"
    )


def _share(interval: Interval | None) -> str:
    return "n/a" if interval is None else f"{interval.value:.3f}"
