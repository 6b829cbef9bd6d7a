"""Forks commands onto terminals from a process that has imported everything: seconds less for each.

Run with the number of a socket, on which `terminal.py` sends one order a line and is told the exit status. The process
has a terminal of its own from the start, so that Python sets up its streams as for a person.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from importlib import import_module
from typing import Any

import gradstore_cli.commands
import warm_featurize

assert warm_featurize
assert all(gradstore_cli.commands.gradstore.commands.values())  # each is imported when it is asked for
for module in ("demo", "explain.linearisation", "kernels.exact", "kernels.residual", "projection.diagnosis"):
    import_module(f"gradstore.{module}")


def serve(orders: socket.socket) -> None:
    lines = orders.makefile("rw")
    for line in lines:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        _, ended = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(ended), file=lines, flush=True)


def run(order: dict[str, Any]) -> None:
    """Become the command, in the foreground of its terminal; leaves without the second that Python takes to tidy up."""
    os.setsid()
    terminal = os.open(order["terminal"], os.O_RDWR)  # which becomes the controlling one
    for stream in (0, 1, 2):
        os.dup2(terminal, stream)
    os.close(terminal)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        if name in order["closed"]:
            os.close(stream)
            setattr(sys, name, None)  # as Python does where it starts without one
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv = ["gradstore", *order["words"]]
    try:
        gradstore_cli.main()
    except SystemExit as stop:
        sys.stdout.flush()
        os._exit(int(stop.code or 0))


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
