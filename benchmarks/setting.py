"""Where a benchmark ran: the columns that every row carries, and the file that rows are added to."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

from gradstore.native import library

RESULTS = Path(__file__).parent / "results"


def setting(seed: int) -> dict[str, object]:
    """Date, device, versions, threads and load of this process."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": names[0] if names else platform.machine(),
        "simd": library.level() or "reference",
        "threads": torch.get_num_threads(),
        "seed": seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "OPENBLAS_CORETYPE": os.environ.get("OPENBLAS_CORETYPE", ""),
        "load_per_core": round(os.getloadavg()[0] / (os.cpu_count() or 1), 2),
    }


def append_rows(name: str, rows: Sequence[dict[str, object]], seed: int) -> None:
    """Add rows to `results/<name>.csv`, each with its setting, and print them."""
    path = RESULTS / f"{name}.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        for row in rows:
            full = {**row, **setting(seed)}
            writer = csv.DictWriter(file, list(full))
            if new:
                writer.writeheader()
                new = False
            writer.writerow(full)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
