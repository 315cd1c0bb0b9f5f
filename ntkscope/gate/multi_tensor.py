"""The gated-Adam step on lists of tensors: one call per operation instead of one per operation and tensor."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ntkscope._types import GateKind
from ntkscope.gate.step import StepRow

Factor = float | list[Tensor]
FOREACH: Any = torch  # torch's stubs do not export the functions on lists


def multi_tensor_step(
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grad_vars: list[Tensor],
    row: StepRow,
    options: Mapping[str, Any],
    *,
    is_external: bool,
) -> None:
    """Take the step of `gated_adam_step`, in place, on tensors of one device and dtype.

    Args:
        weights: w, updated.
        gradients: g; kept.
        exp_avgs: m, updated.
        exp_avg_sqs: v, updated.
        grad_vars: s, updated.
        row: Numbers of the step: floats, or lists with a 0-d tensor per weight, so that nothing is read back from the device.
        options: Of the parameter group.
        is_external: Whether s was set from outside, so that it stays.
    """
    beta1, beta2 = options["betas"]
    if options["maximize"]:
        gradients = list(FOREACH._foreach_neg(gradients))
    if not is_external:
        _update_variances(grad_vars, gradients, exp_avgs, row, is_corrected=options["center"] == "corrected")
    FOREACH._foreach_lerp_(exp_avgs, gradients, 1 - beta1)
    FOREACH._foreach_mul_(exp_avg_sqs, beta2)
    FOREACH._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - beta2)
    gates = _gates(exp_avgs, grad_vars, row, options["gate"])
    _decay(weights, gates if options["decay"] == "gated" else None, row.decay)
    denominators = list(FOREACH._foreach_sqrt(exp_avg_sqs))
    FOREACH._foreach_add_(denominators, row.eps)
    if gates is not None:
        FOREACH._foreach_mul_(gates, exp_avgs)
    moves = exp_avgs if gates is None else gates
    if isinstance(row.step_size, float):
        FOREACH._foreach_addcdiv_(weights, moves, denominators, -row.step_size)
    else:
        moves = list(FOREACH._foreach_div(moves, denominators))
        _scale(moves, row.step_size)
        FOREACH._foreach_sub_(weights, moves)


def _update_variances(variances: list[Tensor], gradients: list[Tensor], means: list[Tensor], row: StepRow, *, is_corrected: bool) -> None:
    """Average the squared deviations of g from the mean before it."""
    if is_corrected:
        deviations = list(FOREACH._foreach_mul(means, row.center))
        FOREACH._foreach_sub_(deviations, gradients)
    else:
        deviations = list(FOREACH._foreach_sub(gradients, means))
    _scale(variances, row.keep)
    if isinstance(row.new, float):
        FOREACH._foreach_addcmul_(variances, deviations, deviations, row.new)
    else:
        FOREACH._foreach_mul_(deviations, deviations)
        _scale(deviations, row.new)
        FOREACH._foreach_add_(variances, deviations)


def _gates(means: list[Tensor], variances: list[Tensor], row: StepRow, kind: GateKind) -> list[Tensor] | None:
    """Compute new tensors q; None for gates that are known to be open."""
    if kind == "open" or (isinstance(row.warm, float) and row.warm):
        return None
    gates = list(FOREACH._foreach_mul(means, means))
    if kind != "snr":
        _add(gates, variances, _map(lambda value: -value, row.threshold))
    FOREACH._foreach_clamp_min_(gates, 0.0)
    if kind == "hard":
        FOREACH._foreach_sign_(gates)
    else:
        totals = [gate.clone() for gate in gates]
        _add(totals, variances, row.noise)
        FOREACH._foreach_add_(totals, row.smallest)
        FOREACH._foreach_div_(gates, totals)
    if not isinstance(row.warm, float):
        _scale(gates, _map(lambda warm: 1 - warm, row.warm))
        FOREACH._foreach_add_(gates, row.warm)
    return gates


def _decay(weights: list[Tensor], gates: list[Tensor] | None, strength: Factor) -> None:
    """Shrink the weights, where gates are given only as far as they are open."""
    if gates is None:
        _scale(weights, _map(lambda value: 1 - value, strength))
        return
    shrinkage = list(FOREACH._foreach_mul(gates, weights))
    _add(weights, shrinkage, _map(lambda value: -value, strength))


def _map(function: Callable[[Any], Any], factor: Factor) -> Any:
    """Apply a formula to a number, or to each parameter's number."""
    return [function(value) for value in factor] if isinstance(factor, list) else function(factor)


def _scale(tensors: list[Tensor], factor: Factor) -> None:
    """Multiply in place with a number, or with one number per tensor."""
    FOREACH._foreach_mul_(tensors, factor)


def _add(tensors: list[Tensor], values: list[Tensor], factor: Factor) -> None:
    """Add a multiple of `values` in place; the factor is a number, or one per tensor."""
    if isinstance(factor, float):
        FOREACH._foreach_add_(tensors, values, alpha=factor)
    else:
        FOREACH._foreach_add_(tensors, list(FOREACH._foreach_mul(values, factor)))
