"""Recording a training run through optimizer hooks; the training loop stays as it is."""

import math
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntkscope._checks import InputError, UserError, check_number
from ntkscope._types import ForwardFn, LossFn
from ntkscope.kernel.blocks import DEFAULT_MEMORY, blockwise_gram, push_forward
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.coverage import Coverage, probe_routes
from ntkscope.kernel.model import forward_rows, train_only_kinds
from ntkscope.kernel.routes import Routes
from ntkscope.record import optimizers
from ntkscope.record.probe import ProbeSet, make_probe
from ntkscope.record.schedule import Schedule, check_schedule, next_step
from ntkscope.record.snapshot import Snapshot, pack_upper
from ntkscope.record.trace import RunFacts, Trace, TraceWriter, load_trace, stop_early, trace_from_state

PROXY_EXAMPLES = 8  # the kernel of so few examples costs little and moves as the whole does
PROXY_CHECKS = 4  # per interval of the schedule


class Recorder:
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
        drift: Take a snapshot between scheduled ones when the kernel has moved by more than this share since the last; None: never.
        forward_fn: The model's call, `forward_fn(model, batch)`, where it is not `model(batch)`.
        clean_targets: True targets where label noise was planted, so that the analysis can be scored.
        path: Folder to write snapshots to as they are taken; in memory only if not given.
        max_memory: Bytes for the kernel computation, 2 GiB if not given.

    Raises:
        InputError: If probe, query, loss or schedule do not fit the model.
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
        drift: float | None = 0.3,
        forward_fn: ForwardFn | None = None,
        clean_targets: Tensor | None = None,
        path: str | Path | None = None,
        max_memory: int | None = None,
    ) -> None:
        check_schedule(schedule)
        if drift is not None:
            check_number("drift", drift, low=1e-6)
        self.model = model
        self.schedule: Schedule = schedule
        self.drift = drift
        self.budget = DEFAULT_MEMORY if max_memory is None else max_memory
        self.probe: ProbeSet = make_probe(model, probe, query, loss=loss, forward_fn=forward_fn, clean_targets=clean_targets)
        self._writer = None if path is None else TraceWriter(Path(path))
        self._clock = optimizers.Clock()
        self._run: _Run | None = None
        self._trace: Trace | None = None
        self._beginning: dict[str, Tensor] | None = None  # weights and buffers before the first step
        self._due: int | None = None
        self._check_every = 1
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
        if self._run is not None:
            raise InputError("This recorder is attached to an optimizer already. Make one recorder per run.")
        optimizers.check_supported(optimizer, precond)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad and id(parameter) in held]
        if not names:
            raise InputError("The optimizer holds no trained parameter of this model. Was the model copied or moved after it was made?")
        routes, coverage = probe_routes(self.model, self.probe.inputs, params=names, forward_fn=self.probe.forward_fn)
        facts = RunFacts(
            num_examples=self.probe.num_examples,
            num_classes=self.probe.num_classes,
            num_params=sum(parameter.numel() for parameter in routes.parameters.values()),
            num_query=self.probe.num_query,
            loss=self.probe.loss.name,
            optimizer=optimizers.describe(optimizer),
            precond=_precond_kind(optimizer, precond),
            stability_edge=optimizers.stability_edge(optimizer),
            momentum_lag=optimizers.momentum_lag(optimizer),
            parameters=list(routes.parameters),
            parameter_sizes=[parameter.numel() for parameter in routes.parameters.values()],
            gate=str(optimizer.param_groups[0]["gate"]) if isinstance(optimizer, optimizers.GatedAdamW) else None,
            probe_hash=self.probe.hash,
            train_only=train_only_kinds(self.model),
        )
        self._begin_trace(facts)
        self._run = _Run(optimizer, precond, routes, coverage)
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    @property
    def trace(self) -> Trace:
        """The record so far; takes a snapshot first if the optimizer has stepped since the last one."""
        if self._trace is None:
            raise InputError("Nothing is recorded yet. Call attach(optimizer), and train.")
        if self._stale and not self._trace.facts.stopped:
            self._snapshot()
        return self._trace

    def state_dict(self) -> dict[str, Any]:
        """Put the record and the clock into plain containers and tensors: `ntkscope analyze` needs nothing else.

        Returns:
            The state; `torch.load(weights_only=True)` reads it.

        Raises:
            InputError: If nothing is recorded yet.
        """
        return self.trace.state_dict() | {"clock": self._clock.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a saved recorder was; call it before `attach`. Later snapshots in the trace folder are dropped.

        Args:
            state: From `state_dict`.

        Raises:
            InputError: If the state is damaged, of another probe, or the recorder is attached already.
        """
        if self._run is not None:
            raise InputError("Load the recorder's state before attach(optimizer).")
        trace = trace_from_state(state, "the given state")
        if trace.facts.probe_hash != self.probe.hash:
            raise InputError("The state was recorded on another probe set (inputs or targets differ). Give the recorder the same probe.")
        try:
            self._clock = optimizers.Clock(**state["clock"])
        except (KeyError, TypeError) as error:
            raise InputError(f"The given state has no valid clock ({error!r}); it is a trace, but no recorder's state_dict().") from error
        self._trace = trace
        self._last_outputs = trace[-1].outputs
        self._plan(trace.steps[-1])

    def _begin_trace(self, facts: RunFacts) -> None:
        """Open the trace, new or resumed."""
        resumed = self._trace
        if resumed is not None and (resumed.facts.parameters, resumed.facts.precond) != (facts.parameters, facts.precond):
            raise InputError("The state was recorded with another model or optimizer. Resume with the same ones, or start a new trace.")
        if self._writer is not None:
            if resumed is not None:
                self._writer.begin(facts, self.probe.tensors())
                self._writer.forget_after(self._clock.step)
                on_disk = load_trace(self._writer.folder).entries
                for snapshot in list(resumed):
                    resumed.entries[snapshot.step] = on_disk.get(snapshot.step) or self._writer.write(snapshot)
            elif (self._writer.folder / "manifest.json").exists():
                raise InputError(
                    f"{self._writer.folder} holds a trace already. Choose another path, or resume it with "
                    "load_state_dict() before attach()."
                )
            else:
                self._writer.begin(facts, self.probe.tensors())
        if resumed is None:
            source = "recorder" if self._writer is None else str(self._writer.folder)
            self._trace = Trace(facts, self.probe.tensors(), source)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Keep the weights of step 0: their M is known only after the first step."""
        if self._clock.step == 0 and self._trace is not None and not len(self._trace):
            self._beginning = {name: value.detach().clone() for name, value in _named_state(self.model)}
        elif self._proxy is None and self.drift is not None and not self._stale:
            self._proxy = self._proxy_kernel()  # resumed: the weights are still those of the last snapshot

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Advance the clock, and take a snapshot if one is due."""
        assert self._run is not None
        assert self._trace is not None
        self._clock.tick(optimizer)
        self._stale = True
        if self._trace.facts.stopped:
            return
        if self._beginning is not None:
            beginning, self._beginning = self._beginning, None
            with _weights_of(self.model, beginning):
                self._snapshot(at_start=True)
        step = self._clock.step
        if (self._due is not None and step >= self._due) or (
            self.drift is not None and step % self._check_every == 0 and self._moved() > self.drift
        ):
            self._snapshot()

    def _snapshot(self, *, at_start: bool = False) -> None:
        """Take a snapshot; a run that has diverged is left alone, with one warning."""
        assert self._trace is not None
        try:
            snapshot = self._measure(0 if at_start else self._clock.step, 0.0 if at_start else self._clock.time)
        except UserError as error:
            reason = f"Recording stopped at step {self._clock.step}: {error}"
            self._trace.facts = stop_early(self._trace.facts, reason)
            if self._writer is not None:
                self._writer.write_facts(self._trace.facts)
            warnings.warn(reason, stacklevel=2)
            return
        self._trace.append(snapshot)
        if self._writer is not None:
            self._trace.entries[snapshot.step] = self._writer.write(snapshot)
        self._last_outputs = snapshot.outputs
        self._stale = at_start
        self._plan(snapshot.step)
        self._proxy = self._proxy_kernel() if self.drift is not None else None

    def _plan(self, step: int) -> None:
        """Decide when to look again after a snapshot."""
        self._due = next_step(self.schedule, step)
        self._check_every = 1 if self._due is None else max(1, (self._due - step) // PROXY_CHECKS)

    def _measure(self, step: int, time: float) -> Snapshot:
        """Compute everything a snapshot holds, at the weights the model has now."""
        assert self._run is not None
        run, probe = self._run, self.probe
        state = optimizers.mechanics(run.optimizer, run.routes.parameters, self._clock, at=dict(run.routes.parameters), precond=run.precond)
        with undisturbed(self.model):
            with torch.no_grad():
                outputs = forward_rows(self.model, probe.inputs, probe.forward_fn)
            if not bool(torch.isfinite(outputs).all()):
                raise InputError("the outputs on the probe are not finite: the run has diverged. Lower the learning rate.")
            kernel = self._kernel(state.precond, probe.inputs)
            forcing = None
            if state.decay is not None:
                options = {"routes": run.routes, "coverage": run.coverage, "budget": self.budget}
                forcing = push_forward(self.model, probe.inputs, state.decay, **options)
            query_outputs = cross = None
            if probe.query_inputs is not None:
                with torch.no_grad():
                    query_outputs = forward_rows(self.model, probe.query_inputs, probe.forward_fn).cpu()
                cross = self._kernel(state.precond, probe.query_inputs, probe.inputs).cpu()
        if not bool(torch.isfinite(kernel).all()):
            raise InputError("the kernel on the probe is not finite: the run has diverged. Lower the learning rate.")
        stored = outputs.cpu()
        return Snapshot(
            step=step,
            time=time,
            learning_rates=tuple(float(group["lr"]) for group in run.optimizer.param_groups),
            loss=probe.loss.value(stored),
            outputs=stored,
            gradient=probe.loss.gradient(stored),
            hessian=probe.loss.hessian_blocks(stored),
            mean_hessian=None if self._last_outputs is None else probe.loss.mean_hessian_blocks(self._last_outputs, stored),
            kernel_upper=pack_upper(kernel).cpu(),
            query_outputs=query_outputs,
            cross_kernel=cross,
            forcing=None if forcing is None else forcing.cpu(),
            gate_open=state.gate_open,
        )

    def _kernel(self, precond: dict[str, Tensor | float], inputs: Any, other: Any = None) -> Tensor:
        """Compute K or K_QS."""
        assert self._run is not None
        is_plain = all(not isinstance(value, Tensor) and value == 1.0 for value in precond.values())
        return blockwise_gram(
            self.model,
            inputs,
            other,
            routes=self._run.routes,
            coverage=self._run.coverage,
            outputs="full",
            precond=None if is_plain else precond,
            budget=self.budget,
            progress=None,
        )

    def _proxy_kernel(self) -> Tensor:
        """Compute the kernel of a few probe examples."""
        assert self._run is not None
        state = optimizers.mechanics(
            self._run.optimizer,
            self._run.routes.parameters,
            self._clock,
            at=dict(self._run.routes.parameters),
            precond=self._run.precond,
        )
        with undisturbed(self.model):
            return self._kernel(state.precond, self.probe.few)

    def _moved(self) -> float:
        """Measure how far the proxy kernel has moved since the last snapshot, relative to its norm then."""
        if self._proxy is None:
            return 0.0
        gap = float(torch.linalg.vector_norm(self._proxy_kernel() - self._proxy))
        scale = float(torch.linalg.vector_norm(self._proxy))
        return gap / scale if scale > 0 else math.inf


@dataclass(frozen=True)
class _Run:
    """What the recorder is attached to."""

    optimizer: Optimizer
    precond: optimizers.PrecondFn | None
    routes: Routes
    coverage: Coverage


def _precond_kind(optimizer: Optimizer, precond: optimizers.PrecondFn | None) -> str:
    """Name the kind of M."""
    if precond is not None:
        return "custom"
    if isinstance(optimizer, optimizers.GatedAdamW):
        return "gate"
    return "adam" if isinstance(optimizer, optimizers.ADAMS) else "identity"


def _named_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over parameters and buffers."""
    yield from model.named_parameters()
    yield from model.named_buffers()


@contextmanager
def _weights_of(model: nn.Module, state: dict[str, Tensor]) -> Generator[None, None, None]:
    """Swap other weights and buffers in: by pointer, so that the model's own storage is not even touched."""
    own = {name: tensor.data for name, tensor in _named_state(model)}
    try:
        for name, tensor in _named_state(model):
            tensor.data = state[name]
        yield
    finally:
        for name, tensor in _named_state(model):
            tensor.data = own[name]
