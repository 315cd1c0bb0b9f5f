"""TorchScript archives: the tensors are read from the tree of the pickle; the model in them is code and is not run."""

import io
from pathlib import Path
from typing import Any

from torch import Tensor

from ntkscope.record.formats.archive import read_archive
from ntkscope.record.formats.claims import check_claims
from ntkscope.record.formats.guards import DamagedError, ExcessError
from ntkscope.record.formats.mapped import MappedFile, archived_tensor
from ntkscope.record.formats.nodes import Call, Named, Table
from ntkscope.record.formats.pickles import read_pickle

MODULES = "__torch__."
MAX_MODULES = 100_000


def read_script(path: Path) -> dict[str, Any]:
    """Read the parameters, buffers and other tensors of a scripted or traced model.

    Args:
        path: The file.

    Returns:
        A state dict under `state_dict`, named as the model's own; under `left_out` what is no plain tensor (packed parameters of
        quantized layers).

    Raises:
        DamagedError: If it is damaged.
        ExcessError: If it claims more than it holds.
    """
    archive = read_archive(path)
    pickled = read_pickle(io.BytesIO(archive.read("data.pkl")), path)
    check_claims(pickled, lambda key: archive.size(f"data/{key}"), path)
    file = MappedFile(path)
    weights: dict[str, Tensor] = {}
    left_out: list[str] = []
    waiting: list[tuple[str, Any]] = [("", pickled.root)]
    seen: set[int] = set()
    while waiting:
        prefix, node = waiting.pop()
        if id(node) in seen:
            continue  # a module that is used in two places keeps its first name
        seen.add(id(node))
        if len(seen) > MAX_MODULES:
            raise ExcessError(path, f"it has more than {MAX_MODULES:,} modules")
        inner: list[tuple[str, Any]] = []
        for name, value in _attributes(node):
            tensor = archived_tensor(value, archive, file, "data/")
            if tensor is not None:
                weights[f"{prefix}{name}"] = tensor
            elif _is_object(value):
                inner.append((f"{prefix}{name}.", value))
        if not _attributes(node) and _is_packed(node):
            left_out.append(prefix.rstrip("."))
        waiting.extend(reversed(inner))
    if not weights:
        raise DamagedError(path, "no tensors among its parameters", "a TorchScript archive without parameters")
    return {"state_dict": weights} | ({"left_out": sorted(left_out)} if left_out else {})


def _attributes(node: Any) -> list[tuple[str, Any]]:
    """List what a module holds."""
    states = node.states if _is_object(node) else []
    return [(str(name), value) for state in states if isinstance(state, Table) for name, value in state.items]


def _is_object(node: Any) -> bool:
    """Say whether a part of the tree is a module, or another object of TorchScript."""
    return isinstance(node, Call) and isinstance(node.function, Named) and node.function.name.startswith(MODULES)


def _is_packed(node: Any) -> bool:
    """Say whether an object keeps its parameters in a form of its own."""
    return _is_object(node) and ".classes." in node.function.name and bool(node.states)
