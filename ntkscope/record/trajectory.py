"""A trajectory from bare checkpoints of one run: kernels are computed now, with M and time from what the files say."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD

from ntkscope._checks import InputError
from ntkscope._types import ForwardFn, LossFn
from ntkscope.kernel.blocks import DEFAULT_MEMORY
from ntkscope.kernel.coverage import probe_routes
from ntkscope.kernel.model import select_parameters
from ntkscope.record.facts import RunFacts
from ntkscope.record.instrument import Instrument
from ntkscope.record.opening import describe_run
from ntkscope.record.optimizers import Mechanics
from ntkscope.record.probe import ProbeSet, make_probe
from ntkscope.record.saved_moment import CheckpointReader, SavedMoment
from ntkscope.record.timeline import Timeline, make_timeline
from ntkscope.record.trace import Trace
from ntkscope.record.weights import load_weights, weights_put_back

LISTED = 3  # files named one by one
PLAIN = (
    "The kernel is that of plain gradient descent, M = identity: {why} If an optimizer of the Adam family or a gate trained the run, this "
    "is not the geometry of its steps, and neither channels nor times are its own."
)


def trace_from_checkpoints(
    paths: Sequence[str | Path],
    model: nn.Module,
    data: tuple[Any, Tensor],
    *,
    loss: str | LossFn,
    query: tuple[Any, Tensor] | None = None,
    times: Sequence[float] | None = None,
    forward_fn: ForwardFn | None = None,
    allow_globals: Sequence[str] = (),
    unsafe: bool = False,
    max_memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Build a trace from checkpoints of a run that was not recorded.

    M, weight decay and gates come from the optimizers in the files, as a recorder reads them from a live one, if every file holds one that
    fits; otherwise M = I, and a note in the facts says why. What was done to find weights and optimizers is logged (`ntkscope`, INFO).
    Files are read one after another, twice each; none stays in memory.

    Args:
        paths: Two or more files, in any order.
        model: A model of the same architecture; its weights are put back afterwards.
        data: Inputs and targets of training examples to follow.
        loss: The loss of the run.
        query: Inputs and targets held out.
        times: Optimizer time of every file; else from stored steps and learning rates, by trapezoid where the rates differ.
        forward_fn: The model's call.
        allow_globals: What the files may use beyond tensors and plain containers, see `load_checkpoint`.
        unsafe: Let the files run any code.
        max_memory: Bytes for the kernel computation.
        progress: Called with (files done, files in all).

    Returns:
        The trace.

    Raises:
        InputError: If there are fewer than two files, their weights do not fit the model, or nothing says when they were saved.
    """
    files = [Path(path) for path in paths]
    if len(files) < 2:
        raise InputError(
            f"One bare checkpoint is a point, not a trajectory: give two or more of the same run (got {len(files)}); or this one with "
            "--continue 100 (`ntkscope.continue_training`), to analyze what training would learn next from here; or record the run."
        )
    if times is not None and len(times) != len(files):
        raise InputError(f"--times needs one time per checkpoint: {len(files)} files, {len(times)} times.")
    probe = make_probe(model, data, query, loss=loss, forward_fn=forward_fn, clean_targets=None)
    reader = CheckpointReader(model, allow_globals, unsafe)
    line = make_timeline(reader.survey(files), times, same_weights=reader.has_same_weights)
    with weights_put_back(model):
        return _measured(line, reader, probe, DEFAULT_MEMORY if max_memory is None else max_memory, progress)


