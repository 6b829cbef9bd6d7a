"""Whether what is installed here works: every way to multiply by P, checked on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradstore.native import library
from gradstore.projection import by_definition, compiled_product, self_check, trust
from gradstore.projection.device_paths import PATHS, PRECISIONS, GpuPath
from gradstore.projection.entries import Entries
from gradstore.projection.kinds import KINDS, kind_of

_CPU_TILES = (16, 64)  # gradients that the compiled product takes together, and more


@dataclass(frozen=True)
class Finding:
    """One way to multiply by P, on one device.

    Attributes:
        device: "cpu", or the name of a GPU and its index.
        path: such as "avx512", "wgmma" or "reference".
        entries: their kind, a name of `projection.kinds.KINDS`.
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

    Returns:
        What was found of each.
    """
    found = [_on_cpu(kind) for kind in KINDS]
    for index in range(torch.cuda.device_count()):
        for kind in KINDS:
            for precision in PRECISIONS:
                found += _on_gpu(index, kind, precision, again=again)
    return found


def _on_cpu(kind: str) -> Finding:
    status = library.status()
    compiled = bool(status.level) and kind_of(kind).compiled is not None
    path = status.level if compiled else "reference"
    hint = f"; {status.why}; {status.hint}" if status.why else ""
    return _by_this_process("cpu", path, kind, torch.device("cpu"), lambda: lambda: True, hint)


def _on_gpu(index: int, kind: str, precision: str, *, again: bool) -> list[Finding]:
    device = f"{torch.cuda.get_device_name(index)}, cuda:{index}"
    paths = [path for path in PATHS if path.suits(index, kind)]
    found = [_path_on_gpu(device, path, index, kind, precision, again=again) for path in paths]
    first = next((i for i, finding in enumerate(found) if finding.state == "ok"), None)
    if first is not None:
        found[first] = replace(found[first], used=True)
        return found
    where, finished = torch.device("cuda", index), self_check.on_device(index)
    slow = _by_this_process(device, "reference", kind, where, finished, "; in torch, hundreds of times slower")
    return [*found, replace(slow, precision=precision)]


def _by_this_process(
    name: str, path: str, kind: str, device: torch.device, finished: Callable[[], Callable[[], bool]], more: str
) -> Finding:
    """Check what needs no process of its own: compiled code of the CPU, or torch."""

    def accumulate(entries: Entries, out: Tensor, block: Tensor, start: int, first_k: int, *_: Any, **__: Any) -> None:
        product = by_definition.accumulate if path == "reference" else compiled_product.accumulate
        product(entries, out, block, start, first_k)

    began = time.monotonic()
    try:
        solved = self_check.check(accumulate, kind, "exact", _CPU_TILES, device, finished=finished, crowd=False)
    except self_check.CheckError as failure:
        return Finding(name, path, kind, "exact", "wrong", True, f"{failure}{more}")
    note = f"{solved} products right, {time.monotonic() - began:.1f} s{more}"
    return Finding(name, path, kind, "exact", "ok", True, note)


def _path_on_gpu(device: str, path: GpuPath, index: int, kind: str, precision: str, *, again: bool) -> Finding:
    missing = path.missing(index)
    if missing:
        return Finding(device, path.name, kind, precision, "absent", False, missing)
    verdict = trust.verdict(path, index, kind, precision, again=again)
    if verdict.fault:
        return Finding(device, path.name, kind, precision, "wrong", False, verdict.fault)
    note = f"{verdict.problems} products right, {verdict.seconds} s on {verdict.at}"
    return Finding(device, path.name, kind, precision, "ok", False, note)
