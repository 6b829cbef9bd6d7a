"""Whether what is installed here works: every way to multiply by P, checked on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradstore.projection import native, self_check, trust
from gradstore.projection.entries import KINDS, Entries
from gradstore.projection.paths import PATHS, PRECISIONS, GpuPath

_CPU_TILES = (16, 64)  # gradients that the compiled product takes together, and more


@dataclass(frozen=True)
class Finding:
    """One way to multiply by P, on one device.

    Attributes:
        device: "cpu", or the name of a GPU and its index.
        path: such as "avx512", "wgmma" or "reference".
        entries: "rademacher" or "gaussian".
        precision: "fast" or "exact".
        state: "ok" where it was checked and gave the right products, "wrong" where it did not, or "absent".
        used: whether a projection of this kind takes it on this device.
        note: what was checked, what is wrong, or what is missing and how to get it.
    """

    device: str
    path: str
    entries: str
    precision: str
    state: str
    used: bool
    note: str


def diagnose(*, again: bool = False) -> list[Finding]:
    """Check the compiled projection of the CPU, and every path of every GPU.

    Args:
        again: repeat the checks of GPUs whose verdicts are kept.
    """
    found = [_on_cpu(kind) for kind in KINDS]
    for index in range(torch.cuda.device_count()):
        for kind in KINDS:
            for precision in PRECISIONS:
                found += _on_gpu(index, kind, precision, again=again)
    return found


def _on_cpu(kind: str) -> Finding:
    status = native.status()
    if status.path != "native":
        return Finding("cpu", "reference", kind, "exact", "ok", True, f"{status.why}; {status.hint}")

    def accumulate(entries: Entries, out: Tensor, block: Tensor, start: int, first_k: int, precision: str) -> None:
        native.accumulate(entries, out, block, start, first_k)

    began = time.monotonic()
    try:
        solved = self_check.check(
            accumulate, kind, "exact", _CPU_TILES, torch.device("cpu"), finished=lambda: lambda: True
        )
    except self_check.CheckError as failure:
        return Finding("cpu", status.level, kind, "exact", "wrong", True, str(failure))
    note = f"{solved} products right, {time.monotonic() - began:.1f} s"
    return Finding("cpu", status.level, kind, "exact", "ok", True, note)


def _on_gpu(index: int, kind: str, precision: str, *, again: bool) -> list[Finding]:
    device = f"{torch.cuda.get_device_name(index)}, cuda:{index}"
    found = [
        _path_on_gpu(device, path, index, kind, precision, again=again) for path in PATHS if path.suits(index, kind)
    ]
    first = next((i for i, finding in enumerate(found) if finding.state == "ok"), None)
    if first is None:
        return [*found, Finding(device, "reference", kind, precision, "ok", True, "in torch, hundreds of times slower")]
    found[first] = replace(found[first], used=True)
    return found


def _path_on_gpu(device: str, path: GpuPath, index: int, kind: str, precision: str, *, again: bool) -> Finding:
    missing = path.missing(index)
    if missing:
        return Finding(device, path.name, kind, precision, "absent", False, missing)
    verdict = trust.verdict(path, index, kind, precision, again=again)
    if verdict.fault:
        return Finding(device, path.name, kind, precision, "wrong", False, verdict.fault)
    note = f"{verdict.problems} products right, {verdict.seconds} s on {verdict.at}"
    return Finding(device, path.name, kind, precision, "ok", False, note)
