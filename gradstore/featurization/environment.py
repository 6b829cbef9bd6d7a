"""Device and library versions: recorded with every run, and not allowed to change unnoticed within a store."""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import h5py
import numpy as np
import torch

from gradstore import __version__
from gradstore.arithmetic import matrix_unit
from gradstore.errors import GradstoreError, MismatchError
from gradstore.native import library
from gradstore.projection import Projection, trust
from gradstore.store.feature_store import computation_name
from gradstore.store.files.disk import Disk
from gradstore.store.files.manifest import Manifest
from gradstore.store.schema import NAMES, NEWEST

_LOG_BYTES = 256 << 20
# What can move the last bits of a feature.
_DECISIVE = ("device", "torch", "projection_backend")


def environment(device: torch.device, projection: Projection) -> dict[str, str | int]:
    """What a run ran on. Never part of a store's identity."""
    passed_over = projection.passed_over(device)
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "projection_backend": projection.path(device),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
        **({"projection_passed_over": "; ".join(passed_over)} if passed_over else {}),
    }


def require_same_environment(log: Path, now: dict[str, str | int], allowed: bool, disk: Disk) -> None:
    """Compare with the run that began the store.

    Raises:
        MismatchError: the device type, torch or the projection's backend has changed and `allowed` is not set.
    """
    began = first_start(log, disk)
    changed = [
        f"{key} {began[key]} → {now[key]}" for key in _DECISIVE if began is not None and began.get(key) != now[key]
    ]
    if changed and not allowed:
        raise MismatchError(
            "this store was begun in another environment, so its rows would differ in their last bits",
            where=log.parent,
            got=", ".join(changed),
            hint="Continue where it was begun, or accept it with --allow-other-versions; the run log records it",
        )


def require_same_computation(manifest: Manifest, now: int, allowed: bool, where: Path) -> None:
    """Compare the revision that computed each shard with this one's.

    Raises:
        MismatchError: some rows were computed by another one, and `allowed` is not set.
    """
    others = [shard for shard in manifest.shards if shard.computation != now]
    if not others or allowed:
        return
    rows = manifest.rows_of(others[0].index)
    raise MismatchError(
        "rows of this store were computed by another version of gradstore, so new ones would differ in their last bits",
        where=where,
        expected=f"revision {now} of the computation",
        got=f"{computation_name(others[0].computation)} for rows {rows.start} to {rows.stop - 1}"
        + (f" and those of {len(others) - 1} more shards" if len(others) > 1 else ""),
        hint="Choose another --out, or accept it with --allow-other-versions; `gradstore info` then says which rows "
        "are of which",
    )


def first_start(log: Path, disk: Disk) -> dict[str, str | int] | None:
    """The first start event of a run log; None where there is none that can be read. Torn lines are passed over."""
    try:
        lines = disk.read_file(log, _LOG_BYTES).splitlines()
    except GradstoreError:
        return None
    for line in lines:
        with suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict) and event.get("event") == "start":
                return event
    return None


def system_card() -> dict[str, str]:
    """What this machine offers, for people: projection path, devices, libraries."""
    return {
        "gradstore": __version__,
        "projection": _projection_path(),
        "matrix unit": _matrix_unit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device; the CPU is used",
        **_gpu_paths(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "torch": torch.__version__,
        "h5py": f"{h5py.__version__} (HDF5 {h5py.version.hdf5_version})",
        "numpy": np.__version__,
        "new stores": f"format version {NEWEST}, rows under {NAMES[NEWEST]}",
        "faiss": _installed("faiss-cpu", "faiss-gpu"),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }


def _gpu_paths() -> dict[str, str]:
    """The path that each GPU takes for signs, as far as it is known without a check."""
    return {f"on cuda:{index}": trust.outlook(index) for index in range(torch.cuda.device_count())}


def _projection_path() -> str:
    found = library.status()
    if found.level:
        return f"compiled, {found.level}" + (f" ({found.hint})" if found.hint else "")
    return f"torch only, many times slower: {found.why}; to get the compiled path, {found.hint}"


def _matrix_unit() -> str:
    if matrix_unit.available():
        return "AMX, for kernels and searches"
    forbidden = "amx" in library.levels()
    return "not used: GRADSTORE_SIMD names another level" if forbidden else "none that can be used; products by BLAS"


def _installed(*names: str) -> str:
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found) or "not installed (pip install 'gradstore[cpu]')"
