"""Four cells: test motion caused by clean labels and by label noise, through the signal channel and through the reservoir.

The gradient at the window's start is affine in the targets, g_s = g_clean + g_noise, with g_clean the gradient for clean targets. For the
squared loss −g_clean = a/n and −g_noise = ξ/n as in theory.md section 8; the same split holds for mse and for cross-entropy.
Where clean targets are unknown, each direction's gradient is shared out by the population-risk rule (theory.md section 6, eigenbasis):
of a mean motion over examples with leave-one-out noise ν, the share 1 − ν/mean² is taken for clean. Those are estimates.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._display import Displayed
from ntkscope.dynamics.dissipation import Dissipation
from ntkscope.spectrum.channels import ChannelSplit
from ntkscope.spectrum.cutoffs import risk_moments
from ntkscope.spectrum.eigen import Spectrum, whiten_field
from ntkscope.spectrum.whitening import Whitening

CELLS = ("signal_clean", "reservoir_clean", "signal_noise", "reservoir_noise")


@dataclass(frozen=True)
class Cells(Displayed):
    """Predicted test motion in four parts; they add up to −G g_s.

    Attributes:
        signal_clean: Clean labels through the signal channel, G Π a/n.
        reservoir_clean: Clean labels through the reservoir, G (I − Π) a/n.
        signal_noise: Label noise through the signal channel, G Π ξ/n.
        reservoir_noise: Label noise through the reservoir, G (I − Π) ξ/n: measured, not assumed zero.
        norms: Norm of each cell over that of the whole predicted motion, by name.
        is_estimate: Whether the split into clean and noise is estimated by the population-risk rule instead of known.
    """

    signal_clean: Float[Tensor, "query_outputs ..."]
    reservoir_clean: Float[Tensor, "query_outputs ..."]
    signal_noise: Float[Tensor, "query_outputs ..."]
    reservoir_noise: Float[Tensor, "query_outputs ..."]
    norms: dict[str, float]
    is_estimate: bool


def four_cells(
    state: Dissipation,
    whitening: Whitening,
    spectrum: Spectrum,
    channels: ChannelSplit,
    *,
    clean_gradient: Float[Tensor, "outputs ..."] | None,
    example_motions: Float[Tensor, "modes examples ..."],
) -> Cells | None:
    """Split the predicted test motion.

    Args:
        state: Operators of the window.
        whitening: Of B_s.
        spectrum: ω and directions.
        channels: The split.
        clean_gradient: Output gradient at the start for clean targets; None where they are unknown.
        example_motions: Whitened motion that each example's gradient causes, times n: for the estimate.

    Returns:
        The cells; None without a query set.
    """
    if state.transfer is None:
        return None
    transfer = state.transfer
    clean = whiten_field(whitening, clean_gradient) if clean_gradient is not None else _estimated_clean(spectrum, example_motions)
    noise = spectrum.residual - clean

    def cell(coordinates: Tensor, basis: Tensor) -> Tensor:
        columns = coordinates.reshape(len(coordinates), -1)
        moved = -(transfer @ whitening.gradient_back(basis @ (basis.T @ columns)))
        return moved.reshape(len(transfer), *coordinates.shape[1:])

    parts = [cell(part, basis) for part in (clean, noise) for basis in (channels.signal_basis, channels.reservoir_basis)]
    whole = float(torch.linalg.vector_norm(sum(parts[1:], parts[0])))
    norms = {name: float(torch.linalg.vector_norm(part)) / whole if whole > 0 else 0.0 for name, part in zip(CELLS, parts, strict=True)}
    return Cells(*parts, norms=norms, is_estimate=clean_gradient is None)


def _estimated_clean(spectrum: Spectrum, example_motions: Tensor) -> Tensor:
    """Share out the residual along every direction by the population-risk rule."""
    mean, variance = risk_moments(spectrum.eigvecs, example_motions)
    noise = variance / (example_motions.shape[1] - 1)
    share = torch.where(mean > 0, (1 - noise / mean.clamp(min=torch.finfo(mean.dtype).tiny)).clamp(min=0.0), 0.0)
    columns = spectrum.residual.reshape(len(spectrum.residual), -1)
    return (spectrum.eigvecs @ (share[:, None] * (spectrum.eigvecs.T @ columns))).view_as(spectrum.residual)
