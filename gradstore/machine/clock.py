"""The time as it is written into logs and verdicts."""

from __future__ import annotations

from datetime import datetime, timezone


def now_utc() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