def _measured(line: Timeline, reader: CheckpointReader, probe: ProbeSet, budget: int, progress: Callable[[int, int], None] | None) -> Trace:
    """Load one file after another, and measure the model as it was."""
    model, moments = reader.model, line.moments
    owners, notes = _owners_of_precond(moments)
    names = list(moments[0].held) if owners else list(select_parameters(model))
    trace: Trace | None = None
    instrument: Instrument | None = None
    previous: Tensor | None = None
    for position, (moment, time) in enumerate(zip(moments, line.times, strict=True)):
        load_weights(model, reader.weights(moment.path))
        with _naming(moment.path):
            parameters = select_parameters(model, names)  # finite
            if instrument is None:
                routes, coverage = probe_routes(model, probe.inputs, params=names, forward_fn=probe.forward_fn)
                instrument = Instrument(model, probe, SGD(parameters.values(), lr=0.0), None, routes, coverage, budget, "full")
            state = _plain(names)
            if owners:
                stored = reader.optimizer(owners[position])
                instrument = replace(instrument, optimizer=stored.optimizer)
                state = stored.mechanics(names, next(iter(parameters.values())).device)
            if trace is None:
                facts = _facts(instrument, len(moments), [*line.notes, *notes], is_known=bool(owners))
                trace = Trace(facts, probe.tensors(), _listed(moments), is_from_checkpoints=True)
            assert moment.step is not None
            snapshot = instrument.measure(state, at=(moment.step, time), previous=previous)
        trace.append(replace(snapshot, learning_rates=moment.rates))
        previous = snapshot.outputs
        if progress is not None:
            progress(position + 1, len(moments))
    assert trace is not None
    return trace


def _owners_of_precond(moments: Sequence[SavedMoment]) -> tuple[list[Path], list[str]]:
    """Choose for every checkpoint the file whose optimizer gives M; none if it is not known everywhere, with the reason."""
    lacking = [moment for moment in moments if moment.reason]
    first = moments[0]
    if lacking:
        count = f"{len(lacking)} of {len(moments)} files have no optimizer that can be used. " if len(lacking) > 1 else ""
        return [], [PLAIN.format(why=f"{count}{lacking[0].reason}")]
    for moment in moments:
        if moment.kind != first.kind or moment.held != first.held:
            what = "another kind of optimizer" if moment.kind != first.kind else "an optimizer of other parameters"
            return [], [PLAIN.format(why=f"{moment.path} holds {what} than {first.path}.")]
    stepped = [position for position, moment in enumerate(moments) if moment.has_stepped]
    if not stepped or stepped[-1] != len(moments) - 1:
        return [], [PLAIN.format(why=f"the optimizer in {moments[-1].path} has not stepped yet.")]
    owners = [moments[next(later for later in stepped if later >= position)].path for position in range(len(moments))]
    notes = list(dict.fromkeys(note for moment in moments for note in moment.notes))
    notes += [
        f"The optimizer in {moment.path} had not stepped, so its M was not yet known: that of {owner} is used at its weights."
        for moment, owner in zip(moments, owners, strict=True)
        if moment.path != owner
    ]
    return owners, notes


def _plain(names: Sequence[str]) -> Mechanics:
    """Make M = I."""
    identity: dict[str, Tensor | float] = dict.fromkeys(names, 1.0)
    return Mechanics(identity, None, None, identity, None)


def _listed(moments: Sequence[SavedMoment]) -> str:
    """Name the files; of many the first and the last."""
    names = [str(each.path) for each in moments]
    return ", ".join(names) if len(names) <= LISTED else f"{names[0]} to {names[-1]} ({len(names)} checkpoints)"


def _facts(instrument: Instrument, count: int, notes: list[str], *, is_known: bool) -> RunFacts:
    """Describe the run."""
    facts = replace(describe_run(instrument, training_size=None, steps_per_epoch=None), notes=notes)
    if is_known:
        return replace(facts, optimizer=f"{facts.optimizer}, as saved in {count} checkpoints")
    unknown = f"unknown ({count} bare checkpoints; plain gradient descent assumed)"
    return replace(facts, optimizer=unknown, precond="identity", stability_edge=None, momentum_lag=0.0)


@contextmanager
def _naming(path: Path) -> Generator[None, None, None]:
    """Say of which file an error is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
