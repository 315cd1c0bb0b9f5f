"""Files of `torch.save`: zip archives since torch 1.6, a row of pickles before."""

import io
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from ntkscope._checks import InputError, UnsupportedError, UserError, format_bytes
from ntkscope.record.formats.archive import Archive, opened, read_archive
from ntkscope.record.formats.claims import check_claims
from ntkscope.record.formats.guards import AGAIN, DamagedError, ExcessError, Trust, Window, first_line
from ntkscope.record.formats.names import allowing, refusal, refused_names
from ntkscope.record.formats.pickles import Pickled, read_pickle
from ntkscope.record.formats.views import memory_of

NAMED = re.compile(r"GLOBAL (\S+?) (?:was not an allowed|whose module)|but got <class '([\w.]+)'>")
HEADS = 3  # pickles before the content in old files: magic number, version, system


def read_torch_zip(path: Path, trust: Trust) -> Any:
    """Read an archive of `torch.save`; tensors are mapped into memory, not read.

    Args:
        path: The file.
        trust: What the caller allows.

    Returns:
        Its content.

    Raises:
        InputError: If it is damaged.
        UnsupportedError: If it asks for more than the caller allows, or claims more than it holds.
    """
    archive = read_archive(path)
    pickled = None if trust.unsafe else checked(archive)
    if path.suffix != ".safetensors":  # which torch.load would take for what it is called
        return _load(path, trust, pickled, path, mmap=True)
    with opened(path) as handle:
        return _load(handle, trust, pickled, path)


def read_torch_part(archive: Archive, trust: Trust) -> Any:
    """Read an archive of `torch.save` that lies inside another file, into memory.

    Args:
        archive: The inner archive.
        trust: What the caller allows.

    Returns:
        Its content.

    Raises:
        InputError: If it is damaged.
        UnsupportedError: If it asks for more than the caller allows, or claims more than it holds.
    """
    pickled = None if trust.unsafe else checked(archive)
    with opened(archive.path) as handle:
        handle.seek(archive.start)
        return _load(io.BytesIO(handle.read(archive.length)), trust, pickled, archive.place)


def checked(archive: Archive) -> Pickled:
    """Look at the pickle of an archive before it is loaded.

    Args:
        archive: Of `torch.save`.

    Returns:
        What it asks for.

    Raises:
        InputError: If it is damaged.
        UnsupportedError: If it claims more than the archive holds.
    """
    pickled = read_pickle(io.BytesIO(archive.read("data.pkl")), archive.place)
    check_claims(pickled, lambda key: archive.size(f"data/{key}"), archive.place)
    return pickled


def read_torch_legacy(path: Path, trust: Trust) -> Any:
    """Read a file of `torch.save` as torch before 1.6 wrote it; all of it is read into memory.

    Args:
        path: The file.
        trust: What the caller allows.

    Returns:
        Its content.

    Raises:
        InputError: If it is damaged.
        UnsupportedError: If it asks for more than the caller allows, or claims more than it holds.
    """
    with opened(path) as handle:
        pickled = None if trust.unsafe else _checked_row(handle, path)
        handle.seek(0)
        return _load(handle, trust, pickled, path)


def _checked_row(handle: io.BufferedReader, path: Path) -> Pickled:
    """Look at the pickles of an old file."""
    size = path.stat().st_size
    window = Window(handle, 0, size, path)
    rows = [read_pickle(window, path) for _ in range(HEADS + 2)]
    pickled = rows[HEADS]
    claimed: dict[str, int] = {}
    for stored in pickled.stored:
        memory = memory_of(stored, path)
        claimed[memory.key] = max(claimed.get(memory.key, 0), memory.num_bytes)
    left = size - window.tell()
    total = sum(claimed.values())
    if total > left:
        raise ExcessError(path, f"its tensors claim {format_bytes(total)} of memory, where the file has {format_bytes(left)}")
    check_claims(pickled, lambda key: claimed.get(key, 0), path)
    others = [row for row in rows if row is not pickled]
    if any(row.calls or row.stored or row.names for row in others):
        raise ExcessError(path, "the pickles around its content hold calls, which torch.save never writes")
    return pickled


def _load(source: Any, trust: Trust, pickled: Pickled | None, place: object, *, mmap: bool = False) -> Any:
    """Let torch load what was looked at."""
    if trust.unsafe:
        warnings.warn(
            f"{place} is loaded with --unsafe-load: code inside it runs with your permissions. Do this only with files you made or trust.",
            UserWarning,
            stacklevel=2,
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about protocols and old kinds of storage
            with allowing(trust):
                return torch.load(source, map_location="cpu", weights_only=not trust.unsafe, mmap=mmap)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise _why(error, trust, pickled, place) from error
    except Exception as error:  # whatever a damaged file makes torch raise is the file's fault
        if trust.unsafe:
            raise InputError(
                f"{place} could not be loaded: {type(error).__name__}: {first_line(error)}. Run where what it needs can be imported."
            ) from error
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise
        raise DamagedError(place, first_line(error)) from error


def _why(error: pickle.UnpicklingError, trust: Trust, pickled: Pickled | None, place: object) -> Exception:
    """Explain why the restricted unpickler gave up."""
    if pickled is None:
        return InputError(f"{place} is no checkpoint that torch.load reads: {first_line(error)}. Copy or download it again.")
    names = refused_names(pickled, trust.allowed)
    said = [first or second for first, second in NAMED.findall(str(error))]
    # Torch is the judge: what it names is refused, whatever our own list says.
    missing = [*names, *(name for name in said if name not in names and f"builtins.{name}" not in names and name not in trust.allowed)]
    if missing:
        return refusal(place, missing)
    if pickled.protocol > 2:
        return UnsupportedError(
            f"{place} was saved with pickle protocol {pickled.protocol}; only protocol 2, torch.save's default, can be read without "
            "running code. Load it where you trust it and save it again without pickle_protocol; or --unsafe-load (unsafe=True)."
        )
    return InputError(
        f"{place} is damaged, or holds objects that cannot be built without running code: {_last_line(error)}. {AGAIN} Save only tensors "
        "and plain containers; if you trust the whole file: --unsafe-load (unsafe=True)."
    )


def _last_line(error: Exception) -> str:
    """Take what torch says was wrong, without its advice."""
    text = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error)
    return text.splitlines()[0][:200] if text.splitlines() else type(error).__name__
