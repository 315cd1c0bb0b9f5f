"""Control-theory view: ω are squared Hankel singular values, and the reservoir is what a truncation drops (theory.md sections 2 and 5).

W is the observability Gramian of dg/dτ = −BKg with output M^½Jᵀg, so √ω_i are its Hankel singular values in the coordinates of B_s, and
keeping r directions is a truncation of the run. Dropping directions R_c changes

    the dissipated loss by   ½ Σ_{R_c} ω_i h_i²            <=  (c/2) ‖h_res‖²,  c the largest ω dropped
    the train motion by      ‖D g_res‖                     <=  √(Λ · ½ Σ_{R_c} ω_i h_i²),  Λ = ∫ λ_max(K) dτ

the second by Cauchy–Schwarz on ∫ K P g dτ (ours). The test motion has no such bound without the kernel on the query set: it is measured.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ntkscope._display import Displayed
from ntkscope.dynamics.dissipation import Dissipation
from ntkscope.spectrum.channels import ChannelSplit
from ntkscope.spectrum.eigen import Spectrum
from ntkscope.spectrum.whitening import Whitening

NUM_RANKS = 12


@dataclass(frozen=True)
class Truncation(Displayed):
    """What is lost when only r directions are kept, for several r.

    Attributes:
        ranks: r, ascending; from 0 to all directions.
        hankel: √ω, Hankel singular values, descending.
        loss_bound: (c/2) ‖h_res‖², loss units.
        loss_error: Dissipated loss that the dropped directions account for, loss units.
        train_bound: Bound on ‖D g_res‖ over ‖D g_s‖.
        train_error: ‖D g_res‖ / ‖D g_s‖.
        query_error: ‖G g_res‖ / ‖G g_s‖; None without a query set.
        reservoir_train_share: ‖D g_res‖ / ‖D g_s‖ at the chosen cutoff.
        reservoir_query_share: ‖G g_res‖ / ‖G g_s‖ there: what predicting with Π only would miss; None without a query set.
        reservoir_visibility: ‖G Π_res‖ / ‖G‖ there (Frobenius): 0 if test points cannot see the reservoir at all, whatever the gradient.
    """

    ranks: Int[Tensor, " ranks"]
    hankel: Float[Tensor, " modes"]
    loss_bound: Float[Tensor, " ranks"]
    loss_error: Float[Tensor, " ranks"]
    train_bound: Float[Tensor, " ranks"]
    train_error: Float[Tensor, " ranks"]
    query_error: Float[Tensor, " ranks"] | None
    reservoir_train_share: float
    reservoir_query_share: float | None
    reservoir_visibility: float | None


def truncate(state: Dissipation, whitening: Whitening, spectrum: Spectrum, channels: ChannelSplit, *, kernel_action: float) -> Truncation:
    """Measure what truncations lose, and their bounds.

    Args:
        state: Operators of the window.
        whitening: Of B_s.
        spectrum: ω and directions.
        channels: The split.
        kernel_action: Λ = ∫ λ_max(K) dτ over the window.

    Returns:
        Errors and bounds.
    """
    num_modes = len(spectrum.eigvals)
    ranks = torch.tensor(
        sorted({0, num_modes, *torch.logspace(0, torch.tensor(float(num_modes)).log10(), NUM_RANKS).round().int().tolist()})
    )
    coordinates = (spectrum.eigvecs.T @ spectrum.residual).reshape(num_modes, -1)
    energies = spectrum.residual_energy
    lost = 0.5 * spectrum.eigvals * energies
    # g = Σ_i B^½ v_i h_i; motions of its parts, cumulated from the last direction to the first.
    directions = whitening.gradient_back(spectrum.eigvecs)  # [outputs, modes]
    train = state.displacement @ directions
    query = None if state.transfer is None else state.transfer @ directions
    loss_error = _tails(lost, ranks)
    dropped = torch.cat([spectrum.eigvals, spectrum.eigvals.new_zeros(1)])[ranks]
    train_norms = _tail_norms(train, coordinates, ranks)
    query_norms = None if query is None else _tail_norms(query, coordinates, ranks)
    reservoir = channels.reservoir_basis.T @ spectrum.residual.reshape(num_modes, -1)
    back = whitening.gradient_back(channels.reservoir_basis)
    query_share = visibility = None
    if state.transfer is not None and query_norms is not None:
        query_share = _ratio(torch.linalg.vector_norm(state.transfer @ back @ reservoir), query_norms[0])
        # G B^½ Π_res B^{†½}, in plain gradient coordinates: its rows are motions of gradients.
        projected = state.transfer @ back @ whitening.motion_back(channels.reservoir_basis).T
        visibility = _ratio(torch.linalg.vector_norm(projected), torch.linalg.vector_norm(state.transfer))
    return Truncation(
        ranks=ranks,
        hankel=spectrum.eigvals.sqrt(),
        loss_bound=0.5 * dropped * _tails(energies, ranks),
        loss_error=loss_error,
        train_bound=(kernel_action * loss_error).sqrt() / train_norms[0].clamp(min=torch.finfo(torch.float64).tiny),
        train_error=train_norms / train_norms[0].clamp(min=torch.finfo(torch.float64).tiny),
        query_error=None if query_norms is None else query_norms / query_norms[0].clamp(min=torch.finfo(torch.float64).tiny),
        reservoir_train_share=_ratio(torch.linalg.vector_norm(state.displacement @ back @ reservoir), train_norms[0]),
        reservoir_query_share=query_share,
        reservoir_visibility=visibility,
    )


def _tails(values: Tensor, ranks: Tensor) -> Tensor:
    """Sum everything from each rank on."""
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])[ranks]


def _tail_norms(motions: Tensor, coordinates: Tensor, ranks: Tensor) -> Tensor:
    """Compute ‖Σ_{i >= r} motion_i h_i‖ for each rank r."""
    return torch.stack([torch.linalg.vector_norm(motions[:, rank:] @ coordinates[rank:]) for rank in ranks.tolist()])


def _ratio(part: Tensor, whole: Tensor) -> float:
    """Divide two norms; 0 where the whole vanishes."""
    return float(part / whole) if float(whole) > 0 else 0.0
