"""The random projection: one definition of P, and the paths that multiply by it."""

from __future__ import annotations

from gradstore.projection.projection import Projection

__all__ = ["Projection"]
