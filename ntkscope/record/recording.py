"""What a recorder does at every step of the optimizer."""

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntkscope._checks import InputError, UserError, check_number
from ntkscope.record import optimizers
from ntkscope.record.allowance import Allowance
from ntkscope.record.audit import GateAudit
from ntkscope.record.beginning import State, copy_state, weights_of
from ntkscope.record.facts import RunFacts, stop_early
from ntkscope.record.files import TraceWriter
from ntkscope.record.following import Following
from ntkscope.record.gradient_audit import GradientAudit, when_received
from ntkscope.record.instrument import Instrument
from ntkscope.record.live_audit import LiveAudit
from ntkscope.record.placement import Placement
from ntkscope.record.probe import ProbeSet
from ntkscope.record.snapshot import Snapshot
from ntkscope.record.trace import Trace
from ntkscope.record.wrapped import seal


class Recording:
    """The part of a recorder that its hooks drive; what it records, and how it is attached, saved and resumed, is `Recorder`'s.

    Args:
        allowance: The time that recording may take.
        audit: As for `Recorder`.
        live_audit: As for `Recorder`.
        every_step: As for `Recorder`.
        drift: As for `Recorder`.

    Raises:
        InputError: If `live_audit` is out of range, or there is no audit.
    """

    model: nn.Module
    probe: ProbeSet
    _placement: Placement
    _writer: TraceWriter | None

    def __init__(self, allowance: Allowance, *, audit: bool, live_audit: int | None, every_step: bool, drift: float | None) -> None:
        self.every_step = every_step
        self.drift = drift
        self._allowance = allowance
        self._following = Following()
        self._audit = GradientAudit()
        self._gate_audit = GateAudit() if audit else None
        if live_audit is not None:
            check_number("live_audit", live_audit, low=1)
            if not audit:
                raise InputError("`live_audit` needs audit=True: without it nothing is known of the gradients' noise.")
        self._live = None if live_audit is None else LiveAudit(live_audit)
        self._clock = optimizers.Clock()
        self._instrument: Instrument | None = None
        self._trace: Trace | None = None
        self._beginning: State | None = None  # weights and buffers before the first step
        self._outputs: Tensor | None = None  # at the current weights, where the model was run on the probe already
        self._last_outputs: Tensor | None = None
        self._proxy: Tensor | None = None
        self._stale = False  # whether the optimizer has stepped since the last snapshot
        self._seal: tuple[tuple[int, int], ...] = ()  # on the weights after the last step
        self._listeners: list[Callable[[Snapshot], None]] = []

    def _is_sealed(self) -> bool:
        """Say whether the weights are those after the last step; if not, the record ends at the last snapshot, with one warning."""
        if seal(self._attached.routes.parameters) == self._seal:
            return True
        self._stale = False
        warnings.warn(
            f"The weights were changed after step {self._clock.step} by something else than the optimizer (restored, averaged?), so "
            "no snapshot is taken there. To have one, call recorder.detach() before.",
            stacklevel=3,
        )
        return False

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Keep the weights of step 0, whose M is known only after the first step; look at the gradients of a snapshot's weights."""
        assert self._trace is not None
        with self._allowance.hook():
            if self._trace.facts.stopped or optimizers.was_skipped(optimizer):
                return None
            is_first = not len(self._trace)
            if is_first:
                self._beginning = copy_state(self.model)
            if not self._stale and not is_first and self._proxy is None and self.drift is not None and self._allowance.permits("drift"):
                self._proxy = self._attached.few_kernel(self._clock)  # resumed: the weights are still those of the last snapshot
            expected = None
            if not self._stale and self._allowance.permits("audit"):
                with self._allowance.pricing("audit", self._attached.waiter()):
                    expected = self._attached.gradient()
        return when_received(args, kwargs, lambda: self._look(optimizer, expected))

    def _look(self, optimizer: Optimizer, expected: dict[str, Tensor] | None) -> None:
        """Look at the gradients that the optimizer is about to use, and compare them with those expected."""
        with self._allowance.hook():
            parameters = self._attached.routes.parameters
            if self._gate_audit is not None:
                self._gate_audit.look(optimizer, parameters)
            if expected is not None:
                self._audit.look(optimizer, parameters, expected)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Advance the clock, and take a snapshot if one is due."""
        assert self._trace is not None
        crew = self._attached.crew
        with self._allowance.hook(), nullcontext() if crew is None else crew.listening():
            if optimizers.was_skipped(optimizer):
                return
            self._clock.tick(optimizer)
            self._stale, self._outputs = True, None
            self._seal = seal(self._attached.routes.parameters)
            if self._trace.facts.stopped:
                return
            if not len(self._trace):
                assert self._beginning is not None
                with weights_of(self.model, self._beginning):
                    self._snapshot(is_planned=True, at_start=True)
                if not self.probe.num_query:
                    self._beginning = None  # nothing to linearize for
            self._audit_live()
            if self.every_step and not self._trace.facts.stopped:
                self._follow()
            if self._wants_snapshot():
                self._snapshot(is_planned=True)

    def _audit_live(self) -> None:
        """Measure what the gate removed of this step, if it is due and can be afforded."""
        live, audit = self._live, self._gate_audit
        if live is None or audit is None or not live.is_due(self._clock.step) or not self._allowance.permits("live audit"):
            return
        with self._allowance.pricing("live audit", self._attached.waiter()):
            live.measure(self._attached, self._clock, audit)

    @property
    def _attached(self) -> Instrument:
        """What measures, once attached."""
        assert self._instrument is not None
        return self._instrument

    def _follow(self) -> None:
        """Keep the outputs after this step, if there is time."""
        if not self._following.is_on:
            return
        # An interval is followed whole or not at all, so there must be time for the rest of it.
        left = 1 if self._placement.due is None else max(1, self._placement.due - self._clock.step + 1)
        if not self._allowance.permits("step", times=left):
            self._following.skip()
            return
        with self._allowance.pricing("step", self._attached.waiter()):
            self._outputs = self._attached.outputs()
        self._following.add(self._outputs, self._clock.time, self._clock.step)

    def _wants_snapshot(self) -> bool:
        """Say whether a snapshot is due and can be afforded, or the kernel has moved too far."""
        assert self._trace is not None
        step, placement, allowance = self._clock.step, self._placement, self._allowance
        if self._trace.facts.stopped:
            return False
        if placement.is_due(step):
            if allowance.permits("snapshot"):
                return True
            placement.put_off()
            return False
        if self.drift is None or not placement.is_checked(step) or not (allowance.permits("snapshot") and allowance.permits("drift")):
            return False
        return self._moved() > self.drift

    def _snapshot(self, *, is_planned: bool, at_start: bool = False) -> None:
        """Take a snapshot; a run that has diverged is left alone, with one warning."""
        assert self._trace is not None
        instrument, clock = self._attached, self._clock
        with self._allowance.pricing("snapshot", instrument.waiter()):
            extra: dict[str, Tensor | None] = {}
            if not at_start:
                extra["step_outputs"], extra["step_times"] = self._following.collect()
                extra["gradient_audit"] = self._audit.collect()
            try:
                snapshot = instrument.snapshot(
                    clock,
                    at=(0, 0.0) if at_start else (clock.step, clock.time),
                    outputs=self._outputs,
                    previous=self._last_outputs,
                    beginning=self._beginning,
                    extra=extra,
                )
                if self._gate_audit is not None and not at_start and (self._gate_audit.is_due(clock.step) or not is_planned):
                    snapshot = replace(snapshot, **self._gate_audit.collect(instrument, clock, snapshot.gradient))
                if self._live is not None:
                    snapshot = replace(snapshot, live_audit=self._live.collect())
                self._keep(snapshot, is_planned=is_planned, at_start=at_start)
                if self._live is not None and self._allowance.permits("channel"):
                    with self._allowance.pricing("channel", instrument.waiter()):
                        self._live.follow(self._trace)
            except UserError as error:
                reason = f"Recording stopped at step {clock.step}: {error}"
                self._write_facts(stop_early(self._trace.facts, reason))
                warnings.warn(reason, stacklevel=2)
                return
        for listener in self._listeners:
            listener(snapshot)
        bound = self._allowance.describe()
        notes = self._placement.notes(bound) + self._following.notes(bound)
        if notes != self._trace.facts.notes:
            self._write_facts(replace(self._trace.facts, notes=notes))

    def _keep(self, snapshot: Snapshot, *, is_planned: bool, at_start: bool) -> None:
        """Add a snapshot to the trace, and plan the next."""
        assert self._trace is not None
        self._trace.append(snapshot)
        if self._writer is not None:
            self._trace.entries[snapshot.step] = self._writer.write(snapshot)
        self._last_outputs = snapshot.outputs
        self._stale = at_start
        if is_planned:
            self._placement.advance(snapshot)
        else:
            self._placement.interrupt()
        self._proxy = self._attached.few_kernel(self._clock) if self.drift is not None else None

    def _write_facts(self, facts: RunFacts) -> None:
        """Change the facts, on disk as well."""
        assert self._trace is not None
        self._trace.facts = facts
        if self._writer is not None:
            self._writer.write_facts(facts)

    def _moved(self) -> float:
        """Measure how far the kernel of a few examples has moved since the last snapshot, relative to its norm then."""
        if self._proxy is None:
            return 0.0
        with self._allowance.pricing("drift", self._attached.waiter()):
            gap = float(torch.linalg.vector_norm(self._attached.few_kernel(self._clock) - self._proxy))
        scale = float(torch.linalg.vector_norm(self._proxy))
        return gap / scale if scale > 0 else math.inf
