"""Checkpoints of every common kind, read without running any of their code."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntkscope.record.facts import SCHEMA
from ntkscope.record.formats.distributed import read_distributed
from ntkscope.record.formats.exported import read_exported
from ntkscope.record.formats.folder import read_folder
from ntkscope.record.formats.guards import Trust
from ntkscope.record.formats.kinds import kind_of
from ntkscope.record.formats.safetensor_files import read_index, read_safetensors
from ntkscope.record.formats.script import read_script
from ntkscope.record.formats.torch_file import read_torch_legacy, read_torch_zip
from ntkscope.record.optimizer_kinds import stored_number
from ntkscope.record.optimizer_state import find_optimizers
from ntkscope.record.weights import unwrap

STEP_KEYS = ("step", "global_step", "steps", "iteration", "iter", "num_steps", "current_step")
TRAINERS = ("trainer_state", "trainer", "progress", "meta")  # where trainers keep their step
SEARCH_DEPTH = 3
MAX_TEXT = 60  # characters of a value
MAX_ROWS = 10_000


def load_checkpoint(path: str | Path, *, allow_globals: Sequence[str] = (), unsafe: bool = False) -> Any:
    """Read a checkpoint onto the CPU; its kind is told by its content (see `kind_of`).

    Files of torch.save (also of Lightning) and older ones, safetensors with or without shards, folders of Hugging Face and of
    torch.distributed.checkpoint, and the tensors of TorchScript and torch.export archives. Tensors are mapped into memory where the
    format allows it: they cost memory when they are read.

    Args:
        path: The file or folder.
        allow_globals: Full names of classes and functions that the file may use, beyond tensors and plain containers.
        unsafe: Let the file run any code; it warns. Only for files whose origin you trust.

    Returns:
        Plain containers and tensors, and what was allowed.

    Raises:
        InputError: If there is no such file, it is damaged, or it is no checkpoint.
        UnsupportedError: If it needs more than plain containers and tensors (the message names all of it), if it claims more than its
            size warrants, or if it is of a kind that is not read.
    """
    path, trust = Path(path), Trust(tuple(allow_globals), unsafe)
    kind = kind_of(path).key
    if kind == "folder":
        return read_folder(path, lambda file: _read_file(file, trust))
    if kind == "distributed":
        return read_distributed(path, trust)
    return _read_file(path, trust)


def _read_file(path: Path, trust: Trust) -> Any:
    """Read one file, or an index and its shards."""
    kind = kind_of(path).key
    if kind == "index":
        return read_index(path, lambda shard: _read_file(shard, trust) if kind_of(shard).key != "index" else None)
    if kind == "torch":
        return read_torch_zip(path, trust)
    if kind == "legacy":
        return read_torch_legacy(path, trust)
    if kind == "script":
        return read_script(path)
    if kind == "exported":
        return read_exported(path, trust)
    return read_safetensors(path)


def find_recorder_state(content: Any, depth: int = SEARCH_DEPTH) -> Mapping[str, Any] | None:
    """Find a recorder's state inside a checkpoint, under whatever key it was saved.

    Args:
        content: From `load_checkpoint`.
        depth: How deep to look.

    Returns:
        The state, or None.
    """
    return _find_recorder_state(content, depth, set())


def _find_recorder_state(content: Any, depth: int, seen: set[int]) -> Mapping[str, Any] | None:
    """Look at a part once: content may hold itself."""
    if not isinstance(content, Mapping) or id(content) in seen:
        return None
    seen.add(id(content))
    schema = content.get("schema")
    if isinstance(schema, str) and schema.startswith(SCHEMA.partition("/")[0]):
        return content
    parts = (_find_recorder_state(value, depth - 1, seen) for value in content.values()) if depth else ()
    return next((part for part in parts if part is not None), None)


def find_weights(content: Any, path: str | Path, *, key: str | None = None) -> dict[str, Tensor]:
    """Find the model's state_dict inside a checkpoint, and take off wrappers' prefixes.

    Args:
        content: From `load_checkpoint`.
        path: The file, for messages.
        key: Where it lies, if there are several; keys are joined by dots.

    Returns:
        Tensors by parameter or buffer name. See `unwrap` for what was done to find them.

    Raises:
        InputError: If there is none, or it is not clear which.
    """
    return unwrap(content, path, key=key).weights


def stored_step(content: Any) -> int | None:
    """Find the step at which a checkpoint was saved.

    Args:
        content: From `load_checkpoint`.

    Returns:
        The step, from a key of that name, a trainer's state or the optimizer's; None if it is nowhere.
    """
    if not isinstance(content, Mapping):
        return None
    for place in (content, *(content.get(name) for name in TRAINERS)):
        if not isinstance(place, Mapping):
            continue
        for key in STEP_KEYS:
            step = stored_number(place.get(key))
            if step is not None:
                return int(step)
    for _, state in find_optimizers(content):
        steps = [stored_number(part.get("step")) for part in state["state"].values() if isinstance(part, Mapping)]
        steps += [stored_number(group.get("step")) for group in state["param_groups"]]
        known = [step for step in steps if step is not None]
        if known:
            return int(max(known))
    return None


def stored_learning_rate(content: Any) -> float | None:
    """Find the learning rate in a checkpoint's optimizer state.

    Args:
        content: From `load_checkpoint`.

    Returns:
        The largest over groups of the first optimizer; None if there is no optimizer state.
    """
    for _, state in find_optimizers(content):
        rates = [stored_number(group.get("lr")) for group in state["param_groups"]]
        known = [rate for rate in rates if rate is not None]
        if known:
            return max(known)
    return None


def describe_content(content: Any, *, skip: Any = None, depth: int = SEARCH_DEPTH) -> list[tuple[str, str]]:
    """List what a file holds.

    Args:
        content: From `load_checkpoint`.
        skip: A part not to look into (the recorder's state, which has thousands of entries).
        depth: How deep to look.

    Returns:
        Rows of key and description.
    """
    rows: list[tuple[str, str]] = []
    for row in _describe(content, "", skip, depth, set()):
        if len(rows) == MAX_ROWS:
            return [*rows, ("...", "more entries are not shown")]
        rows.append(row)
    return rows


def _describe(value: Any, key: str, skip: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, str]]:
    """Describe one value, and what is inside it."""
    if value is skip and value is not None:
        yield key, "record of a run, see below"
    elif isinstance(value, Tensor):
        size = value.numel() * value.element_size()
        layout = "" if value.layout is torch.strided else f" {str(value.layout).removeprefix('torch.')}"
        yield key, f"tensor {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}{layout}, {size / 2**20:.2f} MiB"
    elif isinstance(value, Mapping) and id(value) in seen:
        yield key, "the same dict as above"
    elif isinstance(value, Mapping):
        seen.add(id(value))
        tensors = [part for part in value.values() if isinstance(part, Tensor)]
        if key:
            numel = sum(part.numel() for part in tensors)
            inside = f", {len(tensors)} of them tensors with {numel:,} numbers" if tensors else ""
            yield key, f"dict of {len(value)} entries{inside}"
        if depth:
            for name, part in value.items():
                yield from _describe(part, f"{key}.{_short(name)}" if key else _short(name), skip, depth - 1, seen)
    elif isinstance(value, list | tuple):
        yield key, f"{type(value).__name__} of {len(value)}"
    elif isinstance(value, str | bytes | bool | int | float | complex | None):
        text = repr(value[:MAX_TEXT] if isinstance(value, str | bytes) else value)
        yield key, f"{type(value).__name__} {text if len(text) < MAX_TEXT else text[: MAX_TEXT - 3] + '...'}"
    else:
        yield key, f"object of {type(value).__module__}.{type(value).__qualname__}"


def _short(name: Any) -> str:
    """Write a key."""
    text = repr(name) if isinstance(name, int | float | None) else name if isinstance(name, str) else type(name).__name__
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 2 * MAX_TEXT else f"{text[: 2 * MAX_TEXT]}..."
