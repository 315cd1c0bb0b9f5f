"""Does the split depend on where one cuts?"""

from collections.abc import Sequence
from dataclasses import dataclass

import scipy
from torch import Tensor

from ntkscope._display import Displayed
from ntkscope.spectrum.channels import example_energy, split_channels
from ntkscope.spectrum.cutoffs import Cutoff
from ntkscope.spectrum.eigen import Spectrum
from ntkscope.spectrum.examples import area_under_roc

THRESHOLDS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass(frozen=True)
class SensitivityRow(Displayed):
    """What one cutoff gives.

    Attributes:
        rule: The cutoff.
        signal_rank: Its number of signal directions.
        reservoir_share: Share of the squared residual in its reservoir.
        rank_correlation: Spearman's, of the examples' reservoir energies with those of the chosen cutoff; NaN where one is constant.
        auroc: How well its reservoir energy ranks planted noise; None where that is unknown.
    """

    rule: str
    signal_rank: int
    reservoir_share: float
    rank_correlation: float
    auroc: float | None


@dataclass(frozen=True)
class Sensitivity(Displayed):
    """The split under other cutoffs.

    Attributes:
        rows: One per cutoff: fixed ω from 0.1 to 0.99, then the rules that have an answer.
    """

    rows: tuple[SensitivityRow, ...]

    @property
    def smallest_rank_correlation(self) -> float:
        """Over the fixed cutoffs from 0.25 to 0.9: 1 if the ranking of examples does not depend on the cutoff."""
        inner = {f"fixed:{threshold:g}" for threshold in THRESHOLDS[1:-1]}
        return min(row.rank_correlation for row in self.rows if row.rule in inner)


def cutoff_sensitivity(
    spectrum: Spectrum,
    cutoffs: Sequence[Cutoff],
    chosen: Tensor,
    *,
    is_noise: Tensor | None,
) -> Sensitivity:
    """Split at several cutoffs.

    Args:
        spectrum: ω and directions.
        cutoffs: Verdicts of the rules.
        chosen: Reservoir energy of every example at the chosen cutoff.
        is_noise: Which labels were planted wrong; None where unknown.

    Returns:
        One row per cutoff.
    """
    fixed = [Cutoff(f"fixed:{level:g}", level, int((spectrum.eigvals > level).sum())) for level in THRESHOLDS]
    total = float(spectrum.residual.square().sum())
    rows = []
    for cutoff in (*fixed, *cutoffs):
        if cutoff.rank is None:
            continue
        energy = example_energy(split_channels(spectrum, cutoff).reservoir_part(spectrum.residual), spectrum.owner, len(chosen))
        both = is_noise is not None and 0 < int(is_noise.sum()) < len(is_noise)
        rows.append(
            SensitivityRow(
                rule=cutoff.rule,
                signal_rank=cutoff.rank,
                reservoir_share=float(energy.sum()) / total if total > 0 else 0.0,
                rank_correlation=_spearman(energy, chosen),
                auroc=area_under_roc(energy, is_noise) if both and is_noise is not None else None,
            )
        )
    return Sensitivity(tuple(rows))


def _spearman(first: Tensor, second: Tensor) -> float:
    """Correlate ranks; NaN where one side is constant."""
    if len(first) < 2 or bool((first == first[0]).all()) or bool((second == second[0]).all()):
        return float("nan")
    return float(scipy.stats.spearmanr(first.numpy(), second.numpy()).statistic)
