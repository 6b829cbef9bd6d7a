"""The progress bar of featurize: rows, rows a second, time left, gigabytes."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from gradstore.featurize import Progress as State


class FeaturizeBar:
    """A bar on stderr where that is a terminal; otherwise a line every ten percent.

    Attributes:
        used: whether there was anything to compute.
    """

    def __init__(self, title: str) -> None:
        self._console = Console(stderr=True)
        self._title = title
        self._tenth = -1
        self.used = False
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rows]}"),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[bytes]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=None, rows="", rate="", bytes="")

    def __enter__(self) -> FeaturizeBar:
        """Draw from the first state on, below what is said of the plan."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing, leaving the last state on the screen."""
        self._bar.stop()

    def __call__(self, state: State) -> None:
        """Show a state of the run."""
        self.used = True
        self._bar.start()
        rate = f"{state.computed / state.seconds:.1f} rows/s" if state.computed and state.seconds else ""
        rows = f"{state.rows}/{state.total} rows"
        size = f"{state.rows / state.total * state.size / 1e9:.2f}/{state.size / 1e9:.2f} GB"
        self._bar.update(self._task, completed=state.rows, total=state.total, rows=rows, rate=rate, bytes=size)
        tenth = 10 * state.rows // state.total
        if not self._console.is_terminal and tenth > self._tenth:
            self._tenth = tenth
            self._console.print(f"{self._title}: {rows}  {rate}  {size}", soft_wrap=True, highlight=False)


class CountBar:
    """A bar for work that is counted in one unit; on stderr where that is a terminal, otherwise nothing.

    Args:
        title: of the bar.
        unit: what is counted.
    """

    def __init__(self, title: str, unit: str) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} % of {task.total:,.0f} " + unit),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=1)

    def __enter__(self) -> CountBar:
        """Start drawing."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing, leaving the last state on the screen."""
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show how much is done."""
        self._bar.update(self._task, completed=done, total=total)
