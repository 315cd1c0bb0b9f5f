"""One walk along a trajectory: the operators accumulated over all intervals, and a row of measurements for every snapshot."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._checks import InputError
from ntkscope._eigh import eigh
from ntkscope.dynamics.closure import GRADIENT_LIMIT, relative
from ntkscope.dynamics.dissipation import Dissipation, extend, init, take_step
from ntkscope.dynamics.interval import factor_interval
from ntkscope.record.snapshot import Snapshot
from ntkscope.record.trace import Trace
from ntkscope.spectrum.channels import example_energy
from ntkscope.spectrum.eigen import whitened_gramian
from ntkscope.spectrum.whitening import Whitening, whiten

DISSIPATED = 0.5  # ω above which most of a direction's loss is gone
SATURATED = 0.25  # share of such directions beyond which the split stops telling noise from signal (benchmarks/RESULTS.md)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """What is kept of one snapshot on the way."""

    snapshot: Snapshot  # without its kernel
    kernel_drift: float
    kernel_step: float
    self_influence: Float[Tensor, " examples"]
    local_energy: float  # loss decrease since the previous snapshot, predicted from the gradient observed there
    stability: float
    state_energy: float
    gradient_error: float
    eigvals: Float[Tensor, " modes"]
    left: Float[Tensor, " modes"]  # B_s^{†½} P g_s: the residual that is left
    residual_share: Float[Tensor, " examples"]
    signal_share: float


@dataclass
class Walk:
    """The trajectory, walked once."""

    whitening: Whitening
    first: Snapshot
    first_kernel: Float[Tensor, "outputs outputs"]
    last: Dissipation
    summed: Float[Tensor, "modes modes"]  # Ω summed over the snapshots: what was learned first is largest
    kept: Dissipation | None = None  # at the last snapshot that qualifies for the default window
    kept_summed: Float[Tensor, "modes modes"] | None = None
    kept_index: int = 0
    history: list[Row] = field(default_factory=list)


def walk_trajectory(trace: Trace, start: int, stop: int, *, device: torch.device | str | None, progress: Progress | None) -> Walk:
    """Accumulate the operators over all intervals, keeping a row of history for every snapshot."""
    first = trace[start]
    kernel = first.kernel()
    whitening = whiten(first.hessian)
    num_query_outputs = None if first.cross_kernel is None else first.cross_kernel.shape[0]
    state = init(first.gradient.flatten(), num_query_outputs=num_query_outputs)
    walk = Walk(whitening, replace(_light(first), cross_kernel=first.cross_kernel), kernel, state, whitened_gramian(state, whitening))
    walk.history.append(_first_row(first, kernel, whitening))
    previous = first
    for position in range(start + 1, stop + 1):
        snapshot = trace[position]
        if snapshot.mean_hessian is None:
            raise InputError(f"The snapshot at step {snapshot.step} lacks the Hessian average since the one before. Record the run again.")
        next_kernel = snapshot.kernel()
        interval = factor_interval(
            0.5 * (kernel + next_kernel),
            snapshot.mean_hessian,
            snapshot.time - previous.time,
            negative_tolerance=max(previous.kernel_eps, snapshot.kernel_eps),
            device=device,
        )
        forcing = _flat_mean(previous.forcing, snapshot.forcing)
        state = extend(state, interval, cross=_mean(previous.cross_kernel, snapshot.cross_kernel), forcing=forcing)
        local = take_step(interval, previous.gradient.flatten(), forcing).energy
        walk.history.append(_row(walk, snapshot, kernel, next_kernel, local, state, trace, device))
        walk.last = state
        row = walk.history[-1]
        if float((row.eigvals > DISSIPATED).double().mean()) <= SATURATED and row.gradient_error <= GRADIENT_LIMIT:
            walk.kept, walk.kept_summed, walk.kept_index = state, walk.summed, len(walk.history) - 1
        previous, kernel = snapshot, next_kernel
        if progress is not None:
            progress(position - start, stop - start)
    return walk


def _first_row(first: Snapshot, kernel: Tensor, whitening: Whitening) -> Row:
    """Start the history: nothing is dissipated yet."""
    num_examples = first.outputs.shape[0]
    return Row(
        snapshot=_light(first),
        kernel_drift=0.0,
        kernel_step=0.0,
        self_influence=_self_influence(kernel, num_examples),
        local_energy=0.0,
        stability=math.nan,
        state_energy=0.0,
        gradient_error=0.0,
        eigvals=torch.zeros(whitening.num_modes, dtype=torch.float64),
        left=whitening.gradient(first.gradient.flatten()[:, None]).flatten(),
        residual_share=torch.ones(num_examples, dtype=torch.float64),
        signal_share=0.0,
    )


def _row(
    walk: Walk,
    snapshot: Snapshot,
    kernel: Tensor,
    next_kernel: Tensor,
    local_energy: float,
    state: Dissipation,
    trace: Trace,
    device: torch.device | str | None,
) -> Row:
    """Measure one snapshot."""
    num_examples = snapshot.outputs.shape[0]
    whitening, owner = walk.whitening, walk.whitening.owner
    residual = whitening.gradient(walk.first.gradient.flatten()[:, None]).flatten()
    initial = example_energy(residual, owner, num_examples)
    omega = whitened_gramian(state, whitening)
    walk.summed = walk.summed + omega
    eigvals, eigvecs = eigh(omega, device=device)
    eigvals = eigvals.clamp(min=0.0)
    left = whitening.gradient((state.propagator @ walk.first.gradient.flatten())[:, None]).flatten()
    edge = trace.facts.stability_edge
    observed_gradient = snapshot.gradient.flatten()
    return Row(
        snapshot=_light(snapshot),
        kernel_drift=relative(float(torch.linalg.vector_norm(next_kernel - walk.first_kernel)), walk.first_kernel),
        kernel_step=relative(float(torch.linalg.vector_norm(next_kernel - kernel)), kernel),
        self_influence=_self_influence(next_kernel, num_examples),
        local_energy=local_energy,
        stability=math.nan if edge is None else max(snapshot.learning_rates, default=math.nan) * state.sharpness / edge,
        state_energy=state.energy,
        gradient_error=relative(float(torch.linalg.vector_norm(state.gradient - observed_gradient)), observed_gradient),
        eigvals=eigvals,
        left=left,
        residual_share=example_energy(left, owner, num_examples) / initial.clamp(min=torch.finfo(torch.float64).tiny),
        signal_share=float((eigvals * (eigvecs.T @ residual).square()).sum() / residual.square().sum()),
    )


def _light(snapshot: Snapshot) -> Snapshot:
    """Drop the kernels: a walk keeps every snapshot's outputs, not its N² numbers."""
    return replace(snapshot, kernel_upper=snapshot.kernel_upper.new_empty(0), cross_kernel=None)


def _mean(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Average two ends of an interval, in float64."""
    return None if first is None or second is None else 0.5 * (first.double() + second.double())


def _flat_mean(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Average, stacked over outputs."""
    mean = _mean(first, second)
    return None if mean is None else mean.flatten()


def _self_influence(kernel: Tensor, num_examples: int) -> Tensor:
    """Sum the kernel's diagonal over each example's outputs."""
    return kernel.diagonal().view(num_examples, -1).sum(dim=1)
