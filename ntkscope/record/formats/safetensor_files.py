"""Safetensors: one file, or shards with an index that says which tensor lies where."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ntkscope._checks import InputError
from ntkscope.record.formats.guards import DamagedError, inside, read_json

SHARD = re.compile(r"(?P<stem>.+)-(?P<part>\d{1,5})-of-(?P<parts>\d{1,5})(?P<suffix>\.\w+)")
MAX_SHARDS = 10_000


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a file; its header is checked against its size, and tensors are mapped into memory, not read.

    Args:
        path: The file.

    Returns:
        Tensors by name.

    Raises:
        DamagedError: If it is damaged.
    """
    try:
        return load_file(path)
    except Exception as error:  # the library's own errors, and those of torch on kinds of numbers it does not know
        raise DamagedError(path, error, "no safetensors file") from error


def read_index(path: Path, read_shard: Callable[[Path], Any]) -> dict[str, Tensor]:
    """Read shards by their index.

    Args:
        path: The `.index.json`.
        read_shard: Reads one file.

    Returns:
        Tensors by name.

    Raises:
        DamagedError: If the index is damaged.
        InputError: If a shard or tensor is missing.
        UnsupportedError: If the index names files outside of its folder.
    """
    content = read_json(path, path)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise DamagedError(path, "it has no `weight_map` from tensors to files", "no index of shards")
    names = list(dict.fromkeys(places.values()))
    if len(names) > MAX_SHARDS:
        raise DamagedError(path, f"it names {len(names):,} files", "no index of shards")
    shards = {name: read_shard(inside(path.parent, name, path)) for name in names}
    for tensor, name in places.items():
        if not isinstance(shards[name], dict) or not isinstance(shards[name].get(tensor), Tensor):
            raise InputError(f"{path} says that {tensor!r} lies in {name}, but it does not. Download that file again.")
    return {tensor: shards[name][tensor] for tensor, name in places.items()}


def find_shards(paths: list[Path]) -> list[Path] | None:
    """Find out whether files are all shards of one set, as their names say it.

    Args:
        paths: Files of one folder.

    Returns:
        The shards in order; None if they are no set.

    Raises:
        InputError: If some of the set are missing.
    """
    found = [(SHARD.fullmatch(path.name), path) for path in paths]
    matches = {int(match["part"]): path for match, path in found if match}
    sets = {(match["stem"], match["suffix"], int(match["parts"])) for match, _ in found if match}
    if len(matches) != len(paths) or len(sets) != 1 or not paths:
        return None
    stem, _, parts = sets.pop()
    missing = parts - len(matches)
    if missing:
        raise InputError(f"{missing} of the {parts} shards of {stem} are missing in {paths[0].parent}. Download them as well.")
    return [matches[part] for part in sorted(matches)]
