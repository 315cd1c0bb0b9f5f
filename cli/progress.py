"""What a command is doing, on stderr: one bar with the time left; silent when stderr is no terminal."""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from .terminal import MAX_WIDTH, takes_escapes

LINE_EVERY = 5.0  # seconds between lines where a bar cannot be redrawn


class Stages:
    """The stages of a command, one shown at a time.

    Args:
        bar: Where they are shown.
        say: Prints a line where a bar cannot be redrawn; None where it can, or nothing is shown.
    """

    def __init__(self, bar: Progress, say: Callable[[str], None] | None) -> None:
        self._bar = bar
        self._say = say
        self._said = time.monotonic()
        self._task: TaskID | None = None
        self._label = ""

    def begin(self, label: str) -> None:
        """Go on to the next stage, of which it is not known how long it takes.

        Args:
            label: What is going on, in a few words.
        """
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._label, self._task = label, self._bar.add_task(label, total=None)
        if self._say is not None:
            self._say(f"{label} ...")
            self._said = time.monotonic()

    def update(self, done: int, total: int) -> None:
        """Say how far the stage is.

        Args:
            done: Parts that are done.
            total: Parts in all.
        """
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total)
        if self._say is not None and time.monotonic() - self._said >= LINE_EVERY:
            self._said = time.monotonic()
            task = next(task for task in self._bar.tasks if task.id == self._task)
            self._say(f"{self._label}: {done:,} of {total:,}, {_time_words(task)}")


class _TimeColumn(ProgressColumn):
    """The time left where the end is known, the time so far where it is not."""

    def render(self, task: Task) -> Text:
        """Render the time of a task.

        Args:
            task: The task.

        Returns:
            A few words.
        """
        return Text(_time_words(task), style="progress.remaining")


def _time_words(task: Task) -> str:
    """Say how long a task will take."""
    if task.total is None:
        return f"{_clock(task.elapsed or 0.0)} so far"
    return "" if task.time_remaining is None else f"{_clock(task.time_remaining)} left"


def _clock(seconds: float) -> str:
    """Write seconds as a clock would."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _CountColumn(MofNCompleteColumn):
    """How much is done, where it is known of how much."""

    def render(self, task: Task) -> Text:
        """Render the count of a task.

        Args:
            task: The task.

        Returns:
            For example "3/21".
        """
        return Text("") if task.total is None else super().render(task)


@contextmanager
def stages_shown(*, quiet: bool = False) -> Generator[Stages, None, None]:
    """Show what is going on until the block ends. What the user's own code prints meanwhile goes to stderr: stdout is the result's alone.

    Args:
        quiet: Show nothing.

    Yields:
        The stages.
    """
    is_shown = sys.stderr.isatty() and not quiet
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    console.width = min(console.width, MAX_WIDTH)
    columns = (
        SpinnerColumn("line"),  # turns while a part takes long; ASCII, as not every terminal has more
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        _CountColumn(),
        _TimeColumn(),
    )
    has_bar = is_shown and takes_escapes()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with (
        redirect_stdout(sys.stderr),
        Progress(*columns, console=console, transient=True, expand=True, disable=not has_bar) as bar,
    ):
        yield Stages(bar, say if is_shown and not has_bar else None)
