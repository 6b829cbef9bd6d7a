"""What checks of a GPU's paths found, kept in a file for each device, driver, set of versions and of sources."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from gradstore.machine.user_cache import cache_folder, publish
from gradstore.projection.device_paths import GpuPath

_OWN_SOURCES = ("self_check.py", "entries.py", "kind_record.py", "philox.py")


@dataclass(frozen=True)
class Verdict:
    """What a check of a path found.

    Attributes:
        fault: what went wrong, or "" if nothing did.
        problems: how many were solved.
        lasting: whether it says something of the path, and not only of the moment; only then it is kept.
        seconds: that it took.
        at: when, in UTC.
    """

    fault: str
    problems: int = 0
    lasting: bool = True
    seconds: float = 0.0
    at: str = ""


def kept(path: GpuPath, index: int, kind: str, precision: str) -> Verdict | None:
    """The verdict that is kept on a path, or None."""
    try:
        said = json.loads(file_of(path, index, kind, precision).read_bytes())
        return Verdict(**{field.name: said[field.name] for field in fields(Verdict)})
    except (OSError, ValueError, TypeError, KeyError):  # missing, or damaged
        return None


def keep(path: GpuPath, index: int, kind: str, precision: str, found: Verdict) -> None:
    """Put a verdict in the place of an earlier one, where the cache can be written; without it checks are repeated."""
    with suppress(OSError):
        publish(file_of(path, index, kind, precision), json.dumps(asdict(found)).encode())


def file_of(path: GpuPath, index: int, kind: str, precision: str) -> Path:
    """Where a verdict is kept; another device, driver, version or source has another place."""
    properties = torch.cuda.get_device_properties(index)
    device = [properties.name, str(getattr(properties, "uuid", index)), _driver_version()]
    versions = {"torch": torch.__version__, **path.versions()}
    digest = hashlib.sha256(json.dumps([device, versions, path.name, kind, precision]).encode())
    own = (Path(__file__).parent / name for name in (*_OWN_SOURCES, f"{kind}.py"))
    for file in (*own, *path.sources()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return cache_folder() / "proved" / f"{digest.hexdigest()[:32]}.json"


def _driver_version() -> str:
    """Exactly where the kernel's module says it; elsewhere the version of CUDA that the driver offers."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        offered = getattr(torch._C, "_cuda_getDriverVersion", lambda: "")
        return f"{offered()} {torch.version.cuda or torch.version.hip}"
