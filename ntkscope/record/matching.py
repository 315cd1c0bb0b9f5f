"""Which parameter each state of an optimizer belongs to: by name where names were saved, else by order and shape."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from ntkscope._checks import InputError
from ntkscope.record.prefixes import best_prefix, without_wrappers

MAX_TABLE = 20_000_000  # entries of the table that counts alignments
NAMED = "Save names with it: make the optimizer from model.named_parameters() (torch 2.6 or later), which stores them."
Shape = tuple[int, ...] | None  # None where an entry has no state yet
Rule = Callable[[str, Tensor], bool]
# How people split parameters into two groups, with and without weight decay.
RULES: dict[str, Rule] = {
    "matrices first": lambda name, value: value.ndim >= 2,
    "biases last": lambda name, value: not name.endswith("bias"),
    "biases and norms last": lambda name, value: not (name.endswith("bias") or "norm" in name.lower() or "ln_" in name.lower()),
}


@dataclass(frozen=True)
class Match:
    """Names of the parameters that an optimizer holds.

    Attributes:
        names: One list per group.
        how: In words.
        left_out: Parameters that it does not hold.
    """

    names: list[list[str]]
    how: str
    left_out: list[str]


def match_parameters(groups: Sequence[Mapping[str, Any]], shapes: Sequence[Shape], parameters: Mapping[str, Tensor], place: str) -> Match:
    """Match what an optimizer holds to parameters.

    Args:
        groups: As saved; `params` lists numbers or names.
        shapes: Of all entries, group after group.
        parameters: Of the model, in its order.
        place: For messages.

    Returns:
        The names.

    Raises:
        InputError: If they do not match, or in more than one way.
    """
    counts = [len(group["params"]) for group in groups]
    names = _saved_names(groups)
    if names is not None:
        order, how = _renamed(names, parameters, place), "by name"
    else:
        order, how = _ordered(counts, shapes, parameters, place)
    _check_shapes(order, shapes, parameters, place)
    starts = [sum(counts[:index]) for index in range(len(counts) + 1)]
    split = [order[start:stop] for start, stop in pairwise(starts)]
    return Match(split, how, [name for name in parameters if name not in set(order)])


def _saved_names(groups: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Read the names that were saved with an optimizer."""
    found: list[str] = []
    for group in groups:
        names, params = group.get("param_names"), group["params"]
        if isinstance(names, list | tuple) and len(names) == len(params):
            found.extend(map(str, names))
        elif all(isinstance(each, str) and not each.isdigit() for each in params):
            found.extend(params)
        else:
            return None
    return found


def _renamed(names: list[str], parameters: Mapping[str, Tensor], place: str) -> list[str]:
    """Take off the prefixes of names."""
    if not all(name in parameters for name in names):
        renamed, _ = without_wrappers(names)
        prefix, _ = best_prefix(renamed.values(), parameters)
        added, count = best_prefix(parameters, set(renamed.values()))
        names = [renamed[name] for name in names]
        if prefix:
            names = [name.removeprefix(prefix) for name in names]
        elif added and count:
            names = [f"{added}{name}" for name in names]
    unknown = next((name for name in names if name not in parameters), None)
    if unknown is not None or len(set(names)) != len(names):
        what = f"{unknown!r}, which the model lacks" if unknown is not None else "a parameter twice"
        raise InputError(f"{place} holds {what}. Give the model that was trained.")
    return names


