"""What a scan asks of an arithmetic: bounds on similarities, and what they take of its memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from gradstore.arithmetic.names import Choice
from gradstore.errors import UsageError
from gradstore.kernels.feature_map import FeatureMap
from gradstore.search.query_batch import QueryGroup
from gradstore.store.rows import Rows

Found = list[tuple[QueryGroup, Tensor, Tensor]]
"""(queries, similarities float64 [g, B], their largest errors float64 [g, B]) for each group of queries."""
BLOCK_ROWS = 4096
"""The most rows of a block."""
# Scaled vectors have norms around 1, unless their terms cancel; nothing is said of products of smaller ones than this.
_TINY = 2.0**-40


@dataclass(frozen=True)
class Needs:
    """Bytes that an arithmetic takes of a scan.

    Attributes:
        query: for each query of a batch.
        preparing: for each query of a batch and worker.
        fixed: whatever the batch.
        blocks: (rows, bytes) of the blocks that a worker may use, the largest first; beside bytes a row and query.
    """

    query: int
    preparing: int
    fixed: int
    blocks: Sequence[tuple[int, int]]


class Bounds(ABC):
    """Bounds on the similarities of one batch of queries with rows of a training store; shared by all workers.

    Attributes:
        choice: the name of the engine.
        device: where products are computed.
    """

    choice: ClassVar[Choice]
    device: ClassVar[torch.device] = torch.device("cpu")

    @classmethod
    def refusal(cls, K: int) -> UsageError | None:
        """Why this machine cannot say bounds on features of so many columns; None where it can."""
        return None

    @classmethod
    @abstractmethod
    def bytes_for(cls, train: Rows, phis: Sequence[FeatureMap]) -> Needs:
        """What a scan takes.

        Args:
            train: the training store.
            phis: the distinct feature maps of the queries.
        """

    @staticmethod
    @abstractmethod
    def sample_product(queries: int, rows: int, width: int, dtype: torch.dtype) -> Callable[[], object]:
        """A product of the scan's shape, of rows as stored, to be timed."""

    @abstractmethod
    def __init__(self, train: Rows, groups: Sequence[QueryGroup], workers: int = 1) -> None:
        """Make queries ready.

        Args:
            train: the training store.
            groups: the queries.
            workers: threads that may share that.
        """

    @abstractmethod
    def block(self, rows: int) -> BlockBounds:
        """What one worker reuses for block after block of at most so many rows."""

    def refine(self) -> None:  # noqa: B027 - most have none
        """Too many rows stay in question: say closer bounds from the next block on, if there are any."""


class BlockBounds(ABC):
    """Bounds for one worker."""

    @abstractmethod
    def bounds(self, start: int, stop: int, thresholds: Tensor) -> Found:
        """Bounds on rows start:stop. The similarities of a row that is not finite are not finite either.

        Args:
            start: first row.
            stop: the row behind the last.
            thresholds: float64 [m], a similarity for each query of the batch; bounds on rows that are certainly less
                similar may be as wide as that leaves them.

        Raises:
            NonFiniteError: a row's norm is not finite, or zero under a cosine.
            CorruptError: a row does not match its digest.
        """


def bounds_within(
    group: QueryGroup, center: Tensor, norms: np.ndarray, exponent: np.ndarray, error: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Similarities and their largest errors, float64 [g, B]; infinite where nothing can be said.

    Args:
        group: the queries.
        center: float64 [g, B], inner products of scaled vectors; becomes the similarities.
        norms: float64 [B], of the rows' scaled vectors.
        exponent: int [B], of the rows.
        error: of the inner products, in units of ‖q‖ ‖t‖; one for all, or [g, B].

    Returns:
        (similarities, errors).
    """
    row_scale = torch.from_numpy(group.phi.unscaled(norms, exponent))
    query_scale = torch.from_numpy(group.scale)
    center.mul_(query_scale[:, None]).mul_(row_scale)
    sizes = torch.outer(query_scale * torch.from_numpy(group.norms), row_scale * torch.from_numpy(norms))
    spread = sizes.mul_(error)
    spread[torch.from_numpy(_vague(group.norms))] = torch.inf
    spread[:, torch.from_numpy(_vague(norms))] = torch.inf
    return center, spread


def most_rows(train: Rows, held: int, row: int) -> int:
    """Rows of the largest block that gains anything.

    Args:
        train: the training store.
        held: bytes from which a block gains nothing by more.
        row: bytes of a row of it.

    Returns:
        At least 1.
    """
    return int(np.clip(held // row, 1, min(BLOCK_ROWS, max(1, len(train)))))


def _vague(norms: np.ndarray) -> np.ndarray:
    """Which vectors are so small beside what they are a sum of that products of their entries may vanish."""
    return (norms > 0) & (norms < _TINY)
