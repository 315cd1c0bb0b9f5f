"""Any value of a result in a few words, and any result in one line: what terminals, debuggers and logs show."""

import contextlib
import dataclasses
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ntkscope._checks import UserError, format_bytes
from ntkscope.view.meanings import meanings_of
from ntkscope.view.words import SPACE, number, percent

MAX_TEXT = 200  # characters of a value in a table
MAX_WORD = 60  # characters of a value in a line
MAX_LINE = 240  # characters of a line
MAX_ITEMS = 8  # of a list that are written out
# What a line begins with, where the first fields are not what matters most; dots go into parts.
LEADING = {
    "Analysis": (
        "run.source", "run.num_examples", "window.start_step", "window.stop_step", "channels.signal_rank", "channels.num_modes",
        "closure.trustworthy",
    ),
    "Examples": ("ids", "labels", "is_noise", "abstains"),
    "Closure": ("trustworthy", "energy_error", "gradient_error", "query_error"),
    "Density": ("verdict", "num_snapshots", "needed", "gradient_spacing", "gradient_rest"),
    "GateAudit": ("verdict.kind", "kind", "alpha", "is_counterfactual", "steps"),
    "Transfer": ("fit.correlation", "fit.relative_error", "predictor_rank"),
    "Spectrum": ("eigvals", "effective_rank", "stable_rank"),
    "Dissipation": ("elapsed", "energy", "sharpness", "gramian"),
    "NTKOperator": ("shape", "outputs", "num_examples", "num_classes", "jvp_route"),
    "Recorder": ("num_snapshots", "num_steps", "is_attached", "outputs", "has_audit"),
    "Trace": ("source", "steps", "facts.num_examples", "facts.num_classes", "facts.loss", "facts.optimizer"),
    "History": ("steps", "loss", "gradient_error", "eigvals"),
}  # fmt: skip
SHARES = {
    "energy_error", "gradient_error", "gradient_error_initial", "query_error", "relative_error", "forcing_share", "open_share",
    "decay_share", "removed_share", "reservoir_share", "reservoir_motion", "reservoir_train_share", "reservoir_query_share",
    "share_kept", "product_share", "differing", "open_streaming", "open_exact", "unexplained",
    "energy_spacing", "energy_rest", "gradient_spacing", "gradient_rest", "largest_kernel_step",
}  # fmt: skip


def shown_fields(result: Any) -> dict[str, Any]:
    """List what is shown of a result: the fields of a dataclass, else the attributes that its docstring names.

    Args:
        result: Any result; one that is not finished (an error in its making) shows what it has.

    Returns:
        Values by name.
    """
    is_data = dataclasses.is_dataclass(result)
    names = [field.name for field in dataclasses.fields(result) if field.repr] if is_data else meanings_of(type(result))
    found = {}
    for name in names:
        with contextlib.suppress(AttributeError, UserError):  # what is not there yet, such as a record before the first step
            found[name] = getattr(result, name)
    return found


def line_of(result: Any) -> str:
    """Describe a result in one line.

    Args:
        result: Any result.

    Returns:
        For example "Closure(trustworthy=True, energy_error=0.1 %, ...)".
    """
    kind = type(result)
    fields = shown_fields(result)
    named = _leading(result) or fields
    parts: list[str] = []
    for name, value in named.items():
        part = f"{name}={_word(value, name)}"
        if parts and len(", ".join([*parts, part])) > MAX_LINE:
            break
        parts.append(part)
    return f"{kind.__name__}({', '.join([*parts, *(['...'] if len(parts) < len(fields) else [])])})"


def _leading(result: Any) -> dict[str, Any]:
    """Take what a line begins with, as far as it is there."""
    named = {}
    for path in LEADING.get(type(result).__name__, ()):
        with contextlib.suppress(AttributeError, UserError):
            named[path.rpartition(".")[2]] = attrgetter(path)(result)
    return named


