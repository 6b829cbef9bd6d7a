"""Every kind of output, written by the code that writes it for users, with one of two contents and onto any disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from synthetic import clustered, write_store

import gradstore.store.files.output as output_module
from gradstore.explain.surrogate.saved import save_fitted
from gradstore.model.starter_file import STARTER
from gradstore.report.csv_table import write_csv
from gradstore.report.page import write as write_page
from gradstore.search.index.index_file import save_index
from gradstore.store.export import export
from gradstore.store.feature_store import FeatureStore
from gradstore.store.files.disk import Disk

LETTERS = "ab"


def make_sources(folder: Path) -> None:
    """Two stores, of which outputs are made."""
    for seed, letter in enumerate(LETTERS):
        write_store(folder / letter, clustered(40, 2, 32, seed=seed))


@contextmanager
def on_disk(disk: Disk) -> Iterator[None]:
    """Have outputs written onto a disk."""
    before = output_module.Disk
    output_module.Disk = lambda: disk  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        output_module.Disk = before  # type: ignore[misc]


def csv(path: Path, letter: str, disk: Disk, source: Path) -> None:
    with on_disk(disk):
        write_csv(path, ([letter, i] for i in range(20_000)))


def html(path: Path, letter: str, disk: Disk, source: Path) -> None:
    with on_disk(disk):
        write_page(letter * 50_000, path)


def npy(path: Path, letter: str, disk: Disk, source: Path) -> None:
    export(FeatureStore(source / letter), path, memory="5kB", disk=disk)


def safetensors(path: Path, letter: str, disk: Disk, source: Path) -> None:
    export(FeatureStore(source / letter), path, memory="5kB", disk=disk)


def surrogate(path: Path, letter: str, disk: Disk, source: Path) -> None:
    values = np.full((2, 500), float(ord(letter)))
    report = dict.fromkeys(("alpha_", "n_iter_", "loss_", "converged_", "reason_", "logit_error_"), 0.0)
    model = SimpleNamespace(
        coef_=values,
        intercept_=values[:, 0],
        vectors_=None,
        classes_=np.arange(2),
        state_=None,
        alpha_scores_={},
        n_features_in_=3,
        binding_=SimpleNamespace(),
        get_params=dict,
        **report,
    )
    with on_disk(disk):
        save_fitted(model, path)


def index(path: Path, letter: str, disk: Disk, source: Path) -> None:
    store = FeatureStore(source / letter, disk=disk)
    arrays = {"rest": np.full(5000, ord(letter), np.float32), "error": np.full(5000, ord(letter), np.float16)}
    save_index(path, store, arrays, {"letter": letter})


def starter(path: Path, letter: str, disk: Disk, source: Path) -> None:
    """Written where nothing is; as `gradstore init`, but replacing, so that it can be written again."""
    output_module.write_output(path, [STARTER.encode() + letter.encode()], disk=disk)


def fixed_name(path: Path, letter: str, disk: Disk, source: Path) -> None:
    """A control: the temporary file has one name for all writers."""
    content = letter.encode() * 50_000
    temporary = path.with_name(f".{path.name}.tmp")
    with disk.create(temporary, len(content)) as fd:
        for at in range(0, len(content), 5000):
            disk.write(fd, content[at : at + 5000], at, temporary)
        disk.sync(fd, temporary)
    os.replace(temporary, path)


Writer = Callable[[Path, str, Disk, Path], None]
WRITERS: dict[str, Writer] = {
    write.__name__: write for write in (csv, html, npy, safetensors, surrogate, index, starter, fixed_name)
}
KINDS = {
    "csv": "near.csv",
    "html": "near.html",
    "npy": "x.npy",
    "safetensors": "x.safetensors",
    "surrogate": "fitted",
    "index": "index-classes.safetensors",
    "starter": "project.py",
}
"""Each kind, and a name for it."""
