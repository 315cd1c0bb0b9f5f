"""A figure beside what it would be by chance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

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
        draws: The figure under each permutation.
        reason: Why there is no figure, or no null; empty otherwise.
    """

    observed: float
    mean: float
    deviation: float
    z: float
    p: float
    draws: Float[Tensor, " draws"] = field(repr=False)
    reason: str = ""

    @property
    def num_draws(self) -> int:
        """Size of the null."""
        return len(self.draws)


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
        return Compared(observed, math.nan, math.nan, math.nan, math.nan, draws, words)
    mean, deviation = float(draws.mean()), float(draws.std()) if len(draws) > 1 else 0.0
    if deviation <= NO_SPREAD * max(abs(mean), float(draws.abs().max())):
        return Compared(observed, mean, 0.0, math.nan, math.nan, draws, "permuting the gate does not change it")
    beyond = int(((draws - mean).abs() >= abs(observed - mean)).sum())
    return Compared(observed, mean, deviation, (observed - mean) / deviation, (1 + beyond) / (1 + len(draws)), draws)


def mean_over(figures: Sequence[Compared]) -> Compared:
    """Average a figure over steps, and its null with it: draw by draw, so that the null is that of the average.

    Args:
        figures: The same figure at several steps, with equally many draws.

    Returns:
        The average over the steps at which it is defined.
    """
    defined = [figure for figure in figures if not math.isnan(figure.observed) and not bool(torch.isnan(figure.draws).any())]
    if not defined:
        return Compared(math.nan, math.nan, math.nan, math.nan, math.nan, figures[0].draws[:0], figures[0].reason or "it is not defined")
    return compare(sum(figure.observed for figure in defined) / len(defined), torch.stack([figure.draws for figure in defined]).mean(dim=0))
