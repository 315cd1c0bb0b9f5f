"""What one checkpoint says of its moment in a run: step, learning rate, and whether M can be read from its optimizer."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ntkscope._checks import InputError, UnsupportedError
from ntkscope._display import Displayed
from ntkscope.record.checkpoint import load_checkpoint, stored_step
from ntkscope.record.optimizer_state import StoredOptimizer, find_optimizers, read_optimizer, stored_number
from ntkscope.record.optimizers import describe
from ntkscope.record.weights import COUNTER, Unwrapped, check_fit, unwrap

LOGGER = logging.getLogger("ntkscope")
FAR = 10**6  # steps


@dataclass(frozen=True)
class Pace(Displayed):
    """How fast an optimizer's fastest group goes.

    Attributes:
        rate: Its learning rate.
        momentum: β of SGD; 0 without, and for the Adam family, whose mean gradient is a mean.
        dampening: Of SGD's momentum.
        nesterov: Whether momentum is Nesterov's.
    """

    rate: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def time(self, start: int, stop: int) -> float:
        """Compute optimizer time between two steps of a run that keeps this pace from its first step on.

        Args:
            start: Steps taken before.
            stop: Steps taken in the end.

        Returns:
            rate * Σ c_t, with c_1 = 1 and c_t = β c_{t−1} + (1 − d), in closed form; Nesterov rate * Σ (1 + β c_t).

        Example:
            >>> Pace(0.5, momentum=0.5).time(0, 2)  # 0.5 * (1 + 1.5)
            1.25

        Source:
            theory.md section 2, "Real optimizers".
        """
        count, beta = stop - start, self.momentum
        if not beta:
            return self.rate * count
        if beta == 1:
            total = count + (1 - self.dampening) * (stop * (stop - 1) - start * (start - 1)) / 2
        else:
            limit = (1 - self.dampening) / (1 - beta)
            total = count * limit + (1 - limit) * (beta**start - beta**stop) / (1 - beta)
        return self.rate * (count + beta * total if self.nesterov else total)

    @property
    def settled(self) -> float:
        """Optimizer time of a step far from the first, where momentum has built up."""
        return self.time(FAR, FAR + 1)


@dataclass(frozen=True)
class SavedMoment(Displayed):
    """What a checkpoint says of itself, without its tensors.

    Attributes:
        path: The file.
        step: Optimizer steps taken; None where it does not say.
        pace: From its optimizer; None without one.
        rates: Learning rates of all groups; empty without an optimizer.
        kind: Of an optimizer whose M can be read, "sgd", "adam" or "gate"; empty where none can.
        held: Trained parameters that it holds, in the model's order.
        has_stepped: Whether it has an M yet.
        reason: Why M cannot be read; empty where it can.
        notes: What the optimizer's state leaves open.
    """

    path: Path
    step: int | None
    pace: Pace | None
    rates: tuple[float, ...]
    kind: str
    held: tuple[str, ...]
    has_stepped: bool
    reason: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class CheckpointReader:
    """Reads checkpoints of one model; none is kept in memory.

    Attributes:
        model: The model.
        allow_globals: As for `load_checkpoint`.
        unsafe: As for `load_checkpoint`.
    """

    model: nn.Module
    allow_globals: Sequence[str] = ()
    unsafe: bool = False

    def survey(self, paths: Sequence[Path]) -> list[SavedMoment]:
        """Look at all files once; what was done to find their weights is logged: all of the first, of others what differs.

        Args:
            paths: The files.

        Returns:
            What each says.

        Raises:
            InputError: If one is no checkpoint, or its weights do not fit the model.
        """
        moments: list[SavedMoment] = []
        first: list[str] = []
        for path in paths:
            content = self._load(path)
            found = self._unwrap(content, path)
            check_fit(found)
            moment, optimizer = self._moment(content, path)
            said = [sentence.removeprefix(f"{path}: ") for sentence in (*found.sentences(), *_counter(found), *_optimizer_words(optimizer))]
            for sentence in said:
                if sentence not in first:
                    LOGGER.info("%s: %s", path, sentence)
            first = first or said
            moments.append(moment)
        return moments

    def weights(self, path: Path) -> Unwrapped:
        """Read a file's weights, named as the model names them.

        Args:
            path: The file.

        Returns:
            The weights, compared with the model.
        """
        return self._unwrap(self._load(path), path)

    def optimizer(self, path: Path) -> StoredOptimizer:
        """Read M at the weights that the model has now: weight decay acts on them.

        Args:
            path: The file that holds the optimizer.

        Returns:
            The optimizer's state.
        """
        return read_optimizer(self._load(path), dict(self.model.named_parameters()), path)

    def has_same_weights(self, first: Path, second: Path) -> bool:
        """Compare the weights of two files.

        Args:
            first: A file.
            second: Another.

        Returns:
            Whether they are identical.
        """
        one, other = (self.weights(path).weights for path in (first, second))
        return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())

    def _load(self, path: Path) -> Any:
        """Load a file."""
        return load_checkpoint(path, allow_globals=self.allow_globals, unsafe=self.unsafe)

    def _unwrap(self, content: Any, path: Path) -> Unwrapped:
        """Find the weights."""
        return unwrap(content, path, model=self.model)

    def _moment(self, content: Any, path: Path) -> tuple[SavedMoment, StoredOptimizer | None]:
        """Read what a file says of itself."""
        parameters = dict(self.model.named_parameters())
        optimizer, reason = None, ""
        try:
            optimizer = read_optimizer(content, parameters, path)
        except (InputError, UnsupportedError) as error:
            reason = str(error)
        held = () if optimizer is None else tuple(n for n, p in parameters.items() if p.requires_grad and n in optimizer.precond)
        if optimizer is not None and not held:
            reason = f"The optimizer in {path} holds no parameter that the model trains."
        groups = _groups(content, None if optimizer is None else optimizer.key)
        step = stored_step(content)
        moment = SavedMoment(
            path=path,
            step=optimizer.step if step is None and optimizer is not None else step,
            pace=_pace(groups),
            rates=tuple(rate for group in groups if (rate := stored_number(group.get("lr"))) is not None),
            kind="" if optimizer is None or reason else optimizer.kind,
            held=held,
            has_stepped=optimizer is not None and optimizer.has_stepped,
            reason=reason,
            notes=() if optimizer is None else optimizer.notes,
        )
        return moment, optimizer


def _counter(found: Unwrapped) -> list[str]:
    """Say that counters of batches are missing, where they are."""
    count = sum(name.rpartition(".")[2] == COUNTER for name in found.missing)
    return [f"{count} counters of batches (`{COUNTER}`) are missing; they play no part in evaluation."] if count else []


def _optimizer_words(optimizer: StoredOptimizer | None) -> list[str]:
    """Say how an optimizer was matched."""
    if optimizer is None:
        return []
    left_out = f" Not held by it, so taken as frozen: {', '.join(optimizer.left_out)}." if optimizer.left_out else ""
    where = f" under `{optimizer.key}`" if optimizer.key else ""
    return [f"Optimizer{where}: {describe(optimizer.optimizer)}, matched to the parameters {optimizer.matched}.{left_out}"]


def _groups(content: Any, key: str | None) -> list[Mapping[str, Any]]:
    """Take the groups of the optimizer that was matched, else of the first that has a learning rate."""
    for name, state in find_optimizers(content):
        groups = state["param_groups"]
        if name == key or (key is None and any(stored_number(group.get("lr")) is not None for group in groups)):
            return groups
    return []


def _pace(groups: Sequence[Mapping[str, Any]]) -> Pace | None:
    """Take the pace of the fastest group."""
    paces = []
    for group in groups:
        rate = stored_number(group.get("lr"))
        if rate is not None:
            # Others have a momentum too, of another kind; only SGD has all three.
            beta, dampening = (_number(group, name) if "nesterov" in group else 0.0 for name in ("momentum", "dampening"))
            paces.append(Pace(float(rate), beta, dampening, bool(group.get("nesterov"))))
    return max(paces, key=lambda pace: pace.settled, default=None)


def _number(group: Mapping[str, Any], name: str) -> float:
    """Read an option, 0 where it is not there."""
    return float(stored_number(group.get(name)) or 0.0)
