"""The operators of one window of training, accumulated interval by interval.

Identity 5 of theory.md section 3 composes intervals:  P = P₂P₁,  W = W₁ + P₁ᵀW₂P₁,  D = D₁ + D₂P₁,  G = G₁ + G₂P₁.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._checks import InputError
from ntkscope._display import Displayed
from ntkscope.dynamics.interval import Interval, factor_interval


@dataclass(frozen=True)
class Dissipation(Displayed):
    """Operators of one window of training (theory.md section 2), float64.

    Attributes:
        gramian: W, loss per squared output gradient; symmetric positive semidefinite.
        propagator: P, maps the output gradient at the start to that at the end.
        displacement: D, train motion is −D g_s.
        transfer: G, test motion is −G g_s; None without a query set.
        elapsed: Optimizer time τ of the window.
        gradient: Predicted output gradient at the end, forcing included.
        energy: Loss dissipated, predicted: g_sᵀ W g_s without forcing, else the sum of the forced interval energies.
        homogeneous_energy: The same without the forcing's part, for the forcing's share.
        sharpness: Largest eigenvalue of B^½ K B^½ in the last interval.
        query_motion: Predicted motion of the query outputs, forcing included; −G g_s without forcing. None without a query set.
    """

    gramian: Float[Tensor, "outputs outputs"]
    propagator: Float[Tensor, "outputs outputs"]
    displacement: Float[Tensor, "outputs outputs"]
    transfer: Float[Tensor, "query_outputs outputs"] | None
    elapsed: float
    gradient: Float[Tensor, "outputs ..."]
    energy: float
    homogeneous_energy: float
    sharpness: float
    query_motion: Float[Tensor, "query_outputs ..."] | None = None


def init(gradient: Float[Tensor, "outputs ..."], *, num_query_outputs: int | None = None) -> Dissipation:
    """Start a window of no length.

    Args:
        gradient: Output gradient g_s at its start; in the trace form of the kernel one row per example, one column per class.
        num_query_outputs: Rows of the cross kernel, q * C (q in the trace form); None without a query set.

    Returns:
        P is the identity, all else zero.
    """
    start = gradient.detach().to("cpu", torch.float64)
    zeros = torch.zeros(len(start), len(start), dtype=torch.float64)
    transfer = motion = None
    if num_query_outputs is not None:
        transfer = torch.zeros(num_query_outputs, len(start), dtype=torch.float64)
        motion = torch.zeros(num_query_outputs, *start.shape[1:], dtype=torch.float64)
    return Dissipation(zeros, torch.eye(len(start), dtype=torch.float64), zeros, transfer, 0.0, start, 0.0, 0.0, 0.0, motion)


def accumulate(
    state: Dissipation,
    gram: Float[Tensor, "outputs outputs"],
    hessian_blocks: Float[Tensor, "examples classes classes"],
    elapsed: float,
    *,
    cross: Float[Tensor, "query_outputs outputs"] | None = None,
    forcing: Float[Tensor, "outputs ..."] | None = None,
    query_forcing: Float[Tensor, "query_outputs ..."] | None = None,
    negative_tolerance: float = 1e-10,
    device: torch.device | str | None = None,
) -> Dissipation:
    """Append one interval to a window; exact for a kernel and a loss Hessian that are constant over it.

    Args:
        state: The window so far.
        gram: Average kernel of the interval, J M Jᵀ.
        hessian_blocks: Average loss Hessian blocks.
        elapsed: Length in optimizer time, `>= 0`.
        cross: Average cross kernel J_Q M Jᵀ; needed if the window has a query set.
        forcing: Average r of du/dτ = −K g − r, the motion that is not minus a gradient (weight decay).
        query_forcing: The same of the query outputs.
        negative_tolerance: As for `factor_interval`.
        device: Where to decompose.

    Returns:
        The longer window; `state` is unchanged.

    Raises:
        InputError: If shapes do not fit, time runs backwards, the kernel is not positive semidefinite, or `cross` is missing.

    Example:
        >>> one = accumulate(init(torch.ones(1)), torch.eye(1), torch.ones(1, 1, 1), elapsed=1e9)
        >>> one.gramian  # all the loss there was to dissipate: half of g² / b
        tensor([[0.5000]], dtype=torch.float64)

    Source:
        theory.md sections 2-4. The discretization and the forcing are ours, not the paper's.
    """
    _check_shapes(state, gram, hessian_blocks, cross)
    interval = factor_interval(gram, hessian_blocks, elapsed, negative_tolerance=negative_tolerance, device=device)
    return extend(state, interval, cross=cross, forcing=forcing, query_forcing=query_forcing)


def extend(
    state: Dissipation,
    interval: Interval,
    *,
    cross: Float[Tensor, "query_outputs outputs"] | None = None,
    forcing: Float[Tensor, "outputs ..."] | None = None,
    query_forcing: Float[Tensor, "query_outputs ..."] | None = None,
) -> Dissipation:
    """Append a factored interval to a window: the second half of `accumulate`.

    Args:
        state: The window so far.
        interval: From `factor_interval`.
        cross: As for `accumulate`.
        forcing: As for `accumulate`.
        query_forcing: As for `accumulate`.

    Returns:
        The longer window.
    """
    coordinates = interval.coordinates(state.propagator)
    motion = interval.displace(coordinates)  # D_step P
    transfer, query_motion = state.transfer, state.query_motion
    step = take_step(interval, state.gradient, forcing)
    if transfer is not None and query_motion is not None and cross is not None:
        wide = cross.to("cpu", torch.float64)
        transfer = transfer + wide @ interval.average(state.propagator)
        query_motion = query_motion - (wide @ step.integral.reshape(len(step.integral), -1)).view_as(query_motion)
        if query_forcing is not None:
            query_motion = query_motion - interval.elapsed * query_forcing.to("cpu", torch.float64)
    return Dissipation(
        gramian=state.gramian + interval.dissipate(coordinates),
        propagator=state.propagator - interval.apply_hessian(motion),
        displacement=state.displacement + motion,
        transfer=transfer,
        elapsed=state.elapsed + interval.elapsed,
        gradient=step.gradient,
        energy=state.energy + step.energy,
        homogeneous_energy=state.homogeneous_energy + step.homogeneous_energy,
        sharpness=float(interval.rates.max()) if len(interval.rates) else 0.0,
        query_motion=query_motion,
    )


@dataclass(frozen=True)
class GradientStep:
    """What one interval does to one output gradient.

    Attributes:
        gradient: At the interval's end.
        integral: ∫ g dτ over the interval.
        energy: Loss dissipated on the way, forcing included.
        homogeneous_energy: The same without forcing, gᵀ W_step g.
    """

    gradient: Float[Tensor, "outputs ..."]
    integral: Float[Tensor, "outputs ..."]
    energy: float
    homogeneous_energy: float


def take_step(
    interval: Interval, gradient: Float[Tensor, "outputs ..."], forcing: Float[Tensor, "outputs ..."] | None = None
) -> GradientStep:
    """Follow one output gradient over an interval (theory.md section 4).

    Args:
        interval: From `factor_interval`.
        gradient: g at its start.
        forcing: r of du/dτ = −K g − r.

    Returns:
        Gradient at its end, and the loss dissipated.
    """
    g = gradient.reshape(len(gradient), -1)
    coordinates = interval.coordinates(g)
    homogeneous = float(interval.dissipate(coordinates).diagonal().sum())
    end = g - interval.apply_hessian(interval.displace(coordinates))
    integral = interval.average(g)
    if forcing is None:
        return GradientStep(end.view_as(gradient), integral.view_as(gradient), homogeneous, homogeneous)
    r = forcing.detach().to("cpu", torch.float64).reshape(g.shape)
    pulled = interval.apply_hessian(r)
    moved = -interval.displace(coordinates) - interval.average_transposed(r)
    energy = float((-g * moved - 0.5 * moved * interval.apply_hessian(moved)).sum())
    return GradientStep(
        gradient=(end - interval.average(pulled)).view_as(gradient),
        integral=(integral - interval.average_twice(pulled)).view_as(gradient),
        energy=energy,
        homogeneous_energy=homogeneous,
    )


def _check_shapes(state: Dissipation, gram: Tensor, hessian_blocks: Tensor, cross: Tensor | None) -> None:
    """Check that an interval belongs to the window."""
    num_outputs = len(state.gradient)
    if gram.shape != (num_outputs, num_outputs):
        raise InputError(f"`gram` must have shape {(num_outputs, num_outputs)}, as the window began, got {tuple(gram.shape)}.")
    if hessian_blocks.shape[0] * hessian_blocks.shape[1] != num_outputs or hessian_blocks.shape[1] != hessian_blocks.shape[2]:
        raise InputError(
            f"`hessian_blocks` must have shape (examples, classes, classes) with {num_outputs} outputs in all, "
            f"got {tuple(hessian_blocks.shape)}."
        )
    if (state.transfer is None) != (cross is None):
        raise InputError("Give `cross` for every interval of a window that was begun with `num_query_outputs`, and only then.")
    if cross is not None and state.transfer is not None and cross.shape != state.transfer.shape:
        raise InputError(f"`cross` must have shape {tuple(state.transfer.shape)}, got {tuple(cross.shape)}.")
