"""The two spectra of a window: ω of the whitened Gramian, κ of the whitened propagator (theory.md section 5)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ntkscope._checks import InputError
from ntkscope._display import Displayed, to_frame
from ntkscope._eigh import eigh
from ntkscope.dynamics.dissipation import Dissipation
from ntkscope.spectrum.whitening import OUTSIDE_TOLERANCE, Whitening

TIED = 1e-9  # relative gap of ω below which float64 does not resolve directions


@dataclass(frozen=True)
class Spectrum(Displayed):
    """Spectra of one window.

    Attributes:
        eigvals: ω, share of the loss along each direction that training dissipated; descending, dimensionless. In [0, 1) for a
            constant loss Hessian, else it may exceed 1.
        eigvecs: Directions as columns, in the coordinates of R.
        log_dissipation: κ = −log of the singular values of P̃, descending; float64 resolves it to about 36. It belongs to
            its own directions and is not a function of ω unless B is constant.
        residual: h = B_s^{†½} g_s, the whitened gradient at the start; in the trace form one column per class.
        owner: Example of each coordinate of R.
        effective_rank: exp of the entropy of ω / Σω.
        stable_rank: Σω / ω_1.
    """

    eigvals: Float[Tensor, " modes"]
    eigvecs: Float[Tensor, "modes modes"]
    log_dissipation: Float[Tensor, " modes"]
    residual: Float[Tensor, "modes ..."]
    owner: Int[Tensor, " modes"]
    effective_rank: float
    stable_rank: float

    @property
    def residual_energy(self) -> Float[Tensor, " modes"]:
        """Squared residual along every direction, (v_iᵀh)², summed over columns."""
        return squared_rows(self.eigvecs.T @ self.residual)

    def table(self) -> dict[str, list[Any]]:
        """List all directions, ω descending. κ belongs to directions of its own, so that it is no column.

        Returns:
            Columns by name; `removed_loss` = ½ ω (v_iᵀh)² is what training removed along the direction, without weight decay's own part.
        """
        energy = self.residual_energy
        return {
            "mode": list(range(len(energy))),
            "eigval": self.eigvals.tolist(),
            "residual_energy": energy.tolist(),
            "removed_loss": (0.5 * self.eigvals * energy).tolist(),
        }

    def to_pandas(self) -> Any:
        """Turn the table into a `pandas.DataFrame`.

        Returns:
            The frame, indexed by mode.
        """
        return to_frame(self.table(), index="mode")


def squared_rows(coordinates: Float[Tensor, "rows ..."]) -> Float[Tensor, " rows"]:
    """Sum squares over all columns.

    Args:
        coordinates: One row per direction.

    Returns:
        One number per row.
    """
    return coordinates.reshape(len(coordinates), -1).square().sum(dim=1)


def dissipation_spectrum(
    state: Dissipation,
    whitening: Whitening,
    gradient: Float[Tensor, "outputs ..."],
    *,
    tie_breaker: Float[Tensor, "modes modes"] | None = None,
    device: torch.device | str | None = None,
) -> Spectrum:
    """Decompose Ω = 2 B^½ W B^½ and P̃ = B^{†½} P B^½ on R.

    Args:
        state: Operators of the window.
        whitening: Of B_s, the loss Hessian at its start.
        gradient: g_s.
        tie_breaker: Orders directions whose ω are equal to rounding (hundreds are 1 late in training), for example Ω summed over the
            window's snapshots: what was learned first comes first. Without it their basis is arbitrary, and differs between machines.
        device: Where to decompose.

    Returns:
        The spectra.

    Raises:
        InputError: If the gradient has a part outside the range of B_s: Ω then misses some of the loss (Huber's linear zone).

    Source:
        theory.md section 5. The whitening by B_s on both sides is ours.
    """
    outside = whitening.unexplained(gradient)
    if outside > OUTSIDE_TOLERANCE:
        raise InputError(
            f"A share {outside:.1e} of the output gradient lies where the loss has no curvature, so Omega would miss it "
            "(a piecewise linear loss?). Start the window where the loss is curved, or use a smooth loss."
        )
    eigvals, eigvecs = eigh(whitened_gramian(state, whitening), device=device)
    if tie_breaker is not None:
        num_tied = int((eigvals >= (1 - TIED) * eigvals[0]).sum())
        tied = eigvecs[:, :num_tied]
        eigvecs = torch.cat([tied @ eigh(tied.T @ tie_breaker @ tied, device=device)[1], eigvecs[:, num_tied:]], dim=1)
    eigvals = eigvals.clamp(min=0.0)  # W is positive semidefinite by construction; what is below zero is rounding
    singular = torch.linalg.svdvals(whitened_propagator(state, whitening))
    log_dissipation = -singular.clamp(min=torch.finfo(torch.float64).tiny).log()
    total, largest = float(eigvals.sum()), float(eigvals[0])
    shares = eigvals / total if total > 0 else eigvals
    entropy = -float(torch.special.xlogy(shares, shares).sum())
    return Spectrum(
        eigvals=eigvals,
        eigvecs=eigvecs,
        log_dissipation=log_dissipation.flip(0),
        residual=whiten_field(whitening, gradient),
        owner=whitening.owner,
        effective_rank=math.exp(entropy) if total > 0 else 0.0,
        stable_rank=total / largest if largest > 0 else 0.0,
    )


def whiten_field(whitening: Whitening, gradient: Float[Tensor, "outputs ..."]) -> Float[Tensor, "modes ..."]:
    """Whiten a gradient, keeping its columns if it has any.

    Args:
        whitening: Of B_s.
        gradient: Output gradient.

    Returns:
        B_s^{†½} g.
    """
    return whitening.gradient(gradient.reshape(len(gradient), -1)).reshape(-1, *gradient.shape[1:])


def whitened_gramian(state: Dissipation, whitening: Whitening) -> Float[Tensor, "modes modes"]:
    """Compute Ω = 2 B_s^½ W B_s^½ on R.

    Args:
        state: Operators of the window.
        whitening: Of B_s.

    Returns:
        Symmetric positive semidefinite.
    """
    half = whitening.motion(state.gramian)  # [modes, outputs]
    return 2 * whitening.motion(half.T.contiguous())


def whitened_propagator(state: Dissipation, whitening: Whitening) -> Float[Tensor, "modes modes"]:
    """Compute P̃ = B_s^{†½} P B_s^½ on R.

    Args:
        state: Operators of the window.
        whitening: Of B_s.

    Returns:
        Not symmetric: rows belong to the window's end, columns to its start.
    """
    rotated = whitening.gradient(state.propagator)  # B^{†½} P, then P B^½ as motions of its rows
    return whitening.motion(rotated.T.contiguous()).T
