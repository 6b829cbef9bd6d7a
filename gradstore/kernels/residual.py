"""Residuals of a projected kernel: sampled pairs, exact against estimated, beside what theory predicts."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradstore.errors import UsageError
from gradstore.featurization.fingerprint import identity_of_model, sampled_identity
from gradstore.featurization.settings import Settings
from gradstore.kernels.definitions import PROJECTED, projected_kernel
from gradstore.kernels.exact.exact_gram import exact_gram
from gradstore.kernels.feature_map import FeatureMap, require_served
from gradstore.kernels.projection_error import effective_dimension
from gradstore.kernels.sketched_error import errors_of
from gradstore.machine.byte_counts import parse_bytes
from gradstore.model.examples import input_digests
from gradstore.model.project import Project
from gradstore.report.csv_table import write_csv
from gradstore.report.page import write_residual
from gradstore.report.shown_rows import provenance
from gradstore.report.views import Fact, ResidualPage
from gradstore.store.identity import require_same, without_data
from gradstore.store.present_rows import present_rows
from gradstore.store.rows import Rows, require_comparable

_POINTS = 120
_PAIR = 64  # bytes a feature of a pair takes: as read, its Φ, and both rows in float64 with a copy
_TOGETHER = 64  # pairs at a time, so that they stay in a cache


@dataclass(frozen=True)
class Residuals:
    """Sampled pairs of examples, and both values of one kernel.

    Attributes:
        kernel: name of the projected kernel.
        rows_a: int64 [q], positions in the first store.
        rows_b: int64 [q], positions in the second.
        exact: float64 [q].
        projected: float64 [q].
        standard_error: float64 [q], predicted from the features (see `gradstore.kernels.projection_error`).
        a: the first store.
        b: the second store.
    """

    kernel: str
    rows_a: np.ndarray
    rows_b: np.ndarray
    exact: np.ndarray
    projected: np.ndarray
    standard_error: np.ndarray
    a: Rows
    b: Rows

    @property
    def residual(self) -> np.ndarray:
        """Estimate minus exact value, float64 [q]."""
        return self.projected - self.exact

    @property
    def rate(self) -> float:
        """Rate of the exponential distribution fitted to |residual| (Fig. 4): one over its mean."""
        return float(1 / np.abs(self.residual).mean())

    @property
    def effective_dimension(self) -> float | None:
        """Median K_eff of the pairs; None for a kernel that is no cosine."""
        if not projected_kernel(self.kernel).normalised:
            return None
        found = effective_dimension(torch.from_numpy(self.projected), torch.from_numpy(self.standard_error))
        return float(found.median())

    def cdf(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shares of |residual| ≤ x: observed, the fitted exponential, and normal errors of the predicted size."""
        observed = np.searchsorted(np.sort(np.abs(self.residual)), x, side="right") / len(self.exact)
        exponential = 1 - np.exp(-self.rate * x)
        predicted = [np.mean([math.erf(v / (s * math.sqrt(2))) for s in self.standard_error]) for v in x]
        return observed, exponential, np.asarray(predicted)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        size = np.abs(self.residual)
        score = self.residual / self.standard_error
        return {
            "kernel": self.kernel,
            "pairs": len(size),
            "p50": float(np.quantile(size, 0.5)),
            "p99": float(np.quantile(size, 0.99)),
            "max": float(size.max()),
            "mean": float(self.residual.mean()),
            "rms": float(np.sqrt(np.mean(self.residual**2))),
            "predicted_rms": float(np.sqrt(np.mean(self.standard_error**2))),
            "score_rms": float(np.sqrt(np.mean(score**2))),
            "exponential_rate": self.rate,
            "K": self.a.schema.K,
            "K_eff": self.effective_dimension,
        }

    def page(self) -> ResidualPage:
        """The residuals as a report shows them."""
        values = self.as_dict()
        x = np.linspace(0, values["max"], _POINTS)
        facts = [
            Fact(f"{values['p50']:.2g}", "median |residual|"),
            Fact(f"{values['p99']:.2g}", "99 % are below"),
            Fact(f"{values['max']:.2g}", "largest"),
            Fact(f"{values['rms']:.2g}", "root mean square", f"predicted {values['predicted_rms']:.2g}"),
        ]
        if values["K_eff"] is not None:
            facts.append(Fact(f"{values['K_eff']:,.0f}", "effective dimension", f"K is {self.a.schema.K:,}"))
        return ResidualPage(
            kernel=self.kernel,
            exact=projected_kernel(self.kernel).exact,
            pairs=len(self.exact),
            facts=tuple(facts),
            x=tuple(x.tolist()),
            curves=tuple(tuple(curve.tolist()) for curve in self.cdf(x)),  # type: ignore[arg-type]
            provenance=provenance(self.a, self.b),
        )

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one HTML page that opens offline."""
        return write_residual(self.page(), path)

    def save_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write one line a pair, with the rows' indices in their splits; see `write_csv`."""
        rows = self.a.rows[self.rows_a], self.b.rows[self.rows_b]
        columns = (*rows, self.exact, self.projected, self.standard_error)
        header = ["row_a", "row_b", "exact", "projected", "standard_error"]
        lines = (
            [int(i), int(j), *(repr(float(value)) for value in values)] for i, j, *values in zip(*columns, strict=True)
        )
        return write_csv(path, chain([header], lines))


