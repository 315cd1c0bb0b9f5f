"""Batches as users have them: a tensor, or tuples, lists and dicts of tensors whose first axis is the example."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ntkscope._checks import InputError, InputTypeError


def batch_tensors(batch: Any) -> Iterator[Tensor]:
    """Iterate over the tensors of a batch, in a fixed order.

    Args:
        batch: A tensor, or nested tuples, lists and dicts of tensors.

    Yields:
        Each tensor.

    Raises:
        InputTypeError: If something else is found.
    """
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for key in batch:
            yield from batch_tensors(batch[key])
    elif isinstance(batch, tuple | list):
        for part in batch:
            yield from batch_tensors(part)
    else:
        raise InputTypeError(
            f"A batch must be a tensor, or tuples, lists and dicts of tensors, got {type(batch).__name__}. "
            "Convert the inputs with torch.as_tensor, and give the model's call as `forward_fn(model, batch)` (--forward SPEC) if it is "
            "an odd one."
        )


def map_batch(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Apply `function` to every tensor of a batch, keeping its structure.

    Args:
        function: From tensor to tensor.
        batch: As for `batch_tensors`.

    Returns:
        The batch of results.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        parts = {key: map_batch(function, part) for key, part in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return parts
        kept = copy.copy(batch)  # a tokenizer's BatchEncoding, say, whose attributes a model may use
        kept.update(parts)
        return kept
    parts = [map_batch(function, part) for part in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def take(batch: Any, index: slice | Tensor) -> Any:
    """Take some examples of a batch.

    Args:
        batch: As for `batch_tensors`.
        index: A slice, or integer positions.

    Returns:
        A batch of the same structure.
    """
    return map_batch(lambda tensor: tensor[index], batch)


def count_examples(batch: Any) -> int:
    """Count the examples of a batch.

    Args:
        batch: As for `batch_tensors`.

    Returns:
        The common length of the first axes.

    Raises:
        InputError: If there is no tensor, or first axes differ, or there is no example.
    """
    tensors = list(batch_tensors(batch))
    lengths = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors}
    if len(lengths) != 1:
        raise InputError(f"Every tensor of a batch must have the examples on its first axis, got lengths {sorted(lengths)}.")
    (num_examples,) = lengths
    if num_examples == 0:
        raise InputError("The batch holds no example (n = 0). Give at least one row of inputs.")
    return num_examples


def to_device(batch: Any, device: torch.device) -> Any:
    """Move a batch.

    Args:
        batch: As for `batch_tensors`.
        device: Where to.

    Returns:
        The batch on `device`.
    """
    return map_batch(lambda tensor: tensor.to(device), batch)
