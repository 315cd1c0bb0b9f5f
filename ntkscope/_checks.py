"""Errors a user can mend, and one function per rule on input.

Whatever derives from `UserError` is the input's fault: the command line prints it without a traceback and exits with 2.
Any other exception is a bug of ours.
"""

import difflib
import math
from collections.abc import Collection, Iterable

import torch
from torch import Tensor


class UserError(Exception):
    """What was asked for cannot be done with this input; the message says why and what to do next."""


class InputError(UserError, ValueError):
    """A value is wrong."""


class InputTypeError(UserError, TypeError):
    """A value has the wrong type."""


class UnsupportedError(UserError, NotImplementedError):
    """The case is well formed but not supported."""


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Check that `value` is one of `choices`.

    Args:
        name: Argument name for the message.
        value: What the user gave.
        choices: What is accepted.

    Raises:
        InputError: If it is not.
    """
    if value not in choices:
        raise InputError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.{closest(str(value), choices)}")


def closest(word: str, known: Iterable[str]) -> str:
    """Ask whether something else was meant.

    Args:
        word: What the user gave.
        known: What there is.

    Returns:
        A question that begins with a space; empty where nothing is near.
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_finite(name: str, tensor: Tensor, advice: str) -> None:
    """Check that `tensor` holds neither NaN nor infinity.

    Args:
        name: What the tensor is, for the message.
        tensor: Any floating-point tensor.
        advice: The next step for the user.

    Raises:
        InputError: If an entry is not finite.
    """
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(f"{name} must be finite, got {bad} NaN or infinite of {tensor.numel()} entries. {advice}")


def check_number(
    name: str, value: float | int, *, low: float | int = -math.inf, high: float | int = math.inf, open_high: bool = False
) -> None:
    """Check that `value` is a finite number in `[low, high]`, or `[low, high)` with `open_high`.

    Args:
        name: Argument name for the message.
        value: What the user gave.
        low: Smallest accepted value.
        high: Largest accepted value.
        open_high: Whether `high` itself is refused.

    Raises:
        InputError: If it is outside, or not finite.
    """
    inside = math.isfinite(value) and low <= value and (value < high if open_high else value <= high)
    if not inside:
        raise InputError(f"`{name}` must lie in [{low:g}, {high:g}{')' if open_high else ']'}, got {value}.")


def check_device(device: torch.device | str | None) -> None:
    """Check that a device can be used here.

    Args:
        device: What the user gave; None is fine.

    Raises:
        InputError: If it is unknown, or not on this machine.
    """
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"Device {str(device)!r} cannot be used here: {reason}. Use 'cpu'.") from error


def check_memory(value: object, default: int) -> int:
    """Check a bound on memory.

    Args:
        value: What the user gave as `max_memory`; None for the default.
        default: Bytes.

    Returns:
        Bytes.

    Raises:
        InputError: If it is not positive and finite.
        InputTypeError: If it is no number.
    """
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputTypeError(f"`max_memory` must be a number of bytes, got {value!r}. For 4 GiB give 4 * 2**30.")
    check_number("max_memory", value, low=1)
    return int(value)


def format_bytes(num_bytes: float | int) -> str:
    """Write bytes with a unit.

    Args:
        num_bytes: Bytes.

    Returns:
        Three digits and B, KiB, MiB or GiB.
    """
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} GiB"
