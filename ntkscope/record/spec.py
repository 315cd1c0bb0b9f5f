"""SPECs: where the command line finds a model, data or a callable.

`pkg.module:callable`, `file.py:callable`, or for data also a file or a folder of images. Only the command line (or the caller) names what
is imported; a checkpoint never does.
"""

import importlib
import importlib.util
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ntkscope._checks import InputError, closest
from ntkscope._types import ForwardFn
from ntkscope.kernel.batch import count_examples
from ntkscope.record.checkpoint import load_checkpoint
from ntkscope.record.data_files import read_csv, read_images

INPUT_NAMES = ("inputs", "x", "X")
TARGET_NAMES = ("targets", "labels", "label", "y")


def load_callable(spec: str) -> Any:
    """Import what a SPEC names.

    Args:
        spec: `pkg.module:name` or `file.py:name`. A file may import its neighbours, a module is looked for in the working folder too.

    Returns:
        The object.

    Raises:
        InputError: If it cannot be imported or has no such name.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise InputError(f"SPEC {spec!r} must be `file.py:function` or `package.module:function`, for example net.py:make.")
    # As Python does for a script, but last: what is installed is not hidden by a file that happens to lie there.
    neighbours = str(Path(place).parent.absolute() if place.endswith(".py") else Path.cwd())
    if neighbours not in sys.path:
        sys.path.append(neighbours)
    try:
        with _own_command_line(place):
            module = _module_from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except InputError:
        raise
    except SystemExit as error:
        raise InputError(
            f"SPEC {spec!r} could not be imported: {place} ended Python as it was read (sys.exit, or a command line of its own). "
            "Put what it does as a script under `if __name__ == '__main__':`."
        ) from error
    except Exception as error:
        raise InputError(f"SPEC {spec!r} could not be imported: {type(error).__name__}: {error}.{_way_out(error, place)}") from error
    if not hasattr(module, name):
        raise InputError(f"SPEC {spec!r}: {place} has no {name!r}. Name a function that it defines.{closest(name, vars(module))}")
    return getattr(module, name)


def load_model(spec: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Make the model a SPEC names.

    Args:
        spec: A callable that returns a module.
        arguments: Its keyword arguments; none if not given.

    Returns:
        The model.

    Raises:
        InputError: If it fails or returns something else.
    """
    model = _call(spec, arguments or {})
    if not isinstance(model, nn.Module):
        raise InputError(
            f"--model {spec!r} must return a torch.nn.Module, got {type(model).__name__}. Return the model itself, not its class or state."
        )
    return model


def load_forward(spec: str) -> ForwardFn:
    """Import the model's call.

    Args:
        spec: A callable that takes the model and a batch of inputs.

    Returns:
        The callable.

    Raises:
        InputError: If it cannot be imported, or called.
    """
    function: Any = load_callable(spec)
    if not callable(function):
        raise InputError(f"--forward {spec!r} names something of type {type(function).__name__}. Name a function of (model, batch).")
    return cast("ForwardFn", function)


def load_data(spec: str, *, allow_globals: Sequence[str] = (), unsafe: bool = False) -> tuple[Any, Tensor]:
    """Load inputs and targets.

    Args:
        spec: A callable that returns (inputs, targets); a .npz, .safetensors or .pt file with `inputs` (or `x`) and `targets` (or `labels`,
            `y`), or with targets and tensors that the model takes by name; a .csv table with a head; or a folder with one folder of images
            for each class.
        allow_globals: What a .pt file may use beyond tensors and plain containers, see `load_checkpoint`.
        unsafe: Let a .pt file run any code.

    Returns:
        Inputs and targets.

    Raises:
        InputError: If it cannot be read or is no pair.
    """
    path = Path(spec)
    if path.suffix == ".csv":
        content: Any = read_csv(path)
    elif path.is_dir():
        content = read_images(path)
    elif path.suffix == ".npz":
        content = _read_npz(path)
    elif path.suffix in (".safetensors", ".pt"):
        content = load_checkpoint(path, allow_globals=allow_globals, unsafe=unsafe)
    elif path.is_file():
        raise InputError(
            f"{spec} is no form of data that is read. Give .npz, .safetensors, .pt, .csv, a folder of images, or file.py:function."
        )
    else:
        content = _call(spec, {})
    try:
        pair = _find_pair(content)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"The targets of data SPEC {spec!r} are no numbers: {error}. Give a tensor of classes or values.") from error
    if pair is None:
        raise InputError(
            f"Data SPEC {spec!r} must give a pair (inputs, targets), or a file with the entries `inputs` and `targets`{_found(content)}."
        )
    inputs, targets = pair
    if count_examples(inputs) != len(targets):
        raise InputError(
            f"Data SPEC {spec!r} gives {count_examples(inputs)} inputs, but {len(targets)} targets. Give one target per input."
        )
    return inputs, targets


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Read an archive of plain arrays."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except FileNotFoundError as error:
        raise InputError(f"No such file: {path}. Give the file with the arrays `inputs` and `targets`.") from error
    except (OSError, ValueError, TypeError) as error:  # numpy's message advises to load it unsafely
        raise InputError(f"{path} is no .npz file of plain arrays. Write it with numpy.savez(file, inputs=..., targets=...).") from error


