"""A plugin of pytest that prints a failure as soon as it is known: a run that ends early has then said it."""

from __future__ import annotations

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print what failed, in the process that collects the reports."""
    if report.failed:
        print(f"\nFAILED {report.nodeid} ({report.duration:.0f} s)\n{report.longreprtext[-3000:]}", flush=True)
