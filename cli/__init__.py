"""The command line: each command parses, makes one call of the library, and prints.

Nothing is imported here but on the way into `main`, which Ctrl-C may interrupt as it may anything else.
"""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status; an error is one line on stderr.

    Args:
        arguments: after the program's name; those of this process where None.
    """
    try:
        from .streams import prepare

        prepare()
        from .commands import run

        run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # before a command had begun, which says itself what it has kept
        if sys.stderr:
            print("\rstopped" if sys.stderr.isatty() else "stopped", file=sys.stderr)
        sys.exit(130)
