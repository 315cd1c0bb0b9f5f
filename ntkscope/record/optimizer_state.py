"""The state of an optimizer inside a checkpoint, in the terms of the theory: M, time and decay, as `optimizers.py` defines them.

The optimizer is made again around the saved state, nothing is stepped or copied, and M is read from it as from a live one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Adamax, NAdam, Optimizer, RAdam

from ntkscope._checks import InputError, UnsupportedError, check_finite
from ntkscope._display import Displayed
from ntkscope.gate.optimizer import GatedAdamW
from ntkscope.record.foreign_states import DIAGONALS, as_adam, notes_on
from ntkscope.record.matching import Match, match_parameters
from ntkscope.record.optimizer_kinds import AGAIN, REAL, check_group, recognize, shape_of, stored_number
from ntkscope.record.optimizers import Clock, Mechanics, PrecondFn, check_supported, mechanics, momentum_lag, stability_edge

SEARCH_DEPTH = 4
# What else is an Adam is made as one, with a diagonal of its own.
MAKERS: dict[str, type[Optimizer]] = {"sgd": SGD, "nadam": NAdam, "radam": RAdam, "adamax": Adamax, "gate": GatedAdamW}


@dataclass(frozen=True)
class StoredOptimizer(Displayed):
    """What an optimizer in a checkpoint did in its last step.

    Attributes:
        source: The file.
        key: Keys that lead to it, joined by dots.
        kind: "sgd", "adam" (also AdamW), "nadam", "radam", "adamax", "fused adam", "transformers adamw", "adabelief" or "gate".
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
        optimizer: Made again around the saved state, for its settings.
        notes: What the state leaves open, and how it was taken.
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
    optimizer: Optimizer = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def has_stepped(self) -> bool:
        """Whether M is known: SGD's always is, that of the Adam family after its first step."""
        return any(bool((value != 0).any()) if isinstance(value, Tensor) else value != 0 for value in self.ungated.values())

    def mechanics(self, names: Sequence[str], device: torch.device) -> Mechanics:
        """Put what was read as a recorder puts what a live optimizer did.

        Args:
            names: Of the trained parameters, in the order of the record.
            device: Of the model.

        Returns:
            M, decay and gates of these parameters.
        """

        def placed(found: dict[str, Tensor | float]) -> dict[str, Tensor | float]:
            return {name: value.to(device) if isinstance(value := found[name], Tensor) else value for name in names}

        decay, gates, opened = self.decay, self.gates, None
        if gates is not None:
            opened = torch.tensor([float((gates[name] > 0.5).double().mean()) for name in names], dtype=torch.float64)
        return Mechanics(
            precond=placed(self.precond),
            decay=None if decay is None else {name: decay[name].to(device) for name in names},
            gate_open=opened,
            ungated=placed(self.ungated),
            gates=None if gates is None else {name: gates[name].to(device) for name in names},
        )


def find_optimizers(content: Any) -> list[tuple[str, dict[str, Any]]]:
    """Find states of optimizers anywhere in a checkpoint.

    Args:
        content: From `load_checkpoint`.

    Returns:
        Keys joined by dots, and the state with its `state` by entry and its `param_groups`.
    """
    return list(_search(content, "", SEARCH_DEPTH, set()))


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
        UnsupportedError: If it is of an optimizer whose M is not known from what it stores.
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
    lacking = [name for name in read[0].left_out if parameters[name].requires_grad]
    if others and lacking and key is None:
        raise InputError(
            f"{source} holds several optimizers ({', '.join((read[0].key, *others))}), and the one that matches does not hold "
            f"{lacking[0]}, which the model trains: M is read where one optimizer holds all that is trained."
        )
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
    groups, entries = state["param_groups"], entries_of(state)
    kind = recognize(groups[0], entries, place)
    for group in groups:
        check_group(group, kind, place)
    notes = notes_on(kind, groups)
    groups, entries = as_adam(kind, groups, entries)
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
    known = mechanics(optimizer, held, clock, at=dict(held), precond=_foreign_precond(kind))
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
        optimizer=optimizer,
        notes=notes,
    )


def entries_of(state: dict[str, Any]) -> list[dict[str, Any]]:
    """List the states of all entries, group after group.

    Args:
        state: From `find_optimizers`.

    Returns:
        One per entry; empty for those that have had no gradient.
    """
    # Some formats write numbers as text.
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
    maker: Any = MAKERS.get(kind, Adam)
    optimizer: Optimizer = maker([{"params": [held[name] for name in names]} for names in match.names], lr=0.1)
    order = [held[name] for names in match.names for name in names]
    for own, saved in zip(optimizer.param_groups, groups, strict=True):
        own.update({name: value for name, value in saved.items() if name != "params"})
    for parameter, entry in zip(order, entries, strict=True):
        if "mu_product" in entry and not 0 <= (stored_number(entry["mu_product"]) or 0.0) < 1:
            raise InputError(f"{place} is damaged: an entry's mu_product is outside [0, 1). {AGAIN}")
        if "step" in entry:
            step = stored_number(entry["step"])
            if step is None or step < 1:
                raise InputError(f"{place} is damaged: an entry is at step {step}. {AGAIN}")
        if entry:
            optimizer.state[parameter] = entry
    return optimizer


def _foreign_precond(kind: str) -> PrecondFn | None:
    """Give the M of an optimizer that torch does not have; None for one that `mechanics` knows."""
    diagonal = DIAGONALS.get(kind)
    if diagonal is None:
        return None

    def precond(optimizer: Optimizer, parameter: nn.Parameter) -> Tensor | float:
        state = optimizer.state.get(parameter)
        group = next(group for group in optimizer.param_groups if any(held is parameter for held in group["params"]))
        return diagonal(group, state) if state else 0.0

    return precond


def _steady(group: Mapping[str, Any]) -> float:
    """Compute c of SGD's momentum after many steps, which a state dict of SGD does not count."""
    beta = float(group.get("momentum", 0.0) or 0.0)
    return (1 - float(group["dampening"])) / (1 - beta) if beta else 0.0
