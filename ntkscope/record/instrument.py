"""What the recorder measures at one moment: outputs, kernels, motions by weight decay, and the linearized model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntkscope._checks import InputError
from ntkscope.kernel.blocks import blockwise_gram, push_forward
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.coverage import Coverage
from ntkscope.kernel.model import forward_rows
from ntkscope.kernel.routes import Routes
from ntkscope.record import optimizers
from ntkscope.record.beginning import State, displacement, weights_of
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
    """

    model: nn.Module
    probe: ProbeSet
    optimizer: Optimizer
    precond: optimizers.PrecondFn | None
    routes: Routes
    coverage: Coverage
    budget: int
    form: str

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
            return self._kernel(self.mechanics(clock).precond, self.probe.few)

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

        Raises:
            InputError: If outputs or kernel are not finite.
        """
        probe, state = self.probe, self.mechanics(clock)
        stored = self.outputs() if outputs is None else outputs
        if not bool(torch.isfinite(stored).all()):
            raise InputError("the outputs on the probe are not finite: the run has diverged. Lower the learning rate.")
        with undisturbed(self.model):
            kernel = self._kernel(state.precond, probe.inputs)
            query = probe.query_inputs
            cross = None if query is None else self._kernel(state.precond, query, probe.inputs).cpu()
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

    def _run(self, inputs: Any) -> Tensor:
        """Run the model."""
        with undisturbed(self.model), torch.no_grad():
            return forward_rows(self.model, inputs, self.probe.forward_fn).cpu()

    def _kernel(self, precond: dict[str, Tensor | float], inputs: Any, other: Any = None) -> Tensor:
        """Compute K or K_QS, in the form asked for."""
        is_plain = all(not isinstance(value, Tensor) and value == 1.0 for value in precond.values())
        kernel = blockwise_gram(
            self.model,
            inputs,
            other,
            routes=self.routes,
            coverage=self.coverage,
            outputs=self.form,
            precond=None if is_plain else precond,
            budget=self.budget,
            progress=None,
        )
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
