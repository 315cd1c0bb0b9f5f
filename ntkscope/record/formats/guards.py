"""What no file may make us do: read beyond what it holds, leave its folder, or ask for more memory than its size warrants."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ntkscope._checks import InputError, UnsupportedError, format_bytes

MAX_JSON = 64 * 2**20  # bytes; the index of the largest published models takes 10 MiB
MAX_READ = 256 * 2**20  # bytes read at once into memory: pickles, directories of archives
MAX_LINE = 2**16  # bytes of a line of text inside a pickle
EXPANDED = 64 * 2**20  # bytes that a tensor may have beyond its file: `expand` stores one number for many
AGAIN = "Copy or download it again, or use an earlier file."


@dataclass(frozen=True)
class Trust:
    """What the caller lets a file do.

    Attributes:
        allowed: Full names of what the file may ask for, beyond tensors and plain containers.
        unsafe: Whether code in the file may run.
    """

    allowed: Sequence[str] = ()
    unsafe: bool = False


class DamagedError(InputError):
    """Content is not what it should be.

    Args:
        place: The file, and where in it.
        reason: What is wrong.
        kind: What it would be if it is not truncated.
    """

    def __init__(self, place: object, reason: object, kind: str = "no checkpoint") -> None:
        super().__init__(f"{place} is truncated or {kind}: {printable(str(reason)).rstrip('.')}. {AGAIN}")


class ExcessError(UnsupportedError):
    """A file claims more than it can hold, or more than is read.

    Args:
        place: The file, and where in it.
        what: The claim.
    """

    def __init__(self, place: object, what: str) -> None:
        super().__init__(
            f"{place} is refused before anything is loaded: {printable(what)}. If you trust where it comes from, load it with its own "
            "library and save the model's state_dict with torch.save or safetensors."
        )


def first_line(error: BaseException) -> str:
    """Shorten an error of a library.

    Args:
        error: Any.

    Returns:
        Its first line, at most 200 characters; the kind of error if it says nothing.
    """
    lines = str(error).strip().splitlines()
    return printable(lines[0][:200]) if lines else type(error).__name__


def printable(text: str) -> str:
    """Write text of a file so that a terminal does not act on it.

    Args:
        text: Any.

    Returns:
        The text with escapes for what is not printable.
    """
    return text if text.isprintable() else repr(text)[1:-1]


class Window:
    """A part of an open file that reads as a file of its own, and never more than asked for is allocated.

    Args:
        handle: An open file.
        start: Where the part begins.
        length: Its bytes.
        place: For messages.
        limit: Bytes read at once.
    """

    def __init__(self, handle: BufferedReader, start: int, length: int, place: object, *, limit: int = MAX_READ) -> None:
        self._handle, self._start, self._length, self._place, self._limit = handle, start, length, place, limit
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        """Read bytes.

        Args:
            size: How many; all that are left if negative.

        Returns:
            The bytes, fewer at the end.

        Raises:
            ExcessError: If it is more than is read at once.
        """
        left = max(0, self._length - self._at)
        size = left if size < 0 else min(size, left)
        if size > self._limit:
            raise ExcessError(self._place, f"{format_bytes(size)} in one piece, where at most {format_bytes(self._limit)} is read")
        self._handle.seek(self._start + self._at)
        found = self._handle.read(size)
        self._at += len(found)
        return found

    def readline(self) -> bytes:
        """Read a line of text.

        Returns:
            The line; a part of it if it is absurdly long.
        """
        self._handle.seek(self._start + self._at)
        found = self._handle.readline(min(MAX_LINE, max(0, self._length - self._at)))
        self._at += len(found)
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move.

        Args:
            offset: Bytes.
            whence: 0 from the beginning, 1 from here, 2 from the end.

        Returns:
            The new position.

        Raises:
            ValueError: If it lies before the beginning.
        """
        target = offset + (0, self._at, self._length)[whence]
        if target < 0:
            raise ValueError("a position before the beginning")
        self._at = target
        return self._at

    def tell(self) -> int:
        """Say where the next byte is read.

        Returns:
            The position.
        """
        return self._at

    def seekable(self) -> bool:
        """Say that one can move.

        Returns:
            True.
        """
        return True


def is_tame(name: object) -> bool:
    """Say whether the name of a member stays in its folder.

    Args:
        name: As a file gives it.

    Returns:
        Whether it is a relative path without `..`, on any system.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    kinds = PurePosixPath(name), PureWindowsPath(name)
    return not any(kind.is_absolute() or kind.drive or kind.root or ".." in kind.parts for kind in kinds)


def inside(folder: Path, name: object, source: Path) -> Path:
    """Find a file that another file names.

    Args:
        folder: Where it must be. Links of the Hugging Face cache, from `snapshots/` into `blobs/`, are followed; others only within.
        name: As the other file gives it.
        source: That file, for messages.

    Returns:
        The path.

    Raises:
        InputError: If it is missing.
        DamagedError: If its name cannot be one.
        ExcessError: If it would leave the folder.
    """
    wild = f"it names {str(name)[:100]!r}, which is not inside {folder}"
    if not is_tame(name):
        raise ExcessError(source, wild)
    path = folder / str(name)
    try:
        real, roots = path.resolve(), [folder.resolve()]
        if folder.absolute().parent.name == "snapshots":
            roots.append((folder.absolute().parent.parent / "blobs").resolve())
        is_there = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # loops of links, names too long
        raise DamagedError(source, first_line(error)) from error
    if not any(real.is_relative_to(root) for root in roots):
        raise ExcessError(source, wild)
    if not is_there:
        raise InputError(f"{source} names {name!r}, but there is no such file in {folder}. Copy or download that file as well.")
    return path


def read_json(data: bytes | Path, place: object) -> Any:
    """Parse JSON of reasonable size.

    Args:
        data: The text, or a file that holds it.
        place: For messages.

    Returns:
        Plain containers.

    Raises:
        DamagedError: If it is no JSON.
        ExcessError: If it is too large.
    """
    try:
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        if size > MAX_JSON:
            raise ExcessError(place, f"{format_bytes(size)} of JSON, where at most {format_bytes(MAX_JSON)} is read")
        return json.loads(data.read_bytes() if isinstance(data, Path) else data)
    except (ValueError, RecursionError, OSError) as error:
        raise DamagedError(place, first_line(error), "no JSON") from error
