"""`ntkscope inspect`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .failures import failures_reported
from .loading import AllowGlobals, ModelArgs, Task, UnsafeLoad, open_model
from .notes import notes_shown

if TYPE_CHECKING:
    from torch import nn

    from ntkscope.record.trace import Trace

EXAMPLES = """
ntkscope inspect checkpoint.pt
ntkscope inspect trace/
ntkscope inspect weights.safetensors --model net.py:make
"""


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", hidden=True)],
    model: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Makes the model that the weights should fit, FILE.py:FUNCTION.")
    ] = None,
    model_arg: ModelArgs = None,
    task: Task = None,
    allow_global: AllowGlobals = None,
    unsafe_load: UnsafeLoad = False,
) -> None:
    """Say what a file holds.

    None of its code is run. PATH is a checkpoint file, a folder of weights, or a trace folder. With a model it is said what is missing and
    what is left over.
    """
    with failures_reported():
        from .progress import stages_shown

        with stages_shown() as stages, notes_shown():
            stages.begin("loading PyTorch")
            from ntkscope.record.checkpoint import describe_content, find_recorder_state, load_checkpoint
            from ntkscope.record.formats.kinds import kind_of
            from ntkscope.record.source import find_trace, is_trace
            from ntkscope.record.trace import load_trace, trace_from_state

            stages.begin("reading the file")
            content: list[tuple[str, str]] = []
            said: list[str] = []
            if is_trace(path):
                trace = load_trace(path)
            else:
                kind = kind_of(path)
                loaded = load_checkpoint(path, allow_globals=allow_global or (), unsafe=unsafe_load)
                state = find_recorder_state(loaded)
                content = describe_content(loaded, skip=state)
                trace = find_trace(path) if state is None and path.is_dir() else None
                trace = trace if state is None else trace_from_state(state, str(path))
                network = open_model(model, model_arg, task, [path])
                said = [f"{path} is a {kind.title}. {kind.note}".strip(), *describe_model(loaded, path, network)]

        from .terminal import print_rows, result_console

        console = result_console(unfolded=True)
        if content:
            print_rows(console, ("entry", "what it is"), content)
            console.print()
        for sentence in said:
            console.print(sentence, soft_wrap=True)
        if trace is None:
            console.print(
                "\nNo recorder's state inside: `ntkscope analyze` needs two or more such files of one run, with --model, --data and "
                "--loss; or this one, and --continue 100 to analyze what training would learn next from here.",
                soft_wrap=True,
            )
            return
        if said:
            console.print()
        print_rows(console, ("recorded run", ""), describe_run(trace))
        console.print(f"\nNext: ntkscope analyze {shlex.quote(str(path))}", soft_wrap=True)


def describe_model(content: Any, path: Path, model: "nn.Module | None") -> list[str]:
    """Say where the weights lie, how they fit a model, and what optimizers there are.

    Args:
        content: From `load_checkpoint`.
        path: The file, for messages.
        model: The model; None if it is not known.

    Returns:
        Sentences; why there are no weights, where there are none.
    """
    from ntkscope._checks import InputError, UnsupportedError
    from ntkscope.record.checkpoint import stored_learning_rate, stored_step
    from ntkscope.record.optimizer_facts import describe_optimizers
    from ntkscope.record.weights import unwrap

    try:
        found = unwrap(content, path, model=model)
    except (InputError, UnsupportedError) as error:
        return [str(error)]
    parameters = found.parameters() if model is None else dict(model.named_parameters())
    step, rate = stored_step(content), stored_learning_rate(content)
    known = [f"{name} {value:g}" for name, value in (("step", step), ("learning rate", rate)) if value is not None]
    return [
        *found.sentences(),
        *describe_optimizers(content, parameters, path),
        f"Stored: {', '.join(known)}." if known else "It stores neither step nor learning rate: a trajectory of such files needs --times.",
    ]


def describe_run(trace: "Trace") -> list[tuple[str, str]]:
    """List what a record says of its run.

    Args:
        trace: From `ntkscope.record.trace.load_trace`.

    Returns:
        Rows of name and value; what is not known is left out.
    """
    from ntkscope.view.words import counted, number

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
