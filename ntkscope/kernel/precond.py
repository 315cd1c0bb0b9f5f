"""The diagonal of M, the preconditioner between the two Jacobians (theory.md section 1)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ntkscope._checks import InputError, check_finite

Precond = Mapping[str, Tensor | float]


def check_precond(precond: Precond, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor | float]:
    """Check that M fits the parameters.

    Args:
        precond: Parameter name to a nonnegative tensor shaped as the parameter, or to one number.
        parameters: Parameters of the kernel, by name.

    Returns:
        M for exactly these parameters, in their order.

    Raises:
        InputError: If a parameter is missing, a shape differs, or an entry is negative or not finite.
    """
    missing = sorted(set(parameters) - set(precond))
    if missing:
        raise InputError(f"`precond` must name every parameter of the kernel, missing: {', '.join(missing)}.")
    for name, parameter in parameters.items():
        value = torch.as_tensor(precond[name])
        if value.shape not in (parameter.shape, torch.Size([])):
            raise InputError(
                f"`precond[{name!r}]` must be one number or have the parameter's shape {tuple(parameter.shape)}, got {tuple(value.shape)}."
            )
        check_finite(f"`precond[{name!r}]`", value, "Check the optimizer's state.")
        if bool((value < 0).any()):
            raise InputError(f"`precond[{name!r}]` must be nonnegative, got {float(value.min()):.3g}: J M Jᵀ would not be a kernel.")
    return {name: precond[name] for name in parameters}
