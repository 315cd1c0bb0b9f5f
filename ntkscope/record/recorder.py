"""Recording a training run through optimizer hooks; the training loop stays as it is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ntkscope._checks import InputError, check_choice, check_number
from ntkscope._display import Displayed
from ntkscope._types import ForwardFn, LossFn
from ntkscope.kernel.blocks import DEFAULT_MEMORY
from ntkscope.kernel.coverage import probe_routes
from ntkscope.kernel.ranks import Ranks
from ntkscope.record import optimizers
from ntkscope.record.allowance import Allowance
from ntkscope.record.beginning import check_beginning
from ntkscope.record.crew import Crew, Helper
from ntkscope.record.facts import KERNEL_FORMS, RunFacts
from ntkscope.record.fields import check_fields
from ntkscope.record.files import TraceWriter
from ntkscope.record.instrument import Instrument
from ntkscope.record.opening import check_sizes, describe_run, open_trace, resume_trace
from ntkscope.record.placement import Placement
from ntkscope.record.probe import ProbeSet, hash_of, make_probe
from ntkscope.record.recording import Recording
from ntkscope.record.schedule import Schedule, check_schedule
from ntkscope.record.snapshot import Snapshot
from ntkscope.record.trace import Trace
from ntkscope.record.wrapped import plain_module, plain_optimizer


class Recorder(Recording, Displayed):
    """Records kernels and outputs of a probe set while a model trains.

        recorder = ntkscope.Recorder(model, probe=(x, y), loss="cross_entropy")
        recorder.attach(optimizer)
        ...train as always...
        torch.save({"model": model.state_dict(), "ntkscope": recorder.state_dict()}, "checkpoint.pt")

    The model, its gradients, buffers and the random state are as they would be without it.

    Args:
        model: The model that trains. Rows of its output must depend on their own input row only. Wrappers (DistributedDataParallel,
            torch.compile) are looked through.
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
        distributed: Share the kernels of snapshots among the ranks of `torch.distributed`: each makes this recorder and attaches it to its
            own optimizer, and rank 0 has the record. False records on the ranks that attach, each for itself; one is enough.

    Attributes:
        num_snapshots: Snapshots so far; asking takes none, unlike `trace`.
        num_steps: Optimizer steps so far.
        is_attached: Whether it records an optimizer.
        is_helper: Whether this rank computes for rank 0 and has no record itself.
        facts: What does not change along the run.
        seconds: What training and recording took so far, and the last of each kind of work.
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
        distributed: bool = False,
    ) -> None:
        check_schedule(schedule)
        check_choice("outputs", outputs, KERNEL_FORMS)
        if tolerance is not None:
            check_number("tolerance", tolerance, low=1e-6, high=1.0)
        if drift is not None:
            check_number("drift", drift, low=1e-6)
        allowance = Allowance(max_overhead, is_free=schedule != "log")
        super().__init__(allowance, audit=audit, live_audit=live_audit, every_step=every_step, drift=drift)
        self.model = plain_module(model)
        self.is_distributed = distributed
        self.outputs = outputs
        self.budget = DEFAULT_MEMORY if max_memory is None else max_memory
        self.probe: ProbeSet = make_probe(
            self.model, probe, query, loss=loss, forward_fn=forward_fn, clean_targets=clean_targets, image_shape=image_shape
        )
        self._sizes = check_sizes(self.probe, training_size=training_size, steps_per_epoch=steps_per_epoch)
        self._writer = None if path is None else TraceWriter(Path(path))
        self._placement = Placement(schedule, tolerance, self.probe.loss)
        self._helper: Helper | None = None
        self._hooks: list[RemovableHandle] = []

    def attach(self, optimizer: Optimizer, *, precond: optimizers.PrecondFn | None = None) -> None:
        """Start recording the steps of `optimizer`.

        Args:
            optimizer: SGD, Adam, AdamW, NAdam, RAdam, Adamax or GatedAdamW; others, their subclasses included, with `precond`. Wrappers
                of Lightning and Accelerate are looked through.
            precond: For other optimizers: `precond(optimizer, parameter)`, the diagonal M of its last step.

        Raises:
            InputError: If the recorder is attached already, the optimizer trains nothing of the model, or the trace folder is taken.
            UnsupportedError: If the optimizer's preconditioner is unknown, or it maximizes.
        """
        if self._instrument is not None:
            raise InputError("This recorder is attached to an optimizer already. Make one recorder per run.")
        optimizer = plain_optimizer(optimizer)
        optimizers.check_supported(optimizer, precond)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad and id(parameter) in held]
        if not names:
            raise InputError("The optimizer holds no trained parameter of this model. Was the model copied or moved after it was made?")
        routes, coverage = probe_routes(self.model, self.probe.inputs, params=names, forward_fn=self.probe.forward_fn)
        instrument = Instrument(self.model, self.probe, optimizer, precond, routes, coverage, self.budget, self.outputs)
        ranks = Ranks.here(enabled=True)
        if self.is_distributed and ranks.index:
            self._trace = None  # rank 0 has it
        else:
            if self._writer is not None and ranks.index:
                raise InputError(
                    f"This is rank {ranks.index} of {ranks.size}, and every rank would write to {self._writer.folder}. Record on rank 0 "
                    "alone (`if rank == 0: recorder.attach(optimizer)`), or on all ranks together with distributed=True."
                )
            kept = self.probe.tensors(with_inputs=self._gate_audit is not None)
            self._trace = open_trace(describe_run(instrument, **self._sizes), kept, self._trace, self._writer, self._clock.step)
        before, after = self._before_step, self._after_step
        if self.is_distributed:
            crew, clock = Crew.meet(self._agreed(names), self._clock)
            if crew is not None and not crew.is_leader:
                self._helper = Helper(self.model, crew, clock, compute=instrument.help)
                before, after = self._helper.before_step, self._helper.after_step
            instrument = replace(instrument, crew=crew)
        self._instrument = instrument
        self._hooks = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def _agreed(self, names: list[str]) -> dict[str, Any]:
        """List what all ranks must have in common."""
        probe = self.probe
        query = None if probe.query_targets is None else hash_of(probe.query_inputs, probe.query_targets)
        return {"the probe": probe.hash, "the query set": query, "`outputs`": self.outputs, "the trained parameters": names}

    def detach(self, *, closing: bool = True) -> None:
        """Stop recording: later steps are not seen, and later changes of the weights neither.

        Args:
            closing: Take a last snapshot, if the optimizer has stepped since the last one.

        Raises:
            InputError: If nothing is attached.
        """
        if not self._hooks:
            raise InputError("This recorder is not attached. Call attach(optimizer) first.")
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if closing and self._trace is not None and len(self._trace):
            _ = self.trace
        self._stale = False

    def listen(self, listener: Callable[[Snapshot], None]) -> None:
        """Call a function after every snapshot, for example to log (`ntkscope.integrations.loggers`).

        Args:
            listener: Called with the snapshot; its time counts as recording.
        """
        self._listeners.append(listener)

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
        return bool(self._hooks)

    @property
    def is_helper(self) -> bool:
        """Whether this rank computes for rank 0."""
        return self._helper is not None

    @property
    def facts(self) -> RunFacts:
        """What does not change along the run; asking takes no snapshot.

        Returns:
            The facts.

        Raises:
            InputError: If nothing is attached or resumed yet, or another rank has the record.
        """
        if self._trace is None:
            raise InputError("Nothing is recorded here yet. Call attach(optimizer) first; of several ranks, rank 0 has the record.")
        return self._trace.facts

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of training and recording so far, and of the last of each kind of work."""
        return self._allowance.seconds()

    @property
    def has_audit(self) -> bool:
        """Whether snapshots keep what an audit of the gate needs."""
        return self._gate_audit is not None

    @property
    def trace(self) -> Trace:
        """The record so far; takes a snapshot first if the optimizer has stepped since the last one."""
        if self._helper is not None:
            raise InputError("This rank computes for rank 0, which has the record. Ask there: `if not recorder.is_helper: ...`.")
        if self._trace is None:
            raise InputError("Nothing is recorded yet. Call attach(optimizer), and train.")
        if self._stale and not self._trace.facts.stopped and self._is_sealed():
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
