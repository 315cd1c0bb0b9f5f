"""Exit codes: 0 done, 2 the input is at fault, 1 our bug, 130 interrupted."""

import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager

import typer

INTERRUPTED = 130


@contextmanager
def failures_reported() -> Generator[None, None, None]:
    """Turn failures inside a command into one message on stderr and an exit code.

    Raises:
        typer.Exit: With the code.
        typer.BadParameter: As it came: typer reports it.
    """
    # Heavy, and needed only here: `ntkscope --help` must not wait for torch.
    from ntkscope._checks import UserError

    try:
        yield
    except (typer.Exit, typer.BadParameter):
        raise
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        print("interrupted; nothing half-written was left behind", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from error
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        print(f"error: cannot write {error.filename}: {error.strerror}. Give another place with --out.", file=sys.stderr)
        raise typer.Exit(2) from error
    except Exception as error:
        traceback.print_exc()
        print("This is a bug in ntkscope; please report it with the lines above.", file=sys.stderr)
        raise typer.Exit(1) from error
