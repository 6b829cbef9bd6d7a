"""The main job from end to end on real data: write a project, train it, featurize, explain, report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from gradstore.demo.demo_result import DemoResult
from gradstore.demo.digits import TARGET
from gradstore.demo.preparation import trained_project
from gradstore.demo.residual_pairs import KERNELS, residuals
from gradstore.demo.story import demo_page
from gradstore.explain.forensics import Forensics, forensics
from gradstore.featurization.featurize import featurize
from gradstore.featurization.settings import Given, Settings
from gradstore.projection import Projection
from gradstore.projection.kinds import DEFAULT
from gradstore.report.page import write_demo
from gradstore.search.topk import topk
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.target import target_of

SPLITS = ("train", "test", "stamped")


def run(
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    proj_dim: int | None = None,
    projection: str = DEFAULT,
    progress: Callable[[str], None] | None = None,
) -> DemoResult:
    """Poison a tenth of the digits, train on them, and find the stamped test images by their gradients.

    Writes `project.py`, `cnn.safetensors`, `stores` and `report.html` to `directory`. Run again, it continues or
    reuses what is there, and measures the same numbers.

    Args:
        directory: where to; made if need be.
        seed: decides the split, which images are poisoned, the weights, and the projection.
        proj_dim: projected dimension K; default `default_dim()`.
        projection: kind of its entries, a name of `gradstore.projection.kinds.KINDS`, or "auto".
        progress: called with a line of text when something begins.

    Returns:
        What was measured.

    Raises:
        UsageError: `directory` holds another `project.py`.
        Others: as `featurize` and `topk`.
    """
    folder, dim, say = Path(directory), proj_dim or default_dim(), progress or (lambda line: None)
    target_of(folder / "report.html")  # said before the work, not after it
    settings: Given = {"proj_dim": dim, "projection": projection, "seed": seed}
    Settings(**settings).chosen(torch.device("cpu"))[0].make_projection()  # a K that does not fit, likewise
    seconds: dict[str, float] = {}
    with _timed(seconds, "train"):
        project = trained_project(folder, seed, say)
    stores: dict[str, FeatureStore] = {}
    with _timed(seconds, "featurize"):
        for split in SPLITS:
            say(f"featurizing {split}: {len(project.splits[split]):,} examples, K = {dim:,}")
            stores[split] = featurize(project, split=split, out=folder / "stores" / split, **settings)
    train, *queries = stores.values()
    with _timed(seconds, "explain"):
        say(f"searching {len(train):,} training examples for those most similar to {sum(map(len, queries)):,} queries")
        results = [forensics(train, queries, kernel=kernel) for kernel in KERNELS]
        clean = topk(train, stores["test"], kernel=KERNELS[0], rows=range(6))
    with _timed(seconds, "compare"):
        say("comparing sampled similarities with exact ones")
        errors = torch.cat([error.flatten() for error in residuals(project, train, queries).values()])
    result = _measured(seed, dim, stores, results, errors, seconds, folder)
    write_demo(demo_page(result, results, clean), result.report)
    return result


def default_dim() -> int:
    """10240 where the projection is fast, 4096 where only its reference runs on a CPU."""
    return 10240 if Projection().backend == "native" or torch.cuda.is_available() else 4096


def _measured(
    seed: int,
    dim: int,
    stores: Mapping[str, FeatureStore],
    results: Sequence[Forensics],
    errors: torch.Tensor,
    seconds: Mapping[str, float],
    folder: Path,
) -> DemoResult:
    test, stamped = stores["test"], stores["stamped"]
    return DemoResult(
        seed=seed,
        proj_dim=dim,
        clean_correct=int((test.logits.argmax(1) == test.labels).sum()),
        clean=len(test),
        attacked_as_target=int((stamped.logits.argmax(1) == TARGET).sum()),
        attacked=len(stamped),
        residual_mean=float(errors.abs().mean()),
        pairs=len(errors),
        confusions={found.kernel: found.confusion for found in results if found.confusion is not None},
        stages=seconds,
        report=folder / "report.html",
        stores={split: store.path for split, store in stores.items()},
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began
