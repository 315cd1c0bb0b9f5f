"""Zip archives of torch: a table of members, each a stretch of the file. Nothing is unpacked."""

import struct
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from ntkscope._checks import InputError, UnsupportedError, format_bytes
from ntkscope.record.formats.guards import MAX_READ, DamagedError, ExcessError, Window, is_tame

MAX_DIRECTORY = 32 * 2**20  # bytes of the table of members, a few hundred thousand
HEADER = struct.Struct("<4s22xHH")  # of a member: signature, length of its name, length of its extra field
COMPRESSIBLE = "code/"  # TorchScript compresses its source, which is not read
SEPARATED = "/"


@dataclass(frozen=True)
class Archive:
    """A zip archive inside a file.

    Attributes:
        path: The file.
        place: For messages.
        start: Where the archive begins in it.
        length: Its bytes.
        members: Where each member's bytes lie in the file: start and length, by name without the folder that holds all.
        unread: Names of compressed members, which are left alone.
    """

    path: Path
    place: str
    start: int
    length: int
    members: dict[str, tuple[int, int]]
    unread: frozenset[str]

    def __contains__(self, name: str) -> bool:
        return name in self.members

    def size(self, name: str) -> int:
        """Look up the bytes of a member.

        Args:
            name: The member.

        Returns:
            Its length; 0 if it is not there.
        """
        return self.members.get(name, (0, 0))[1]

    def read(self, name: str) -> bytes:
        """Read a member into memory.

        Args:
            name: The member.

        Returns:
            Its bytes.

        Raises:
            DamagedError: If it is missing or cut.
            ExcessError: If it is too large for what is read at once.
        """
        if name not in self.members:
            raise DamagedError(self.place, f"it has no member {name}")
        start, length = self.members[name]
        if length > MAX_READ:
            raise ExcessError(self.place, f"its member {name} has {format_bytes(length)}, where at most {format_bytes(MAX_READ)} is read")
        with opened(self.path) as handle:
            handle.seek(start)
            found = handle.read(length)
        if len(found) < length:
            raise DamagedError(self.place, f"its member {name} is cut")
        return found


@contextmanager
def opened(path: Path) -> Generator[BufferedReader, None, None]:
    """Open a file.

    Args:
        path: The file.

    Yields:
        The handle.

    Raises:
        InputError: If it cannot be opened or read.
    """
    try:
        with path.open("rb") as handle:
            yield handle
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}. Check its permissions, or copy it elsewhere.") from error


def read_archive(path: Path, *, start: int = 0, length: int | None = None, name: str = "") -> Archive:
    """Read the table of members of an archive.

    Args:
        path: The file.
        start: Where the archive begins in it.
        length: Its bytes; None for up to the end of the file.
        name: Of the part that the archive is, for messages.

    Returns:
        The archive.

    Raises:
        InputError: If it is damaged.
        ExcessError: If members are compressed, leave their folder, or claim more than the file holds.
    """
    place = f"{path}, {name}" if name else str(path)
    with opened(path) as handle:
        length = path.stat().st_size - start if length is None else length
        window = Window(handle, start, length, place, limit=MAX_DIRECTORY)
        infos = _directory(window, place)
        folder = _common_folder([info.filename for info in infos])
        members: dict[str, tuple[int, int]] = {}
        unread: set[str] = set()
        for info in infos:
            short = info.filename.removeprefix(folder)
            if not is_tame(info.orig_filename):
                raise ExcessError(place, f"its member {info.filename[:100]!r} would leave its folder")
            if short in members or short in unread:
                raise ExcessError(place, f"it has two members {short[:100]!r}")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                if not short.startswith(COMPRESSIBLE):
                    raise ExcessError(place, f"its member {short[:100]!r} is compressed or encrypted, which torch.save never does")
                unread.add(short)
                continue
            members[short] = (start + _data_offset(window, info, length, place), info.file_size)
    return Archive(path, place, start, length, members, frozenset(unread))


def _directory(handle: Any, place: str) -> list[zipfile.ZipInfo]:
    """Read the table of members."""
    try:
        with zipfile.ZipFile(handle) as archive:
            return [info for info in archive.infolist() if not info.is_dir()]
    except UnsupportedError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError, OverflowError, IndexError) as error:
        raise DamagedError(place, error) from error


def _common_folder(names: list[str]) -> str:
    """Find the folder that holds all members, with its slash; empty if there is none."""
    folders = {name.partition(SEPARATED)[0] if SEPARATED in name else "" for name in names}
    return f"{folders.pop()}{SEPARATED}" if len(folders) == 1 and "" not in folders else ""


def _data_offset(window: Window, info: zipfile.ZipInfo, length: int, place: str) -> int:
    """Find where the bytes of a stored member begin, and check that they are there."""
    window.seek(max(0, info.header_offset))
    head = window.read(HEADER.size)
    if info.header_offset < 0 or len(head) < HEADER.size or not head.startswith(b"PK\x03\x04"):
        raise DamagedError(place, f"its member {info.filename[:100]!r} is not where the table says")
    _, name_length, extra_length = HEADER.unpack(head)
    offset = info.header_offset + HEADER.size + name_length + extra_length
    if info.file_size != info.compress_size or offset + info.file_size > length:
        claim = f"its member {info.filename[:100]!r} claims {format_bytes(info.file_size)}, and the file ends before"
        raise ExcessError(place, claim)
    return offset
