"""What can be said of optimizers in a checkpoint without computing with their tensors, which may be large."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ntkscope._checks import InputError, UnsupportedError
from ntkscope.record.matching import match_parameters
from ntkscope.record.optimizer_kinds import recognize, shape_of
from ntkscope.record.optimizer_state import entries_of, find_optimizers, stored_number

OPTIONS = ("lr", "momentum", "betas", "weight_decay", "gate", "alpha")


def describe_optimizers(content: Any, parameters: Mapping[str, Tensor], source: str | Path) -> list[str]:
    """Describe every optimizer's state: its kind and options, and to which parameters its entries belong.

    Args:
        content: From `load_checkpoint`.
        parameters: Of the model, or `Unwrapped.parameters()`.
        source: The file, for messages.

    Returns:
        Sentences; what does not match or is not read is said with the reason.
    """
    return [
        _describe(key, state, parameters, f"{source}, the optimizer under `{key or '(top)'}`") for key, state in find_optimizers(content)
    ]


def _describe(key: str, state: dict[str, Any], parameters: Mapping[str, Tensor], place: str) -> str:
    """Describe one optimizer."""
    groups, entries = state["param_groups"], entries_of(state)
    settings = ", ".join(f"{name}={_short(groups[0][name])}" for name in OPTIONS if name in groups[0])
    start = f"Optimizer under `{key or '(top)'}`: {len(groups)} group{'s' if len(groups) > 1 else ''}, {settings or 'no options'}"
    steps = [step for entry in entries if (step := stored_number(entry.get("step"))) is not None]
    if steps:
        start += f", step {int(max(steps)):,}"
    try:
        kind = recognize(groups[0], entries, place)
        match = match_parameters(groups, [shape_of(entry, place) for entry in entries], parameters, place)
    except (InputError, UnsupportedError) as error:
        return f"{start}. Its M is not read: {error}"
    frozen = f"; not in it: {len(match.left_out)} of the model's" if match.left_out else ""
    return f"{start}. Read as {kind}, its {len(entries)} matched to parameters {match.how}{frozen}."


def _short(value: Any) -> str:
    """Write an option."""
    number = stored_number(value)
    return f"{number:g}" if number is not None else str(value)[:40]
