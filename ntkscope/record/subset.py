"""Choosing a probe from a training set: a random subset, with class shares kept."""

import torch
from jaxtyping import Int
from torch import Tensor

from ntkscope._checks import InputError, InputTypeError


def stratified_subset(targets: Tensor, size: int, *, seed: int = 0) -> Int[Tensor, " size"]:
    """Draw rows of a training set at random, each class at its share of the whole.

    Args:
        targets: Of the whole training set, one row per example: class indices, or one-hot rows. Anything else is taken for regression, and
            rows are drawn without regard to it.
        size: Rows to draw, from 1 to all.
        seed: Of the draw.

    Returns:
        Row indices, ascending. A class whose share is no whole number is rounded by the largest remainder, so that sizes add up.

    Raises:
        InputError: If there are not so many rows, or less than one is asked for.
        InputTypeError: If targets are no tensor, or the size is no whole number.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1])
        >>> labels[stratified_subset(labels, 3)]
        tensor([0, 0, 1])
    """
    if not isinstance(targets, Tensor) or targets.ndim == 0:
        raise InputTypeError(f"`targets` must be a tensor with one row per training example, got {type(targets).__name__}.")
    if not isinstance(size, int) or isinstance(size, bool):
        raise InputTypeError(f"`size` must be a whole number of rows, got {size!r}.")
    num_rows = len(targets)
    if not 1 <= size <= num_rows:
        raise InputError(f"`size` must lie in [1, {num_rows}], the rows of `targets`, got {size}. Give a smaller size or more targets.")
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    labels = _labels(targets.detach().cpu())
    if labels is None:
        return order[:size].sort().values
    _, classes, counts = labels.unique(return_inverse=True, return_counts=True)
    whole, remainder = torch.div(counts * size, num_rows, rounding_mode="floor"), (counts * size) % num_rows
    largest = remainder.argsort(descending=True, stable=True)[: size - int(whole.sum())]
    whole[largest] += 1
    shuffled = classes[order]
    drawn = [order[shuffled == label][: int(quota)] for label, quota in enumerate(whole)]
    return torch.cat(drawn).sort().values


def _labels(targets: Tensor) -> Tensor | None:
    """Read class labels; None where targets are not of that kind."""
    if targets.ndim > 1 and targets[0].numel() > 1:
        rows = targets.flatten(1)
        is_one_hot = bool(((rows == 0) | (rows == 1)).all()) and bool((rows.sum(dim=1) == 1).all())
        return rows.to(torch.int64).argmax(dim=1) if is_one_hot else None
    return None if targets.is_floating_point() or targets.is_complex() else targets.flatten()
