"""SPECs: where the command line finds a model, data or a callable.

`pkg.module:callable`, `file.py:callable`, or for data also a .npz, .safetensors or .pt file. Only the command line (or the caller)
names what is imported; a checkpoint never does.
"""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkscope._checks import InputError, closest
from ntkscope.kernel.batch import count_examples
from ntkscope.record.checkpoint import load_checkpoint

DATA_KEYS = (("inputs", "targets"), ("x", "y"), ("X", "y"))


def load_callable(spec: str) -> Any:
    """Import what a SPEC names.

    Args:
        spec: `pkg.module:name` or `file.py:name`.

    Returns:
        The object.

    Raises:
        InputError: If it cannot be imported or has no such name.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise InputError(f"SPEC {spec!r} must be `file.py:function` or `package.module:function`, for example net.py:make.")
    try:
        module = _module_from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"SPEC {spec!r} could not be imported: {type(error).__name__}: {error}.") from error
    if not hasattr(module, name):
        raise InputError(f"SPEC {spec!r}: {place} has no {name!r}. Name a function that it defines.{closest(name, vars(module))}")
    return getattr(module, name)


def load_model(spec: str) -> nn.Module:
    """Make the model a SPEC names.

    Args:
        spec: A callable without arguments that returns a module.

    Returns:
        The model.

    Raises:
        InputError: If it fails or returns something else.
    """
    model = _call(spec)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"--model {spec!r} must return a torch.nn.Module, got {type(model).__name__}. Return the model itself, not its class or state."
        )
    return model


def load_data(spec: str) -> tuple[Any, Tensor]:
    """Load inputs and targets.

    Args:
        spec: A callable that returns (inputs, targets), or a .npz, .safetensors or .pt file with `inputs` and `targets` (or `x` and `y`).

    Returns:
        Inputs and targets.

    Raises:
        InputError: If it cannot be read or is no pair.
    """
    suffix = Path(spec).suffix
    if suffix == ".npz":
        try:
            with np.load(spec, allow_pickle=False) as archive:
                content: Any = {name: torch.from_numpy(archive[name]) for name in archive.files}
        except FileNotFoundError as error:
            raise InputError(f"No such file: {spec}. Give the file with the arrays `inputs` and `targets`.") from error
        except (OSError, ValueError, TypeError) as error:  # numpy's message advises to load it unsafely
            raise InputError(
                f"{spec} is no .npz file of plain arrays. Write it with numpy.savez(file, inputs=..., targets=...)."
            ) from error
    elif suffix in (".safetensors", ".pt"):
        content = load_checkpoint(Path(spec))
    else:
        content = _call(spec)
    try:
        pair = _find_pair(content)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"The targets of data SPEC {spec!r} are no numbers: {error}. Give a tensor of classes or values.") from error
    if pair is None:
        raise InputError(f"Data SPEC {spec!r} must give a pair (inputs, targets), or a file with the entries `inputs` and `targets`.")
    inputs, targets = pair
    if count_examples(inputs) != len(targets):
        raise InputError(
            f"Data SPEC {spec!r} gives {count_examples(inputs)} inputs, but {len(targets)} targets. Give one target per input."
        )
    return inputs, targets


def _find_pair(content: Any) -> tuple[Any, Tensor] | None:
    """Find inputs and targets in what was loaded."""
    if isinstance(content, Mapping):
        found = next((keys for keys in DATA_KEYS if all(key in content for key in keys)), None)
        return None if found is None else (content[found[0]], torch.as_tensor(content[found[1]]))
    if isinstance(content, tuple | list) and len(content) == 2:
        return content[0], torch.as_tensor(content[1])
    return None


def _call(spec: str) -> Any:
    """Call what a SPEC names; its own failure is the user's."""
    function = load_callable(spec)
    if not callable(function):
        raise InputError(f"SPEC {spec!r} names something of type {type(function).__name__}. Name a function without arguments.")
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise InputError(f"SPEC {spec!r} failed when called without arguments: {type(error).__name__}: {error}.") from error


def _module_from_file(path: Path) -> Any:
    """Import a file by its path."""
    if not path.is_file():
        known = [other.name for other in path.parent.glob("*.py")]
        raise InputError(f"No such file: {path}. Give the path of a Python file.{closest(path.name, known)}")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None:
        raise InputError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(specification)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickling look it up there
    specification.loader.exec_module(module)
    return module
