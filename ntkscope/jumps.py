"""Can training be skipped? From a snapshot, predict the outputs at every later one, and compare with the run.

Two predictions: the kernel frozen as it is at the snapshot, and its last drift extrapolated linearly in optimizer time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._checks import InputError, check_number
from ntkscope._display import Displayed
from ntkscope._types import LossFn
from ntkscope.analysis import loss_of, trace_of
from ntkscope.course import Course
from ntkscope.dynamics.jump import jump, jump_errors
from ntkscope.record.recorder import Recorder
from ntkscope.record.trace import Trace


@dataclass(frozen=True)
class JumpErrors(Displayed):
    """Errors of predictions from one snapshot on.

    Attributes:
        start_step: Optimizer step of the snapshot.
        steps: Steps of the later snapshots.
        elapsed: Optimizer time to each.
        loss: Φ observed there.
        frozen: ‖predicted − observed‖ / ‖observed − start‖ of the training outputs, kernel frozen; 1 is "nothing moves".
        extrapolated: The same with the kernel's last drift extrapolated; NaN where the prediction blew up, or there is no drift yet.
        frozen_query: As `frozen`, of the query outputs; None without a query set.
        extrapolated_query: As `extrapolated`, likewise.
    """

    start_step: int
    steps: list[int]
    elapsed: Float[Tensor, " horizons"]
    loss: Float[Tensor, " horizons"]
    frozen: Float[Tensor, " horizons"]
    extrapolated: Float[Tensor, " horizons"]
    frozen_query: Float[Tensor, " horizons"] | None
    extrapolated_query: Float[Tensor, " horizons"] | None


@dataclass(frozen=True)
class JumpStudy(Displayed):
    """Jumps from several snapshots of one run.

    Attributes:
        jumps: By start, ascending.
    """

    jumps: tuple[JumpErrors, ...]

    def reach(self, error: float = 0.1, *, kind: str = "frozen") -> dict[int, int]:
        """Find how far each snapshot sees: the last step up to which the training outputs are predicted within an error.

        Args:
            error: Relative error.
            kind: "frozen" or "extrapolated".

        Returns:
            Last step by start step; the start itself where already the first jump misses.
        """
        found = {}
        for one in self.jumps:
            errors: Tensor = getattr(one, kind)
            misses = (~(errors <= error)).nonzero()
            count = int(misses[0]) if len(misses) else len(errors)
            found[one.start_step] = one.steps[count - 1] if count else one.start_step
        return found


def jump_study(
    source: str | Path | Sequence[str | Path] | Trace | Recorder,
    *,
    loss: str | LossFn | None = None,
    num_starts: int = 4,
) -> JumpStudy:
    """Predict later outputs from snapshots along a run.

    Args:
        source: As for `analyze`, a recorded run.
        loss: The loss of the run, where it was a callable.
        num_starts: From how many snapshots to jump, spread evenly over the trace.

    Returns:
        Errors against how far the outputs really moved.

    Raises:
        InputError: If there are fewer than three snapshots, the loss is unknown, or the optimizer's preconditioner moves by itself.

    Source:
        Ours: theory.md section 5, "Frozen baseline", from any snapshot, and with the drift extrapolated.
    """
    check_number("num_starts", num_starts, low=1)
    trace = trace_of(source)
    if len(trace) < 3:
        raise InputError(f"A jump study needs at least three snapshots, got {len(trace)}. Record more of the run.")
    if trace.facts.precond != "identity":
        raise InputError(
            f"The preconditioner of {trace.facts.optimizer} moves by itself, so a kernel of one moment predicts nothing. Record an SGD run."
        )
    if trace.facts.outputs != "full":
        raise InputError("A jump study needs the full kernel: the trace form has an error of its own. Record with outputs='full'.")
    bound = loss_of(trace, loss, trace[0].outputs)
    if bound is None:
        raise InputError(f"The loss {trace.facts.loss!r} cannot be rebuilt from its name; give `loss=`.")
    course = Course(trace, 0, len(trace) - 1, loss=bound)
    starts = np.unique(np.linspace(0, len(trace) - 2, num_starts).round().astype(int)).tolist()
    return JumpStudy(tuple(_jump_from(course, position) for position in starts))


def _jump_from(course: Course, position: int) -> JumpErrors:
    """Predict every snapshot after one."""
    assert course.loss is not None
    start, trace = course.read(position), course.trace
    later = [trace[k] for k in range(position + 1, len(trace))]
    elapsed = [snapshot.time - start.snapshot.time for snapshot in later]
    rates: dict[str, Any] = {}
    if position > 0:
        before = course.read(position - 1)
        passed = start.snapshot.time - before.snapshot.time
        rates["kernel_rate"] = (start.kernel - before.kernel) / passed
        if start.cross is not None and before.cross is not None:
            rates["cross_rate"] = (start.cross - before.cross) / passed
    outputs = start.snapshot.outputs.double()
    observed = torch.stack([snapshot.outputs.double() for snapshot in later])
    frozen = jump(start.kernel, start.cross, outputs, course.loss.gradient, elapsed)
    moved = jump(start.kernel, start.cross, outputs, course.loss.gradient, elapsed, **rates) if rates else None
    nothing = torch.full((len(later),), torch.nan, dtype=torch.float64)
    frozen_query = moved_query = None
    if frozen.query_motion is not None and start.snapshot.query_outputs is not None:
        query = start.snapshot.query_outputs.double()
        seen = torch.stack([(s.query_outputs.double() - query).flatten() for s in later if s.query_outputs is not None])
        zero = torch.zeros(query.numel(), dtype=torch.float64)
        frozen_query = jump_errors(frozen.query_motion, seen, zero)
        moved_query = nothing if moved is None or moved.query_motion is None else jump_errors(moved.query_motion, seen, zero)
    return JumpErrors(
        start_step=start.snapshot.step,
        steps=[snapshot.step for snapshot in later],
        elapsed=torch.tensor(elapsed, dtype=torch.float64),
        loss=torch.tensor([snapshot.loss for snapshot in later], dtype=torch.float64),
        frozen=jump_errors(frozen.outputs, observed, outputs),
        extrapolated=nothing if moved is None else jump_errors(moved.outputs, observed, outputs),
        frozen_query=frozen_query,
        extrapolated_query=moved_query,
    )
