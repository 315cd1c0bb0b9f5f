"""Exit codes: 0 done, 2 the input is at fault, 1 our bug, 130 interrupted, 141 the reader of our output went away."""

import os
import shutil
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import typer

INTERRUPTED = 130
NO_READER = 141  # 128 + SIGPIPE, as shells report it
FULL = 2**20  # bytes left on a disk that is as good as full


@contextmanager
def failures_reported(out: Path | None = None) -> Generator[None, None, None]:
    """Turn failures inside a command into one message on stderr and an exit code.

    Args:
        out: The folder that the command writes to.

    Raises:
        typer.Exit: With the code.
        typer.BadParameter: As it came: typer reports it.
    """
    try:
        yield
    except (typer.Exit, typer.BadParameter):
        raise
    except KeyboardInterrupt as error:
        print("interrupted; nothing half-written was left behind", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from error
    except BrokenPipeError as error:
        silence_stdout()
        raise typer.Exit(NO_READER) from error
    except Exception as error:
        message = _fault_of_input(error, out)
        if message is not None:
            print(f"error: {message}", file=sys.stderr)
            raise typer.Exit(2) from error
        traceback.print_exc()
        print("This is a bug in ntkscope; please report it with the lines above.", file=sys.stderr)
        raise typer.Exit(1) from error


def silence_stdout() -> None:
    """Let what is still to be written to a closed pipe go nowhere, so that Python's last flush does not complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _fault_of_input(error: Exception, out: Path | None) -> str | None:
    """Say what the user can mend; None where the fault is ours."""
    # Heavy, and loaded by now: `ntkscope --help` must not wait for torch.
    from ntkscope._checks import UserError

    if isinstance(error, UserError):
        return str(error)
    if out is not None and _is_disk_full(error, out):
        return f"the disk that holds {out} is full. Make room, or give another place with --out."
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot use {os.fsdecode(error.filename)}: {error.strerror}. Give another place, or change its permissions."
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error):
        return f"out of memory: {str(error).strip().splitlines()[0]}. Record a smaller probe, or bound the job with --max-memory 4G."
    return None


def _is_disk_full(error: Exception, out: Path) -> bool:
    """Tell from the error, or from the disk: torch and safetensors say in words of their own that they could not write."""
    return "No space left on device" in str(error) or shutil.disk_usage(_existing(out)).free < FULL


def _existing(folder: Path) -> Path:
    """Find the nearest folder that is there."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
