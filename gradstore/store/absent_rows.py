"""What is stored of an absent row: nothing that was computed of it, in a form that nobody can take for something.

Features are zeros times a scale that is NaN, norms are NaN: whatever forgets to ask whether a row is there gets NaN or
is refused, never a number. Of a row that was removed, or could not
be read, nothing at all is known.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gradstore.store.schema import REMOVED, UNREADABLE

_NAN = ("scale", "sq_norm", "norm")


def blanked(columns: Mapping[str, np.ndarray], reasons: np.ndarray) -> dict[str, np.ndarray]:
    """Datasets of some rows as they are stored where some are absent.

    Args:
        columns: the datasets; not changed. Logits of an absent row stay where they are finite.
        reasons: uint8 [n], 0 for a row that is there, else why it is not.

    Returns:
        The same with `absent`; copies where anything differs.
    """
    gone, unknown = np.flatnonzero(reasons), np.flatnonzero(np.isin(reasons, (REMOVED, UNREADABLE)))
    if not len(gone):
        return {**columns, "absent": reasons}
    out = {name: array.copy() for name, array in columns.items()}
    out["absent"] = reasons.astype(np.uint8)
    out["features"][gone] = 0
    for name in _NAN:
        out[name][gone] = np.nan
    finite = np.isfinite(out["logits"][gone]).all(axis=1)
    out["logits"][gone[~finite]] = np.nan
    out["logits"][unknown] = np.nan
    out["label"][unknown] = -1
    for name in ("input_digest", "preview"):
        if name in out:
            out[name][unknown] = 0
    return out
