"""Recording a training run through optimizer hooks; the training loop stays as it is."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntkscope._checks import InputError, UserError, check_choice, check_number
from ntkscope._display import Displayed
from ntkscope._types import ForwardFn, LossFn
from ntkscope.kernel.blocks import DEFAULT_MEMORY
from ntkscope.kernel.coverage import probe_routes
from ntkscope.record import optimizers
from ntkscope.record.allowance import Allowance
from ntkscope.record.audit import GateAudit
from ntkscope.record.beginning import State, check_beginning, copy_state, weights_of
from ntkscope.record.facts import KERNEL_FORMS, RunFacts, stop_early
from ntkscope.record.fields import check_fields
from ntkscope.record.files import TraceWriter
from ntkscope.record.following import Following
from ntkscope.record.gradient_audit import GradientAudit
from ntkscope.record.instrument import Instrument
from ntkscope.record.live_audit import LiveAudit
from ntkscope.record.opening import check_sizes, describe_run, open_trace, resume_trace
from ntkscope.record.placement import Placement
from ntkscope.record.probe import ProbeSet, make_probe
from ntkscope.record.schedule import Schedule, check_schedule
from ntkscope.record.snapshot import Snapshot
from ntkscope.record.trace import Trace


class Recorder(Displayed):
    """Records kernels and outputs of a probe set while a model trains.

        recorder = ntkscope.Recorder(model, probe=(x, y), loss="cross_entropy")
        recorder.attach(optimizer)
        ...train as always...
        torch.save({"model": model.state_dict(), "ntkscope": recorder.state_dict()}, "checkpoint.pt")

    The model, its gradients, buffers and the random state are as they would be without it.

    Args:
        model: The model that trains. Rows of its output must depend on their own input row only.
        probe: Inputs and targets of the training examples to follow, n >= 2.
        query: Inputs and targets held out.
        loss: The loss that is trained, at its scale: "squared" (½‖u − y‖², mean over examples), "mse", "cross_entropy", a torch loss
            module, or a convex callable `(outputs, targets) -> scalar`.
        schedule: "log", an interval in steps, or a list of steps; a snapshot of step 0 is always taken.
        tolerance: With "log": take snapshots as densely as keeps the error of energy over each interval below this share (of the gradient:
            five times that), estimated as the run goes; None spaces them by step count alone.
        max_overhead: Share of training time that recording may take; snapshots that would exceed it are put off. The larger of 25 % and
            60 seconds if not given, for a schedule that is written down no bound.
        drift: Take a snapshot between planned ones when the kernel has moved by more than this share since the last; None: never.
        outputs: "full", or "trace" for K_tr / C, one entry per pair of examples: C² times smaller, approximate (theory.md section 4).
        every_step: Keep the probe's outputs after every step, one forward pass each: needed for drift and diffusion.
        audit: Keep what an audit of the gate needs, at snapshots that come half again as late as the one before: weights, mean gradient,
            gradient variance and preconditioner. Optimizers without a gate are audited as if they had one; the recorder then keeps the
            averages m and s of their gradients, two tensors of the model's size.
        live_audit: Besides, measure every so many steps what the gate removes of the step's motion, while training goes on; needs `audit`.
        training_size: Examples in the whole training set, where the probe is a random subset of it (see `stratified_subset`).
        steps_per_epoch: Optimizer steps that pass over the training set once.
        forward_fn: The model's call, `forward_fn(model, batch)`, where it is not `model(batch)`.
        clean_targets: True targets where label noise was planted, so that the analysis can be scored.
        image_shape: (height, width) or (height, width, channels) of an input, where inputs are flattened images (channel after channel, row
            after row): the report then shows suspicious ones. Inputs of shape (n, 1 or 3, h, w) with sides of at least 8 are recognised.
        path: Folder to write snapshots to as they are taken; in memory only if not given.
        max_memory: Bytes for the kernel computation, 2 GiB if not given.

    Attributes:
        num_snapshots: Snapshots so far; asking takes none, unlike `trace`.
        num_steps: Optimizer steps so far.
        is_attached: Whether it records an optimizer.
        outputs: As given.
        every_step: As given.
        has_audit: As `audit`.

    Raises:
        InputError: If probe, query, loss or schedule do not fit the model, or a number is out of range.
        InputTypeError: If the model's output is no tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: tuple[Any, Tensor],
        query: tuple[Any, Tensor] | None = None,
        *,
        loss: str | LossFn | nn.Module,
        schedule: Schedule = "log",
        tolerance: float | None = 0.02,
        max_overhead: float | None = None,
        drift: float | None = 0.3,
        outputs: str = "full",
        every_step: bool = False,
        audit: bool = False,
        live_audit: int | None = None,
        training_size: int | None = None,
        steps_per_epoch: int | None = None,
        forward_fn: ForwardFn | None = None,
        clean_targets: Tensor | None = None,
        image_shape: Sequence[int] | None = None,
        path: str | Path | None = None,
        max_memory: int | None = None,
    ) -> None:
        check_schedule(schedule)
        check_choice("outputs", outputs, KERNEL_FORMS)
        if tolerance is not None:
            check_number("tolerance", tolerance, low=1e-6, high=1.0)
        if drift is not None:
            check_number("drift", drift, low=1e-6)
        self.model = model
        self.drift = drift
        self.every_step = every_step
        self.outputs = outputs
        self.budget = DEFAULT_MEMORY if max_memory is None else max_memory
        self._allowance = Allowance(max_overhead, is_free=schedule != "log")
        self.probe: ProbeSet = make_probe(
            model, probe, query, loss=loss, forward_fn=forward_fn, clean_targets=clean_targets, image_shape=image_shape
        )
        self._sizes = check_sizes(self.probe, training_size=training_size, steps_per_epoch=steps_per_epoch)
        self._placement = Placement(schedule, tolerance, self.probe.loss)
        self._following = Following()
        self._audit = GradientAudit()
        self._gate_audit = GateAudit() if audit else None
        if live_audit is not None:
            check_number("live_audit", live_audit, low=1)
            if not audit:
                raise InputError("`live_audit` needs audit=True: without it nothing is known of the gradients' noise.")
        self._live = None if live_audit is None else LiveAudit(live_audit)
        self._writer = None if path is None else TraceWriter(Path(path))
        self._clock = optimizers.Clock()
        self._instrument: Instrument | None = None
        self._trace: Trace | None = None
        self._beginning: State | None = None  # weights and buffers before the first step
        self._outputs: Tensor | None = None  # at the current weights, where the model was run on the probe already
        self._last_outputs: Tensor | None = None
        self._proxy: Tensor | None = None
        self._stale = False  # whether the optimizer has stepped since the last snapshot

    def attach(self, optimizer: Optimizer, *, precond: optimizers.PrecondFn | None = None) -> None:
        """Start recording the steps of `optimizer`.

        Args:
            optimizer: SGD, Adam, AdamW or GatedAdamW; others, their subclasses included, with `precond`.
            precond: For other optimizers: `precond(optimizer, parameter)`, the diagonal M of its last step.

        Raises:
            InputError: If the recorder is attached already, the optimizer trains nothing of the model, or the trace folder is taken.
            UnsupportedError: If the optimizer's preconditioner is unknown, or it maximizes.
        """
        if self._instrument is not None:
            raise InputError("This recorder is attached to an optimizer already. Make one recorder per run.")
        optimizers.check_supported(optimizer, precond)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad and id(parameter) in held]
        if not names:
            raise InputError("The optimizer holds no trained parameter of this model. Was the model copied or moved after it was made?")
        routes, coverage = probe_routes(self.model, self.probe.inputs, params=names, forward_fn=self.probe.forward_fn)
        instrument = Instrument(self.model, self.probe, optimizer, precond, routes, coverage, self.budget, self.outputs)
        kept = self.probe.tensors(with_inputs=self._gate_audit is not None)
        self._trace = open_trace(describe_run(instrument, **self._sizes), kept, self._trace, self._writer, self._clock.step)
        self._instrument = instrument
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    @property
    def num_snapshots(self) -> int:
        """Snapshots so far."""
        return 0 if self._trace is None else len(self._trace)

    @property
    def num_steps(self) -> int:
        """Optimizer steps so far."""
        return self._clock.step

    @property
    def is_attached(self) -> bool:
        """Whether it records an optimizer."""
        return self._instrument is not None

    @property
    def has_audit(self) -> bool:
        """Whether snapshots keep what an audit of the gate needs."""
        return self._gate_audit is not None

    @property
    def trace(self) -> Trace:
        """The record so far; takes a snapshot first if the optimizer has stepped since the last one."""
        if self._trace is None:
            raise InputError("Nothing is recorded yet. Call attach(optimizer), and train.")
        if self._stale and not self._trace.facts.stopped:
            with self._allowance.hook():
                # The plan stands, unless it has been waiting for a snapshot.
                self._snapshot(is_planned=self._placement.is_due(self._clock.step))
        return self._trace

    def state_dict(self) -> dict[str, Any]:
        """Put the record and the clock into plain containers and tensors: `ntkscope analyze` needs nothing else.

        Returns:
            The state; `torch.load(weights_only=True)` reads it.

        Raises:
            InputError: If nothing is recorded yet.
        """
        parts: dict[str, Any] = {
            "clock": self._clock,
            "placement": self._placement,
            "allowance": self._allowance,
            "following": self._following,
        }
        if self._gate_audit is not None:
            parts["gate_audit"] = self._gate_audit
        state = self.trace.state_dict() | {name: part.state_dict() for name, part in parts.items()}
        return state if self._beginning is None else state | {"beginning": dict(self._beginning)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a saved recorder was; call it before `attach`. Later snapshots in the trace folder are dropped.

        Args:
            state: From `state_dict`.

        Raises:
            InputError: If the state is damaged, of another probe, or the recorder is attached already.
        """
        if self._instrument is not None:
            raise InputError("Load the recorder's state before attach(optimizer).")
        trace = resume_trace(state, self.probe, self.outputs)
        try:
            check_fields(optimizers.Clock, state["clock"], "The clock of the given state")
            self._clock = optimizers.Clock(**state["clock"])
            if "allowance" in state:  # schema 1 knew no budget
                self._allowance.load(state["allowance"])
                self._following.load(state["following"])
            self._placement.load(state.get("placement"), trace)
            if self._gate_audit is not None and "gate_audit" in state:
                self._gate_audit.load(state["gate_audit"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(
                f"The given state has no valid clock or plan ({error!r}); it is a trace, but no recorder's state_dict()."
            ) from error
        self._beginning = check_beginning(state.get("beginning"), self.model)
        self._trace = trace
        self._last_outputs = trace[-1].outputs

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the weights of step 0, whose M is known only after the first step; look at the gradients of a snapshot's weights."""
        assert self._trace is not None
        with self._allowance.hook():
            if self._trace.facts.stopped or optimizers.was_skipped(optimizer):
                return
            if self._gate_audit is not None:
                self._gate_audit.look(optimizer, self._attached.routes.parameters)
            is_first = not len(self._trace)
            if is_first:
                self._beginning = copy_state(self.model)
            if not self._stale and not is_first and self._proxy is None and self.drift is not None and self._allowance.permits("drift"):
                self._proxy = self._attached.few_kernel(self._clock)  # resumed: the weights are still those of the last snapshot
            has_closure = any(callable(value) for value in (*args[1:], *kwargs.values()))  # gradients are computed in the step itself
            if not self._stale and not has_closure and self._allowance.permits("audit"):
                instrument = self._attached
                with self._allowance.pricing("audit", instrument.waiter()):
                    self._audit.look(optimizer, instrument.routes.parameters, instrument.gradient())

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Advance the clock, and take a snapshot if one is due."""
        assert self._trace is not None
        with self._allowance.hook():
            if optimizers.was_skipped(optimizer):
                return
            self._clock.tick(optimizer)
            self._stale, self._outputs = True, None
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
