"""Options that need reading: what they accept, what a shell completes them to, and what is said where they are wrong."""

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import typer

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# The library has the same lists (a test compares them), but completing a word must not wait for torch.
LOSSES = ("squared", "mse", "cross_entropy")
OPTIMIZERS = ("sgd", "adamw", "gated")
GATES = ("soft", "hard", "snr")
TASKS = ("sequence-classification", "image-classification", "regression")
# Offered by shell completion; more is accepted.
CUTOFFS = ("half", "fixed:0.9", "rank:10", "energy:0.95", "gap", "rank", "mp", "gd", "risk")
DEVICES = ("auto", "cpu", "cuda", "mps")
KINDS = ("full", "trace", "sum", "class=0")
ALPHAS = ("unbiased", "1")


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """Make the reader of an option with a few values.

    Args:
        choices: The values.

    Returns:
        A function that returns its argument, or says what is accepted.
    """

    def read(text: str) -> str:
        if text in choices:
            return text
        close = difflib.get_close_matches(text, choices, n=1, cutoff=0.7)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise typer.BadParameter(f"{text!r} is none of {', '.join(choices)}.{hint}")

    return read


def completed(choices: Sequence[str]) -> Callable[[], list[str]]:
    """Make the completion of an option.

    Args:
        choices: What to offer.

    Returns:
        What typer's `autocompletion` takes; typer leaves out what does not begin as the word does.
    """
    return lambda: list(choices)


def check_folder(folder: Path) -> Path:
    """Check before any work that a folder can be written to; the callback of --out.

    Args:
        folder: What the user typed.

    Returns:
        The same.

    Raises:
        typer.BadParameter: If it is no folder, or could not be made.
    """
    try:
        place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    except OSError as error:
        raise typer.BadParameter(f"{folder} cannot be a folder: {error.strerror}. Give another name.") from error
    if not place.is_dir():
        raise typer.BadParameter(f"{place} is a file, and a folder is written. Give another name.")
    if not _is_writable(place):
        raise typer.BadParameter(f"{place} cannot be written to. Give another place, or change its permissions.")
    return folder


def parse_window(text: str | None) -> tuple[int, int] | None:
    """Read `A:B`, two optimizer steps.

    Args:
        text: What the user typed.

    Returns:
        Start and stop.

    Raises:
        typer.BadParameter: If it is something else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no window. Give two optimizer steps, for example 0:200.", param_hint="'--window'")
    return int(match[1]), int(match[2])


def parse_size(text: str | None) -> int | None:
    """Read a size in bytes, or with a unit: 500M, 4G, 4GiB.

    Args:
        text: What the user typed.

    Returns:
        Bytes.

    Raises:
        typer.BadParameter: If it is something else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, flags=re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size. Give bytes or a unit, for example 4G.", param_hint="'--max-memory'")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse_times(text: str | None) -> list[float] | None:
    """Read a comma-separated list of times.

    Args:
        text: What the user typed.

    Returns:
        Times.

    Raises:
        typer.BadParameter: If it is something else.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no list of times. Give numbers, for example 0,0.5,2.", param_hint="'--times'") from error


def parse_alpha(text: str | None) -> float | str | None:
    """Read a gate's α: a number, or a name.

    Args:
        text: What the user typed.

    Returns:
        The number, or the name.

    Raises:
        typer.BadParameter: If it is neither.
    """
    if text is None or text in ("unbiased", "finite"):
        return text
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no multiple. Give a number, or unbiased.", param_hint="'--alpha'") from error


def parse_kind(text: str) -> str:
    """Read the kind of a kernel that can be priced.

    Args:
        text: What the user typed.

    Returns:
        The kind.

    Raises:
        typer.BadParameter: If it is the loss kernel.
    """
    if text == "loss":
        raise typer.BadParameter(
            "the loss kernel needs a loss, which this command does not take. Price class=0, which costs as much.",
            param_hint="'--outputs'",
        )
    return text


def _is_writable(folder: Path) -> bool:
    """Try to write: permissions alone do not tell on read-only and virtual file systems."""
    try:
        with TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