def _ordered(counts: list[int], shapes: Sequence[Shape], parameters: Mapping[str, Tensor], place: str) -> tuple[list[str], str]:
    """Match by order and shape."""
    pool, total = list(parameters), sum(counts)
    trained = [name for name, value in parameters.items() if value.requires_grad]
    if total > len(pool):
        raise InputError(
            f"{place} holds {total} parameters, the model only {len(pool)}. {_first_difference(pool, shapes, parameters)} Give the model "
            "that was trained."
        )
    if total == len(trained) and _fit(trained, shapes, parameters):
        pool = trained
    if total < len(pool):
        return _embedded(pool, shapes, parameters, place), "by order and shape; parameters that it does not hold were frozen"
    found: dict[tuple[str, ...], str] = {}
    if _fit(pool, shapes, parameters):
        found[tuple(pool)] = "by order and shape"
    if len(counts) == 2:
        for title, rule in RULES.items():
            for is_first in (True, False):
                first = [name for name in pool if rule(name, parameters[name]) is is_first]
                order = [*first, *(name for name in pool if name not in set(first))]
                if len(first) == counts[0] and _fit(order, shapes, parameters):
                    found.setdefault(tuple(order), f"by order and shape, groups split with {title if is_first else f'{title}, reversed'}")
    if len(found) > 1:
        ways = list(found)
        differ = next(k for k, (a, b) in enumerate(zip(*ways[:2], strict=True)) if a != b)
        raise InputError(
            f"{place} can be matched in {len(found)} ways: its entry {differ} may be {ways[0][differ]!r} or {ways[1][differ]!r}, "
            f"of the same shape. {NAMED}"
        )
    if not found:
        raise InputError(
            f"{place} does not match the model by order and shape. {_first_difference(pool, shapes, parameters)} Give the model that was "
            f"trained; if its groups are split in an unusual way: {NAMED}"
        )
    order, how = found.popitem()
    return list(order), how


def _embedded(pool: list[str], shapes: Sequence[Shape], parameters: Mapping[str, Tensor], place: str) -> list[str]:
    """Find the one way to leave parameters out that keeps the order."""
    sizes = [tuple(parameters[name].shape) for name in pool]
    start = f"{place} holds {len(shapes)} of the model's {len(pool)} parameters; the others were frozen or left out."
    advice = f"Set requires_grad of the model as in training. {NAMED}"
    if len(shapes) * len(pool) > MAX_TABLE:
        raise InputError(f"{start} There are too many to find out which. {advice}")
    # ways[j]: in how many ways the first j entries lie among the parameters seen so far, counted up to 2.
    history = [[1] + [0] * len(shapes)]
    for size in sizes:
        last = history[-1]
        history.append([1] + [min(2, last[j + 1] + (last[j] if shapes[j] in (None, size) else 0)) for j in range(len(shapes))])
    if history[-1][-1] == 0:
        raise InputError(f"{start} No choice fits the shapes. {_first_difference(pool, shapes, parameters)} {advice}")
    if history[-1][-1] > 1:
        raise InputError(f"{start} Several choices fit the shapes. {advice}")
    chosen: list[str] = []
    at = len(shapes)
    for index in range(len(pool), 0, -1):
        if at and history[index - 1][at] == 0:
            chosen.append(pool[index - 1])
            at -= 1
    return chosen[::-1]


def _fit(order: Sequence[str], shapes: Sequence[Shape], parameters: Mapping[str, Tensor]) -> bool:
    """Say whether names have the shapes of the entries."""
    return len(order) == len(shapes) and all(
        shape is None or tuple(parameters[name].shape) == shape for name, shape in zip(order, shapes, strict=True)
    )


def _first_difference(pool: list[str], shapes: Sequence[Shape], parameters: Mapping[str, Tensor]) -> str:
    """Say where order and shapes first disagree."""
    for index, (name, shape) in enumerate(zip(pool, shapes, strict=False)):
        if shape is not None and tuple(parameters[name].shape) != shape:
            return f"Its entry {index} has shape {list(shape)}, the model's {name!r} {list(parameters[name].shape)}."
    return "The shapes that both have agree."


def _check_shapes(order: list[str], shapes: Sequence[Shape], parameters: Mapping[str, Tensor], place: str) -> None:
    """Check entries that were matched by name."""
    for name, shape in zip(order, shapes, strict=True):
        if shape is not None and tuple(parameters[name].shape) != shape:
            raise InputError(
                f"{place} has a state of shape {list(shape)} for {name!r}, which has {list(parameters[name].shape)}. Give the model that "
                "was trained; states of sharded or flattened parameters must be gathered first."
            )