def _find_pair(content: Any) -> tuple[Any, Tensor] | None:
    """Find inputs and targets in what was loaded."""
    if isinstance(content, Mapping):
        target = next((name for name in TARGET_NAMES if name in content), None)
        if target is None:
            return None
        given = next((name for name in INPUT_NAMES if name in content), None)
        if given is not None:
            return content[given], torch.as_tensor(content[target])
        named = {name: value for name, value in content.items() if name != target}  # input_ids, attention_mask, ...
        return (named, torch.as_tensor(content[target])) if named else None
    if isinstance(content, tuple | list) and len(content) == 2:
        return content[0], torch.as_tensor(content[1])
    return None


def _found(content: Any) -> str:
    """Say what entries there are instead."""
    if not isinstance(content, Mapping):
        return f"; got {type(content).__name__}"
    return f"; it has {', '.join(map(str, list(content)[:8])) or 'none'}"


def _call(spec: str, arguments: Mapping[str, Any]) -> Any:
    """Call what a SPEC names; its own failure is the user's."""
    function = load_callable(spec)
    said = f"with {', '.join(f'{name}={value!r}' for name, value in arguments.items())}" if arguments else "without arguments"
    if not callable(function):
        raise InputError(f"SPEC {spec!r} names something of type {type(function).__name__}. Name a function to be called {said}.")
    try:
        with _own_command_line(spec.rpartition(":")[0]):
            return function(**arguments)
    except (Exception, SystemExit) as error:
        raise InputError(f"SPEC {spec!r} failed when called {said}: {type(error).__name__}: {error}.") from error


@contextmanager
def _own_command_line(place: str) -> Generator[None, None, None]:
    """Hide our command line from code of the user, whose argparse would read it as its own."""
    arguments, sys.argv = sys.argv, [place]
    try:
        yield
    finally:
        sys.argv = arguments


def _way_out(error: Exception, place: str) -> str:
    """Say what helps where a package was taken for a file, or is not found."""
    if "no known parent package" in str(error) and place.endswith(".py"):
        file = Path(place).absolute()
        root = next(folder for folder in file.parents if not (folder / "__init__.py").is_file())
        module = ".".join((*file.parent.relative_to(root).parts, file.stem))
        return f" It is part of a package, so name it as one: with PYTHONPATH={root}, {module}:FUNCTION." if "." in module else ""
    if isinstance(error, ModuleNotFoundError) and not place.endswith(".py"):
        return " Install it, or put the folder that holds it on PYTHONPATH."
    return ""


def _module_from_file(path: Path) -> Any:
    """Import a file by its path."""
    if not path.is_file():
        known = [other.name for other in path.parent.glob("*.py")]
        raise InputError(f"No such file: {path}. Give the path of a Python file.{closest(path.name, known)}")
    # Not its own name: a file called as the package that it imports must not stand in its place.
    name = f"_spec_{path.stem}"
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(path.absolute()):
        return loaded  # --model, --data and --query often name one file, which may take long or draw random numbers
    specification = importlib.util.spec_from_file_location(name, path.absolute())
    if specification is None or specification.loader is None:
        raise InputError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses and pickling look it up there
    try:
        specification.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
