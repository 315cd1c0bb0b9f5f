"""Which part of a parameter a weight is, and in which form a parameter's share of the Jacobian takes less memory."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ntkscope.kernel.layout import Layout
from ntkscope.kernel.rules.use import OuterUse, Use
from ntkscope.kernel.watch import WeightWatch

Storage = Literal["factors", "rows"]


@dataclass(frozen=True)
class Target:
    """The part of a parameter that a weight is."""

    name: str | None  # None: the weight is computed, and its gradients are pulled back through autograd
    part: slice  # rows of the parameter as a matrix (first axis, rest)
    transposed: bool


def num_rows(parameter: Tensor) -> int:
    """Count the rows of a parameter as a matrix (first axis, rest).

    Args:
        parameter: Any parameter.

    Returns:
        Its first axis; 1 for a number.
    """
    return parameter.shape[0] if parameter.ndim else 1


def resolve(weight: Tensor, watch: WeightWatch, parameters: Mapping[str, nn.Parameter]) -> Target:
    """Say whether a weight is a parameter, some rows of one (`in_proj_weight` of attention), or its transpose.

    Args:
        weight: A weight of the watch.
        watch: The watch.
        parameters: Parameters under rules.

    Returns:
        The part; for anything else a target without a name.
    """
    computed = Target(None, slice(0, num_rows(weight)), transposed=False)
    roots = watch.roots(weight)
    if len(roots) != 1:
        return computed
    (name,) = roots
    parameter = parameters[name]
    if weight is parameter:
        return Target(name, slice(0, num_rows(parameter)), transposed=False)
    if weight._base is not parameter or not parameter.is_contiguous() or parameter.ndim == 0:
        return computed
    offset = int(weight.storage_offset()) - int(parameter.storage_offset())
    if weight.shape[1:] == parameter.shape[1:] and weight.stride() == parameter.stride():
        start, rest = divmod(offset, max(1, int(parameter.stride(0))))
        if rest == 0:
            return Target(name, slice(start, start + weight.shape[0]), transposed=False)
    if parameter.ndim == 2 and offset == 0 and weight.shape == parameter.mT.shape and weight.stride() == parameter.mT.stride():
        return Target(name, slice(0, num_rows(parameter)), transposed=True)
    return computed


@dataclass(frozen=True)
class OuterShape:
    """Sizes of one outer use: positions T, units u, inputs k (the vocabulary for tokens)."""

    positions: int
    units: int
    inputs: int
    is_token: bool
    part: tuple[int, int]
    transposed: bool


def outer_shape(use: Use, target: Target, layout: Layout, num_examples: int) -> OuterShape | None:
    """Measure a use.

    Args:
        use: Any use.
        target: From `resolve`.
        layout: Where the examples are.
        num_examples: n.

    Returns:
        Its sizes; None if it has no factors.
    """
    if not isinstance(use, OuterUse) or use.rows_only or target.name is None:
        return None
    inputs = use.inputs(layout, num_examples)
    is_token = inputs.ndim == 2
    width = use.weight.shape[0] if is_token else inputs.shape[2]
    part = (target.part.start, target.part.stop)
    return OuterShape(inputs.shape[1], use.weight.numel() // width, width, is_token, part, use.transposed != target.transposed)


def choose_storage(shapes: Iterable[OuterShape | None], num_params: int, num_classes: int) -> Storage:
    """Choose the form of one parameter.

    Args:
        shapes: Of all its uses.
        num_params: Entries of the parameter.
        num_classes: C.

    Returns:
        "factors" where they are possible and take less memory, or where rows would be as wide as a vocabulary.
    """
    found = list(shapes)
    outer = [shape for shape in found if shape is not None]
    if len(outer) < len(found) or not outer:
        return "rows"
    tokens, dense = [shape for shape in outer if shape.is_token], [shape for shape in outer if not shape.is_token]
    if len({shape.transposed for shape in dense}) > 1 or _overlap({shape.part for shape in dense}):
        return "rows"
    if tokens:
        # A tied head has the table's rows as units. Any other mixture has no contraction of its own.
        is_tied = all(not shape.transposed and shape.part == token.part for shape in dense for token in tokens)
        return "factors" if is_tied and len({shape.part for shape in tokens}) == 1 and tokens[0].part[0] == 0 else "rows"
    held = sum(shape.positions * (num_classes * shape.units + shape.inputs) for shape in dense)
    return "factors" if held <= num_classes * num_params else "rows"


def _overlap(parts: set[tuple[int, int]]) -> bool:
    """Say whether different parts share a row."""
    ordered = sorted(parts)
    return any(later[0] < earlier[1] for earlier, later in itertools.pairwise(ordered))
