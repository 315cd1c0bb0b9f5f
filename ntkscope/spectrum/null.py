"""More signal than chance? The same operators applied to residuals of shuffled labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._display import Displayed
from ntkscope.spectrum.eigen import Spectrum


@dataclass(frozen=True)
class Null(Displayed):
    """Signal share of the run's residual against that of shuffled labels.

    Attributes:
        observed: hᵀ Ω h / hᵀ h: share of the squared residual that training dissipated.
        mean: Of the same over shuffles; the operators stay those of the run.
        deviation: Standard deviation over shuffles.
        z: (observed − mean) / deviation; NaN where shuffles do not differ.
        p: (1 + shuffles that reach the observed share) / (1 + shuffles).
        num_shuffles: How many.
    """

    observed: float
    mean: float
    deviation: float
    z: float
    p: float
    num_shuffles: int


def shuffled_null(spectrum: Spectrum, residuals: Sequence[Float[Tensor, "modes ..."]]) -> Null:
    """Compare the residual's signal share with that of shuffled labels.

    Args:
        spectrum: ω, directions and the residual of the run.
        residuals: Whitened gradients at the window's start, for targets shuffled among examples.

    Returns:
        The comparison.
    """
    observed = signal_share(spectrum, spectrum.residual)
    shares = torch.tensor([signal_share(spectrum, residual) for residual in residuals], dtype=torch.float64)
    mean, deviation = float(shares.mean()), float(shares.std())
    return Null(
        observed=observed,
        mean=mean,
        deviation=deviation,
        z=(observed - mean) / deviation if deviation > 0 else float("nan"),
        p=(1 + int((shares >= observed).sum())) / (1 + len(shares)),
        num_shuffles=len(shares),
    )


def signal_share(spectrum: Spectrum, residual: Float[Tensor, "modes ..."]) -> float:
    """Compute hᵀ Ω h / hᵀ h.

    Args:
        spectrum: ω and directions.
        residual: h.

    Returns:
        The share; 0 for no residual.
    """
    coordinates = (spectrum.eigvecs.T @ residual).reshape(len(residual), -1)
    total = float(coordinates.square().sum())
    return float((spectrum.eigvals[:, None] * coordinates.square()).sum()) / total if total > 0 else 0.0
