"""The other end of `killed_writer.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

PATIENCE = 10.0  # seconds for the jobs to end


class Forks:
    """Forks jobs from a process that has imported everything already; `warm` names more to import."""

    def __init__(self, *warm: str, **environment: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("killed_writer.py")), *warm]
        pipe, env = subprocess.PIPE, {**os.environ, **environment}
        self._server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env, start_new_session=True)
        assert self._answer()["ready"]

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self, *orders: dict[str, Any]) -> list[int]:
        """Pids of the new processes, one an order."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(orders) + "\n")
        self._server.stdin.flush()
        return self._answer()["pids"]

    def statuses(self) -> list[int]:
        """Exit statuses of the processes started last, once all are gone; negative for signals."""
        return self._answer()["statuses"]

    def close(self) -> None:
        """End the server; jobs that go on, as those of a test that failed meanwhile, are killed with it."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        try:
            self._server.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
        self._server.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        return json.loads(self._server.stdout.readline())
