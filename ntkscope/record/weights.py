"""The weights of a model inside a checkpoint: where they lie, what was taken off their names, and how they fit a model."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ntkscope._checks import InputError, UnsupportedError, closest
from ntkscope._display import Displayed
from ntkscope.record.candidates import Candidate, find_candidates
from ntkscope.record.prefixes import best_prefix, parts_of, without_wrappers

LISTED = 8  # names written out in a sentence
COUNTER = "num_batches_tracked"  # of BatchNorm: files of torch before 1.0 lack it, and nothing in evaluation needs it
STATISTICS = ("running_mean", "running_var", COUNTER)


@dataclass(frozen=True)
class Unwrapped(Displayed):
    """The weights found in a checkpoint, what was done to find them, and how they fit a model.

    Attributes:
        source: The file.
        key: Keys that lead to the weights, joined by dots; empty if they are all there is.
        prefixes: What was taken off the names, in that order.
        added: What was put before the names because the model has it.
        others: Keys of other weights in the file, each of which `key=` chooses.
        left_out: Names of entries that are no tensors, or lie outside of the prefix that was taken off.
        weights: Tensors by parameter or buffer name.
        compared: Whether a model was given to compare with.
        missing: Names that the model has and the file lacks.
        extra: Names that the file has and the model lacks.
        reshaped: Names whose shape differs, with both shapes.
        recast: Names whose kind of number differs, with both; they are converted when they are loaded.
        tied: Names that the file lacks because the model holds one tensor under two names; safetensors files have such a tensor once.
    """

    source: str
    key: str
    prefixes: tuple[str, ...]
    added: str
    others: tuple[str, ...]
    left_out: tuple[str, ...]
    weights: dict[str, Tensor]
    compared: bool = False
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    reshaped: dict[str, str] = field(default_factory=dict)
    recast: dict[str, str] = field(default_factory=dict)
    tied: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(self.sentences())

    @property
    def fits(self) -> bool:
        """Whether the model's `load_state_dict` takes these weights."""
        return self.compared and not (self.missing or self.extra or self.reshaped)

    def parameters(self) -> dict[str, Tensor]:
        """Guess which weights are parameters, without a model: statistics, whole numbers and tied doubles are not.

        Returns:
            Tensors by name, in the order of the file.
        """
        seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
        found: dict[str, Tensor] = {}
        for name, value in self.weights.items():
            place = (value.data_ptr(), tuple(value.shape), value.stride())
            if value.is_floating_point() and name.rpartition(".")[2] not in STATISTICS and (place not in seen or not value.numel()):
                seen.add(place)
                found[name] = value
        return found

    def sentences(self) -> list[str]:
        """Say what was done and what was found.

        Returns:
            Sentences for people.
        """
        numbers = [value.numel() for name, value in self.weights.items() if name not in self.tied]
        where = f"under `{self.key}`" if self.key else "at the top"
        said = [f"{self.source}: {len(numbers)} tensors with {sum(numbers):,} numbers, found {where}."]
        if self.others:
            said.append(f"There are other weights too: {_listed(self.others)}. To take some of these instead, save them alone in a file.")
        if self.prefixes:
            said.append(f"Taken off the names: {', '.join(f'`{prefix}`' for prefix in self.prefixes)}.")
        if self.added:
            said.append(f"Put before the names: `{self.added}`.")
        if self.left_out:
            said.append(f"Left out, being no weights of this model: {_listed(self.left_out)}.")
        if self.tied:
            said.append(f"Stored under another name, to which the model ties them: {_listed(self.tied)}.")
        for label, names in (("Missing in the file", self.missing), ("Not in the model", self.extra)):
            if names:
                said.append(f"{label}: {_listed(names)}.")
        if self.reshaped:
            said.append(f"Of another shape: {_listed([f'{name} ({what})' for name, what in self.reshaped.items()])}.")
        if self.recast:
            said.append(f"Converted when loaded: {_listed([f'{name} ({what})' for name, what in self.recast.items()])}.")
        if self.fits:
            said.append("They fit the model.")
        return said


