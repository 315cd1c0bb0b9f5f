"""Archives of torch.export (`.pt2`): weights are raw bytes beside a table, or a file of torch.save inside. The program is not run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntkscope.record.formats.archive import Archive, read_archive
from ntkscope.record.formats.guards import DamagedError, Trust, is_tame, read_json
from ntkscope.record.formats.mapped import MappedFile
from ntkscope.record.formats.torch_file import read_torch_part
from ntkscope.record.formats.views import LARGEST, Memory, View

WEIGHTS = "data/weights/"
TABLE = "_weights_config.json"
OLD_WEIGHTS = "serialized_state_dict.pt"  # torch up to 2.7
# Numbers of torch's export schema (torch/_export/serde/schema.py, ScalarType).
KINDS: dict[int, torch.dtype] = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 10: torch.complex64, 11: torch.complex128, 12: torch.bool, 13: torch.bfloat16, 28: torch.uint16,
    29: torch.float8_e4m3fn, 30: torch.float8_e5m2, 31: torch.float8_e4m3fnuz, 32: torch.float8_e5m2fnuz,
}  # fmt: skip


def read_exported(path: Path, trust: Trust) -> dict[str, Any]:
    """Read the weights of an exported program.

    Args:
        path: The file.
        trust: What the caller allows.

    Returns:
        A state dict under `state_dict`; of several programs each under its name.

    Raises:
        DamagedError: If it is damaged, or holds no weights.
        UnsupportedError: If it asks for more than the caller allows, or claims more than it holds.
    """
    archive = read_archive(path)
    if OLD_WEIGHTS in archive:
        return {"state_dict": _part(archive, OLD_WEIGHTS, trust)}
    file = MappedFile(path)
    tables = [name for name in archive.members if name.startswith(WEIGHTS) and name.endswith(TABLE)]
    found = {name.removeprefix(WEIGHTS).removesuffix(TABLE): _weights(archive, name, file, trust) for name in tables}
    for name in archive.members:
        if name.startswith(WEIGHTS) and name.endswith(".pt"):  # one file of torch.save per program, of torch 2.8
            found.setdefault(name.removeprefix(WEIGHTS).removesuffix(".pt"), _part(archive, name, trust))
    if not found:
        raise DamagedError(path, "it has no weights", "an exported program without weights")
    return {"state_dict": found.popitem()[1]} if len(found) == 1 else dict(found)


def _part(archive: Archive, name: str, trust: Trust) -> Any:
    """Read a file of torch.save inside the archive."""
    start, length = archive.members[name]
    return read_torch_part(read_archive(archive.path, start=start, length=length, name=name), trust)


def _weights(archive: Archive, table: str, file: MappedFile, trust: Trust) -> dict[str, Tensor]:
    """Read the weights of one program."""
    place = f"{archive.place}, {table}"
    content = read_json(archive.read(table), place)
    rows = content.get("config") if isinstance(content, Mapping) else None
    if not isinstance(rows, Mapping):
        raise DamagedError(place, "it has no `config`")
    weights: dict[str, Tensor] = {}
    for name, row in rows.items():
        member = f"{WEIGHTS}{row.get('path_name')}" if isinstance(row, Mapping) else ""
        if member not in archive or not is_tame(member):
            raise DamagedError(place, f"the memory of {name!r} is missing")
        if row.get("use_pickle"):
            weights[name] = _part(archive, member, trust)
            continue
        start, length = archive.members[member]
        weights[name] = file.tensor(_view(row.get("tensor_meta"), name, length, place), start, length, place)
    return weights


def _view(meta: Any, name: str, length: int, place: object) -> View:
    """Read the shape of a tensor."""
    if not isinstance(meta, Mapping):
        raise DamagedError(place, f"{name!r} has no shape")
    dtype = KINDS.get(meta["dtype"]) if isinstance(meta.get("dtype"), int) else None
    size, stride, offset = _counts(meta.get("sizes")), _counts(meta.get("strides")), _counts([meta.get("storage_offset")])
    if dtype is None or size is None or stride is None or offset is None or len(size) != len(stride):
        raise DamagedError(place, f"the shape of {name!r} is not made of counts")
    return View(Memory(name, dtype, length), dtype, offset[0], size, stride)


def _counts(values: Any) -> tuple[int, ...] | None:
    """Read counts, each in a box that says what it is."""
    if not isinstance(values, list):
        return None
    found = [value.get("as_int") if isinstance(value, Mapping) else None for value in values]
    counts = [n for n in found if isinstance(n, int) and not isinstance(n, bool) and 0 <= n < LARGEST]
    return tuple(counts) if len(counts) == len(found) else None