def residual(
    project: Project,
    a: Rows,
    b: Rows | None = None,
    kernel: str = "proj-trntk",
    *,
    pairs: int = 900,
    seed: int = 0,
    memory: int | str = "2GB",
    device: str = "auto",
) -> Residuals:
    """Compare a projected kernel with the exact one on a sample of pairs (Engel et al., ICLR 2024, Fig. 4).

    About sqrt(pairs) rows are drawn from each store, without replacement and never the same row on both sides, and
    every row of the one is compared with every row of the other; so residuals that share a row are not independent.

    Args:
        project: the project that the stores were made from.
        a: a store, or any `Rows`.
        b: another; None pairs rows of `a` with other rows of `a`.
        kernel: a name in `gradstore.kernels.definitions.PROJECTED` that has an exact kin.
        pairs: how many pairs, at least.
        seed: of the sample.
        memory: bytes that the exact kernel, and then the projected one, may take, beside the pairs.
        device: for the exact kernel.

    Returns:
        Exact and projected values of every pair.

    Raises:
        UsageError: an unknown kernel, one that the layout cannot serve, or too few rows for two different ones.
        MismatchError: the stores are not of this project.
        Others: as `exact_gram`.

    Example:
        >>> found = gs.residual(project, train, pairs=16)
        >>> found.exact.shape, bool(abs(found.residual).max() < 0.1)
        ((16,), True)
    """
    chosen = projected_kernel(kernel)
    if not chosen.exact:
        there = [name for name, other in PROJECTED.items() if other.exact]
        raise UsageError(
            "no exact kernel is its like", where="--kernel", expected=f"one of {', '.join(there)}", got=repr(kernel)
        )
    other = a if b is None else b
    require_comparable(a, other)
    require_served(chosen, a)
    rows_a, rows_b = _sample(a.present_at, None if b is None else b.present_at, pairs, seed)
    for part, places in _places((a, rows_a), (other, rows_b)):
        _require_same_project(project, part, places)
    (rows_a, splits_a), (rows_b, splits_b) = _by_part(a, rows_a), _by_part(other, rows_b)
    exact_values = partial(exact_gram, project, kernel=chosen.exact, memory=memory, device=device)
    exact = np.block(
        [[exact_values(x, y, rows_a=rows_x, rows_b=rows_y) for y, rows_y in splits_b] for x, rows_x in splits_a]
    )
    budget = parse_bytes(memory)
    projected, errors = _projected(FeatureMap.of(chosen, present_rows(a), budget), a, other, rows_a, rows_b, budget)
    grid_a, grid_b = np.meshgrid(rows_a, rows_b, indexing="ij")
    flat = (grid_a.ravel(), grid_b.ravel(), exact.ravel(), projected.ravel(), errors.ravel())
    return Residuals(kernel, *flat, a=a, b=other)


