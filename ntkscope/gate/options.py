"""Options of a parameter group of GatedAdamW: their check, their number α, and the path that they choose."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch

from ntkscope._checks import InputError, check_choice, check_number
from ntkscope._types import GateKind
from ntkscope.gate.step import Center, Decay, resolve_alpha

Path = Literal["single", "foreach", "fused"]

# Options that state dicts of older versions lack, and those that say how to compute rather than what.
LATER_OPTIONS: dict[str, Any] = {"decay": "plain", "foreach": None, "fused": False, "capturable": False, "gate_stats": False}
PATH_OPTIONS = ("foreach", "fused", "capturable", "gate_stats")


def alpha_of(options: Mapping[str, Any]) -> float:
    """Resolve the α of a group.

    Args:
        options: Of the group.

    Returns:
        α as a number.

    Raises:
        InputError: If the choice is unknown, or a size is missing.
    """
    sizes = {name: options[name] for name in ("batch_size", "dataset_size")}
    return resolve_alpha(options["alpha"], beta1=options["betas"][0], **sizes)


def path_of(options: Mapping[str, Any], device: torch.device) -> Path:
    """Choose how parameters of a group are computed.

    Args:
        options: Of the group.
        device: Where the parameters are.

    Returns:
        "fused" and "foreach" where asked for; without a wish "foreach" on CUDA, else "single".
    """
    if options["fused"]:
        return "fused"
    if options["foreach"] is None:
        return "foreach" if device.type == "cuda" else "single"
    return "foreach" if options["foreach"] else "single"


def check_options(options: Mapping[str, Any]) -> None:
    """Check all options of one group.

    Args:
        options: Of the group, with the defaults.

    Raises:
        InputError: If one is out of range, or two exclude each other.
    """
    for name in ("lr", "eps", "weight_decay", "lambda_pop"):
        check_number(name, float(options[name]), low=0.0)
    for name, value in zip(("betas[0]", "betas[1]", "rho"), (*options["betas"], options["rho"]), strict=True):
        check_number(name, float(value), low=0.0, high=1.0, open_high=True)
    check_number("gate_warmup", options["gate_warmup"], low=0)
    check_choice("gate", options["gate"], get_args(GateKind))
    check_choice("center", options["center"], get_args(Center))
    check_choice("decay", options["decay"], get_args(Decay))
    if options["fused"] and options["foreach"]:
        raise InputError("`fused` and `foreach` cannot both be True: each is a way to compute the same step. Choose one.")
    alpha_of(options)
