"""Tensors mapped from a stretch of a file: memory is used only where they are read."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntkscope.record.formats.archive import Archive, opened
from ntkscope.record.formats.guards import DamagedError, ExcessError, first_line
from ntkscope.record.formats.nodes import Call, Named
from ntkscope.record.formats.views import View, check_view, view_of


class MappedFile:
    """A file that is mapped into memory, privately: nothing is ever written to it.

    Args:
        path: The file.

    Raises:
        InputError: If it cannot be mapped.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._copies: dict[tuple[int, int], torch.UntypedStorage] = {}
        self._copied = 0
        try:
            self._size = path.stat().st_size
            self._storage = torch.UntypedStorage.from_file(str(path), False, self._size)
        except (RuntimeError, OSError) as error:
            raise DamagedError(path, first_line(error)) from error

    def tensor(self, view: View, start: int, length: int, place: object) -> Tensor:
        """Make a tensor.

        Args:
            view: Its shape.
            start: Where its memory begins in the file.
            length: Bytes of its memory.
            place: For messages.

        Returns:
            The tensor.

        Raises:
            DamagedError: If torch cannot make it.
            UnsupportedError: If it does not fit into its memory.
        """
        check_view(view, length, place)
        part = self._part(start, length, view.dtype.itemsize, place)
        try:
            return torch.empty(0, dtype=view.dtype).set_(part, view.offset, view.size, view.stride)  # pyright: ignore[reportCallIssue, reportArgumentType]
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise DamagedError(place, first_line(error)) from error

    def _part(self, start: int, length: int, width: int, place: object) -> torch.UntypedStorage:
        """Take a stretch of the file; a copy of it where numbers would not lie at multiples of their size."""
        if start % max(1, width) == 0:
            return self._storage[start : start + length]  # pyright: ignore[reportReturnType]
        if (start, length) not in self._copies:
            self._copied += length
            if self._copied > self._size:
                raise ExcessError(place, "its parts overlap, and together are larger than the file")
            copy = torch.empty(length, dtype=torch.uint8)
            with opened(self._path) as handle:
                handle.seek(start)
                if handle.readinto(copy.numpy().data) != length:
                    raise DamagedError(place, "it ends inside of a tensor")
            self._copies[start, length] = copy.untyped_storage()
        return self._copies[start, length]


def archived_tensor(node: Any, archive: Archive, file: MappedFile, folder: str) -> Tensor | None:
    """Make the tensor that a part of an archive's pickle describes.

    Args:
        node: A part of the tree.
        archive: The archive.
        file: The file that holds it.
        folder: Of its members with memory, for example `data/`.

    Returns:
        The tensor; None if the node describes none.

    Raises:
        InputError: If it is not as torch writes it.
        UnsupportedError: If it does not fit into its memory.
    """
    if isinstance(node, Call) and isinstance(node.function, Named) and node.function.name == "torch._utils._rebuild_parameter":
        node = node.args[0] if isinstance(node.args, tuple) and node.args else None
    view = view_of(node, archive.place) if isinstance(node, Call) else None
    if view is None or (view.dtype.is_floating_point is False and str(view.dtype).startswith("torch.q")):
        return None
    start, length = archive.members.get(f"{folder}{view.memory.key}", (0, 0))
    return file.tensor(view, start, length, archive.place)
