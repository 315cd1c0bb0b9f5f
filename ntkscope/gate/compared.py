"""A figure beside what it would be by chance."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._display import Displayed

NO_SPREAD = 1e-12  # of the draws' size: less is rounding


@dataclass(frozen=True)
class Compared(Displayed):
    """A figure against its permutation null.

    Attributes:
        observed: The figure; NaN where it is not defined.
        mean: Of the null.
        deviation: Standard deviation of the null.
        z: (observed − mean) / deviation; NaN where the null does not vary.
        p: (1 + draws at least as far from the null's mean, on either side) / (1 + draws).
        num_draws: Size of the null.
        reason: Why there is no figure, or no null; empty otherwise.
    """

    observed: float
    mean: float
    deviation: float
    z: float
    p: float
    num_draws: int
    reason: str = ""


def compare(observed: float, draws: Float[Tensor, " draws"], *, reason: str = "") -> Compared:
    """Compare a figure with the same figure under permutations.

    Args:
        observed: The figure.
        draws: Under permutations; empty for none.
        reason: Why it is not defined, if it is not.

    Returns:
        The comparison.

    Example:
        >>> compare(3.0, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)).z
        2.0
    """
    if reason or math.isnan(observed) or not len(draws) or bool(torch.isnan(draws).any()):
        words = reason or ("there are no permutations" if not len(draws) else "it is not defined (0/0)")
        return Compared(observed, math.nan, math.nan, math.nan, math.nan, len(draws), words)
    mean, deviation = float(draws.mean()), float(draws.std()) if len(draws) > 1 else 0.0
    if deviation <= NO_SPREAD * max(abs(mean), float(draws.abs().max())):
        return Compared(observed, mean, 0.0, math.nan, math.nan, len(draws), "permuting the gate does not change it")
    beyond = int(((draws - mean).abs() >= abs(observed - mean)).sum())
    return Compared(observed, mean, deviation, (observed - mean) / deviation, (1 + beyond) / (1 + len(draws)), len(draws))
