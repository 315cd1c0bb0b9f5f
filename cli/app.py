"""The application: one file per command."""

import typer

from .analyze import analyze
from .demo import demo
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
app.command()(inspect)


def main() -> None:
    """Run the command line."""
    app()
