"""Calls of odd models: which part of what they return is the output, and how a batch of named tensors is passed.

A forward function takes (model, batch) and returns one row per example; without one the model is called with the batch as its argument.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ntkscope._checks import InputError, InputTypeError, closest
from ntkscope._types import ForwardFn

# What the models of Hugging Face's transformers return for a task; their batches are passed by name.
TASKS = {
    "sequence-classification": "logits",
    "image-classification": "logits",
    "regression": "logits",
}


def make_forward(*, forward: ForwardFn | None = None, output: str | None = None, task: str | None = None) -> ForwardFn | None:
    """Compose the model's call from what the user said of it.

    Args:
        forward: The model's call, `forward(model, batch)`.
        output: Which part of the result is the output: a position in a tuple, a key of a dict, or an attribute; parts of parts with dots.
        task: A task of Hugging Face's transformers: the batch is passed by name, and `logits` are the output.

    Returns:
        The call; None where nothing was said.

    Raises:
        InputError: If the task is unknown, or said beside a call or an output.
    """
    if task is not None:
        if task not in TASKS:
            raise InputError(f"Unknown task {task!r}; there are {', '.join(TASKS)}.{closest(task, TASKS)}")
        if forward is not None or output is not None:
            raise InputError("A task already says how the model is called and what its output is. Give --task, or --forward and --output.")
        return Picked(call_by_name, TASKS[task])
    if output is None:
        return forward
    return Picked(call_with_batch if forward is None else forward, output)


class Picked:
    """A forward function that takes one part of what a call returns.

    Args:
        call: `call(model, batch)`, returns any nest of tuples, dicts and objects.
        part: As for `make_forward`.
    """

    def __init__(self, call: ForwardFn, part: str) -> None:
        self.call, self.part = call, part

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Run the model.

        Args:
            model: Any module.
            batch: Its inputs.

        Returns:
            The chosen part.

        Raises:
            InputTypeError: If that is no tensor.
        """
        found = self.call(model, batch)
        for name in self.part.split("."):
            found = _part(found, name)
        if not isinstance(found, Tensor):
            raise InputTypeError(f"Output {self.part!r} of the model is a {type(found).__name__}, not a tensor. It holds: {_parts(found)}.")
        return found


def call_with_batch(model: nn.Module, batch: Any) -> Any:
    """Call a model with the batch as its single argument.

    Args:
        model: Any module.
        batch: Its inputs.

    Returns:
        What it returns.
    """
    return model(batch)


def call_by_name(model: nn.Module, batch: Any) -> Any:
    """Call a model with the entries of the batch as named arguments.

    Args:
        model: Any module.
        batch: Tensors by name.

    Returns:
        What it returns.

    Raises:
        InputTypeError: If the batch has no names.
    """
    if not isinstance(batch, Mapping):
        raise InputTypeError(
            f"A task passes inputs by name, got a batch of type {type(batch).__name__}. "
            "Give a dict, for example of input_ids and attention_mask."
        )
    return model(**batch)


def _part(value: Any, name: str) -> Any:
    """Take one part by position, key or attribute."""
    if isinstance(value, Mapping) and name in value:
        return value[name]
    if isinstance(value, Sequence) and name.lstrip("-").isdigit():
        position = int(name)
        if -len(value) <= position < len(value):
            return value[position]
    elif name.isidentifier() and not name.startswith("_") and not isinstance(value, Tensor) and hasattr(value, name):
        return getattr(value, name)
    raise InputError(f"The model's output has no part {name!r}: it is a {type(value).__name__} with {_parts(value)}. {_choice(value)}")


def _choice(value: Any) -> str:
    """Say what to do where a part is not there."""
    return "Leave out the output (--output)." if isinstance(value, Tensor) else "Choose one of these."


def _parts(value: Any) -> str:
    """List the parts of an output."""
    if isinstance(value, Tensor):
        return f"no parts (a tensor of shape {tuple(value.shape)})"
    if isinstance(value, Mapping):
        return ", ".join(f"{name!r}" for name in value) or "no entries"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"positions 0 to {len(value) - 1}" if value else "no entries"
    return ", ".join(name for name in vars(value) if not name.startswith("_")) if hasattr(value, "__dict__") else "no parts"
