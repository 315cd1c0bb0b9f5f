"""results.safetensors: a result of any depth as named tensors, and all the rest as JSON in the file's metadata.

A tensor is named by its attribute path (`spectrum/eigvals`), so that any reader of safetensors can use it. In the JSON a result is
{its class: its fields}, a tensor {"tensor": its name}; tuples and dicts are tagged likewise, lists and plain values stand for themselves.
Python's JSON writes NaN and infinities as words, and reads them back.
Loading makes classes of a closed set only, those that the annotations of the result's own fields name.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import safetensors
import torch
from torch import Tensor

from ntkscope._checks import InputError
from ntkscope._tensor_file import write_tensors
from ntkscope.summary import SCHEMA

FILE = "results.safetensors"
UNREADABLE = "{path} cannot be read as a saved result: {reason}. Analyze again: `ntkscope analyze CHECKPOINT --out DIR` writes a new one."

Result = TypeVar("Result")


def split(value: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Take a result apart.

    Args:
        value: A result dataclass, or what its fields hold.
        path: Attribute path of the value.

    Returns:
        Its structure, JSON-able but for NaN and infinities, and its tensors by name.

    Raises:
        TypeError: If something in it is no tensor, result, container or plain value.
    """
    if isinstance(value, Tensor):
        return {"tensor": path}, {path: value.contiguous()}
    if value is None or isinstance(value, bool | int | float | str):
        return value, {}
    if is_dataclass(value) and not isinstance(value, type):
        tag, items = type(value).__name__, {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, Mapping):
        tag, items = "dict", dict(value)
    elif isinstance(value, list | tuple):
        tag, items = type(value).__name__, {str(k): part for k, part in enumerate(value)}
    else:
        raise TypeError(f"{path} is a {type(value).__name__}, which has no place in a saved result")
    parts = {name: split(part, f"{path}/{name}".lstrip("/")) for name, part in items.items()}
    tensors = {name: tensor for _, found in parts.values() for name, tensor in found.items()}
    content = {name: structure for name, (structure, _) in parts.items()}
    if tag == "list":
        return list(content.values()), tensors
    return {tag: list(content.values()) if tag == "tuple" else content}, tensors


def join(structure: Any, tensors: Mapping[str, Tensor], classes: Mapping[str, type]) -> Any:
    """Put a result together again.

    Args:
        structure: From `split`.
        tensors: From `split`.
        classes: Result classes by name.

    Returns:
        The result; fields that the structure lacks have their defaults.
    """
    if isinstance(structure, list):
        return [join(part, tensors, classes) for part in structure]
    if not isinstance(structure, dict):
        return structure
    ((tag, content),) = structure.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "tuple":
        return tuple(join(part, tensors, classes) for part in content)
    made: Callable[..., Any] = dict if tag == "dict" else classes[tag]
    return made(**{name: join(part, tensors, classes) for name, part in content.items()})


def result_classes(root: type) -> dict[str, type]:
    """List the dataclasses that a result may hold.

    Args:
        root: Its class.

    Returns:
        By name: the class itself, and those that annotations of fields mention, at any depth.
    """
    found: dict[str, type] = {}
    pending: list[Any] = [root]
    while pending:
        kind = pending.pop()
        if isinstance(kind, type) and is_dataclass(kind) and kind.__name__ not in found:
            found[kind.__name__] = kind
            pending.extend(get_type_hints(kind).values())
        pending.extend(get_args(kind))
    return found


def write_result(result: Any, path: Path, *, also: Mapping[str, Tensor]) -> None:
    """Write a result.

    Args:
        result: A dataclass.
        path: The file.
        also: Further tensors, for other readers.
    """
    structure, tensors = split(result)
    text = json.dumps(structure)
    tensors |= also
    # safetensors refuses tensors that share memory.
    storages: set[int] = set()
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if pointer in storages else tensor
        storages.add(pointer)
    write_tensors(tensors, path, metadata={"schema": SCHEMA, "result": text, "checksum": _checksum(text, tensors)})


def read_result(path: str | Path, root: type[Result]) -> Result:
    """Read a result.

    Args:
        path: A file from `write_result`, or the folder that holds it as results.safetensors.
        root: Class of the result.

    Returns:
        An equal result.

    Raises:
        InputError: If there is no such file, or it is truncated, damaged, foreign, or of another version.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise InputError(f"There is no saved result at {path}. Give a folder that `ntkscope analyze` or `Analysis.save` wrote.")
    try:
        with safetensors.safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            # Copied to memory of torch's own alignment, on which the rounding of matrix products depends.
            tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # ruff: ignore[in-dict-keys]
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(UNREADABLE.format(path=path, reason=f"it is truncated, or no safetensors file ({error})")) from error
    reason = _reason_against(metadata, tensors)
    if reason:
        raise InputError(UNREADABLE.format(path=path, reason=reason))
    try:
        result = join(json.loads(metadata["result"]), tensors, result_classes(root))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(UNREADABLE.format(path=path, reason=f"another version of ntkscope wrote it ({error})")) from error
    if not isinstance(result, root):
        raise InputError(UNREADABLE.format(path=path, reason=f"it holds no {root.__name__}"))
    return result


def _reason_against(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Say why a file's content is not to be read; empty if nothing speaks against it."""
    if "result" not in metadata:
        return "it holds arrays alone, as earlier versions of ntkscope and other programs write"
    if metadata.get("schema") != SCHEMA:
        return f"it has schema {metadata.get('schema')}, and this version reads {SCHEMA}"
    if metadata.get("checksum") != _checksum(metadata["result"], tensors):
        return "it is damaged: its checksum does not fit"
    return ""


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Sum up a file's content: safetensors has no checksum of its own."""
    total = zlib.crc32(text.encode("utf-8"))
    for name in sorted(tensors):
        tensor = tensors[name]
        total = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"
