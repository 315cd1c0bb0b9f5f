"""What the library says beside its results, on stderr: notes that --quiet silences, and warnings that nothing does."""

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import typer


class _Notes(logging.Handler):
    """Prints every record on a line of its own, at any time above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record.

        Args:
            record: From the library.
        """
        typer.echo(f"note: {record.getMessage()}", err=True)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning without the line of code that gave it."""
    typer.echo(f"warning: {message}", err=True)


@contextmanager
def notes_shown(*, quiet: bool = False) -> Generator[None, None, None]:
    """Print what the library logs and warns of until the block ends.

    Args:
        quiet: Print warnings only.

    Yields:
        Nothing.
    """
    logger, notes = logging.getLogger("ntkscope"), _Notes(logging.WARNING if quiet else logging.INFO)
    level = logger.level
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            yield
        finally:
            logger.removeHandler(notes)
            logger.setLevel(level)
