"""`ntkscope inspect`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .failures import failures_reported


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint file or a trace folder.")],
) -> None:
    """Say what a file holds; none of its code is run.

    Example: ntkscope inspect checkpoint.pt
    """
    with failures_reported():
        from rich.console import Console
        from rich.table import Table

        from ntkscope.record.checkpoint import describe_content, find_recorder_state, load_checkpoint
        from ntkscope.record.trace import load_trace, trace_from_state

        console = Console(highlight=False)
        state = None
        if path.is_dir():
            trace = load_trace(path)
        else:
            content = load_checkpoint(path)
            state = find_recorder_state(content)
            trace = None if state is None else trace_from_state(state, str(path))
            table = Table("entry", "what it is", box=None, pad_edge=False)
            for key, description in describe_content(content, skip=state):
                table.add_row(key, description)
            console.print(table)
        if trace is None:
            console.print("\nNo recorder's state inside: `ntkscope analyze` needs two or more such files, --model, --data and --loss.")
            return
        facts = Table("recorded run", "", box=None, pad_edge=False)
        for name, value in asdict(trace.facts).items():
            if name not in ("parameters", "parameter_sizes"):
                facts.add_row(name, str(value))
        steps = trace.steps
        facts.add_row("snapshots", f"{len(steps)}, steps {steps[0]} to {steps[-1]}" if steps else "none")
        console.print(facts)
        console.print(f"\nNext: ntkscope analyze {path}", soft_wrap=True, markup=False)
