"""The application: one file per command."""

import sys

import typer

from .analyze import analyze
from .check import check
from .demo import demo
from .failures import INTERRUPTED
from .inspect import inspect

app = typer.Typer(
    name="ntkscope",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Shows what a neural network has learned (signal channel) and what it has merely stored (reservoir).",
    epilog="Start with: ntkscope demo",
)
app.command()(demo)
app.command()(analyze)
app.command()(check)
app.command()(inspect)


def main() -> None:
    """Run the command line."""
    try:
        app()
    except KeyboardInterrupt:  # before or after a command's own handler, for example while torch loads
        sys.exit(INTERRUPTED)
