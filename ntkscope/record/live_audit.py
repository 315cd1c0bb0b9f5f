"""Auditing the gate while training goes on: what it removes of each step's motion, without a null (theory.md section 7, items 2 and 3)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope.dynamics.dissipation import Dissipation, extend, init
from ntkscope.dynamics.form import Form
from ntkscope.dynamics.interval import factor_interval
from ntkscope.gate.channel import channel_at
from ntkscope.gate.step import gate_values
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.model import forward_rows
from ntkscope.record.audit import GateAudit, mean_decay
from ntkscope.record.beginning import weights_of
from ntkscope.record.instrument import Instrument
from ntkscope.record.optimizers import Clock
from ntkscope.record.trace import Trace
from ntkscope.spectrum.eigen import whitened_gramian
from ntkscope.spectrum.whitening import Whitening, whiten

COLUMNS = ("step", "precision", "recall", "collateral", "gated_direction", "ungated_direction")
DIFFERENCE = 1e-3  # of the weights' norm: curvature and float32 then err by about as much
DISSIPATED = 0.5  # ω above which a direction is signal


class Parts(NamedTuple):
    """A whitened motion on both channels."""

    signal: Tensor
    reservoir: Tensor


@dataclass(frozen=True)
class _Window:
    """The window from step 0 to the last snapshot.

    The smaller of the two channels is kept as a basis in float32: every audited step multiplies with it.
    """

    state: Dissipation
    whitening: Whitening
    rank: int
    basis: Float[Tensor, "modes smaller"]

    @property
    def num_modes(self) -> int:
        """Dimension of R."""
        return len(self.basis)

    def split(self, motion: Float[Tensor, "examples classes"]) -> Parts:
        """Split an output motion.

        Args:
            motion: Of all outputs.

        Returns:
            Its whitened parts.
        """
        whole = self.whitening.motion(self._stacked(motion)).float()
        return self._parts(whole)

    def signal_gradient(self, gradient: Float[Tensor, "examples classes"]) -> Float[Tensor, "examples classes"]:
        """Project an output gradient onto the signal channel.

        Args:
            gradient: g.

        Returns:
            Π̂ g.
        """
        part = self._parts(self.whitening.gradient(self._stacked(gradient)).float()).signal
        return self.whitening.gradient_back(part.double()).view(gradient.shape)

    def _parts(self, whole: Tensor) -> Parts:
        """Project on the smaller channel; the rest is the other."""
        inside = self.basis @ (self.basis.T @ whole)
        return Parts(inside, whole - inside) if self.rank == self.basis.shape[1] else Parts(whole - inside, inside)

    def _stacked(self, field: Tensor) -> Tensor:
        """Stack outputs as the whitening does: by output, or by example in the trace form."""
        rows = len(field) * self.whitening.root.shape[1]
        return field.double().reshape(rows, -1)


class LiveAudit:
    """Follows the signal channel from snapshot to snapshot, and measures steps against it.

    Args:
        interval: Steps from one audit to the next.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self._window: _Window | None = None
        self._followed = -1  # index of the last snapshot
        self._rows: list[list[float]] = []

    def is_due(self, step: int) -> bool:
        """Say whether a step is to be audited: there must be a signal channel.

        Args:
            step: Its number.

        Returns:
            Whether.
        """
        return step % self.interval == 0 and self._window is not None and 0 < self._window.rank < self._window.num_modes

    def follow(self, trace: Trace) -> None:
        """Bring the channel up to the last snapshot: one trapezoid for every snapshot that is new.

        Args:
            trace: The record so far.
        """
        form = Form(trace.facts.outputs == "trace")
        for position in range(self._followed + 1, len(trace)):
            snapshot = trace[position]
            if self._window is None:
                whitening = whiten(form.blocks(snapshot.hessian))
                state = init(form.field(snapshot.gradient))
                self._window = _Window(state, whitening, 0, torch.zeros(whitening.num_modes, 0))
            elif snapshot.mean_hessian is not None:
                before, whitening = trace[position - 1], self._window.whitening
                kernel = 0.5 * (before.kernel() + snapshot.kernel())
                elapsed = snapshot.time - before.time
                piece = factor_interval(kernel, form.blocks(snapshot.mean_hessian), elapsed, negative_tolerance=snapshot.kernel_eps)
                self._window = _Window(extend(self._window.state, piece), whitening, 0, self._window.basis)
            self._followed = position
        if self._window is not None and self._followed > 0:
            state, whitening = self._window.state, self._window.whitening
            rank = int((torch.linalg.eigvalsh(whitened_gramian(state, whitening)) > DISSIPATED).sum())
            directions = channel_at(state, whitening, rank).basis.float()
            smaller = directions[:, :rank] if 2 * rank <= len(directions) else directions[:, rank:]
            self._window = _Window(state, whitening, rank, smaller.contiguous())

    def measure(self, instrument: Instrument, clock: Clock, audit: GateAudit) -> None:
        """Measure the step that was just taken, at the weights that it led to.

        Motions are finite differences, two forward passes instead of two of forward-mode AD: an audited step is to cost little.

        Args:
            instrument: What measures the run.
            clock: After the step.
            audit: Has m and s of a run without a gate.
        """
        assert self._window is not None
        parameters = instrument.routes.parameters
        state = instrument.mechanics(clock)
        means, variances = audit.moments(instrument.optimizer, parameters)
        weights = [parameter.detach() for parameter in parameters.values()]
        mean = [means[name].to(own) for name, own in parameters.items()]
        precond = [torch.as_tensor(state.ungated[name]).to(own) for name, own in parameters.items()]
        if state.gates is None:
            alpha = (1 - mean_decay(instrument.optimizer)) / (1 + mean_decay(instrument.optimizer))
            options = {"kind": "soft", "alpha": alpha, "lambda_pop": alpha}
            gates = [gate_values(m, variances[name].to(m), **options) for name, m in zip(parameters, mean, strict=True)]
        else:
            gates = [state.gates[name].to(own) for name, own in parameters.items()]
        ungated = [p * m for p, m in zip(precond, mean, strict=True)]
        gated = [q * t for q, t in zip(gates, ungated, strict=True)]
        start, pulled = self._pull(instrument, self._window)
        target = [p * d for p, d in zip(precond, pulled, strict=True)]
        length, scale = _norm(ungated), _norm(weights)
        scale = DIFFERENCE * scale / length if length > 0 else 0.0
        moved = [self._moved(instrument, start, weights, direction, scale) for direction in (ungated, gated)]
        before, gone = self._window.split(moved[0]), self._window.split(moved[0] - moved[1])
        removed = float(_dot(gone.reservoir, gone.reservoir))
        self._rows.append([
            float(clock.step),
            _ratio(removed, removed + _dot(gone.signal, gone.signal)),
            _ratio(_dot(gone.reservoir, before.reservoir), _dot(before.reservoir, before.reservoir)),
            _ratio(_dot(gone.signal, before.signal), _dot(before.signal, before.signal)),
            _cosine(gated, target),
            _cosine(ungated, target),
        ])

    def collect(self) -> Float[Tensor, "audits 6"] | None:
        """Hand the rows over to a snapshot.

        Returns:
            One row per audited step since the last call, columns as `COLUMNS`; NaN where a figure is 0/0. None if there are none.
        """
        rows, self._rows = self._rows, []
        return torch.tensor(rows, dtype=torch.float64) if rows else None

    def _pull(self, instrument: Instrument, window: "_Window") -> tuple[Tensor, list[Tensor]]:
        """Compute the outputs, and Jᵀ Π̂ g."""
        probe, parameters = instrument.probe, instrument.routes.parameters
        with undisturbed(instrument.model):
            outputs = forward_rows(instrument.model, probe.inputs, probe.forward_fn)
            wanted = window.signal_gradient(probe.loss.gradient(outputs.detach().cpu())).to(outputs)
            grads = torch.autograd.grad(outputs, list(parameters.values()), wanted, allow_unused=True)
        return outputs.detach(), [
            torch.zeros_like(own) if grad is None else grad for own, grad in zip(parameters.values(), grads, strict=True)
        ]

    def _moved(
        self, instrument: Instrument, start: Tensor, weights: list[Tensor], direction: list[Tensor], scale: float
    ) -> Float[Tensor, "examples classes"]:
        """Compute J t, times a scale, by a finite difference."""
        probe, parameters = instrument.probe, instrument.routes.parameters
        state = {name: torch.add(own, t, alpha=-scale) for name, own, t in zip(parameters, weights, direction, strict=True)}
        with undisturbed(instrument.model), weights_of(instrument.model, state), torch.no_grad():
            return (forward_rows(instrument.model, probe.inputs, probe.forward_fn) - start).cpu()


def _dot(first: Tensor, second: Tensor) -> float:
    """Multiply and add up."""
    return float(torch.dot(first.flatten(), second.flatten()))


def _norm(tensors: list[Tensor]) -> float:
    """Compute the norm of all of them together."""
    return sum(_dot(tensor, tensor) for tensor in tensors) ** 0.5


def _cosine(first: list[Tensor], second: list[Tensor]) -> float:
    """Compute a cosine."""
    return _ratio(sum(_dot(a, b) for a, b in zip(first, second, strict=True)), _norm(first) * _norm(second))


def _ratio(above: float, below: float) -> float:
    """Divide; NaN for 0/0."""
    return above / below if below > 0 else float("nan")
