"""The state of an optimizer inside a checkpoint, in the terms of the theory: M, time and decay, as `optimizers.py` defines them.

The optimizer is made again around the saved state, nothing is stepped or copied, and M is read from it as from a live one.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from ntkscope._checks import InputError, UnsupportedError, check_finite
from ntkscope._display import Displayed
from ntkscope.gate.optimizer import GatedAdamW
from ntkscope.record.matching import Match, match_parameters
from ntkscope.record.optimizer_kinds import AGAIN, REAL, check_group, recognize, shape_of
from ntkscope.record.optimizers import Clock, check_supported, mechanics, momentum_lag, stability_edge

SEARCH_DEPTH = 4


@dataclass(frozen=True)
class StoredOptimizer(Displayed):
    """What an optimizer in a checkpoint did in its last step.

    Attributes:
        source: The file.
        key: Keys that lead to it, joined by dots.
        kind: "sgd", "adam" (also AdamW) or "gate".
        matched: How its entries were matched to parameters.
        others: Keys of other optimizers in the file.
        left_out: Parameters that it does not hold.
        step: Steps taken; None where it does not count them.
        learning_rate: The largest over groups.
        learning_rates: One per group.
        precond: Diagonal of M by parameter name, scaled by how fast its group moves beside the fastest; zero before its first step.
        ungated: The same without the gate.
        gates: q by parameter name; None without a gate.
        decay: Direction of weight decay; None where no group decays.
        momentum_lag: Steps by which momentum makes the flow lag.
        stability_edge: θ of theory.md section 2.
    """

    source: str
    key: str
    kind: str
    matched: str
    others: tuple[str, ...]
    left_out: tuple[str, ...]
    step: int | None
    learning_rate: float
    learning_rates: tuple[float, ...]
    precond: dict[str, Tensor | float]
    ungated: dict[str, Tensor | float]
    gates: dict[str, Tensor] | None
    decay: dict[str, Tensor] | None
    momentum_lag: float
    stability_edge: float | None


def find_optimizers(content: Any) -> list[tuple[str, dict[str, Any]]]:
    """Find states of optimizers anywhere in a checkpoint.

    Args:
        content: From `load_checkpoint`.

    Returns:
        Keys joined by dots, and the state with its `state` by entry and its `param_groups`.
    """
    return list(_search(content, "", SEARCH_DEPTH, set()))


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


def read_optimizer(content: Any, parameters: Mapping[str, Tensor], source: str | Path, *, key: str | None = None) -> StoredOptimizer:
    """Read M and time from an optimizer's state.

    Args:
        content: From `load_checkpoint`.
        parameters: The model's `named_parameters()`, with the weights of the checkpoint; or `Unwrapped.parameters()`.
        source: The file, for messages.
        key: Which optimizer, if there are several.

    Returns:
        The optimizer's state, matched to the parameters.

    Raises:
        InputError: If there is none, it is damaged, or it does not match the parameters.
        UnsupportedError: If it is of another optimizer than SGD, Adam, AdamW and GatedAdamW.
    """
    found = find_optimizers(content)
    if key is not None:
        found = [each for each in found if each[0] == key]
    if not found:
        where = "" if key is None else f" under {key!r}"
        raise InputError(f"{source} holds no state of an optimizer{where}. Save optimizer.state_dict() beside the model's.")
    read, failed = [], []
    for name, state in found:
        try:
            read.append(_read(state, parameters, str(source), name))
        except (InputError, UnsupportedError) as error:
            failed.append(error)
    if not read:
        raise failed[0]
    if len(read) > 1:
        names = ", ".join(each.key or "(top)" for each in read)
        raise InputError(f"{source} holds several optimizers that match ({names}). Choose one with key={read[0].key!r}.")
    others = tuple(name for name, _ in find_optimizers(content) if name != read[0].key)
    return replace(read[0], others=others)


def _search(value: Any, path: str, depth: int, seen: set[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Look at a value, and inside of it."""
    if not isinstance(value, Mapping | list | tuple) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping) and isinstance(value.get("param_groups"), list | tuple):
        groups, state = value["param_groups"], value.get("state", {})
        is_sound = groups and all(isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple) for group in groups)
        if is_sound and isinstance(state, Mapping):
            yield path, {"state": state, "param_groups": list(groups)}
            return
    if depth:
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, part in parts:
            if isinstance(part, Mapping | list | tuple) and isinstance(name, str | int):
                yield from _search(part, f"{path}.{name}" if path else str(name), depth - 1, seen)


