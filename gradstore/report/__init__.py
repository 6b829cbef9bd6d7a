"""Results as one self-contained HTML page; rendering only."""

from gradstore.report.page import write_demo, write_forensics, write_residual, write_topk
from gradstore.report.views import (
    Confusion,
    Culprit,
    DemoPage,
    Example,
    Explanation,
    Fact,
    ForensicsPage,
    Interval,
    Neighbour,
    ResidualPage,
    TopKPage,
    Verdict,
    VoteCount,
)

__all__ = [
    "Confusion",
    "Culprit",
    "DemoPage",
    "Example",
    "Explanation",
    "Fact",
    "ForensicsPage",
    "Interval",
    "Neighbour",
    "ResidualPage",
    "TopKPage",
    "Verdict",
    "VoteCount",
    "write_demo",
    "write_forensics",
    "write_residual",
    "write_topk",
]
