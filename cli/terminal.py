"""What commands print when they are done."""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

MAX_WIDTH = 100  # longer lines are hard to read
UNFOLDED = 10_000  # columns: rows of a table in a pipe stay on one line, for grep and cut
GAP = 2  # columns
MIN_LAST = 24  # columns that the last column of a table needs to be read; else rows are set one below the other


class _PipedConsole(Console):
    """A console that leaves a reader that went away to `failures_reported`."""

    def on_broken_pipe(self) -> None:
        """Raise the error again that is being handled."""
        raise


def takes_escapes() -> bool:
    """Tell whether a terminal may be sent escape codes.

    Returns:
        False for NO_COLOR (taken strictly: no bold or cursor codes either) and for dumb terminals.
    """
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def result_console(*, unfolded: bool = False) -> Console:
    """Make the console for results, on stdout; text is printed as it is.

    Args:
        unfolded: Whether rows in a pipe or file stay on one line, however long.

    Returns:
        The console.
    """
    is_piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    width, height = (UNFOLDED, None) if unfolded and is_piped else shutil.get_terminal_size()
    return _PipedConsole(
        color_system="auto" if takes_escapes() else None,
        width=width,
        height=height,
        highlight=False,
        markup=False,
        emoji=False,
        safe_box=True,
    )


def print_rows(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose last column folds; where there is no room for columns, each row is its name and, indented, the rest.

    Args:
        console: From `result_console`.
        head: Titles of the columns.
        rows: Cells; the first is a name.
    """
    shown = [[printable(cell) for cell in row] for row in rows]
    fixed = sum(max(cell_len(row[k]) for row in (head, *shown)) + GAP for k in range(len(head) - 1))
    if fixed + MIN_LAST <= console.width:
        table = Table(*head, box=None, pad_edge=False, padding=(0, GAP, 0, 0))
        for column in table.columns[:-1]:
            column.no_wrap = True
        for row in shown:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        return
    for name, *rest in shown:
        console.print(Text("\n".join(fold_name(name, console.width)), style="bold"), soft_wrap=True)
        for line in textwrap.wrap(", ".join(cell for cell in rest if cell), console.width, initial_indent="  ", subsequent_indent="  "):
            console.print(Text(line), soft_wrap=True)


def fold_name(name: str, width: int) -> list[str]:
    """Fold a parameter's name, after a dot or underscore where it can.

    Args:
        name: For example "encoder.layers.0.weight".
        width: Columns.

    Returns:
        Lines; all but the first are indented.
    """
    lines = [""]
    for part in re.findall(r"[^._/]*[._/]?", name):
        if lines[-1].strip() and len(lines[-1]) + len(part) > width:
            lines.append("  ")
        lines[-1] += part
    return lines


def printable(text: str) -> str:
    """Replace control characters, which a file's keys could send to the terminal.

    Args:
        text: Anything.

    Returns:
        The text without them.
    """
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def show(analysis: object, folder: Path, *, has_report: bool, again: str = "") -> None:
    """Print the summary, and where the files are.

    Args:
        analysis: The result.
        folder: Where it was saved.
        has_report: Whether a report was written.
        again: The command that gives the same once more.
    """
    from ntkscope.view.text import print_summary

    console = result_console()
    print_summary(analysis, console)
    if has_report:
        console.print(f"Report: {folder / 'report.html'}", soft_wrap=True)
    console.print(f"Numbers: {folder / 'summary.json'}, {folder / 'results.safetensors'}", soft_wrap=True)
    if again:
        console.print(f"The same again: {again}", soft_wrap=True)
