"""The diagonal M of every Adam that is known, from its options and what it keeps of a parameter.

M is what a step does to a gradient that has been the same since the first step, over that gradient and lr: Δw = −lr M ⊙ g, with the
denominator as it is. A bias-corrected average of such gradients is the gradient itself, so that Adam's M is 1/(√v̂ + ε). An average that is
not corrected holds the share 1 − β₁ᵗ of it; NAdam looks one step ahead, so that its weights do not add up to one early on.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Diagonal = Callable[[Mapping[str, Any], Mapping[str, Any]], Tensor | float]

RECTIFIED_ABOVE = 5.0  # length of the average of squares from which RAdam and AdaBelief trust it


def adam_diagonal(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    """Compute 1/(√v̂ + ε) of Adam and AdamW; amsgrad: with the largest v so far.

    Args:
        group: Options.
        state: Of a parameter that has had a gradient.

    Returns:
        M, shaped as the parameter.
    """
    second = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    return _wide(second).div(_correction(group, state, 1)).sqrt_().add_(group["eps"]).reciprocal_()


def nadam_diagonal(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    """Compute the M of `torch.optim.NAdam`: Adam's, times the weights that a step gives to all gradients so far.

    Args:
        group: Options.
        state: Of a parameter that has had a gradient.

    Returns:
        M, shaped as the parameter.

    Source:
        Dozat 2016, with torch's schedule of μ: μ_t = β₁ (1 − ½ 0.96^(t ψ)), ψ = `momentum_decay`.
    """
    beta1, step, decay = float(group["betas"][0]), float(state["step"]), float(group["momentum_decay"])
    now, following = (beta1 * (1 - 0.5 * 0.96 ** (t * decay)) for t in (step, step + 1))
    so_far = float(state["mu_product"])
    weight = (1 - now) / (1 - so_far) + following / (1 - so_far * following) * _correction(group, state, 0)
    return adam_diagonal(group, state).mul_(weight)


def radam_diagonal(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor | float:
    """Compute the M of `torch.optim.RAdam`: r_t √(1 − β₂ᵗ)/(√v + ε), and 1 in the first steps, whose v it does not trust.

    Args:
        group: Options.
        state: Of a parameter that has had a gradient.

    Returns:
        M.

    Source:
        Liu et al. 2020, On the Variance of the Adaptive Learning Rate and Beyond. As torch does, ε is added before v is corrected.
    """
    length, factor = _rectification(group, state)
    return _late_epsilon(group, state, state["exp_avg_sq"]).mul_(factor) if length > RECTIFIED_ABOVE else 1.0


def adamax_diagonal(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    """Compute the M of `torch.optim.Adamax`: one over the decayed largest |g|, which holds ε already.

    Args:
        group: Options.
        state: Of a parameter that has had a gradient.

    Returns:
        M, shaped as the parameter.
    """
    return _wide(state["exp_inf"]).reciprocal()


def fused_diagonal(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    """Compute the M of FusedAdam (Apex, DeepSpeed) and DeepSpeedCPUAdam: Adam's, or without any bias correction.

    Args:
        group: Options.
        state: Of a parameter that has had a gradient.

    Returns:
        M, shaped as the parameter.
    """
    return adam_diagonal(group, state) if group["bias_correction"] else _uncorrected(group, state)


def transformers_diagonal(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    """Compute the M of the AdamW that Transformers had until version 4: √(1 − β₂ᵗ)/(√v + ε), or without any bias correction.

    Args:
        group: Options.
        state: Of a parameter that has had a gradient.

    Returns:
        M, shaped as the parameter.
    """
    return _late_epsilon(group, state, state["exp_avg_sq"]) if group["correct_bias"] else _uncorrected(group, state)


def adabelief_diagonal(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor | float:
    """Compute the M of timm's AdaBelief, whose groups say whether it is rectified; its stored variance holds ε already.

    Args:
        group: Options.
        state: Of a parameter that has had a gradient.

    Returns:
        M; zero where a step does nothing.

    Source:
        Zhuang et al. 2020, AdaBelief. A rectified step takes the variance itself, also with amsgrad.
    """
    if not group["rectify"]:
        variance = state["max_exp_avg_var"] if group["amsgrad"] else state["exp_avg_var"]
        return _wide(variance).div(_correction(group, state, 1)).sqrt_().add_(group["eps"]).reciprocal_()
    length, factor = _rectification(group, state)
    if length >= RECTIFIED_ABOVE:
        return _late_epsilon(group, state, state["exp_avg_var"]).mul_(factor)
    return 1.0 if group["degenerated_to_sgd"] else 0.0


def _wide(value: Tensor) -> Tensor:
    """Take at least float32."""
    return value if value.dtype is torch.float64 else value.float()


def _correction(group: Mapping[str, Any], state: Mapping[str, Any], which: int) -> float:
    """Compute 1 − βᵗ, the share of a constant that an average holds."""
    return 1 - float(group["betas"][which]) ** float(state["step"])


def _uncorrected(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    """Compute (1 − β₁ᵗ)/(√v + ε)."""
    return _wide(state["exp_avg_sq"]).sqrt().add_(group["eps"]).reciprocal_().mul_(_correction(group, state, 0))


def _late_epsilon(group: Mapping[str, Any], state: Mapping[str, Any], second: Tensor) -> Tensor:
    """Compute √(1 − β₂ᵗ)/(√v + ε): ε is added before v is corrected."""
    return _wide(second).sqrt().add_(group["eps"]).reciprocal_().mul_(math.sqrt(_correction(group, state, 1)))


def _rectification(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, float]:
    """Compute ρ_t, the length of the average of squares, and the factor r_t (0 where it is not defined)."""
    beta2, step = float(group["betas"][1]), float(state["step"])
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / (1 - beta2**step)
    if length < RECTIFIED_ABOVE:
        return length, 0.0
    return length, math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
