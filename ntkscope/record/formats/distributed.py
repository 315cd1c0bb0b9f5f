"""Folders of torch.distributed.checkpoint (also of FSDP and Lightning): put together here, without a process group."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntkscope._checks import InputError, UnsupportedError, format_bytes
from ntkscope.record.formats.archive import opened, read_archive
from ntkscope.record.formats.distributed_table import TABLE, Entry, Piece, read_table
from ntkscope.record.formats.guards import DamagedError, ExcessError, Trust, inside
from ntkscope.record.formats.mapped import MappedFile, archived_tensor
from ntkscope.record.formats.torch_file import checked, read_torch_part

MAX_KEYS = 100  # that lead to an entry


def read_distributed(folder: Path, trust: Trust) -> dict[str, Any]:
    """Read a folder.

    Args:
        folder: With `.metadata` and its `.distcp` files.
        trust: What the caller allows.

    Returns:
        Its content, nested as it was saved. Tensors that were saved whole are mapped, others are put together in memory.

    Raises:
        InputError: If it is damaged, or a file is missing.
        UnsupportedError: If it asks for more than the caller allows, or claims more than its files hold.
    """
    entries = read_table(folder)
    reader = _Reader(folder, trust)
    content: dict[str | int, Any] = {}
    for entry in entries:
        _put(content, entry.path, reader.read(entry), folder / TABLE)
    return {str(key): _with_lists(value) for key, value in content.items()}


class _Reader:
    """Reads entries; files stay mapped."""

    def __init__(self, folder: Path, trust: Trust) -> None:
        self.folder, self.trust = folder, trust
        self.files: dict[str, tuple[Path, MappedFile]] = {}
        self.assembled = 0

    def read(self, entry: Entry) -> Any:
        """Read an entry."""
        if entry.dtype is None:
            path, _ = self.open(entry.pieces[0])
            piece = entry.pieces[0]
            return read_torch_part(read_archive(path, start=piece.start, length=piece.length, name=_name(entry)), self.trust)
        if len(entry.pieces) == 1 and entry.pieces[0].sizes == entry.size:
            return self.piece(entry, entry.pieces[0])
        return self.assemble(entry)

    def assemble(self, entry: Entry) -> Tensor:
        """Put the pieces of a tensor together."""
        assert entry.dtype is not None
        place, count = f"{self.folder / TABLE}, {_name(entry)}", math.prod(entry.size)
        if sum(math.prod(piece.sizes) for piece in entry.pieces) != count:
            raise DamagedError(place, "its parts do not add up to the whole")
        self.assembled += count * entry.dtype.itemsize
        held = sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())
        if self.assembled > held:
            raise ExcessError(place, f"its tensors claim more than the {format_bytes(held)} of the folder")
        parts = [self.piece(entry, piece) for piece in entry.pieces]
        whole = torch.empty(entry.size, dtype=entry.dtype)
        covered = torch.zeros(entry.size, dtype=torch.bool)
        for piece, part in zip(entry.pieces, parts, strict=True):
            region = tuple(slice(start, start + length) for start, length in zip(piece.offsets, piece.sizes, strict=True))
            whole[region] = part
            covered[region] = True
        if not bool(covered.all()):
            raise DamagedError(place, "its parts overlap and leave gaps")
        return whole

    def piece(self, entry: Entry, piece: Piece) -> Tensor:
        """Read one piece of a tensor."""
        path, file = self.open(piece)
        archive = read_archive(path, start=piece.start, length=piece.length, name=_name(entry))
        found = archived_tensor(checked(archive).root, archive, file, "data/")
        if found is None or found.dtype != entry.dtype or tuple(found.shape) != piece.sizes:
            raise DamagedError(
                archive.place, f"it is not the {str(entry.dtype).removeprefix('torch.')} tensor of shape {piece.sizes} of the table"
            )
        return found

    def open(self, piece: Piece) -> tuple[Path, MappedFile]:
        """Find and map the file of a piece."""
        if piece.file not in self.files:
            path = inside(self.folder, piece.file, self.folder / TABLE)
            self.files[piece.file] = path, MappedFile(path)
        path, _ = self.files[piece.file]
        if piece.start + piece.length > path.stat().st_size:
            raise DamagedError(path, f"it ends before the piece at byte {piece.start:,} that the table names")
        with opened(path) as handle:
            handle.seek(piece.start)
            if handle.read(4) != b"PK\x03\x04":
                raise UnsupportedError(
                    f"{path} holds its pieces in a form that is not read here. Turn the folder into one file where you trust it: "
                    "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt"
                )
        return self.files[piece.file]


def _name(entry: Entry) -> str:
    """Write the keys that lead to an entry."""
    return ".".join(map(str, entry.path))[:200]


def _put(content: dict[str | int, Any], path: tuple[str | int, ...], value: Any, place: Path) -> None:
    """Put a value where its keys lead; lists stay dicts by position until all is there."""
    if len(path) > MAX_KEYS:
        raise InputError(f"{place} nests an entry below {len(path)} keys, which no checkpoint does. Copy or download it again.")
    target = content
    for key in path[:-1]:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise DamagedError(place, f"two entries at {'.'.join(map(str, path))[:200]}")
    target[path[-1]] = value


def _with_lists(value: Any) -> Any:
    """Turn what is kept by position into lists."""
    if not isinstance(value, dict):
        return value
    if value and all(isinstance(key, int) for key in value):
        return [_with_lists(value[key]) for key in sorted(value)]
    return {str(key): _with_lists(part) for key, part in value.items()}
