"""Options that need reading."""

import re

import typer

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


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
        raise typer.BadParameter(f"{text!r} is no window. Give two optimizer steps, for example --window 0:200.")
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
        raise typer.BadParameter(f"{text!r} is no size. Give bytes or a unit, for example --max-memory 4G.")
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
        raise typer.BadParameter(f"{text!r} is no list of times. Give numbers, for example --times 0,0.5,2.") from error


def parse_alpha(text: str | None) -> float | str | None:
    """Read a gate's α: a number, or a name.

    Args:
        text: What the user typed.

    Returns:
        The number, or the name as it is.
    """
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text


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
        raise typer.BadParameter("the loss kernel needs a loss, which this command does not take. Price class=0, which costs as much.")
    return text
