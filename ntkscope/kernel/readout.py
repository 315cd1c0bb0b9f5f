"""Which numbers of an example the kernel differentiates: the kernel kinds of theory.md section 1.

`full` and `trace` take all C outputs of an example. `sum`, `class=k` and `loss` take one number of it, so that their kernel is the
full kernel of a model with one output: a readout is a `forward_fn` of its own, and the rest of the engine knows nothing of kinds
but whether classes are summed over (`trace`).
"""

import re
from typing import Any, cast

import torch
from torch import Tensor, nn

from ntkscope._checks import InputError, InputTypeError
from ntkscope._losses import NAMED_LOSSES
from ntkscope._types import ForwardFn, KernelOutputs, LossFn
from ntkscope.kernel.batch import take
from ntkscope.kernel.model import forward_rows

KINDS = "'full', 'trace', 'sum', 'class=k' or 'loss'"


def check_kind(outputs: KernelOutputs) -> int | None:
    """Check the name of a kernel kind.

    Args:
        outputs: "full", "trace", "sum", "class=k" or "loss".

    Returns:
        k for "class=k", else None.

    Raises:
        InputError: If there is no such kind.
    """
    if outputs in ("full", "trace", "sum", "loss"):
        return None
    match = re.fullmatch(r"class=(\d+)", outputs) if isinstance(outputs, str) else None
    if match is None:
        raise InputError(f"`outputs` must be {KINDS}, got {outputs!r}.")
    return int(match[1])


def make_readout(outputs: KernelOutputs, *, forward_fn: ForwardFn | None = None, loss: str | LossFn | nn.Module | None = None) -> ForwardFn:
    """Make the function from a batch to the rows that are differentiated.

    Args:
        outputs: The kind.
        forward_fn: The model's call, where it is not `model(batch)`.
        loss: For "loss": its name, or a callable `(outputs, targets) -> scalar`; each example is its own batch of one.

    Returns:
        `readout(model, batch)`, of shape `(n, C)` for "full" and "trace", else `(n, 1)`. For "loss", `batch` is the pair
        `(inputs, targets)`.

    Raises:
        InputError: If the kind or the loss is unknown, or the class does not exist (when the readout is called).
        InputTypeError: If the loss is no callable.
    """
    index = check_kind(outputs)
    if outputs == "loss":
        function = _loss_function(loss)

        def read_loss(model: nn.Module, batch: Any) -> Tensor:
            inputs, targets = batch
            rows = forward_rows(model, inputs, forward_fn)
            try:
                values = [function(rows[i : i + 1], take(targets, slice(i, i + 1))) for i in range(len(rows))]
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                reason = (str(error).strip().splitlines() or [""])[0]
                raise InputError(f"The loss failed on one example: {reason}. Check the targets' shape, dtype and range.") from error
            if not all(isinstance(value, Tensor) for value in values):
                raise InputTypeError(f"`loss` must return a tensor, got {type(values[0]).__name__}. Do not call .item() in it.")
            if any(value.numel() != 1 for value in values):
                raise InputError(
                    f"`loss` must return one number for a batch, got shape {tuple(values[0].shape)}. Reduce it, by mean or sum."
                )
            return torch.stack([value.reshape(()) for value in values])[:, None]

        return read_loss

    def read(model: nn.Module, batch: Any) -> Tensor:
        rows = forward_rows(model, batch, forward_fn)
        if outputs == "sum":
            return rows.sum(dim=1, keepdim=True)
        if index is None:
            return rows
        if index >= rows.shape[1]:
            raise InputError(f"`outputs` asks for class {index}, but the model has {rows.shape[1]} outputs, 0 to {rows.shape[1] - 1}.")
        return rows[:, index : index + 1]

    return read


def check_targets(outputs: KernelOutputs, *, other: Any, targets: Any, other_targets: Any, loss: object) -> None:
    """Check that targets are there for the loss kernel, and for no other kind.

    Args:
        outputs: The kind.
        other: Second batch, or None.
        targets: Of the first batch.
        other_targets: Of the second.
        loss: The loss.

    Raises:
        InputError: If one is missing, or given for another kind.
    """
    if outputs != "loss":
        given = [name for name, value in (("targets", targets), ("other_targets", other_targets), ("loss", loss)) if value is not None]
        if given:
            raise InputError(f"`{given[0]}` is for outputs='loss', got outputs={outputs!r}. Leave it out, or ask for outputs='loss'.")
        return
    if targets is None:
        raise InputError("outputs='loss' needs `targets`, those of `inputs`.")
    if other is not None and other_targets is None:
        raise InputError("outputs='loss' with `other` needs `other_targets` too, those of `other`.")
    if other is None and other_targets is not None:
        raise InputError("`other_targets` belong to `other`, which is not given.")


def _loss_function(loss: object) -> LossFn:
    """Look up or check the loss."""
    if isinstance(loss, str):
        if loss not in NAMED_LOSSES:
            raise InputError(f"`loss` must be one of {', '.join(map(repr, NAMED_LOSSES))}, or a callable, got {loss!r}.")
        return NAMED_LOSSES[loss]
    if not callable(loss):
        raise InputTypeError(f"outputs='loss' needs `loss`: a name or a callable (outputs, targets) -> scalar, got {type(loss).__name__}.")
    return cast("LossFn", loss)
