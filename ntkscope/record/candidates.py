"""What in a checkpoint may be the weights of a model."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ntkscope.record.facts import SCHEMA

# Keys under which people save a model, the most telling first.
MODEL_KEYS = (
    "model", "state_dict", "model_state_dict", "model_state", "model_weights", "net", "network", "net_state_dict", "module", "weights",
    "params", "parameters", "model_dict", "model_sd", "checkpoint",
)  # fmt: skip
AVERAGED = re.compile(r"(^|[._\d])(ema|swa|averaged?|shadow)", re.IGNORECASE)
# Keys whose tensors are no weights.
NO_MODEL = re.compile(r"(^|_)(optim|sched|scaler|rng|random|sampler|loader|loss|metric|history|callback|loops)", re.IGNORECASE)
EXTRA = "_extra_state"  # torch's name for what a module keeps beside tensors
SEARCH_DEPTH = 4
PLAIN, OTHER, AVERAGE, MIXED = range(4)


@dataclass(frozen=True)
class Candidate:
    """Something that looks like a state_dict.

    Attributes:
        key: Keys that lead to it, joined by dots.
        weights: Its tensors.
        left_out: Names of what is no tensor.
        rank: Smaller is likelier to be the model.
    """

    key: str
    weights: dict[str, Tensor]
    left_out: list[str]
    rank: tuple[int, int, int]

    @property
    def is_known(self) -> bool:
        """Whether its key says that it is the model."""
        return self.rank[0] == PLAIN


def find_candidates(content: Any) -> list[Candidate]:
    """Find what may be a model's weights.

    Args:
        content: From `load_checkpoint`.

    Returns:
        Candidates, the likeliest first; those that mix tensors with other things only if there is nothing better.
    """
    found = list(_search(content, (), SEARCH_DEPTH, set()))
    pure = [each for each in found if each.rank[0] != MIXED]
    return sorted(pure or found, key=lambda each: each.rank)


def _search(value: Any, path: tuple[str, ...], depth: int, seen: set[int]) -> Iterator[Candidate]:
    """Look at a value, and inside of it; what is in two places counts once."""
    if id(value) in seen or (path and NO_MODEL.search(path[-1])):
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):  # in a file that was loaded with unsafe=True
        value = value.state_dict()
    if not isinstance(value, Mapping) or _is_state_of_something_else(value):
        return
    tensors = {_text(name): part for name, part in value.items() if isinstance(part, Tensor)}
    rest = [_text(name) for name, part in value.items() if not isinstance(part, Tensor)]
    if tensors:
        is_pure = all(name.endswith(EXTRA) for name in rest)
        yield Candidate(".".join(path), tensors, rest, _rank(path, is_pure))
        if is_pure:
            return
    if depth:
        for name, part in value.items():
            yield from _search(part, (*path, _text(name)), depth - 1, seen)


def _rank(path: tuple[str, ...], is_pure: bool) -> tuple[int, int, int]:
    """Say how likely it is that something is the model."""
    last = path[-1].lower() if path else ""
    known = MODEL_KEYS.index(last) if last in MODEL_KEYS else len(MODEL_KEYS)
    if not is_pure:
        tier = MIXED
    elif any(AVERAGED.search(name) for name in path):
        tier = AVERAGE
    else:
        tier = PLAIN if not path or last in MODEL_KEYS else OTHER
    return tier, len(path), known


def _is_state_of_something_else(value: Mapping[Any, Any]) -> bool:
    """Say whether a mapping is the state of an optimizer or of a recorder."""
    schema = value.get("schema")
    is_record = isinstance(schema, str) and schema.startswith(SCHEMA.partition("/")[0])
    return is_record or ("state" in value and "param_groups" in value)


def _text(name: Any) -> str:
    """Write a key; it need not be a text."""
    return name if isinstance(name, str) else repr(name) if isinstance(name, int | float | None) else type(name).__name__
