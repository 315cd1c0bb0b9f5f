"""The application: one file per command."""

import shutil
import sys
from importlib.metadata import version
from io import TextIOWrapper
from typing import Annotated

import typer

from . import analyze, check, demo, inspect, report
from .failures import INTERRUPTED, NO_READER, silence_stdout

HELP_WIDTH = (36, 100)  # columns of --help, at least and at most


def _examples(commands: str) -> str:
    """Set examples below a command's help, as they are typed."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in commands.strip().splitlines())


def _show_version(is_asked: bool) -> None:
    """Print the version and leave."""
    if is_asked:
        print(f"ntkscope {version('ntkscope')}")
        raise typer.Exit


# Plain help and plain usage errors: they fold well at any width, and need neither colors nor Unicode.
app = typer.Typer(
    name="ntkscope",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: ntkscope demo",
)
app.command(epilog=_examples(demo.EXAMPLES))(demo.demo)
app.command(epilog=_examples(analyze.EXAMPLES))(analyze.analyze)
app.command(epilog=_examples(report.EXAMPLES))(report.report)
app.command(epilog=_examples(check.EXAMPLES))(check.check)
app.command(epilog=_examples(inspect.EXAMPLES))(inspect.inspect)


@app.callback()
def ntkscope(
    _: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Shows what a neural network has learned (signal channel) and what it has merely stored (reservoir)."""


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # names of files and parameters may hold what the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    low, high = HELP_WIDTH
    try:
        try:
            app(prog_name="ntkscope", terminal_width=max(low, min(shutil.get_terminal_size().columns - 1, high)))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
        sys.exit(NO_READER)
    except KeyboardInterrupt:  # before or after a command's own handler
        sys.exit(INTERRUPTED)
