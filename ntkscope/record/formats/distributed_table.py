"""The table of a torch.distributed.checkpoint folder: `.metadata` is a pickle, and is read as a tree, never loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ntkscope.record.formats.archive import opened
from ntkscope.record.formats.guards import DamagedError, Window
from ntkscope.record.formats.names import DTYPES
from ntkscope.record.formats.nodes import Call, Named, Table
from ntkscope.record.formats.pickles import read_pickle
from ntkscope.record.formats.views import LARGEST

TABLE = ".metadata"
MODULE = "torch.distributed.checkpoint."
Counts = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Bytes of one entry.

    Attributes:
        file: Name of the file, as the table gives it.
        start: First byte in it.
        length: Bytes.
        offsets: Where the piece lies in its tensor, one per axis; empty for what is no tensor.
        sizes: Shape of the piece.
    """

    file: str
    start: int
    length: int
    offsets: Counts
    sizes: Counts


@dataclass(frozen=True)
class Entry:
    """One entry of the checkpoint.

    Attributes:
        path: Keys that lead to it; numbers are positions in lists.
        dtype: Of a tensor; None for anything else.
        size: Shape of a tensor.
        pieces: Its pieces.
    """

    path: tuple[str | int, ...]
    dtype: torch.dtype | None
    size: Counts
    pieces: tuple[Piece, ...]


def read_table(folder: Path) -> list[Entry]:
    """Read what a folder holds.

    Args:
        folder: With a `.metadata` file.

    Returns:
        Its entries.

    Raises:
        DamagedError: If the table is damaged.
        UnsupportedError: If it is built to exhaust time or memory.
    """
    path = folder / TABLE
    with opened(path) as handle:
        tree = read_pickle(Window(handle, 0, path.stat().st_size, path), path)
    root = _fields(tree.root, "metadata.Metadata")
    rows, places = (None, None) if root is None else (root.get("state_dict_metadata"), root.get("storage_data"))
    if root is None or not isinstance(rows, Table) or not isinstance(places, Table):
        raise DamagedError(path, "it is no table of a distributed checkpoint")
    lies = _places(places, path)
    plans = root.get("planner_data")
    paths = {name: way for name, way in plans.items if isinstance(name, str)} if isinstance(plans, Table) else {}
    found: list[Entry] = []
    for name, row in rows.items:
        if not isinstance(name, str) or not isinstance(row, Call) or not isinstance(row.function, Named):
            raise DamagedError(path, "an entry has no name or no description")
        way = _way(paths.get(name), name)
        if row.function.name == f"{MODULE}metadata.BytesStorageMetadata":
            found.append(Entry(way, None, (), _pieces(name, [((), ())], lies, path)))
            continue
        found.append(_tensor(name, way, row, lies, path))
    return found


def _tensor(name: str, way: tuple[str | int, ...], row: Call, lies: dict[Any, Any], path: Path) -> Entry:
    """Read what the table says of a tensor."""
    fields = _fields(row, "metadata.TensorStorageMetadata")
    properties = None if fields is None else fields.get("properties")
    state = properties.states[0] if isinstance(properties, Call) and properties.states else None
    kind = state[0] if isinstance(state, tuple) and state else None
    size = None if fields is None else _counts(fields.get("size"))
    chunks = None if fields is None else fields.get("chunks")
    if not isinstance(kind, Named) or kind.name not in DTYPES or size is None or not isinstance(chunks, list):
        raise DamagedError(path, f"its description of {name!r} is not as torch writes it")
    wanted = []
    for chunk in chunks:
        part = _fields(chunk, "metadata.ChunkStorageMetadata")
        offsets, sizes = (None, None) if part is None else (_counts(part.get("offsets")), _counts(part.get("sizes")))
        if offsets is None or sizes is None or not len(offsets) == len(sizes) == len(size):
            raise DamagedError(path, f"a part of {name!r} has no place or shape")
        if any(offset + length > whole for offset, length, whole in zip(offsets, sizes, size, strict=True)):
            raise DamagedError(path, f"a part of {name!r} lies outside of it")
        wanted.append((offsets, sizes))
    return Entry(way, DTYPES[kind.name], size, _pieces(name, wanted, lies, path))


def _places(places: Table, path: Path) -> dict[Any, tuple[str, int, int]]:
    """Read where pieces lie: file, start and length by name and offsets."""
    found: dict[Any, tuple[str, int, int]] = {}
    for key, value in places.items:
        index, info = _fields(key, "metadata.MetadataIndex"), _fields(value, "filesystem._StorageInfo")
        if index is None or info is None:
            raise DamagedError(path, "it does not say in which files the pieces lie")
        file, start, length = info.get("relative_path"), info.get("offset"), info.get("length")
        numbers = _counts((start, length))
        if not isinstance(file, str) or numbers is None:
            raise DamagedError(path, "the place of a piece is not a file, an offset and a length")
        if info.get("transform_descriptors"):
            raise DamagedError(path, "its pieces are compressed by an extension; save it again without", "written with an extension")
        offsets = index.get("offset")
        found[index.get("fqn"), () if offsets is None else _counts(offsets)] = (file, numbers[0], numbers[1])
    return found


def _pieces(name: str, wanted: list[tuple[Counts, Counts]], lies: dict[Any, tuple[str, int, int]], path: Path) -> tuple[Piece, ...]:
    """Find the pieces of an entry."""
    found = []
    for offsets, sizes in wanted:
        place = lies.get((name, offsets))
        if place is None:
            raise DamagedError(path, f"it does not say where {name!r} lies")
        found.append(Piece(*place, offsets, sizes))
    return tuple(found)


def _way(way: Any, name: str) -> tuple[str | int, ...]:
    """Read the keys that lead to an entry; its name where there are none."""
    is_known = isinstance(way, tuple) and way and all(isinstance(key, str | int) for key in way)
    return tuple(way) if is_known else (name,)


def _fields(node: Any, kind: str) -> Table | None:
    """Read the fields of an object of torch.distributed.checkpoint."""
    is_it = isinstance(node, Call) and isinstance(node.function, Named) and node.function.name == MODULE + kind
    state = node.states[0] if is_it and node.states else None
    return state if isinstance(state, Table) else None


def _counts(value: Any) -> Counts | None:
    """Read a tuple of counts, or a torch.Size."""
    if isinstance(value, Call) and isinstance(value.function, Named) and value.function.name == "torch.Size":
        value = value.args[0] if isinstance(value.args, tuple) and value.args else ()
    if not isinstance(value, tuple) or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < LARGEST for n in value):
        return None
    return tuple(value)
