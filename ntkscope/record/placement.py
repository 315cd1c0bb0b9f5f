"""Where to take snapshots: by a fixed schedule, or as dense as a tolerance on the discretization error asks for."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ntkscope.dynamics.loss import ProbeLoss
from ntkscope.record.local_error import local_error
from ntkscope.record.schedule import Schedule, next_step
from ntkscope.record.snapshot import Snapshot
from ntkscope.record.trace import Trace

SAFETY = 0.9
DENSEST = 20  # spacing is never below a twentieth of the steps so far: a record grows with the logarithm of the run, whatever the noise
SHRINK, GROW = 0.5, 2.0  # bounds on the change of one spacing to the next
STEP_RATIO = 1.5  # the next snapshot is never later than so many times the step count
DRIFT_CHECKS = 4  # per interval


class Placement:
    """Plans the next snapshot after every one that was planned.

    Args:
        schedule: "log", an interval in steps, or a list of steps.
        tolerance: With "log": relative error that one interval may have; None for spacing by step count alone.
        loss: The loss on the probe.
    """

    def __init__(self, schedule: Schedule, tolerance: float | None, loss: ProbeLoss) -> None:
        self.schedule: Schedule = schedule
        self.tolerance = tolerance if schedule == "log" else None
        self.due: int | None = None
        self._check_every = 1
        self._checked_from = 0
        self.num_put_off = 0
        self.num_coarse = 0  # pairs of intervals of one step each whose error is above the tolerance
        self.largest_error = 0.0  # of those intervals and of those that were made longer by putting a snapshot off
        self._loss = loss
        self._recent: list[Snapshot] = []  # the last two that were planned, with their kernels
        self._initial_loss = math.nan
        self._is_interrupted = False  # a snapshot was asked for since the last planned one
        self._is_put_off = False

    def is_due(self, step: int) -> bool:
        """Say whether a snapshot is planned.

        Args:
            step: Now.

        Returns:
            Whether its time has come, or is past.
        """
        return self.due is not None and step >= self.due

    def is_checked(self, step: int) -> bool:
        """Say whether to look if the kernel has moved by more than was planned for.

        Args:
            step: Now.

        Returns:
            True a few times in every interval, at equal distances from its beginning.
        """
        return (step - self._checked_from) % self._check_every == 0

    def put_off(self) -> None:
        """Note that the planned snapshot cannot be afforded now; counted once for each that was planned."""
        self.num_put_off += not self._is_put_off
        self._is_put_off = True

    def interrupt(self) -> None:
        """Note a snapshot that was asked for by hand: the plan stands, as if it had not been."""
        self._is_interrupted = True

    def advance(self, snapshot: Snapshot) -> None:
        """Plan the next snapshot.

        Args:
            snapshot: The one that was planned, just taken.
        """
        if self.tolerance is None:
            self.due = next_step(self.schedule, snapshot.step)
        else:
            self._remember(snapshot)
            self.due = snapshot.step + self._spacing(self.tolerance)
        self._plan_checks(snapshot.step)
        self._is_put_off = self._is_interrupted = False

    def notes(self, bound: str) -> list[str]:
        """Say where the plan could not be kept.

        Args:
            bound: The time that recording may take, in words.

        Returns:
            A sentence for each way in which it was not.
        """
        found = []
        asked = "The schedule" if self.tolerance is None else f"Tolerance {100 * self.tolerance:g} %"
        reached = "" if self.largest_error == 0 else f" (the estimated error of an interval reaches {100 * self.largest_error:.2g} %)"
        if self.num_put_off:
            plural = "snapshot was" if self.num_put_off == 1 else "snapshots were"
            found.append(
                f"{asked} asks for denser snapshots than the budget of {bound} allows: {self.num_put_off} {plural} put off{reached}; "
                f"raise max_overhead{'' if self.tolerance is None else ' or tolerance'}."
            )
        if self.num_coarse:
            plural = "interval errs" if self.num_coarse == 1 else "intervals err"
            found.append(
                f"{asked} cannot be met by the densest snapshots that are taken (every step, later every twentieth of the steps so far): "
                f"{self.num_coarse} {plural} by more{reached}; "
                "lower the learning rate, or raise tolerance."
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Turn the plan into plain containers.

        Returns:
            The state.
        """
        return {
            "schedule": self._describe(),
            "due": self.due,
            "recent": [snapshot.step for snapshot in self._recent],
            "num_put_off": self.num_put_off,
            "num_coarse": self.num_coarse,
            "largest_error": self.largest_error,
        }

    def load(self, state: Mapping[str, Any] | None, trace: Trace) -> None:
        """Go on with a plan.

        Args:
            state: From `state_dict`; without one, as if the last snapshots of the trace had been planned.
            trace: What was recorded.

        Raises:
            KeyError: If the state lacks a field.
            TypeError: If a field has the wrong type.
        """
        recent = trace.steps[-2:] if state is None else [step for step in state["recent"] if step in trace.entries]
        self._initial_loss = trace[0].loss
        if self.tolerance is not None:
            for step in recent:
                self._is_interrupted = True  # what lies between may be a snapshot asked for by hand
                self._remember(trace[trace.steps.index(step)])
        last = recent[-1] if recent else trace.steps[-1]
        if state is None or state["schedule"] != self._describe():
            self.due = next_step(self.schedule, trace.steps[-1])
        else:
            self.due = None if state["due"] is None else int(state["due"])
        if state is not None:
            self.num_put_off, self.num_coarse = int(state["num_put_off"]), int(state["num_coarse"])
            self.largest_error = float(state["largest_error"])
        self._plan_checks(last)
        self._is_interrupted = trace.steps[-1] != last

    def _plan_checks(self, step: int) -> None:
        """Choose how often to look whether the kernel has moved by more than planned for."""
        floor = 1 if self.tolerance is None else max(1, step // DENSEST)
        self._check_every = 1 if self.due is None else max(floor, (self.due - step) // DRIFT_CHECKS)
        self._checked_from = step

    def _describe(self) -> str:
        """Name the rule, so that a plan made by another one is not followed."""
        schedule = self.schedule if isinstance(self.schedule, str | int) else list(self.schedule)
        return f"{schedule}, tolerance {self.tolerance}"

    def _remember(self, snapshot: Snapshot) -> None:
        """Keep the last two planned snapshots, the Hessian averaged from one to the other."""
        mean = snapshot.mean_hessian
        if self._is_interrupted and self._recent:
            mean = self._loss.mean_hessian_blocks(self._recent[-1].outputs, snapshot.outputs)
        if not self._recent and math.isnan(self._initial_loss):
            self._initial_loss = snapshot.loss
        light = replace(snapshot, mean_hessian=mean, cross_kernel=None, step_outputs=None)
        self._recent = [*self._recent[-2:], light]

    def _spacing(self, tolerance: float) -> int:
        """Choose the number of steps to the next snapshot."""
        recent = self._recent
        if len(recent) < 3:
            return 1
        before, middle, after = recent
        self._recent = recent[1:]
        error = local_error(before, middle, after, initial_loss=self._initial_loss)
        spacing = after.step - middle.step
        densest = max(1, before.step // DENSEST)
        is_coarse = error > tolerance and spacing <= densest and middle.step - before.step <= densest
        self.num_coarse += is_coarse
        if is_coarse or self._is_put_off:
            self.largest_error = max(self.largest_error, error)
        factor = SAFETY * (tolerance / error) ** (1 / 3) if error > 0 else GROW
        wanted = round(spacing * min(max(factor, SHRINK), GROW))
        return max(1, after.step // DENSEST, min(wanted, math.floor(STEP_RATIO * after.step) - after.step))
