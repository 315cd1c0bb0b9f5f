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
from ntkscope.record.optimizers import Clock, current_gates
from ntkscope.record.trace import Trace
from ntkscope.spectrum.eigen import whitened_gramian
from ntkscope.spectrum.whitening import Whitening, whiten

COLUMNS = ("step", "precision", "recall", "collateral", "gated_direction", "ungated_direction")
DIFFERENCE = 1e-3  # of the weights' norm: curvature and float32 then err by about as much
DISSIPATED = 0.5  # ω above which a direction is signal


class Products(NamedTuple):
    """Inner products of what a gate removes with itself and with the whole motion, and of the motion with itself."""

    removed: float
    mixed: float
    whole: float

    @staticmethod
    def of(gone: Tensor, whole: Tensor) -> "Products":
        """Multiply.

        Args:
            gone: Of any shape.
            whole: Of the same.

        Returns:
            The products.
        """
        a, b = gone.flatten(), whole.flatten()
        return Products(float(torch.dot(a, a)), float(torch.dot(a, b)), float(torch.dot(b, b)))


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

    def products(self, gone: Float[Tensor, "examples classes"], whole: Float[Tensor, "examples classes"]) -> tuple[Products, Products]:
        """Multiply whitened output motions with one another on both channels.

        Args:
            gone: What a gate removes of a motion.
            whole: The motion.

        Returns:
            On the signal channel, and on the reservoir.
        """
        vectors = [self.whitening.motion(self._stacked(motion)).float() for motion in (gone, whole)]
        inside = Products.of(*((self.basis.T @ vector).double() for vector in vectors))
        total = Products.of(*(vector.double() for vector in vectors))
        outside = Products(*(a - b for a, b in zip(total, inside, strict=True)))
        return (inside, outside) if self._is_signal_kept else (outside, inside)

    def signal_gradient(self, gradient: Float[Tensor, "examples classes"]) -> Float[Tensor, "examples classes"]:
        """Project an output gradient onto the signal channel.

        Args:
            gradient: g.

        Returns:
            Π̂ g.
        """
        whole = self.whitening.gradient(self._stacked(gradient)).float()
        inside = self.basis @ (self.basis.T @ whole)
        signal = inside if self._is_signal_kept else whole - inside
        return self.whitening.gradient_back(signal.double()).view(gradient.shape)

    @property
    def _is_signal_kept(self) -> bool:
        """Whether the basis is the signal channel's."""
        return self.rank == self.basis.shape[1]

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
        self._scale: float | None = None  # length of the finite differences, by the weights' norm at the last snapshot

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
        self._scale = None
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
        means, variances = audit.moments(instrument.optimizer, parameters)
        diagonals = instrument.ungated(clock)
        mean = [means[name].to(own) for name, own in parameters.items()]
        precond = [torch.as_tensor(diagonals[name]).to(own) for name, own in parameters.items()]
        held = current_gates(instrument.optimizer, parameters)
        if held is None:
            alpha = (1 - mean_decay(instrument.optimizer)) / (1 + mean_decay(instrument.optimizer))
            options = {"kind": "soft", "alpha": alpha, "lambda_pop": alpha}
            gates = [gate_values(m, variances[name].to(m), **options) for name, m in zip(parameters, mean, strict=True)]
        else:
            gates = [held[name].to(own) for name, own in parameters.items()]
        ungated = [p * m for p, m in zip(precond, mean, strict=True)]
        gated = [q.mul_(t) for q, t in zip(gates, ungated, strict=True)]
        if self._scale is None:
            self._scale = DIFFERENCE * _dot(weights := [parameter.detach() for parameter in parameters.values()], weights) ** 0.5
        squares = [_dot(ungated, ungated), _dot(gated, gated)]
        scale = self._scale / squares[0] ** 0.5 if squares[0] > 0 else 0.0
        with undisturbed(instrument.model):
            start, pulled = self._pull(instrument, self._window)
            with torch.no_grad():
                moved = [self._moved(instrument, start, direction, scale) for direction in (ungated, gated)]
        target = [d.mul_(p) for p, d in zip(precond, pulled, strict=True)]
        size = _dot(target, target)
        signal, reservoir = self._window.products(moved[0] - moved[1], moved[0])
        self._rows.append([
            float(clock.step),
            _ratio(reservoir.removed, reservoir.removed + signal.removed),
            _ratio(reservoir.mixed, reservoir.whole),
            _ratio(signal.mixed, signal.whole),
            _ratio(_dot(gated, target), (squares[1] * size) ** 0.5),
            _ratio(_dot(ungated, target), (squares[0] * size) ** 0.5),
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
        outputs = forward_rows(instrument.model, probe.inputs, probe.forward_fn)
        wanted = window.signal_gradient(probe.loss.gradient(outputs.detach().cpu())).to(outputs)
        grads = torch.autograd.grad(outputs, list(parameters.values()), wanted, allow_unused=True)
        return outputs.detach(), [
            torch.zeros_like(own) if grad is None else grad for own, grad in zip(parameters.values(), grads, strict=True)
        ]

    def _moved(self, instrument: Instrument, start: Tensor, direction: list[Tensor], scale: float) -> Float[Tensor, "examples classes"]:
        """Compute J t, times a scale, by a finite difference."""
        probe, parameters = instrument.probe, instrument.routes.parameters
        state = {name: torch.add(own, t, alpha=-scale) for (name, own), t in zip(parameters.items(), direction, strict=True)}
        with weights_of(instrument.model, state):
            return (forward_rows(instrument.model, probe.inputs, probe.forward_fn) - start).cpu()


def _dot(first: list[Tensor], second: list[Tensor]) -> float:
    """Multiply and add up over all parameters."""
    return sum(float(torch.dot(a.flatten(), b.flatten())) for a, b in zip(first, second, strict=True))


def _ratio(above: float, below: float) -> float:
    """Divide; NaN for 0/0."""
    return above / below if below > 0 else float("nan")
