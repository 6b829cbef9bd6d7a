"""Exact kernels take examples some at a time, so these must not look at one another: every row's logits, twice."""

from __future__ import annotations

import torch

from gradstore.featurization.plan import to_device
from gradstore.featurization.second_look import SecondLook
from gradstore.jacobians.row_owners import rounding_of
from gradstore.jacobians.subject import take
from gradstore.kernels.exact.example_selection import Selection
from gradstore.machine.devices import without_fused_encoders
from gradstore.model.project import Project

_TOGETHER = 16  # rows of a batch; every second of them is computed without the others


def require_independent_rows(project: Project, selection: Selection, device: torch.device) -> None:
    """Compare the logits of every row in a batch with those in half of it, and of one row a batch with those alone.

    Holds a batch of 16 examples and what a forward pass takes for it.

    Args:
        project: its model is on the device.
        selection: the rows.
        device: where the model is.

    Raises:
        ProjectError: a row depends on others; names it.
        NonFiniteError: logits are not finite; names the row.
    """
    for start in range(0, len(selection), _TOGETHER):
        span = range(start, min(start + _TOGETHER, len(selection)))
        inputs = to_device(selection.read(span), device)
        with without_fused_encoders():
            logits = project.logits(inputs)
            rows = [int(row) for row in selection.rows[span.start : span.stop]]
            look = SecondLook(logits.float(), rows, rounding_of(project.model, logits))
            for first in range(min(2, len(span))):
                places = slice(first, len(span), 2)
                look.add(list(range(len(span)))[places], project.logits(take(inputs, places)).float(), "beside others")
            one = start // _TOGETHER % len(span)
            look.add([one], project.logits(take(inputs, slice(one, one + 1))).float(), "alone")
        look.require_finite(selection.split)
        look.require(selection.split)
