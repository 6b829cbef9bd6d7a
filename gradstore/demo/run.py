"""The main job from end to end on real data: write a project, train it, featurize, explain, report."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import save

from gradstore.demo.digits import TARGET
from gradstore.demo.residual import KERNELS, residuals
from gradstore.demo.result import DemoResult
from gradstore.demo.story import demo_page
from gradstore.demo.training import train
from gradstore.errors import UsageError
from gradstore.featurize import Progress as Rows
from gradstore.featurize import featurize
from gradstore.forensics import forensics
from gradstore.project import Project, load_project
from gradstore.projection import Projection
from gradstore.report import write_demo
from gradstore.store import FeatureStore
from gradstore.topk import topk

SPLITS = ("train", "test", "stamped")

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) as the demo goes on."""


def run(
    directory: str | os.PathLike[str], *, seed: int = 0, proj_dim: int | None = None, progress: Progress | None = None
) -> DemoResult:
    """Poison a tenth of the digits, train on them, and find the stamped test images by their gradients.

    Writes `project.py`, `cnn.safetensors`, `stores/` and `report.html` to `directory`. Run again, it continues or
    reuses what is there, and measures the same numbers.

    Args:
        directory: where to; made if need be.
        seed: decides the split, which images are poisoned, and the weights.
        proj_dim: projected dimension K; default 10240, or 4096 where only the slower reference projection runs.
        progress: called as the demo goes on.

    Returns:
        What was measured.

    Raises:
        UsageError: `directory` holds another `project.py`.
        Others: as `featurize` and `topk`.
    """
    folder, clock = Path(directory), _Clock(progress or (lambda stage, done, total: None))
    dim = proj_dim or default_dim()
    with clock.stage("train"):
        project = _trained_project(folder, seed)
    with clock.stage("featurize"):
        stores = {split: _featurize(project, split, folder / "stores" / split, dim, clock) for split in SPLITS}
    queries = [stores["test"], stores["stamped"]]
    with clock.stage("explain"):
        results = [forensics(stores["train"], queries, kernel=kernel) for kernel in KERNELS]
        clean = topk(stores["train"], stores["test"], kernel=KERNELS[0], rows=range(6))
    with clock.stage("compare"):
        errors = torch.cat([error.flatten() for error in residuals(project, stores["train"], queries).values()])
    test, stamped = queries
    result = DemoResult(
        seed=seed,
        proj_dim=dim,
        clean_correct=int((test.logits.argmax(1) == test.labels).sum()),
        clean=len(test),
        attacked_as_target=int((stamped.logits.argmax(1) == TARGET).sum()),
        attacked=len(stamped),
        residual_mean=float(errors.abs().mean()),
        pairs=len(errors),
        confusions={found.kernel: found.confusion for found in results if found.confusion is not None},
        stages=clock.seconds,
        report=(folder / "report.html").absolute(),
        stores={split: store.path for split, store in stores.items()},
    )
    write_demo(demo_page(result, results, clean), result.report)
    return result


def default_dim() -> int:
    """10240 where the projection is fast, 4096 where only its reference runs on a CPU."""
    return 10240 if Projection().backend == "native" or torch.cuda.is_available() else 4096


def _featurize(project: Project, split: str, out: Path, dim: int, clock: _Clock) -> FeatureStore:
    def tell(rows: Rows) -> None:
        clock.progress(f"featurize {split}", rows.rows, rows.total)

    return featurize(project, split=split, out=out, proj_dim=dim, progress=tell)


def _trained_project(folder: Path, seed: int) -> Project:
    """The project in `folder`, written and trained unless it is there already."""
    text = project_text(seed)
    file = folder / "project.py"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write(file, text.encode())
    elif file.read_text(encoding="utf-8") != text:
        raise UsageError(
            "the folder holds another project.py",
            where=file,
            expected=f"the demo's, with seed {seed}",
            hint="Choose another folder",
        )
    project = load_project(file)
    weights = folder / "cnn.safetensors"
    if not weights.exists():
        kind = type(project.model)
        state = train(lambda: kind(classes=10), project.splits["train"], seed)
        _write(weights, save(state))
    return project.prepare()


def project_text(seed: int = 0) -> str:
    """The demo's project file, whose default seed is `seed`."""
    text = files("gradstore.demo").joinpath("digits.py").read_text(encoding="utf-8")
    return text.replace("def project(seed: int = 0)", f"def project(seed: int = {int(seed)})")


def _write(path: Path, content: bytes) -> None:
    """Make a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class _Clock:
    """Seconds of each stage, and the way to tell the caller about it."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.progress(name, 0, 1)
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began
        self.progress(name, 1, 1)
