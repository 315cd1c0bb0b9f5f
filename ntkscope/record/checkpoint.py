"""Checkpoint files, read without running any of their code."""

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ntkscope._checks import InputError, UnsupportedError
from ntkscope.record.facts import SCHEMA

WRAPPERS = ("module.", "_orig_mod.")
STATE_KEYS = ("model", "state_dict", "model_state_dict", "model_state", "net")
OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optim", "opt")
STEP_KEYS = ("step", "global_step", "steps", "iteration")
SEARCH_DEPTH = 3


def load_checkpoint(path: Path) -> Any:
    """Read a checkpoint file with `weights_only=True`, onto the CPU.

    Args:
        path: A `.pt` file of torch.save, or a `.safetensors` file.

    Returns:
        Plain containers and tensors.

    Raises:
        InputError: If there is no such file, or it is truncated or of another kind.
        UnsupportedError: If it needs more than plain containers and tensors; the message names what.
    """
    if not path.exists():
        raise InputError(f"No such file: {path}. Give a checkpoint file or a trace folder.")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty. Was the run stopped while it was saving? Use an earlier file.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{path} is truncated or no safetensors file: {error}.") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        wanted = _refused_globals(str(error))
        if wanted:
            raise UnsupportedError(
                f"{path} holds more than tensors and plain containers; it asks for {', '.join(wanted)}. Loading that could run code of "
                "the file, so it is refused. Save model.state_dict() (not the model) and recorder.state_dict() instead."
            ) from error
        raise InputError(f"{path} is no checkpoint that torch.load reads: {_first_line(error)}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise InputError(f"{path} is truncated or no checkpoint: {_first_line(error)}") from error


def find_recorder_state(content: Any, depth: int = SEARCH_DEPTH) -> Mapping[str, Any] | None:
    """Find a recorder's state inside a checkpoint, under whatever key it was saved.

    Args:
        content: From `load_checkpoint`.
        depth: How deep to look.

    Returns:
        The state, or None.
    """
    if not isinstance(content, Mapping):
        return None
    schema = content.get("schema")
    if isinstance(schema, str) and schema.startswith(SCHEMA.partition("/")[0]):
        return content
    if depth:
        for value in content.values():
            found = find_recorder_state(value, depth - 1)
            if found is not None:
                return found
    return None


def find_weights(content: Any, path: Path) -> dict[str, Tensor]:
    """Find the model's state_dict inside a checkpoint, and take off wrappers' prefixes.

    Args:
        content: From `load_checkpoint`.
        path: The file, for messages.

    Returns:
        Tensors by parameter or buffer name.

    Raises:
        InputError: If there is none.
    """
    weights = content
    for key in STATE_KEYS:
        if isinstance(weights, Mapping) and isinstance(weights.get(key), Mapping):
            weights = weights[key]
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(
            f"{path} holds no state_dict, neither at the top nor under {', '.join(STATE_KEYS)}. "
            f"Run `ntkscope inspect {path}` to see what it holds."
        )
    named = dict(weights)
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in named):
            named = {name.removeprefix(prefix): value for name, value in named.items()}
    return named


def stored_step(content: Any) -> int | None:
    """Find the step at which a checkpoint was saved.

    Args:
        content: From `load_checkpoint`.

    Returns:
        The step, from a key of that name or from the optimizer's state; None if it is nowhere.
    """
    if not isinstance(content, Mapping):
        return None
    for key in STEP_KEYS:
        value = content.get(key)
        if isinstance(value, int) or (isinstance(value, Tensor) and value.numel() == 1):
            return int(value)
    for group in _optimizer_states(content):
        if "step" in group:
            return int(group["step"])
    return None


def stored_learning_rate(content: Any) -> float | None:
    """Find the learning rate in a checkpoint's optimizer state.

    Args:
        content: From `load_checkpoint`.

    Returns:
        The largest over groups; None if there is no optimizer state.
    """
    if not isinstance(content, Mapping):
        return None
    for key in OPTIMIZER_KEYS:
        state = content.get(key)
        if isinstance(state, Mapping) and "param_groups" in state:
            return max(float(group["lr"]) for group in state["param_groups"])
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
    return list(_describe(content, "", skip, depth))


def _describe(value: Any, key: str, skip: Any, depth: int) -> Iterator[tuple[str, str]]:
    """Describe one value, and what is inside it."""
    if value is skip and value is not None:
        yield key, "record of a run, see below"
    elif isinstance(value, Tensor):
        size = value.numel() * value.element_size()
        yield key, f"tensor {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}, {size / 2**20:.2f} MiB"
    elif isinstance(value, Mapping):
        tensors = [part for part in value.values() if isinstance(part, Tensor)]
        if key:
            numel = sum(part.numel() for part in tensors)
            inside = f", {len(tensors)} of them tensors with {numel:,} numbers" if tensors else ""
            yield key, f"dict of {len(value)} entries{inside}"
        if depth:
            for name, part in value.items():
                yield from _describe(part, f"{key}.{name}" if key else str(name), skip, depth - 1)
    elif isinstance(value, list | tuple):
        yield key, f"{type(value).__name__} of {len(value)}"
    else:
        text = repr(value)
        yield key, f"{type(value).__name__} {text if len(text) < 60 else text[:57] + '...'}"


def _optimizer_states(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Iterate over the per-parameter states of an optimizer in a checkpoint."""
    for key in OPTIMIZER_KEYS:
        state = content.get(key)
        if isinstance(state, Mapping) and isinstance(state.get("state"), Mapping):
            yield from (part for part in state["state"].values() if isinstance(part, Mapping))


def _is_zip(path: Path) -> bool:
    """Recognize torch's zip format, which can be mapped into memory."""
    with path.open("rb") as handle:
        return handle.read(4) == b"PK\x03\x04"


def _refused_globals(message: str) -> list[str]:
    """Read the names that weights_only loading refused from torch's message."""
    return sorted(set(re.findall(r"GLOBAL ([\w.]+)", message)))


def _first_line(error: Exception) -> str:
    """Shorten an error of torch to its first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
