"""Where the examples are in a layer's tensors.

A layer deep inside a model rarely says which of its axes runs over the examples: (n, T, d), (T, n, d), or the two folded into one.
The probe tries the layouts below on two examples and keeps the one in which each example's outputs reach only its own rows.
"""

from enum import Enum

from torch import Tensor


class Layout(Enum):
    """Where the examples are; n is their number, T the number of positions."""

    FIRST = "(n, ...)"
    SECOND = "(T, n, ...)"
    FOLDED = "(n T, ...), an example's positions together"
    FOLDED_BY_POSITION = "(T n, ...), a position's examples together"


def possible_layouts(shape: tuple[int, ...], num_examples: int) -> list[Layout]:
    """List the layouts that a shape allows, the usual ones first.

    Args:
        shape: Of a layer's output.
        num_examples: n.

    Returns:
        Layouts.
    """
    found = []
    if shape and shape[0] == num_examples:
        found.append(Layout.FIRST)
    if len(shape) > 1 and shape[1] == num_examples:
        found.append(Layout.SECOND)
    if shape and shape[0] > num_examples and shape[0] % num_examples == 0:
        found += [Layout.FOLDED, Layout.FOLDED_BY_POSITION]
    return found


def allows(layout: Layout, shape: tuple[int, ...], num_examples: int) -> bool:
    """Say whether a tensor of this shape can have this layout.

    Args:
        layout: A layout.
        shape: Of the tensor.
        num_examples: n; with n = 1 a folded tensor need not be longer than n.

    Returns:
        Whether the sizes fit.
    """
    if layout is Layout.SECOND:
        return len(shape) > 1 and shape[1] == num_examples
    if layout is Layout.FIRST:
        return bool(shape) and shape[0] == num_examples
    return bool(shape) and shape[0] % num_examples == 0


def by_example(tensor: Tensor, layout: Layout, num_examples: int) -> Tensor:
    """View a tensor as (n, T, ...).

    Args:
        tensor: In `layout`.
        layout: Where the examples are.
        num_examples: n.

    Returns:
        A view with examples first and positions second; T = 1 for `FIRST`.
    """
    if layout is Layout.FIRST:
        return tensor.unsqueeze(1)
    if layout is Layout.SECOND:
        return tensor.transpose(0, 1)
    if layout is Layout.FOLDED:
        return tensor.unflatten(0, (num_examples, -1))
    return tensor.unflatten(0, (-1, num_examples)).transpose(0, 1)
