"""The only orchestration: from a record of a run to an `Analysis`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ntkscope._checks import InputError, check_choice, check_device
from ntkscope._losses import NAMED_LOSSES
from ntkscope._types import ForwardFn, LossFn
from ntkscope.audit_price import audited_model, check_price, price_of
from ntkscope.auditing import ChannelKeeper, audit_run, audited_positions
from ntkscope.conclusions import conclude
from ntkscope.course import Course
from ntkscope.dynamics.loss import ProbeLoss, bind_loss
from ntkscope.findings import (
    target_kernel,
)
from ntkscope.gate.audit_options import AuditOptions
from ntkscope.record.recorder import Recorder
from ntkscope.record.rescale import rescaled
from ntkscope.record.source import find_trace, open_source
from ntkscope.record.trace import Trace
from ntkscope.record.trajectory import trace_from_checkpoints
from ntkscope.results import Analysis
from ntkscope.spectrum.cutoffs import parse_rule
from ntkscope.tables import gate_of
from ntkscope.uncertainty import estimate_uncertainty
from ntkscope.walk import Progress, walk_trajectory
from ntkscope.window import Stop, asked_reason, check_time, default_stop, settled_start, snap

NUM_MATRICES = 80  # of size N x N, float64, at the peak: 79 were measured at N = 2,000 (benchmarks/RESULTS.md)


def analyze(
    source: str | Path | Sequence[str | Path] | Trace | Recorder,
    *,
    model: nn.Module | None = None,
    data: tuple[Any, Tensor] | None = None,
    query: tuple[Any, Tensor] | None = None,
    loss: str | LossFn | None = None,
    times: Sequence[float] | None = None,
    forward_fn: ForwardFn | None = None,
    allow_globals: Sequence[str] = (),
    unsafe: bool = False,
    cutoff: str = "half",
    window: tuple[int, int] | None = None,
    jackknife: int | None = None,
    rescale_time: bool = False,
    audit: AuditOptions | bool = True,
    device: torch.device | str | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
    stage: Callable[[str], None] | None = None,
) -> Analysis:
    """Split what a run learned from what it left alone.

    Args:
        source: A checkpoint that holds a recorder's state, a trace folder, a `Trace`, a `Recorder`, or (with `model`, `data` and `loss`)
            two or more bare checkpoints of one run.
        model: For bare checkpoints: a model of the same architecture. For a record with audit data: the model that was trained, for the
            audit of the gate (a `Recorder` has it).
        data: For bare checkpoints: inputs and targets of training examples to follow. For a record with audit data: the probe, where its
            inputs are not one tensor.
        query: For bare checkpoints: inputs and targets held out.
        loss: The loss of the run. A record knows it, unless it was a callable and the frozen-kernel baseline is wanted.
        times: For bare checkpoints: optimizer time of each; else stored step times stored learning rate.
        forward_fn: The model's call, `forward_fn(model, batch)`, where it is not `model(batch)`; a `Recorder` knows it.
        allow_globals: Full names of classes and functions that a checkpoint may use, beyond tensors and plain containers.
        unsafe: Let a checkpoint run any code. Only for files whose origin you trust.
        cutoff: Rule that separates signal from reservoir: "half" (ω > ½), "fixed:X", "rank:R", "energy:X", "gap", "rank", "mp", "gd" or
            "risk".
        window: Optimizer steps (start, stop), snapped to the nearest snapshots. By default from the first snapshot (for the Adam family the
            first whose preconditioner has settled) to the last at which at
            most a quarter of the directions have ω > ½ and the gradient closure error is at most 25 %, else the whole trace.
        jackknife: Number of groups of examples (10 is usual) left out in turn for standard errors of signal rank, effective rank and
            reservoir energies; none if not given. 10 groups doubled the time of an
            analysis of 500 outputs.
        rescale_time: Stretch optimizer time by the measured size of the gradients that the optimizer received, where gradient clipping or a
            loss of another scale made it differ from that of the loss on the probe.
        audit: How to audit the gate, or a gate on a run without one; True for the default, False for no audit. It is run where the record
            holds audit data (`Recorder(audit=True)`) and the model is at hand.
        device: Where to decompose matrices, for example "cuda"; the CPU if not given.
        max_memory: Bytes; a job that needs more is refused before it starts. No limit if not given.
        progress: Called with (parts done, parts in all) of the stage that is going on.
        stage: Called with a few words when a stage begins; some stages report no progress.

    Returns:
        The analysis.

    Raises:
        InputError: If the source cannot be read, holds fewer than two snapshots, the window is outside the trace, or a rule is unknown.

    Source:
        theory.md sections 2-5 and 8.
    """
    parse_rule(cutoff)
    if isinstance(loss, str):
        check_choice("loss", loss, NAMED_LOSSES)
    check_device(device)
    begin = stage or _ignore
    found = None
    if isinstance(source, Trace | Recorder) or (model is None and data is None):
        found = trace_of(source, allow_globals=allow_globals, unsafe=unsafe)
    elif not isinstance(source, Trace | Recorder):
        found = find_trace(source, allow_globals=allow_globals, unsafe=unsafe)
    if found is not None:
        trace = found
    elif model is None or data is None or loss is None or isinstance(source, Trace | Recorder):
        raise InputError("Bare checkpoints need all of `model`, `data` and `loss` (--model, --data, --loss).")
    else:
        paths = [source] if isinstance(source, str | Path) else source
        begin("computing kernels")
        trace = trace_from_checkpoints(
            paths,
            model,
            data,
            loss=loss,
            query=query,
            times=times,
            forward_fn=forward_fn,
            allow_globals=allow_globals,
            unsafe=unsafe,
            max_memory=max_memory,
            progress=progress,
        )
    if len(trace) < 2:
        raise InputError(
            f"{trace.source} holds {len(trace)} snapshot(s); a trajectory needs at least two. "
            "Train for at least one step with the recorder attached, and save recorder.state_dict() after it."
        )
    _check_memory(trace, max_memory)
    start, stop = (0, len(trace) - 1) if window is None else snap(window, trace.steps)
    check_time(trace, start, stop)
    if rescale_time:
        trace = rescaled(trace)
    if window is None:
        start = settled_start(trace)
    bound = loss_of(trace, loss, trace[start].outputs)
    course = Course(trace, start, stop, loss=bound)
    options = (AuditOptions() if audit else None) if isinstance(audit, bool) else audit
    audited, audit_reason = audited_model(source, trace, model, data, options, start, forward_fn=forward_fn)
    keeper = None
    if options is not None and audited is not None:
        positions = audited_positions(trace, start, options.num_steps)
        check_price(price_of(trace.facts, audited, len(positions), options), max_memory)
        keeper = ChannelKeeper(positions, cutoff)
    begin("analyzing")
    walk = walk_trajectory(
        course, target_kernel=target_kernel(trace), device=device, progress=progress, visit=None if keeper is None else keeper.visit
    )
    gate_audit = None
    if keeper is not None and options is not None and audited is not None:
        begin("auditing the gate")
        gate_audit = audit_run(trace, keeper, audited, options, loss=bound, max_memory=max_memory, progress=progress)
    end = (
        default_stop(walk, trace.steps[start])
        if window is None
        else Stop(len(walk.history) - 1, asked_reason(window, trace.steps, start, stop))
    )
    if window is None and walk.kept is not None:
        state, summed = walk.kept, walk.kept_summed
    else:
        state, summed = walk.last, walk.summed
    uncertainty = None
    if jackknife is not None:
        begin("leaving out examples")
        shorter = Course(trace, start, start + end.index, loss=bound)
        uncertainty = estimate_uncertainty(shorter, cutoff=cutoff, num_groups=jackknife, device=device, progress=progress)
    begin("drawing conclusions")
    return conclude(
        trace,
        walk,
        end,
        state,
        summed,
        cutoff=cutoff,
        bound=bound,
        start=start,
        uncertainty=uncertainty,
        gate=gate_of(walk, trace, gate_audit, audit_reason),
        device=device,
    )


def _ignore(_: str) -> None:
    """Tell nobody."""


def trace_of(
    source: str | Path | Sequence[str | Path] | Trace | Recorder, *, allow_globals: Sequence[str] = (), unsafe: bool = False
) -> Trace:
    """Open any recorded source.

    Args:
        source: As for `analyze`.
        allow_globals: As for `analyze`.
        unsafe: As for `analyze`.

    Returns:
        Its trace.
    """
    if isinstance(source, Recorder):
        return source.trace
    return source if isinstance(source, Trace) else open_source(source, allow_globals=allow_globals, unsafe=unsafe)


def _check_memory(trace: Trace, max_memory: int | None) -> None:
    """Price the operators before the first is formed."""
    per_example = 1 if trace.facts.outputs == "trace" else trace.facts.num_classes
    num_outputs, num_query_outputs = trace.facts.num_examples * per_example, trace.facts.num_query * per_example
    needed = 8 * (NUM_MATRICES * num_outputs**2 + 3 * num_query_outputs * num_outputs)
    if max_memory is not None and needed > max_memory:
        raise InputError(
            f"The analysis of {num_outputs} stacked outputs needs about {needed / 2**30:.2f} GiB, more than the "
            f"{max_memory / 2**30:.2f} GiB allowed. Raise max_memory (--max-memory), or record a smaller probe."
        )


def loss_of(trace: Trace, loss: str | LossFn | None, outputs: Tensor) -> ProbeLoss | None:
    """Rebuild the loss from what the user gave, or from its recorded name.

    Args:
        trace: The record.
        loss: The user's.
        outputs: Of the probe, to try it on.

    Returns:
        The bound loss; None where only its name is known, and that is no name of ours.
    """
    if loss is None and trace.facts.loss not in NAMED_LOSSES:
        return None
    return bind_loss(trace.facts.loss if loss is None else loss, trace.probe["targets"], outputs)
