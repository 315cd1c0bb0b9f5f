"""The diagonal of M, the preconditioner between the two Jacobians (theory.md section 1)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ntkscope._checks import InputError, InputTypeError, check_finite

Precond = Mapping[str, Tensor | float]


def check_precond(precond: Precond, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor | float]:
    """Check that M fits the parameters.

    Args:
        precond: Parameter name to a nonnegative tensor shaped as the parameter, or to one number.
        parameters: Parameters of the kernel, by name.

    Returns:
        M for exactly these parameters, in their order.

    Raises:
        InputTypeError: If it is no dict, or a value is no real tensor or number.
        InputError: If a parameter is missing, a shape differs, or an entry is negative or not finite.
    """
    if not isinstance(precond, Mapping):
        raise InputTypeError(f"`precond` must be a dict of parameter names to tensors or numbers, got {type(precond).__name__}.")
    missing = sorted(set(parameters) - set(precond))
    if missing:
        raise InputError(f"`precond` must name every parameter of the kernel, missing: {', '.join(missing)}.")
    checked: dict[str, Tensor | float] = {}
    for name, parameter in parameters.items():
        try:
            value = torch.as_tensor(precond[name]).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputTypeError(f"`precond[{name!r}]` must be a tensor or a number, got {type(precond[name]).__name__}.") from error
        if value.is_complex():
            raise InputTypeError(f"`precond[{name!r}]` must be real, got {value.dtype}.")
        if value.shape not in (parameter.shape, torch.Size([])):
            raise InputError(
                f"`precond[{name!r}]` must be one number or have the parameter's shape {tuple(parameter.shape)}, got {tuple(value.shape)}."
            )
        check_finite(f"`precond[{name!r}]`", value, "Check the optimizer's state.")
        if bool((value < 0).any()):
            raise InputError(f"`precond[{name!r}]` must be nonnegative, got {float(value.min()):.3g}: J M Jᵀ would not be a kernel.")
        checked[name] = float(value) if value.ndim == 0 else value
    return checked