def words_of(value: Any, name: str = "") -> str:
    """Describe a value in a few words, for a table.

    Args:
        value: Anything.
        name: Of the field: shares are percentages, and bytes have a unit.

    Returns:
        At most 200 characters.
    """
    if isinstance(value, Tensor):
        return tensor_words(value)
    if isinstance(value, str):
        return cut(value, MAX_TEXT)
    if isinstance(value, Mapping):
        if value and all(isinstance(each, bool | int | float | str) for each in value.values()) and len(value) <= MAX_ITEMS:
            return cut(", ".join(f"{key}: {words_of(each, name)}" for key, each in value.items()), MAX_TEXT)
        return cut(f"{len(value):,} entries" + (f": {', '.join(map(str, value))}" if value else ""), MAX_TEXT)
    if isinstance(value, list | tuple):
        return _sequence_words(value, name)
    if dataclasses.is_dataclass(value):
        return cut(line_of(value), MAX_TEXT)
    return _scalar(value, name)


def tensor_words(tensor: Tensor) -> str:
    """Describe a tensor: precision, shape, range, and how many of its numbers are not finite.

    Args:
        tensor: Any.

    Returns:
        For example "float64, 120 × 120, from 0.00 to 3.21, 2 not finite".
    """
    kind = str(tensor.dtype).removeprefix("torch.")
    shape = " × ".join(f"{size:,}" for size in tensor.shape) or "scalar"
    words = f"{kind}, {shape}"
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_complex():
        return words  # a range would need the values, or has no meaning
    if not tensor.numel():
        return f"{words}, empty"
    values = tensor.detach()
    if tensor.dtype == torch.bool:
        return f"{words}, {int(values.sum()):,} true"
    if not tensor.is_floating_point():
        return f"{words}, from {int(values.min()):,} to {int(values.max()):,}"
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        values = values[torch.isfinite(values)]
    span = f", from {number(float(values.min()))} to {number(float(values.max()))}" if values.numel() else ""
    return f"{words}{span}" + (f", {bad:,} not finite" if bad else "")


def cut(text: str, length: int) -> str:
    """Cut a long text.

    Args:
        text: Any.
        length: At most so many characters.

    Returns:
        The text, or its beginning and "...".
    """
    return text if len(text) <= length else text[: length - 3] + "..."


def _word(value: Any, name: str) -> str:
    """Describe a value inside a line."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, str):
        return repr(cut(value, MAX_WORD))
    if isinstance(value, Mapping):
        return f"{{{len(value)} entries}}"
    if isinstance(value, list | tuple) and not _is_short(value):
        span = f", {min(value)} to {max(value)}" if all(isinstance(each, int) for each in value) else ""
        return f"[{len(value)} items{span}]"
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}(...)"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_word(each, name) for each in value)}]"
    if isinstance(value, float) and name not in SHARES:
        return f"{value:.4g}"
    # No separators of thousands: commas separate fields.
    return _scalar(value, name).replace(SPACE, " ").replace(",", "")


def _is_short(value: list[Any] | tuple[Any, ...]) -> bool:
    """Say whether a sequence is written out: few plain numbers or names."""
    return len(value) <= MAX_ITEMS and all(isinstance(each, bool | int | float) for each in value)


def _sequence_words(value: list[Any] | tuple[Any, ...], name: str) -> str:
    """Describe a list in a table."""
    if not value:
        return "none"
    is_numeric = all(isinstance(each, int | float) and not isinstance(each, bool) for each in value)
    if is_numeric and len(value) > MAX_ITEMS:
        return f"{len(value):,} values, from {_scalar(min(value), name)} to {_scalar(max(value), name)}"
    if len(value) > MAX_ITEMS or any(dataclasses.is_dataclass(each) for each in value):
        return cut(f"{len(value):,} items: {words_of(value[0])}" + (", ..." if len(value) > 1 else ""), MAX_TEXT)
    return cut(", ".join(words_of(each, name) for each in value), MAX_TEXT)


def _scalar(value: Any, name: str) -> str:
    """Write a number, or whatever else it is."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int | float) and "bytes" in name:
        return format_bytes(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return percent(value) if name in SHARES else number(value, 4)
    return cut(str(value), MAX_TEXT)