def _sample(a: np.ndarray, b: np.ndarray | None, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Some of the rows a, and of the rows b, or else other rows of a."""
    rng = np.random.default_rng(seed)
    side = max(1, math.ceil(math.sqrt(pairs)))
    if b is not None:
        return rng.choice(a, min(side, len(a)), replace=False), rng.choice(b, min(side, len(b)), replace=False)
    if len(a) < 2:
        raise UsageError("a pair takes two rows", expected="a store of at least 2 rows", got=len(a))
    both = rng.choice(a, min(2 * side, len(a) // 2 * 2), replace=False)
    return both[: len(both) // 2], both[len(both) // 2 :]


def _by_part(store: Rows, rows: np.ndarray) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]]:
    """Rows int64 [r], those of one part together, and each part's split with its rows of that split."""
    found: dict[Rows, list[tuple[int, int]]] = {}
    for row in rows.tolist():
        part, own = store.part(row)
        found.setdefault(part, []).append((row, int(part.rows[own])))
    ordered = np.array([row for pairs in found.values() for row, _ in pairs])
    return ordered, [(part.split, np.array([own for _, own in pairs])) for part, pairs in found.items()]


def _places(*chosen: tuple[Rows, np.ndarray]) -> list[tuple[Rows, np.ndarray]]:
    """The parts that some rows of several stores are from, each with the rows' places there."""
    found: dict[Rows, list[int]] = {}
    for store, rows in chosen:
        for part, own in (store.part(int(row)) for row in rows):
            found.setdefault(part, []).append(own)
    return [(part, np.unique(places)) for part, places in found.items()]


def _projected(
    phi_of: FeatureMap, a: Rows, b: Rows, rows_a: np.ndarray, rows_b: np.ndarray, memory: int
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel values and their standard errors, [n, m]; holds the features of one row of rows_a and some of rows_b."""
    values, errors = np.empty((len(rows_a), len(rows_b))), np.empty((len(rows_a), len(rows_b)))
    step = int(np.clip(memory // (_PAIR * b.shape[1] * b.shape[2]), 1, _TOGETHER))
    for span in (slice(at, at + step) for at in range(0, len(rows_b), step)):
        right = torch.from_numpy(b.features[rows_b[span]])
        maps = [phi_of.rows(b.read(int(row), int(row) + 1), b.where) for row in rows_b[span]]
        phi, norms = torch.cat([phi for phi, _ in maps]).double(), torch.cat([norm for _, norm in maps])
        for i, row in enumerate(rows_a.tolist()):
            own, norm = phi_of.rows(a.read(row, row + 1), a.where)
            values[i, span] = (own.double() @ phi.T / (norm[:, None] * norms))[0].numpy()
            left = torch.from_numpy(a.features[row]).expand_as(right)
            errors[i, span] = errors_of(left, right, phi_of.kernel, a.identity).numpy()
    return values, errors


def _require_same_project(project: Project, store: Rows, places: np.ndarray) -> None:
    """Refuse a store of other weights, parameters or classes than the project has now, or of other inputs there."""
    examples = project.examples(store.split)
    theirs = without_data(store.identity)
    ours = identity_of_model(project, Settings.of(store.identity, where=store.where))
    if store.input_digests is None:
        theirs["inputs"] = store.identity["data"]["sampled rows"]
        ours["inputs"] = sampled_identity(examples, n=store.identity["data"]["length"])["sampled rows"]
    else:
        theirs["inputs"] = sha256(store.input_digests[places].tobytes()).hexdigest()
        digests = [input_digests(examples.read([int(row)])[0]) for row in store.rows[places]]
        ours["inputs"] = sha256(b"".join(digest.tobytes() for digest in digests)).hexdigest()
    require_same(theirs, ours, where=store.where, theirs="the store", ours="the project", data=False)
