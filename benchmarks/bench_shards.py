"""What many shards cost: publishing one, opening a store of them, and a run of tiny ones.

    python -m benchmarks.bench_shards [--folder DIR] [--publish 1000,10000] [--open 1000,10000] [--run 2000]

Shards are those of rows [10, 16] float16. Publishing and opening need no rows, so that only the manifest is measured:
its entries are made up, and no shard lies beside it. A run writes shards of one row by the loop that featurize uses.
"of one core" are seconds of the processor, which others that work beside do not lengthen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.setting import append_rows
from gradstore.store.background_writer import in_background
from gradstore.store.files.disk import Disk
from gradstore.store.files.manifest import Manifest, Shard
from gradstore.store.files.manifest_file import read_manifest, write_manifest
from gradstore.store.identity import fingerprint_of
from gradstore.store.schema import BULK, Schema
from gradstore.store.store_writer import open_writer

SCHEMA = Schema(c=10, K=16, classes=10)
COLUMNS = (
    *("what", "shards", "seconds", "of one core", "peak MB", "bytes of shards", "bytes of the listing"),
    *("first 100, median ms", "middle 100, median ms", "last 100, median ms"),
)


class CountingDisk(Disk):
    """Counts the bytes that are written, of shards apart from those of what lists them."""

    def __init__(self) -> None:
        self.listing = self.shards = 0
        self._names: dict[int, str] = {}

    def _open(self, path: Path, flags: int, mode: int = 0o666) -> int:
        fd = super()._open(path, flags, mode)
        self._names[fd] = path.name
        return fd

    def _pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        done = super()._pwrite(fd, data, offset)
        if "store." in self._names[fd]:
            self.listing += done
        else:
            self.shards += done
        return done


def planned(rows: int, shards: int) -> Manifest:
    """A store of so many rows in so many shards, of which none is there."""
    identity = {
        "format": 1,
        "projection": {"kind": "rademacher", "K": SCHEMA.K, "seed": 0, "version": 1},
        "parameters": {"count": 1, "blocks": [["w", [1]]]},
        "weights": "benchmark",
        "classes": SCHEMA.classes,
        "layout": "per-class",
        "dtype": "float16",
        "data": {"length": rows},
    }
    names = tuple(map(str, range(SCHEMA.classes)))
    return Manifest(identity, fingerprint_of(identity), SCHEMA, rows, -(-rows // shards), 1, "train", names)


def entry(manifest: Manifest, index: int) -> Shard:
    """What a manifest says of a shard, made up."""
    layout = manifest.layout_of(index)
    names = [column.name for column in SCHEMA.columns if column.name not in BULK]
    columns = {name: hashlib.sha256(f"{name} {index}".encode()).hexdigest() for name in names}
    rows = len(manifest.rows_of(index))
    return Shard(index, rows, layout.size, layout.offsets, layout.digest, columns)


def publish(folder: Path, shards: int) -> dict[str, Any]:
    """Milliseconds of publishing the first, the middle and the last hundred of so many shards, in order."""
    disk, path = CountingDisk(), folder / "published"
    seconds, used = [], time.process_time()
    with open_writer(path, planned(shards, shards), disk) as writer:
        for index in range(shards):
            shard = entry(writer.manifest, index)
            began = time.perf_counter()
            writer.adopt(shard)
            seconds.append(time.perf_counter() - began)
    shutil.rmtree(path)
    middle = shards // 2
    parts = {"first": seconds[:100], "middle": seconds[middle : middle + 100], "last": seconds[-100:]}
    median = {f"{name} 100, median ms": round(1e3 * statistics.median(part), 3) for name, part in parts.items()}
    used = time.process_time() - used
    return {
        **median,
        "seconds": round(sum(seconds), 2),
        "of one core": round(used, 2),
        "bytes of the listing": disk.listing,
    }


def reopened(folder: Path, rows: int, shards: int) -> dict[str, Any]:
    """Seconds of reading the manifest of a store, and the memory that a process holds for it, at most and after."""
    manifest, path = planned(rows, shards), folder / "opened"
    path.mkdir()
    entries = tuple(entry(manifest, index) for index in range(manifest.shard_count))
    write_manifest(path, replace(manifest, shards=entries), Disk())
    code = [sys.executable, "-m", "benchmarks.bench_shards", "--read", str(path)]
    found = [json.loads(subprocess.run(code, check=True, capture_output=True, text=True).stdout) for _ in range(5)]
    size = (path / "store.json").stat().st_size
    shutil.rmtree(path)
    return {**{name: statistics.median(one[name] for one in found) for name in found[0]}, "bytes of the listing": size}


def read(path: Path) -> dict[str, float]:
    """What reading one manifest takes in this process."""

    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, began, used = held("VmRSS"), time.perf_counter(), time.process_time()
    manifest = read_manifest(path, Disk())
    seconds, used = time.perf_counter() - began, time.process_time() - used
    assert not manifest.missing
    return {"seconds": round(seconds, 4), "of one core": round(used, 4), "peak MB": round(held("VmHWM") - before, 1)}


def held(what: str) -> float:
    """Megabytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) / 1024


def one_row(row: int) -> dict[str, np.ndarray]:
    data = {c.name: np.ones((1, *c.shape), c.dtype) for c in SCHEMA.columns if c.name != "digest"}
    return {**data, "row": np.array([row])}


def run_of(folder: Path, shards: int) -> dict[str, Any]:
    """Seconds and bytes of writing so many shards of one row."""
    disk, path = CountingDisk(), folder / "run"
    began, used = time.perf_counter(), time.process_time()
    with open_writer(path, planned(shards, shards), disk) as writer, in_background(writer) as background:
        for index in writer.missing:
            background.write(partial(one_row, index))
    seconds, used = time.perf_counter() - began, time.process_time() - used
    shutil.rmtree(path)
    return {
        "seconds": round(seconds, 2),
        "of one core": round(used, 2),
        "bytes of shards": disk.shards,
        "bytes of the listing": disk.listing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--publish", default="1000,10000")
    parser.add_argument("--open", default="1000,10000")
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--run", default="2000")
    parser.add_argument("--read", type=Path)
    given = parser.parse_args()
    if given.read is not None:
        print(json.dumps(read(given.read)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        measures: dict[str, Callable[[int], dict[str, Any]]] = {
            "publish": partial(publish, Path(folder)),
            "open": partial(reopened, Path(folder), given.rows),
            "run": partial(run_of, Path(folder)),
        }
        found = [
            dict.fromkeys(COLUMNS, "") | {"what": what, "shards": int(shards)} | measure(int(shards))
            for what, measure in measures.items()
            for shards in getattr(given, what).split(",")
            if shards
        ]
    append_rows("shards", found, seed=0)


if __name__ == "__main__":
    main()
