"""Pixels inside a page: PNG as a data URI, so that the file needs nothing beside it."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from gradstore.report.views import Picture

SMALL = 64
"""Pictures up to this many pixels a side are enlarged with visible pixels instead of blurred."""

LARGEST = 256
"""Larger pictures are reduced to this many pixels a side: a page shows them at about half of that."""


def is_picture(shown: object) -> bool:
    """Whether this is pixels that `data_uri` can encode."""
    return (
        isinstance(shown, np.ndarray)
        and shown.dtype == np.uint8
        and shown.size > 0
        and (shown.ndim == 2 or (shown.ndim == 3 and shown.shape[2] == 3))
    )


def is_small(shown: Picture) -> bool:
    """Whether a browser should enlarge it without smoothing."""
    return max(shown.shape[:2]) <= SMALL


def data_uri(shown: Picture) -> str:
    """PNG of uint8 pixels [H, W] or [H, W, 3] as `data:image/png;base64,...`."""
    picture = Image.fromarray(np.ascontiguousarray(shown))
    picture.thumbnail((LARGEST, LARGEST))
    png = io.BytesIO()
    picture.save(png, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode("ascii")
