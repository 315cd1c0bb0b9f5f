"""The state of torch.optim.AdamW as that of GatedAdamW, and back."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from ntkscope._checks import UnsupportedError

HALF_PRECISION = (torch.float16, torch.bfloat16)

NOT_ADAMW = "from_adamw takes a torch.optim.AdamW, got {name}: {reason} Train with AdamW, or start a GatedAdamW afresh."


def check_adamw(optimizer: Optimizer) -> None:
    """Check that an optimizer does what GatedAdamW does with an open gate.

    Args:
        optimizer: The user's.

    Raises:
        UnsupportedError: If it is another one, or uses amsgrad or differentiable steps.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, AdamW):
        reason = "its weight decay or its averages are others."
        raise UnsupportedError(NOT_ADAMW.format(name=name, reason=reason))
    for group in optimizer.param_groups:
        if group["amsgrad"]:
            raise UnsupportedError(NOT_ADAMW.format(name=f"{name}(amsgrad=True)", reason="the largest v so far has no counterpart here."))
        if group.get("differentiable"):
            raise UnsupportedError(NOT_ADAMW.format(name=f"{name}(differentiable=True)", reason="steps here are not differentiable."))


def gated_groups(optimizer: AdamW) -> list[dict[str, Any]]:
    """Turn AdamW's groups into groups of GatedAdamW.

    Args:
        optimizer: The user's.

    Returns:
        Groups with what both have, and with what others left there (`initial_lr` of a schedule).
    """
    dropped = {"amsgrad", "differentiable", "fused", "decoupled_weight_decay"}
    groups = [{key: value for key, value in group.items() if key not in dropped} for group in optimizer.param_groups]
    return [group | {"foreach": group["foreach"], "params": list(group["params"])} for group in groups]


def gated_state(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Tensor]:
    """Turn AdamW's state of a parameter into GatedAdamW's.

    Args:
        state: AdamW's.
        group: GatedAdamW's, whose `rho`, `center` and `capturable` count.

    Returns:
        New tensors: m, v and t as they are (float32 for half precision), and s such that ŝ = max(v̂ − m̂², 0).
    """
    wide = {name: state[name].float() if state[name].dtype in HALF_PRECISION else state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    step = int(state["step"])
    beta1, beta2 = group["betas"]
    m_hat, v_hat = wide["exp_avg"] / (1 - beta1**step), wide["exp_avg_sq"] / (1 - beta2**step)
    samples = step - (group["center"] == "corrected")
    scale = 1 - group["rho"] ** samples if samples else 1.0
    device = wide["exp_avg"].device if group["capturable"] else "cpu"
    return wide | {
        "grad_var": (v_hat - m_hat.square()).clamp(min=0.0) * scale,
        "step": torch.tensor(float(step), device=device),
    }


def adamw_of(groups: list[dict[str, Any]], states: dict[Tensor, dict[str, Tensor]], options: dict[str, Any]) -> AdamW:
    """Make an AdamW that goes on where GatedAdamW is.

    Args:
        groups: GatedAdamW's.
        states: GatedAdamW's.
        options: Of AdamW, in place of those taken over.

    Returns:
        AdamW on the same parameters, with copies of m, v and t; s is dropped.
    """
    dropped = {"rho", "gate", "alpha", "lambda_pop", "gate_warmup", "center", "batch_size", "dataset_size", "decay", "gate_stats", "fused"}
    kept = [{key: value for key, value in group.items() if key not in dropped} | {"params": list(group["params"])} for group in groups]
    for group in kept:  # torch's AdamW captures on accelerators only
        group["capturable"] = group["capturable"] and all(parameter.device.type != "cpu" for parameter in group["params"])
    optimizer = AdamW([group | options for group in kept])
    for group in optimizer.param_groups:
        on_device = group["capturable"] or group["fused"]
        for parameter in group["params"]:
            state = states.get(parameter)
            if state:
                averages = {name: state[name].to(parameter.dtype, copy=True) for name in ("exp_avg", "exp_avg_sq")}
                step = state["step"].to(parameter.device if on_device else "cpu", copy=True)
                optimizer.state[parameter] = {"step": step, **averages}
    return optimizer
