"""From two factored Jacobians to J M J'ᵀ, in chunks of columns."""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._types import KernelOutputs
from ntkscope.kernel.jacobian import FactoredJacobian
from ntkscope.kernel.rules.factor import PositionFactor

Precond = Mapping[str, Tensor | float]


def contract(
    left: FactoredJacobian, right: FactoredJacobian, *, precond: Precond | None, outputs: KernelOutputs, chunk_bytes: int
) -> Float[Tensor, "rows columns"]:
    """Contract two Jacobians over all parameters.

    Args:
        left: Jacobian of the rows.
        right: Jacobian of the columns.
        precond: Diagonal M by parameter name: a tensor shaped as the parameter, or one number; the identity if not given.
        outputs: "full" or "trace".
        chunk_bytes: Bound on a chunk of per-example weight gradients.

    Returns:
        Shape `(n C, n' C)` for "full", `(n, n')` for "trace".
    """
    per_example = 1 if outputs == "trace" else left.num_classes
    total = left.rows.new_zeros(left.num_examples * per_example, right.num_examples * per_example)
    for name, parts in left.factors.items():
        scale = 1.0 if precond is None else precond[name]
        for factor, other in _pairs(parts, right.factors.get(name, [])):
            if isinstance(scale, Tensor):
                weight = scale.to(total)
                # [units, inputs]: a bias has one input, which is always one
                matrix = (weight.flatten(1) if weight.ndim > 1 else weight[:, None])[factor.units]
                total += _by_weight_gradients(factor, other, matrix, outputs, chunk_bytes)
            elif factor.activations.shape[1] == other.activations.shape[1] == 1:
                total += scale * _by_two_grams(factor, other, outputs)
            else:
                total += scale * _by_weight_gradients(factor, other, None, outputs, chunk_bytes)
    others = right.row_blocks()
    for name, block in left.row_blocks().items():
        scale = 1.0 if precond is None else precond[name]
        weighted = block * (scale.to(block).flatten() if isinstance(scale, Tensor) else scale)
        total += _flat(weighted, outputs) @ _flat(others[name], outputs).T
    return total


def _pairs(left: list[PositionFactor], right: list[PositionFactor]) -> Iterator[tuple[PositionFactor, PositionFactor]]:
    """Match factors of the same rows of a weight."""
    by_units = {(factor.units.start, factor.units.stop): factor for factor in right}
    for factor in left:
        other = by_units.get((factor.units.start, factor.units.stop))
        if other is not None:
            yield factor, other


def _flat(gradients: Float[Tensor, "examples classes columns"], outputs: KernelOutputs) -> Tensor:
    """View gradients as matrix rows: one per output, or one per example (whose products sum over classes: the trace)."""
    return gradients.flatten(1) if outputs == "trace" else gradients.flatten(0, 1)


def _by_two_grams(left: PositionFactor, right: PositionFactor, outputs: KernelOutputs) -> Tensor:
    """One position: <d aᵀ, d' a'ᵀ> = <d, d'> <a, a'>, so two small Grams suffice and no gradient is formed."""
    inputs = left.activations.flatten(1) @ right.activations.flatten(1).T  # [examples, examples']
    grads = _flat(left.output_grads.flatten(2), outputs) @ _flat(right.output_grads.flatten(2), outputs).T
    if outputs == "trace":
        return grads * inputs
    num_classes = left.output_grads.shape[1]
    blocks = grads.view(inputs.shape[0], num_classes, inputs.shape[1], num_classes)
    return (blocks * inputs[:, None, :, None]).view(grads.shape)


def _by_weight_gradients(
    left: PositionFactor, right: PositionFactor, weight: Tensor | None, outputs: KernelOutputs, chunk_bytes: int
) -> Tensor:
    """General case: per-output weight gradients, a chunk of columns at a time, weighted by M.

    With M an elementwise weight the two small Grams no longer factor (theory.md section 1).

    Args:
        left: Factor of the rows.
        right: Factor of the columns.
        weight: M of the factor's rows of the parameter; the identity if None.
        outputs: The kind.
        chunk_bytes: Bound on a chunk.

    Returns:
        The contribution to the kernel.
    """
    num_inputs, num_units = left.activations.shape[2], left.output_grads.shape[3]
    rows = left.output_grads.shape[:2].numel() + right.output_grads.shape[:2].numel()
    column_bytes = 2 * rows * left.activations.element_size()  # gradients and their weighted copy
    columns = max(1, chunk_bytes // column_bytes)
    units_step, inputs_step = max(1, columns // num_inputs), min(num_inputs, columns)
    total: Tensor | float = 0.0
    for units in _slices(num_units, units_step):
        for inputs in _slices(num_inputs, inputs_step):
            first = _weight_gradients(left, units, inputs)
            second = first if right is left else _weight_gradients(right, units, inputs)
            weighted = first if weight is None else first * weight[units, inputs].flatten()
            total = total + _flat(weighted, outputs) @ _flat(second, outputs).T
    assert isinstance(total, Tensor)  # a weight has at least one column
    return total


def _weight_gradients(factor: PositionFactor, units: slice, inputs: slice) -> Float[Tensor, "examples classes columns"]:
    """Form gradients of every output in weight[units, inputs]."""
    grads = factor.output_grads[..., units].transpose(2, 3).flatten(1, 2)  # [examples, classes * units, positions]
    gradients = torch.bmm(grads, factor.activations[:, :, inputs])  # [examples, classes * units, inputs]
    return gradients.view(*factor.output_grads.shape[:2], -1)


def _slices(length: int, step: int) -> list[slice]:
    """Cut `range(length)` into slices of `step`."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
