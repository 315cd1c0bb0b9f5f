"""What the recorder measures at one moment: outputs, kernels, motions by weight decay, and the linearized model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntkscope._checks import InputError
from ntkscope.kernel.blocks import blockwise_gram, blockwise_grams, complete, push_forward
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.coverage import Coverage
from ntkscope.kernel.model import forward_rows
from ntkscope.kernel.ranks import Ranks
from ntkscope.kernel.routes import Routes
from ntkscope.record import optimizers
from ntkscope.record.beginning import State, displacement, weights_of
from ntkscope.record.crew import ALONE, Crew, Job
from ntkscope.record.gradient_audit import probe_gradient
from ntkscope.record.probe import ProbeSet
from ntkscope.record.snapshot import Snapshot, pack_upper


@dataclass(frozen=True)
class Instrument:
    """Measures a model that an optimizer trains, on a probe and query set.

    Attributes:
        model: The model.
        probe: Probe and query set.
        optimizer: The user's.
        precond: A user's M.
        routes: From `probe_routes`.
        coverage: From `probe_routes`.
        budget: Bytes for kernels.
        form: "full", or "trace" for K_tr / C.
        crew: Ranks that share the kernels of snapshots; None for this process alone.
    """

    model: nn.Module
    probe: ProbeSet
    optimizer: Optimizer
    precond: optimizers.PrecondFn | None
    routes: Routes
    coverage: Coverage
    budget: int
    form: str
    crew: Crew | None = None

    def outputs(self) -> Tensor:
        """Run the model on the probe.

        Returns:
            u, on the CPU.
        """
        return self._run(self.probe.inputs)

    def gradient(self) -> dict[str, Tensor]:
        """Compute ∇Φ.

        Returns:
            By name of the trained parameter.
        """
        probe = self.probe
        return probe_gradient(self.model, probe.inputs, probe.loss, self.routes.parameters, probe.forward_fn)

    def few_kernel(self, clock: optimizers.Clock) -> Tensor:
        """Compute the kernel of a few probe examples.

        Args:
            clock: After the last step.

        Returns:
            K, which moves as the whole kernel does.
        """
        with undisturbed(self.model):
            kernel = blockwise_gram(
                self.model,
                self.probe.few,
                None,
                routes=self.routes,
                coverage=self.coverage,
                outputs=self.form,
                precond=_diagonals(self.mechanics(clock)),
                budget=self.budget,
                progress=None,
            )
            return self._scaled(kernel)

    def snapshot(
        self,
        clock: optimizers.Clock,
        *,
        at: tuple[int, float],
        outputs: Tensor | None,
        previous: Tensor | None,
        beginning: State | None,
        extra: dict[str, Tensor | None],
    ) -> Snapshot:
        """Measure everything a snapshot holds, at the weights the model has now.

        Args:
            clock: After the last step.
            at: Step and time of the snapshot.
            outputs: On the probe, if the model was run on it already.
            previous: Outputs at the previous snapshot.
            beginning: Weights at step 0, around which to linearize; None for none.
            extra: Further fields of the snapshot.

        Returns:
            The snapshot.
        """
        state = self.mechanics(clock)
        return self.measure(state, at=at, outputs=outputs, previous=previous, beginning=beginning, extra=extra)

    def measure(
        self,
        state: optimizers.Mechanics,
        *,
        at: tuple[int, float],
        outputs: Tensor | None = None,
        previous: Tensor | None = None,
        beginning: State | None = None,
        extra: Mapping[str, Tensor | None] = MappingProxyType({}),
    ) -> Snapshot:
        """Measure a snapshot under a given M.

        Args:
            state: What the optimizer applies, or applied when the weights were saved.
            at: As for `snapshot`.
            outputs: Likewise.
            previous: Likewise.
            beginning: Likewise.
            extra: Likewise.

        Returns:
            The snapshot.

        Raises:
            InputError: If outputs or kernel are not finite.
        """
        probe = self.probe
        stored = self.outputs() if outputs is None else outputs
        if not bool(torch.isfinite(stored).all()):
            raise InputError("the outputs on the probe are not finite: the run has diverged. Lower the learning rate.")
        with undisturbed(self.model):
            query, is_start = probe.query_inputs, at[0] == 0
            kernel = self.kernel(Job.KERNEL, state, self._called(Job.KERNEL, at_start=is_start))
            cross = None
            if query is not None:
                cross = self.kernel(Job.CROSS_KERNEL, state, self._called(Job.CROSS_KERNEL, at_start=is_start)).cpu()
        if not bool(torch.isfinite(kernel).all()):
            raise InputError("the kernel on the probe is not finite: the run has diverged. Lower the learning rate.")
        has_decay, has_query = state.decay is not None, query is not None
        return Snapshot(
            step=at[0],
            time=at[1],
            learning_rates=tuple(float(group["lr"]) for group in self.optimizer.param_groups),
            loss=probe.loss.value(stored),
            outputs=stored,
            gradient=probe.loss.gradient(stored),
            hessian=probe.loss.hessian_blocks(stored),
            mean_hessian=None if previous is None else probe.loss.mean_hessian_blocks(previous, stored),
            kernel_upper=pack_upper(kernel).cpu(),
            query_outputs=self._run(query) if has_query else None,
            cross_kernel=cross,
            forcing=self._push(probe.inputs, state.decay) if has_decay else None,
            query_forcing=self._push(query, state.decay) if has_decay and has_query else None,
            linearized=self._linearized(probe.inputs, beginning) if has_query else None,
            query_linearized=self._linearized(query, beginning) if has_query else None,
            gate_open=state.gate_open,
            probe_hash=probe.hash,
            **extra,
        )

    def waiter(self) -> Callable[[], None]:
        """Choose how to wait for the device to finish what it was given.

        Returns:
            A function that waits.
        """
        device = next(iter(self.routes.parameters.values())).device
        return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)

    def mechanics(self, clock: optimizers.Clock) -> optimizers.Mechanics:
        """Read M, gate and weight decay at the weights the model has now.

        Args:
            clock: After the last step.

        Returns:
            What the optimizer applies.
        """
        parameters = self.routes.parameters
        return optimizers.mechanics(self.optimizer, parameters, clock, at=dict(parameters), precond=self.precond)

    def ungated(self, clock: optimizers.Clock) -> dict[str, Tensor | float]:
        """Read the diagonal of M⁰, without gate.

        Args:
            clock: After the last step.

        Returns:
            By parameter name.
        """
        return optimizers.ungated_diagonals(self.optimizer, self.routes.parameters, clock, precond=self.precond)

    def kernel(self, job: Job, state: optimizers.Mechanics, ranks: Ranks) -> Tensor:
        """Compute K or K_QS in the form asked for, inside `undisturbed`, together with other ranks.

        Args:
            job: Which of the two.
            state: Has M.
            ranks: All of them make this call.

        Returns:
            The kernel, the same on all ranks.
        """
        inputs, other = (self.probe.inputs, None) if job is Job.KERNEL else (self.probe.query_inputs, self.probe.inputs)
        ranks.check_same_call(self.routes.parameters, inputs, other)
        with ranks.failing_together():
            total = blockwise_grams(
                self.model,
                inputs,
                other,
                routes=self.routes,
                coverage=self.coverage,
                outputs=self.form,
                precond=_diagonals(state),
                budget=self.budget,
                progress=None,
                accumulate=torch.float64,
                groups={"": None},
                part=ranks.part,
            )[""]
        ranks.add_up(total)
        return self._scaled(complete(total, self.routes.dtype, is_symmetric=other is None))

    def help(self, job: Job, clock: optimizers.Clock, ranks: Ranks) -> None:
        """Compute this rank's share of what rank 0 asked for.

        Args:
            job: Which kernel.
            clock: After the last step.
            ranks: All of them.
        """
        self.kernel(job, self.mechanics(clock), ranks)

    def _run(self, inputs: Any) -> Tensor:
        """Run the model."""
        with undisturbed(self.model), torch.no_grad():
            return forward_rows(self.model, inputs, self.probe.forward_fn).cpu()

    def _called(self, job: Job, *, at_start: bool) -> Ranks:
        """Call the other ranks to a job, if there are any that listen."""
        return ALONE if self.crew is None else self.crew.ask(job, self.model, at_start=at_start)

    def _scaled(self, kernel: Tensor) -> Tensor:
        """Divide K_tr by C in the trace form."""
        return kernel / self.probe.num_classes if self.form == "trace" else kernel

    def _push(self, inputs: Any, tangents: dict[str, Tensor] | None) -> Tensor:
        """Compute the motion of outputs when weights move."""
        assert tangents is not None
        with undisturbed(self.model):
            options = {"routes": self.routes, "coverage": self.coverage, "budget": self.budget}
            return push_forward(self.model, inputs, tangents, **options).detach().cpu()

    def _linearized(self, inputs: Any, beginning: State | None) -> Tensor | None:
        """Compute u_0 + J(w_0)(w − w_0)."""
        if beginning is None:
            return None
        moved = displacement(self.routes.parameters, beginning)
        with weights_of(self.model, beginning):
            start = self._run(inputs)
            motion = self._push(inputs, moved)
        return start.to(motion) + motion


def _diagonals(state: optimizers.Mechanics) -> dict[str, Tensor | float] | None:
    """Take M; None where it is the identity."""
    is_plain = all(not isinstance(value, Tensor) and value == 1.0 for value in state.precond.values())
    return None if is_plain else state.precond
