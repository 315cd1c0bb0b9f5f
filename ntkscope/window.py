"""Which part of a run is analyzed, and why."""

from dataclasses import dataclass

from ntkscope._checks import InputError
from ntkscope.dynamics.form import Form
from ntkscope.record.snapshot import Snapshot
from ntkscope.record.trace import Trace
from ntkscope.walk import Walk

MAX_UNSETTLED = 10  # steps within which the preconditioner must have settled; later it is snapshots that are too few
UNSETTLED = 4.0  # predicted over observed decrease: 6 to 30,000 in the first two steps of adamw and gated demos, at most 2.6 after
SMALLEST_DECREASE = 1e-3  # of the loss: what counts as a decrease at all


def settled_start(trace: Trace) -> int:
    """Find the snapshot at which a default window begins: the first, or where the optimizer's preconditioner has settled.

    After its first step Adam divides by the gradient of one batch. Parameters that this batch did not touch get 1/ε, and the kernel they
    make predicts a decrease, gᵀKg Δτ, that no step ever made. Such intervals are left out if they begin in the first steps.

    Args:
        trace: The record.

    Returns:
        Index of a snapshot.
    """
    if trace.facts.precond == "identity":
        return 0
    form = Form(trace.facts.outputs == "trace")
    steps = trace.steps
    if trace.is_from_checkpoints and steps[0] == 0:
        steps[0] = steps[1]  # whose preconditioner is taken there
    last = min(sum(step < MAX_UNSETTLED for step in steps), len(trace) - 2)
    before = trace[0]
    rate = _decrease_rate(before, form)
    for position in range(1, last + 1):
        after = trace[position]
        next_rate = _decrease_rate(after, form)
        predicted = 0.5 * (rate + next_rate) * (after.time - before.time)
        if predicted <= UNSETTLED * max(before.loss - after.loss, SMALLEST_DECREASE * abs(before.loss)):
            return position - 1
        before, rate = after, next_rate
    return last


def _decrease_rate(snapshot: Snapshot, form: Form) -> float:
    """Compute gᵀ K g, the decrease of the loss in optimizer time."""
    gradient = form.field(snapshot.gradient)
    columns = gradient.reshape(len(gradient), -1)
    return float((columns * (snapshot.kernel() @ columns)).sum())


@dataclass(frozen=True)
class Stop:
    """Where the window ends, and why."""

    index: int
    reason: str


def check_time(trace: Trace, start: int, stop: int) -> None:
    """Check that optimizer time passes in the window."""
    times = trace.times
    if times[start] == times[stop]:
        raise InputError(
            f"There is no time between the first and the last snapshot of {trace.source} (both at {times[start]:g}): "
            "was the learning rate zero, or --times the same?"
        )


def snap(window: tuple[int, int], steps: list[int]) -> tuple[int, int]:
    """Snap a window to the nearest snapshots."""
    first, last = window
    if not (steps[0] <= first < last <= steps[-1]):
        raise InputError(
            f"The window {first}:{last} is outside the trace, or empty. Snapshots run from step {steps[0]} to {steps[-1]}; "
            "give start:stop with start < stop inside that."
        )
    start, stop = (min(range(len(steps)), key=lambda j, step=step: abs(steps[j] - step)) for step in window)
    if start == stop:
        raise InputError(
            f"The window {first}:{last} holds no interval: both ends are nearest to the snapshot at step {steps[start]}. "
            f"Snapshots near it: {steps[max(0, start - 2) : start + 3]}."
        )
    return start, stop


def asked_reason(window: tuple[int, int], steps: list[int], start: int, stop: int) -> str:
    """Say what became of the window asked for."""
    return f"asked for {window[0]}:{window[1]}; nearest snapshots {steps[start]} to {steps[stop]}"


def default_stop(walk: Walk, first_step: int) -> Stop:
    """Choose the default window: up to the last snapshot where the spectrum still separates and the closure holds."""
    last = len(walk.history) - 1
    later = "" if walk.course.start == 0 else (
        f"; it begins at step {first_step}, since before it the optimizer's preconditioner of its first steps, made of single gradients, "
        "predicts far more decrease than there was"
    )  # fmt: skip
    if walk.kept is None:
        return Stop(
            last,
            "the whole trace: at no snapshot do at most a quarter of the directions have omega > 1/2 "
            f"together with a closure error of at most 25 %{later}",
        )
    if walk.kept_index == last:
        return Stop(
            last,
            "the whole trace: to its end at most a quarter of the directions have omega > 1/2 "
            f"and the closure error is at most 25 %{later}",
        )
    begin = "the first snapshot" if walk.course.start == 0 else f"the snapshot at step {first_step}"
    reasons = "the last snapshot at which at most a quarter of the directions have omega > 1/2 and the closure error is at most 25 %"
    return Stop(walk.kept_index, f"from {begin} to {reasons}; later snapshots are shown but not used{later}")
