"""A plugin of pytest: one of N shares of the tests, drawn by their names.

    python -m pytest -p share --share 0/3

The N shares have no test in common, and together they are all.
"""

from __future__ import annotations

import zlib

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take `--share`."""
    parser.addoption("--share", default="0/1", metavar="K/N", help="run the K-th of N shares of the tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the tests of other shares."""
    share, count = map(int, config.getoption("share").split("/"))
    others = [item for item in items if not in_share(item.nodeid, share, count)]
    items[:] = [item for item in items if in_share(item.nodeid, share, count)]
    config.hook.pytest_deselected(items=others)


def in_share(name: str, share: int, count: int) -> bool:
    """Whether a test of this name is in the share."""
    return zlib.crc32(name.encode()) % count == share