def _read(state: dict[str, Any], parameters: Mapping[str, Tensor], source: str, key: str) -> StoredOptimizer:
    """Read one optimizer."""
    place = f"{source}, the optimizer's state" + (f" under `{key}`" if key else "")
    groups, entries = state["param_groups"], _entries(state)
    kind = recognize(groups[0], entries, place)
    for group in groups:
        check_group(group, kind, place)
    match = match_parameters(groups, [shape_of(entry, place) for entry in entries], parameters, place)
    odd = next((name for names in match.names for name in names if parameters[name].dtype not in REAL), None)
    if odd is not None:
        raise UnsupportedError(f"{place} holds {odd!r}, which is {parameters[odd].dtype}. Load the model in float32 or bfloat16.")
    held = {name: nn.Parameter(parameters[name].detach().cpu(), requires_grad=False) for names in match.names for name in names}
    optimizer = _remade(kind, groups, entries, match, held, place)
    check_supported(optimizer, None)
    steps = [int(found) for entry in entries if (found := stored_number(entry.get("step"))) is not None]
    clock = Clock(step=max(steps, default=0), buildup=[_steady(group) for group in groups])
    clock.tick(optimizer)
    known = mechanics(optimizer, held, clock, at=dict(held), precond=None)
    for name, diagonal in known.precond.items():
        if isinstance(diagonal, Tensor):
            check_finite(f"M of {name!r}, from {place},", diagonal, AGAIN)
    return StoredOptimizer(
        source=source,
        key=key,
        kind=kind,
        matched=match.how,
        others=(),
        left_out=tuple(match.left_out),
        step=max(steps, default=None),
        learning_rate=max(float(group["lr"]) for group in groups),
        learning_rates=tuple(float(group["lr"]) for group in groups),
        precond=known.precond,
        ungated=known.ungated,
        gates=known.gates,
        decay=known.decay,
        momentum_lag=momentum_lag(optimizer),
        stability_edge=stability_edge(optimizer),
    )


def _entries(state: dict[str, Any]) -> list[dict[str, Any]]:
    """List the states of all entries, group after group; empty ones have had no gradient. Some formats write numbers as text."""
    found = []
    for group in state["param_groups"]:
        for each in group["params"]:
            keys = (each, str(each)) if isinstance(each, str | int) else ()
            entry = next((state["state"][key] for key in keys if key in state["state"]), None)
            found.append(dict(entry) if isinstance(entry, Mapping) else {})
    return found


def _remade(
    kind: str, groups: Sequence[Mapping[str, Any]], entries: list[dict[str, Any]], match: Match, held: dict[str, nn.Parameter], place: str
) -> Optimizer:
    """Make the optimizer again, around its saved state."""
    maker: Any = {"sgd": SGD, "adam": Adam, "gate": GatedAdamW}[kind]
    optimizer: Optimizer = maker([{"params": [held[name] for name in names]} for names in match.names], lr=0.1)
    order = [held[name] for names in match.names for name in names]
    for own, saved in zip(optimizer.param_groups, groups, strict=True):
        own.update({name: value for name, value in saved.items() if name != "params"})
    for parameter, entry in zip(order, entries, strict=True):
        if "step" in entry:
            step = stored_number(entry["step"])
            if step is None or step < 1:
                raise InputError(f"{place} is damaged: an entry is at step {step}. {AGAIN}")
        if entry:
            optimizer.state[parameter] = entry
    return optimizer


def _steady(group: Mapping[str, Any]) -> float:
    """Compute c of SGD's momentum after many steps, which a state dict of SGD does not count."""
    beta = float(group.get("momentum", 0.0) or 0.0)
    return (1 - float(group["dampening"])) / (1 - beta) if beta else 0.0
