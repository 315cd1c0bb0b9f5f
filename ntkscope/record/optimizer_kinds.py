"""Which optimizer saved a state: recognized by its options and entries, which are checked before anything is computed from them."""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkscope._checks import InputError, UnsupportedError, check_number
from ntkscope.gate.options import LATER_OPTIONS, check_options
from ntkscope.record.matching import Shape
from ntkscope.record.optimizer_refusals import reason_against

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "exp_avg_var", "max_exp_avg_var", "grad_var", "momentum_buffer")
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # torch computes with these; 8 bits and fewer only store
GIVE = "Record the run with Recorder.attach(optimizer, precond=...) instead, or go on with M = identity."
AGAIN = "Save optimizer.state_dict() again, or use an earlier file."
GATE_OPTIONS = {"betas", "rho", "gate", "alpha"}

# Options that change no step: how torch computes, and what schedules, layer-wise rates and people keep in groups.
INERT = {
    *("params", "param_names", "name", "maximize", "foreach", "fused", "capturable", "differentiable"),
    *("initial_lr", "max_lr", "min_lr", "swa_lr", "lr_scale", "lr_mult", "wd_mult"),
}


@dataclass(frozen=True)
class Form:
    """What an optimizer saves, names split by spaces; anything else may change its steps, so that it is not recognized.

    Attributes:
        options: That its groups have, beside lr, betas, eps and weight_decay.
        entries: That every entry has.
        more_options: That groups may have.
        more_entries: That entries may have.
    """

    options: str
    entries: str
    more_options: str = ""
    more_entries: str = ""

    def fits(self, options: Set[str], saved: Set[str]) -> bool:
        """Say whether groups and entries are of this form.

        Args:
            options: Names in a group.
            saved: Names in any entry.

        Returns:
            Whether they are, whatever values they hold.
        """
        needed = {*self.options.split(), "lr", "betas", "eps", "weight_decay"}
        allowed = needed | INERT | {*self.more_options.split()}
        return needed <= options <= allowed and saved <= {*self.entries.split(), *self.more_entries.split()}


FORMS = {
    "nadam": Form("momentum_decay", "step exp_avg exp_avg_sq mu_product", "decoupled_weight_decay"),
    "radam": Form("decoupled_weight_decay differentiable", "step exp_avg exp_avg_sq"),
    "adamax": Form("differentiable", "step exp_avg exp_inf"),
    "fused adam": Form("bias_correction", "exp_avg exp_avg_sq", "step amsgrad decoupled_weight_decay", "step"),
    "transformers adamw": Form("correct_bias", "step exp_avg exp_avg_sq"),
    "adabelief": Form(
        "amsgrad rectify degenerated_to_sgd decoupled_decay fixed_decay", "step exp_avg exp_avg_var", "buffer", "max_exp_avg_var"
    ),
}


def recognize(group: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], place: str) -> str:
    """Recognize an optimizer by what it saves.

    Args:
        group: The first of its groups.
        entries: States of its parameters.
        place: For messages.

    Returns:
        "sgd", "adam" (also AdamW), "gate", or one of `FORMS`: "nadam", "radam", "adamax", "fused adam" (Apex, DeepSpeed),
        "transformers adamw" and "adabelief" (timm's).

    Raises:
        UnsupportedError: If it is another one.
        InputError: If an entry lacks what all of its kind have.
    """
    saved = {str(name) for entry in entries for name in entry}
    options = {str(name) for name in group}
    form = next((name for name, form in FORMS.items() if form.fits(options, saved)), None)
    if options >= GATE_OPTIONS and ("grad_var" in saved or saved <= {"step", "exp_avg", "exp_avg_sq"}):
        kind, needed = "gate", {"step", "exp_avg", "exp_avg_sq", "grad_var"}
    elif form is not None:
        kind, needed = form, {*FORMS[form].entries.split(), *(["max_exp_avg_var"] if form == "adabelief" and group["amsgrad"] else [])}
    elif _is_adam(group, saved):
        kind, needed = "adam", {"step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])}
    elif {"momentum", "dampening", "nesterov"} <= options and not saved - {"momentum_buffer"}:
        kind, needed = "sgd", set()
    else:
        raise UnsupportedError(_refusal(group, saved, place))
    for entry in entries:
        if entry and needed - entry.keys():
            raise InputError(f"{place} is damaged: an entry lacks {', '.join(sorted(needed - entry.keys()))}. {AGAIN}")
    return kind


def _is_adam(group: Mapping[str, Any], saved: Set[str]) -> bool:
    """Recognize torch's Adam and AdamW, and optimizers that save and step alike."""
    is_alike = {"betas", "eps", "amsgrad"} <= group.keys() and not saved - {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    return is_alike and not group.get("caution") and not group.keys() & {"bias_correction", "correct_bias", "momentum_decay"}


def _refusal(group: Mapping[str, Any], saved: Set[str], place: str) -> str:
    """Say what was found instead, why M is unknown, and what to do."""
    options = ", ".join(sorted(str(name) for name in group if name != "params"))
    reason = reason_against(group, saved)
    return (
        f"{place} is not of SGD, Adam, NAdam, RAdam, Adamax, GatedAdamW or another Adam that is known: its groups have {options[:200]}, "
        f"its entries {', '.join(sorted(saved))[:200] or 'nothing'}. {reason + '. ' if reason else ''}Its M is unknown. {GIVE}"
    )


def check_group(group: Mapping[str, Any], kind: str, place: str) -> None:
    """Check the options of a group.

    Args:
        group: As saved.
        kind: From `recognize`.
        place: For messages.

    Raises:
        InputError: If one is missing or out of range.
        UnsupportedError: If this group makes its optimizer another one.
    """
    if group.get("caution"):
        raise UnsupportedError(f"{place} is not read. {reason_against(group, set())}. Its M is unknown. {GIVE}")
    try:
        if kind == "gate":
            check_options({"batch_size": None, "dataset_size": None, **LATER_OPTIONS, **group})
            return
        limits = {"lr": math.inf, "weight_decay": math.inf}
        limits |= {"momentum": 1.0} if kind == "sgd" else {"eps": math.inf}
        limits |= {"momentum_decay": math.inf} if kind == "nadam" else {}
        for name, high in limits.items():
            check_number(name, float(group[name]), low=0.0, high=high, open_high=high == 1.0)
        if kind == "sgd":
            check_number("dampening", float(group["dampening"]), low=0.0, high=1.0)
            return
        for beta in group["betas"]:
            check_number("betas", float(beta), low=0.0, high=1.0, open_high=True)
        if len(group["betas"]) != 2:
            raise InputError("`betas` must be two numbers.")
    except KeyError as error:
        raise InputError(f"{place} is damaged: its groups lack {error}. {AGAIN}") from error
    except (InputError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise InputError(f"{place} is damaged: its groups have options that make no sense ({error}). {AGAIN}") from error


def stored_number(value: Any) -> float | int | None:
    """Read a number that may be a tensor.

    Args:
        value: Anything from a file.

    Returns:
        The number; None if it is none, or not finite.
    """
    if isinstance(value, Tensor):
        is_plain = value.numel() == 1 and value.layout is torch.strided and not (value.is_meta or value.is_complex() or value.is_quantized)
        value = value.item() if is_plain else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e300 and math.isfinite(value) else None


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
