"""Progress bars: what is done, how fast, and the time that is left."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from gradstore.machine.byte_counts import format_bytes

from .output import is_drawable, on_one_line, say
from .stopping import stop_if_asked

if TYPE_CHECKING:
    from gradstore.featurization.featurize import Progress as State

_LONGEST = 40  # columns of a bar
_SHORTEST = 5
_TITLE = 20  # columns of a title
_CTRL_C = 3  # columns left free at the right, where a terminal shows ^C: a line that is full would move on by it


class CountBar:
    """A bar for work counted in one unit; on stderr where that is a terminal, otherwise a line every ten percent.

    It is drawn from the first count on: what is said before stands above it, and an error has no bar of nothing.

    Args:
        title: of the bar.
        unit: what is counted.

    Attributes:
        used: whether anything was counted.
    """

    def __init__(self, title: str, unit: str) -> None:
        self._title, self._unit = on_one_line(title), unit
        self._tenth = -1
        self._began = (0.0, 0)  # when counting began, and what had been done by then
        self.used = False
        self._console = _Console(stderr=True, force_terminal=is_drawable())
        self._column = BarColumn()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            self._column,
            TextColumn("{task.fields[text]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, text="")

    def __enter__(self) -> CountBar:
        """Nothing is drawn yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing, leaving the last state on the screen."""
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show how much is done."""
        self._show(done, total, [])

    def once(self, done: int, total: int) -> None:
        """Show how much is done, and stop drawing when all is, for another bar to come."""
        self(done, total)
        if done == total:
            self._bar.stop()

    def _show(self, done: int, total: int, more: list[str]) -> None:
        stop_if_asked()
        now = time.monotonic()
        if not self.used:
            self.used, self._began = True, (now, done)
        counted = [f"{done:,}/{total:,} {self._unit}"]
        if self._console.is_terminal:
            self._draw(
                done, total, [*counted, *_time(now - self._began[0], done - self._began[1], total - done), *more]
            )
        elif 10 * done // max(total, 1) > self._tenth:
            self._tenth = 10 * done // max(total, 1)
            say(f"{self._title}: {'  '.join([*counted, *more])}")

    def _draw(self, done: int, total: int, details: list[str]) -> None:
        """Draw the details that fit beside a short bar, the first ones first."""
        room = self._console.width - _CTRL_C
        title = self._title if cell_len(self._title) <= _TITLE else set_cell_size(self._title, _TITLE - 1) + "…"
        text, *others = details
        for detail in others:
            longer = f"{text}  {detail}"
            if cell_len(f"{title} {longer} ") + _SHORTEST <= room:
                text = longer
        self._column.bar_width = max(min(_LONGEST, room - cell_len(f"{title}  {text}")), 1)
        self._bar.update(self._task, description=title, completed=done, total=total, text=text)
        self._bar.start()


class FeaturizeBar(CountBar):
    """The bar of featurize: rows, time left, rows a second, bytes."""

    def __init__(self, title: str) -> None:
        super().__init__(title, "rows")

    def __enter__(self) -> FeaturizeBar:
        """Nothing is drawn yet."""
        return self

    def show(self, state: State) -> None:
        """Show a state of the run."""
        rate = [f"{state.computed / state.seconds:.1f} rows/s"] if state.computed and state.seconds else []
        size = format_bytes(state.size)
        if state.rows < state.total:
            size = f"{format_bytes(state.rows / state.total * state.size)} of {size}"
        self._show(state.rows, state.total, [*rate, size])


class _Console(Console):
    """A console whose cursor stays visible: after Ctrl-Z or a kill nobody would show it again."""

    def show_cursor(self, show: bool = True) -> bool:
        """Leave it as it is."""
        return False


def _time(seconds: float, done: int, left: int) -> list[str]:
    """Time left by the pace so far, or what it took; nothing before there is a pace."""
    if left == 0:
        return [f"in {timedelta(seconds=round(seconds))}"]
    return [f"{timedelta(seconds=round(seconds / done * left))} left"] if done > 0 else []
