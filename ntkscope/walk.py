"""One walk along a trajectory: the operators accumulated over all intervals, and a row of measurements for every snapshot."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._eigh import eigvalsh, largest_eigval
from ntkscope.course import Course, Leg, Moment, factor_leg
from ntkscope.dynamics.closure import GRADIENT_LIMIT, relative
from ntkscope.dynamics.dissipation import Dissipation, init, take_step
from ntkscope.dynamics.drift import centered_alignment
from ntkscope.dynamics.form import Form
from ntkscope.record.snapshot import Snapshot
from ntkscope.spectrum.channels import example_energy
from ntkscope.spectrum.eigen import whiten_field, whitened_gramian
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
    velocity: float  # kernel_step per optimizer time
    alignment_start: float
    alignment_targets: float
    largest_eigval: float  # of K, for the transfer of energy into motion
    is_refined: bool
    self_influence: Float[Tensor, " examples"]
    local_energy: float  # loss decrease since the previous snapshot, predicted from the gradient observed there
    stability: float
    state_energy: float
    gradient_error: float
    eigvals: Float[Tensor, " modes"]
    left: Float[Tensor, "modes ..."]  # B_s^{†½} P g_s: the residual that is left
    residual_share: Float[Tensor, " examples"]
    signal_share: float


@dataclass
class Walk:
    """The trajectory, walked once."""

    course: Course
    whitening: Whitening
    first: Moment
    trace_kernel: Float[Tensor, "examples examples"]  # K_tr at the start
    target_kernel: Float[Tensor, "examples examples"] | None  # y yᵀ
    last: Dissipation
    summed: Float[Tensor, "modes modes"]  # Ω summed over the snapshots: what was learned first is largest
    kept: Dissipation | None = None  # at the last snapshot that qualifies for the default window
    kept_summed: Float[Tensor, "modes modes"] | None = None
    kept_index: int = 0
    history: list[Row] = field(default_factory=list)

    @property
    def form(self) -> Form:
        """How outputs are stacked."""
        return self.course.form

    @property
    def residual(self) -> Float[Tensor, "modes ..."]:
        """Whitened gradient at the start, h = B_s^{†½} g_s."""
        return whiten_field(self.whitening, self.first.gradient)


def walk_trajectory(
    course: Course,
    *,
    target_kernel: Float[Tensor, "examples examples"] | None,
    device: torch.device | str | None,
    progress: Progress | None,
    visit: Callable[[int, Dissipation, Walk], None] | None = None,
) -> Walk:
    """Accumulate the operators over all intervals, keeping a row of history for every snapshot.

    Args:
        course: The trace, and from where to where.
        target_kernel: y yᵀ.
        device: Where to decompose.
        progress: Called with (intervals done, intervals in all).
        visit: Called at every snapshot but the first, with its index in the trace, the operators of the window that ends there and the
            walk so far.

    Returns:
        The walk.
    """
    first = course.moment(course.start)
    num_examples, num_classes = first.snapshot.outputs.shape
    whitening = whiten(course.form.blocks(first.snapshot.hessian))
    state = init(first.gradient, num_query_outputs=None if first.cross is None else len(first.cross))
    trace_kernel = course.form.trace_kernel(first.kernel, num_examples, num_classes)
    walk = Walk(course, whitening, first, trace_kernel, target_kernel, state, whitened_gramian(state, whitening))
    walk.history.append(_first_row(walk))
    for position, leg in enumerate(course.legs()):
        pieces = factor_leg(leg, device=device)
        local, gradient = 0.0, leg.start.gradient
        for piece in pieces:
            state = piece.extend(state)
            step = take_step(piece.interval, gradient, piece.forcing)
            local, gradient = local + step.energy, step.gradient
        walk.last = state
        walk.history.append(_row(walk, leg, local, state, is_refined=len(pieces) > 1, device=device))
        row = walk.history[-1]
        if float((row.eigvals > DISSIPATED).double().mean()) <= SATURATED and row.gradient_error <= GRADIENT_LIMIT:
            walk.kept, walk.kept_summed, walk.kept_index = state, walk.summed, len(walk.history) - 1
        if visit is not None:
            visit(course.start + position + 1, state, walk)
        if progress is not None:
            progress(position + 1, course.stop - course.start)
    return walk


def _first_row(walk: Walk) -> Row:
    """Start the history: nothing is dissipated yet."""
    snapshot = walk.first.snapshot
    num_examples, num_classes = snapshot.outputs.shape
    return Row(
        snapshot=_light(snapshot),
        kernel_drift=0.0,
        kernel_step=0.0,
        velocity=math.nan,
        alignment_start=1.0,
        alignment_targets=_alignment(walk.trace_kernel, walk.target_kernel),
        largest_eigval=largest_eigval(walk.first.kernel),
        is_refined=False,
        self_influence=walk.form.self_influence(walk.first.kernel, num_examples, num_classes),
        local_energy=0.0,
        stability=math.nan,
        state_energy=0.0,
        gradient_error=0.0,
        eigvals=torch.zeros(walk.whitening.num_modes, dtype=torch.float64),
        left=walk.residual,
        residual_share=torch.ones(num_examples, dtype=torch.float64),
        signal_share=0.0,
    )


def _row(walk: Walk, leg: Leg, local_energy: float, state: Dissipation, *, is_refined: bool, device: torch.device | str | None) -> Row:
    """Measure one snapshot."""
    snapshot, kernel = leg.stop.snapshot, leg.stop.kernel
    num_examples, num_classes = snapshot.outputs.shape
    owner, residual = walk.whitening.owner, walk.residual
    initial = example_energy(residual, owner, num_examples)
    omega = whitened_gramian(state, walk.whitening)
    walk.summed = walk.summed + omega
    columns = residual.reshape(len(residual), -1)
    start = walk.first.gradient
    left = whiten_field(walk.whitening, (state.propagator @ start.reshape(len(start), -1)).view_as(start))
    edge = walk.course.trace.facts.stability_edge
    moved = relative(float(torch.linalg.vector_norm(kernel - leg.start.kernel)), leg.start.kernel)
    trace_kernel = walk.form.trace_kernel(kernel, num_examples, num_classes)
    return Row(
        snapshot=_light(snapshot),
        kernel_drift=relative(float(torch.linalg.vector_norm(kernel - walk.first.kernel)), walk.first.kernel),
        kernel_step=moved,
        velocity=moved / leg.whole.elapsed if leg.whole.elapsed > 0 else math.nan,
        alignment_start=_alignment(trace_kernel, walk.trace_kernel),
        alignment_targets=_alignment(trace_kernel, walk.target_kernel),
        largest_eigval=largest_eigval(kernel),
        is_refined=is_refined,
        self_influence=walk.form.self_influence(kernel, num_examples, num_classes),
        local_energy=local_energy,
        stability=math.nan if edge is None else max(snapshot.learning_rates, default=math.nan) * state.sharpness / edge,
        state_energy=state.energy,
        gradient_error=relative(float(torch.linalg.vector_norm(state.gradient - leg.stop.gradient)), leg.stop.gradient),
        eigvals=eigvalsh(omega, device=device).clamp(min=0.0),
        left=left,
        residual_share=example_energy(left, owner, num_examples) / initial.clamp(min=torch.finfo(torch.float64).tiny),
        signal_share=float((columns * (omega @ columns)).sum() / columns.square().sum()),
    )


def _light(snapshot: Snapshot) -> Snapshot:
    """Drop the kernels: a walk keeps every snapshot's outputs, not its N² numbers."""
    return replace(snapshot, kernel_upper=snapshot.kernel_upper.new_empty(0), cross_kernel=None)


def _alignment(kernel: Tensor, other: Tensor | None) -> float:
    """Align with another kernel, where there is one."""
    return math.nan if other is None else centered_alignment(kernel, other)
