"""The engines of a search, and which is the fastest here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from gradstore.arithmetic import chooser
from gradstore.arithmetic.names import ENGINES, require_one_of
from gradstore.errors import UsageError
from gradstore.kernels.feature_map import FeatureMap
from gradstore.machine.devices import full_float32
from gradstore.machine.threads import single_threaded
from gradstore.search.bounds.bounds import Bounds
from gradstore.search.bounds.bounds_bfloat16 import LimbBounds
from gradstore.search.bounds.bounds_float32 import CudaBounds, Float32Bounds
from gradstore.search.bounds.bounds_int8 import IntegerBounds
from gradstore.search.bounds.scan_plan import ScanPlan, plan_scan
from gradstore.store.rows import Rows

_BY_NAME: dict[str, type[Bounds]] = {
    means.choice.name: means for means in (Float32Bounds, IntegerBounds, LimbBounds, CudaBounds)
}
# Floating-point operations below which choosing an engine by measurement takes longer than it can save.
_WORTH_MEASURING = 2e10
# What converting a number costs, in such operations.
_READING = 20


def choose_engine(
    name: str, train: Rows, phis: Sequence[FeatureMap], k: int, memory: int
) -> tuple[type[Bounds], ScanPlan]:
    """The engine of a name, and how it cuts a scan.

    Args:
        name: one of `ENGINES`; "auto" for a GPU where there is one, else for the one that a measurement of some
            milliseconds finds fastest, of those that need not read the store much more often than others.
        train: the training store.
        phis: the feature map of each query.
        k: neighbours a query.
        memory: bytes.

    Returns:
        (the engine, the cut).

    Raises:
        UsageError: an unknown engine, or one that this machine does not have; or too little memory.
    """
    require_one_of(ENGINES, name, "--engine")
    maps, K = tuple(dict.fromkeys(phis)), phis[0].K
    if name in _BY_NAME:
        means = _BY_NAME[name]
        refused = means.refusal(K)
        if refused is not None:
            raise refused
        return means, plan_scan(train, maps, len(phis), k, memory, means)
    usual = Float32Bounds if CudaBounds.refusal(K) else CudaBounds
    plan = plan_scan(train, maps, len(phis), k, memory, usual)
    work = (2.0 * len(phis) + _READING) * len(train) * max(phi.length for phi in maps)
    if usual is CudaBounds or work < _WORTH_MEASURING:
        return usual, plan
    plans = _plans(train, maps, len(phis), k, memory)
    plans = {means: other for means, other in plans.items() if 2 * other.batch >= plan.batch}
    dtype = getattr(torch, train.schema.dtype)
    means = _fastest(tuple(plans), _round_up(-(-plan.batch // len(maps))), _round_up(plan.block), maps[0].width, dtype)
    return means, plans[means]


def _plans(train: Rows, maps: Sequence[FeatureMap], m: int, k: int, memory: int) -> dict[type[Bounds], ScanPlan]:
    """Of every engine that can be used here, in this memory."""
    plans: dict[type[Bounds], ScanPlan] = {}
    for means in _BY_NAME.values():
        if means.refusal(maps[0].K) is None:
            try:
                plans[means] = plan_scan(train, maps, m, k, memory, means)
            except UsageError:
                continue
    return plans


@lru_cache(maxsize=32)
def _fastest(
    candidates: tuple[type[Bounds], ...], queries: int, rows: int, width: int, dtype: torch.dtype
) -> type[Bounds]:
    """Measured on one thread, as the workers of a search run it, from rows as stored at the sizes of its products."""
    with single_threaded(), full_float32(torch.device("cpu")):
        name = chooser.fastest(
            {means.choice.name: means.sample_product(queries, rows, width, dtype) for means in candidates}
        )
    return _BY_NAME[name]


def _round_up(size: int, steps: Sequence[int] = (1, 8, 32, 128, 512)) -> int:
    """Few distinct sizes, so that a session measures seldom."""
    return next((step for step in steps if size <= step), steps[-1])
