"""`ntkscope inspect`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .failures import failures_reported

EXAMPLES = """
ntkscope inspect checkpoint.pt
ntkscope inspect trace/
"""


def inspect(path: Annotated[Path, typer.Argument(metavar="PATH", hidden=True)]) -> None:
    """Say what a file holds.

    None of its code is run. PATH is a checkpoint file or a trace folder.
    """
    with failures_reported():
        from .progress import stages_shown

        with stages_shown() as stages:
            stages.begin("loading PyTorch")
            from ntkscope.record.checkpoint import describe_content, find_recorder_state, load_checkpoint
            from ntkscope.record.trace import load_trace, trace_from_state

            stages.begin("reading the file")
            content: list[tuple[str, str]] = []
            if path.is_dir():
                trace = load_trace(path)
            else:
                loaded = load_checkpoint(path)
                state = find_recorder_state(loaded)
                content = describe_content(loaded, skip=state)
                trace = None if state is None else trace_from_state(state, str(path))

        from .terminal import print_rows, result_console

        console = result_console(unfolded=True)
        if content:
            print_rows(console, ("entry", "what it is"), content)
            console.print()
        if trace is None:
            console.print(
                "No recorder's state inside: `ntkscope analyze` needs two or more such files of one run, with --model, --data and --loss."
            )
            return
        print_rows(console, ("recorded run", ""), describe_run(trace))
        console.print(f"\nNext: ntkscope analyze {shlex.quote(str(path))}", soft_wrap=True)


def describe_run(trace: object) -> list[tuple[str, str]]:
    """List what a record says of its run.

    Args:
        trace: From `ntkscope.record.trace.load_trace`.

    Returns:
        Rows of name and value; what is not known is left out.
    """
    from ntkscope.record.trace import Trace
    from ntkscope.view.words import counted, number

    assert isinstance(trace, Trace)
    facts, steps = trace.facts, trace.steps
    kernels = {"full": "one entry per pair of outputs", "trace": "one entry per pair of examples: classes share a kernel"}
    rows = [
        ("examples followed", f"{facts.num_examples:,} with {counted(facts.num_classes, 'output')} each"),
        ("held-out examples", f"{facts.num_query:,}" if facts.num_query else "none"),
        ("training set", "" if facts.training_size is None else f"{facts.training_size:,} examples, of which those are a sample"),
        ("loss", facts.loss),
        ("optimizer", facts.optimizer),
        ("preconditioner", facts.precond),
        ("gate", "" if facts.gate is None else f"{facts.gate}, α = {'unknown' if facts.alpha is None else number(facts.alpha)}"),
        ("momentum", "" if facts.momentum_lag == 0 else f"gradients act for about {number(facts.momentum_lag)} steps"),
        ("parameters", f"{facts.num_params:,} trained, in {counted(len(facts.parameters), 'tensor')}"),
        ("kernels", f"{facts.outputs}: {kernels[facts.outputs]}"),
        ("snapshots", f"{len(steps)}, steps {steps[0]:,} to {steps[-1]:,}" if steps else "none"),
        ("steps per epoch", "" if facts.steps_per_epoch is None else f"{facts.steps_per_epoch:,}"),
        ("acts otherwise in training", ", ".join(facts.train_only)),
        ("has kinks", ", ".join(facts.kinked)),
        ("stopped early", facts.stopped),
        *(("note", note) for note in facts.notes),
    ]
    return [row for row in rows if row[1]]
