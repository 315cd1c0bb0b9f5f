"""Which optimizer saved a state: recognized by its options and entries, which are checked before anything is computed from them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ntkscope._checks import InputError, UnsupportedError, check_number
from ntkscope.gate.options import LATER_OPTIONS, check_options
from ntkscope.record.matching import Shape

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "grad_var", "momentum_buffer")
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # torch computes with these; 8 bits and fewer only store
GIVE = "Record the run with Recorder.attach(optimizer, precond=...) instead, or go on with M = identity."
AGAIN = "Save optimizer.state_dict() again, or use an earlier file."


def recognize(group: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], place: str) -> str:
    """Recognize an optimizer by what it saves.

    Args:
        group: The first of its groups.
        entries: States of its parameters.
        place: For messages.

    Returns:
        "sgd", "adam" (also AdamW) or "gate".

    Raises:
        UnsupportedError: If it is another one.
        InputError: If an entry lacks what all of its kind have.
    """
    saved = {str(name) for entry in entries for name in entry}
    if {"betas", "rho", "gate", "alpha"} <= group.keys():
        kind, needed = "gate", {"step", "exp_avg", "exp_avg_sq", "grad_var"}
    elif {"betas", "eps", "amsgrad"} <= group.keys() and not saved - {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}:
        kind, needed = "adam", {"step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])}
    elif {"momentum", "dampening", "nesterov"} <= group.keys() and not saved - {"momentum_buffer"}:
        kind, needed = "sgd", set()
    else:
        options = ", ".join(sorted(str(name) for name in group if name != "params"))
        raise UnsupportedError(
            f"{place} is not of SGD, Adam, AdamW or GatedAdamW: its groups have {options[:200]}, its entries "
            f"{', '.join(sorted(saved))[:200] or 'nothing'}. Its M is unknown. {GIVE}"
        )
    for entry in entries:
        if entry and needed - entry.keys():
            raise InputError(f"{place} is damaged: an entry lacks {', '.join(sorted(needed - entry.keys()))}. {AGAIN}")
    return kind


def check_group(group: Mapping[str, Any], kind: str, place: str) -> None:
    """Check the options of a group.

    Args:
        group: As saved.
        kind: From `recognize`.
        place: For messages.

    Raises:
        InputError: If one is missing or out of range.
    """
    try:
        options = {**LATER_OPTIONS, **group}
        if kind == "gate":
            check_options(options)
            return
        limits = {"lr": math.inf, "weight_decay": math.inf, **({"eps": math.inf} if kind == "adam" else {"momentum": 1.0})}
        for name, high in limits.items():
            check_number(name, float(group[name]), low=0.0, high=high, open_high=high == 1.0)
        for beta in group["betas"] if kind == "adam" else ():
            check_number("betas", float(beta), low=0.0, high=1.0, open_high=True)
        if kind == "adam" and len(group["betas"]) != 2:
            raise InputError("`betas` must be two numbers.")
        if kind == "sgd":
            check_number("dampening", float(group["dampening"]), low=0.0, high=1.0)
    except (InputError, KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise InputError(f"{place} is damaged: its groups have options that make no sense ({error}). {AGAIN}") from error


def shape_of(entry: Mapping[str, Any], place: str) -> Shape:
    """Read the shape that the moments of an entry share.

    Args:
        entry: State of one parameter.
        place: For messages.

    Returns:
        The shape; None before its first step.

    Raises:
        InputError: If they are no dense tensors of real numbers, or of several shapes.
    """
    shapes = set()
    for name in MOMENTS:
        value = entry.get(name)
        if value is None:
            continue
        is_dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
        if not is_dense or value.dtype not in REAL:
            raise InputError(f"{place} is damaged: {name} is no dense tensor of real numbers in 16 bits or more. {AGAIN}")
        shapes.add(tuple(value.shape))
    if len(shapes) > 1:
        raise InputError(f"{place} is damaged: the moments of an entry have the shapes {sorted(shapes)}. {AGAIN}")
    return shapes.pop() if shapes else None