def unwrap(content: Any, source: str | Path, *, model: nn.Module | None = None, key: str | None = None) -> Unwrapped:
    """Find a model's weights inside a checkpoint.

    Of several candidates the plain model is taken, not its moving average; wrappers' prefixes are taken off. With a model, so is
    whatever other prefix makes most names fit, for example the `model.` of Lightning.

    Args:
        content: From `load_checkpoint`.
        source: The file, for messages.
        model: To compare with.
        key: Which weights, if there are several: keys joined by dots, or the last of them.

    Returns:
        The weights, and what was done.

    Raises:
        InputError: If there are none, it is not clear which, or what the model ties differs in the file.
        UnsupportedError: If they are not plain dense tensors.
    """
    chosen, others = _choose(find_candidates(content), source, key)
    found = Unwrapped(
        source=str(source),
        key=chosen.key,
        prefixes=(),
        added="",
        others=tuple(other.key or "(top)" for other in others),
        left_out=tuple(chosen.left_out),
        weights={},
    )
    renamed, prefixes = without_wrappers(chosen.weights)
    weights = {renamed[name]: value for name, value in chosen.weights.items()}
    expected = {} if model is None else {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    if expected:
        found, weights, prefixes = _fitted(found, chosen.weights, weights, prefixes, expected)
    if model is not None:
        # Buffers that the model does not save, but an older version of it did.
        unsaved = {name for name, _ in model.named_buffers()} - expected.keys()
        old = tuple(name for name in weights if name in unsaved)
        found = replace(found, left_out=(*found.left_out, *old))
        weights = {name: value for name, value in weights.items() if name not in unsaved}
    for name, value in weights.items():
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            kind = "quantized" if value.is_quantized else "without data" if value.is_meta else str(value.layout).removeprefix("torch.")
            raise UnsupportedError(f"{source}: the weight {name!r} is {kind}. Save a state_dict of plain dense tensors.")
    tied = _tied(weights, expected, source)
    weights = weights | tied
    return replace(found, weights=weights, prefixes=prefixes, tied=tuple(tied), **_differences(weights, expected, model is not None))


def check_fit(found: Unwrapped) -> None:
    """Check that weights fit the model they were compared with.

    Args:
        found: From `unwrap`.

    Raises:
        InputError: If entries are missing, extra, or of another shape; the message names near ones.
    """
    missing = [name for name in found.missing if name.rpartition(".")[2] != COUNTER]
    shapes = [f"{name} ({what})" for name, what in found.reshaped.items()]
    kinds = (("missing", missing), ("extra", found.extra), ("of another shape", shapes))
    parts = [f"{kind} {_listed(names)}" for kind, names in kinds if names]
    if parts:
        near = closest(missing[0], found.extra).replace("Did you mean", f"Was {missing[0]!r} renamed from") if missing else ""
        raise InputError(
            f"The weights in {found.source} do not fit the model: {'; '.join(parts)}. Is --model the model that was trained?{near}"
        )


def load_weights(model: nn.Module, found: Unwrapped) -> None:
    """Load weights that were compared with the model.

    Args:
        model: The model.
        found: From `unwrap`, with this model.

    Raises:
        InputError: If entries are missing, extra, or of another shape.
    """
    check_fit(found)
    model.load_state_dict(found.weights, strict=False)  # what may be missing was checked


@contextmanager
def weights_put_back(model: nn.Module) -> Generator[None, None, None]:
    """Put the weights of a model back when the block ends, however it ends.

    Args:
        model: Any module.

    Yields:
        Nothing.
    """
    own = {name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    try:
        yield
    finally:
        model.load_state_dict(own, strict=False)  # extra states that are no tensors are not touched


def _choose(candidates: list[Candidate], source: str | Path, key: str | None) -> tuple[Candidate, list[Candidate]]:
    """Choose among candidates."""
    if not candidates:
        raise InputError(
            f"{source} holds no state_dict, neither at the top nor inside. Run `ntkscope inspect {source}` to see what it holds, and save "
            "model.state_dict()."
        )
    if key is not None:
        matches = [each for each in candidates if each.key == key] or [each for each in candidates if each.key.endswith(f".{key}")]
        if len(matches) != 1:
            what = "several weights" if matches else "no weights"
            raise InputError(f"{source} has {what} under {key!r}; choose one of {_listed([each.key or '(top)' for each in candidates])}.")
        return matches[0], [each for each in candidates if each is not matches[0]]
    best = min(candidates, key=lambda each: each.rank)
    rivals = [each for each in candidates if each.rank[0] == best.rank[0] and not each.is_known]
    if not best.is_known and len(rivals) > 1:
        raise InputError(
            f"{source} holds several models: {_listed([each.key for each in rivals])}. Choose one with key={rivals[0].key!r}, "
            "or save its state_dict alone."
        )
    return best, [each for each in candidates if each is not best]


def _fitted(
    found: Unwrapped, raw: dict[str, Tensor], weights: dict[str, Tensor], prefixes: tuple[str, ...], expected: dict[str, Tensor]
) -> tuple[Unwrapped, dict[str, Tensor], tuple[str, ...]]:
    """Choose names that fit a model: as they are, without wrappers, without a further prefix, or with one that the model has."""
    prefix, count = best_prefix(weights, expected)
    plain = sum(name in expected for name in raw)
    if plain and plain >= count:
        return found, raw, ()
    if count:
        inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        outside = tuple(name for name in weights if not name.startswith(prefix))
        return replace(found, left_out=(*found.left_out, *outside)), inside, (*prefixes, *parts_of(prefix))
    added, count = best_prefix(expected, weights)
    if count:
        return replace(found, added=added), {f"{added}{name}": value for name, value in weights.items()}, prefixes
    return found, weights, prefixes


def _tied(weights: dict[str, Tensor], expected: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Find what a file leaves out because the model holds it under another name too."""
    peers: dict[tuple[Any, ...], list[str]] = {}
    for name, value in expected.items():
        if value.numel() and not value.is_meta:
            peers.setdefault((value.device, value.data_ptr(), tuple(value.shape), value.stride()), []).append(name)
    found: dict[str, Tensor] = {}
    for names in peers.values():
        stored = [name for name in names if name in weights]
        for other in stored[1:]:
            if not torch.equal(weights[stored[0]], weights[other]):
                raise InputError(
                    f"{source}: {stored[0]} and {other} are one tensor in the model, and two different ones in the file. Is --model the "
                    "model that was trained? Make one that does not tie them."
                )
        found |= {name: weights[stored[0]] for name in names if stored and name not in weights}
    return found


def _differences(weights: dict[str, Tensor], expected: dict[str, Tensor], compared: bool) -> dict[str, Any]:
    """Compare weights with those of a model."""
    if not compared:
        return {}
    both = [name for name in expected if name in weights]
    shapes = {name: (tuple(weights[name].shape), tuple(expected[name].shape)) for name in both}
    return {
        "compared": True,
        "missing": tuple(name for name in expected if name not in weights),
        "extra": tuple(name for name in weights if name not in expected),
        "reshaped": {name: f"file {list(own)}, model {list(other)}" for name, (own, other) in shapes.items() if own != other},
        "recast": {
            name: f"{_kind(weights[name])} to {_kind(expected[name])}" for name in both if weights[name].dtype != expected[name].dtype
        },
    }


def _kind(value: Tensor) -> str:
    """Write a kind of number."""
    return str(value.dtype).removeprefix("torch.")


def _listed(names: Any) -> str:
    """Write names, not too many."""
    few = [name if str(name).isprintable() else repr(name) for name in list(names)[:LISTED]]
    return ", ".join(few) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
