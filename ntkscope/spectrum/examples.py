"""One row per probe example: its reservoir energy, and beside it what else would rank suspicious labels."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scipy  # its subpackages load when first used: scipy.stats alone would take a fifth of the time of import torch
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from ntkscope._atomic import replace_when_done
from ntkscope._checks import InputError, check_choice
from ntkscope._display import Displayed, to_frame

# Whether a large value is suspicious; a wrong label has a small margin.
SUSPICIOUS_WHEN_LARGE = {
    "reservoir_energy": True,
    "loss": True,
    "margin": False,
    "area_under_margin": False,
    "self_influence": True,
    "half_time": True,
    "quarter_time": True,
}

# Of the scores made from the operators it ranked wrong labels best, or as well, in nearly every run measured, and it needs no cutoff and no
# window that ends before interpolation. Margin and loss in such a window are about as good (benchmarks/RESULTS.md).
RECOMMENDED = "half_time"
# Where the window begins after most labels were learned, half-times do not compare: what is learned already has little left to lose, and
# loses no half of it. The observed loss then found wrong labels best in every window measured (benchmarks/RESULTS.md).
LATER = "loss"
FROM_OPERATORS = {"reservoir_energy", "half_time", "quarter_time"}
COLUMNS = (
    "reservoir_energy",
    "reservoir_share",
    "loss",
    "margin",
    "area_under_margin",
    "self_influence",
    "half_time",
    "quarter_time",
)


@dataclass(frozen=True)
class Examples(Displayed):
    """The table of examples (theory.md section 8).

    Attributes:
        ids: Row of each example in the probe.
        labels: Given labels; None for regression.
        true_labels: Clean labels, where noise was planted.
        is_noise: Whether the label was planted wrong; None if unknown.
        reservoir_energy: ‖[(I − Π) h]_i‖², loss units times two.
        reservoir_share: That over ‖h_i‖².
        loss: Loss at the window's end.
        margin: Output of the label minus the largest other, at the window's end; NaN for regression.
        area_under_margin: Margin averaged over the window's steps.
        self_influence: Σ_c K[(i,c),(i,c)] at the window's end.
        half_time: Optimizer time at which half of the example's squared residual was gone; infinite if never.
        quarter_time: Likewise, when a quarter is left.
        residual_left: Share of each example's squared residual that was left at the last snapshot: orders those whose times are infinite.
        abstains: Why nothing should be called suspicious (closure errors too large); empty where nothing speaks against it.
        pictures: Small pictures of the inputs; None where they are no images.
        ranked_by: The score that finds wrong labels best in this window: "half_time", or "loss" where most labels were learned before it
            began.
    """

    ids: list[int]
    labels: list[int] | None
    true_labels: list[int] | None
    is_noise: Bool[Tensor, " examples"] | None
    reservoir_energy: Float[Tensor, " examples"]
    reservoir_share: Float[Tensor, " examples"]
    loss: Float[Tensor, " examples"]
    margin: Float[Tensor, " examples"]
    area_under_margin: Float[Tensor, " examples"]
    self_influence: Float[Tensor, " examples"]
    half_time: Float[Tensor, " examples"]
    quarter_time: Float[Tensor, " examples"]
    residual_left: Float[Tensor, " examples"]
    abstains: str = ""
    pictures: UInt8[Tensor, "examples height width channels"] | None = None
    ranked_by: str = RECOMMENDED

    def ranking(self, by: str | None = None) -> list[int]:
        """Order the examples, most suspicious first.

        Args:
            by: Score to rank by: one of the columns; `ranked_by` if not given.

        Returns:
            Positions, most suspicious first.

        Raises:
            InputError: If there is no such score, or it rests on operators that the closure errors say not to believe.
        """
        by = self.ranked_by if by is None else by
        check_choice("by", by, SUSPICIOUS_WHEN_LARGE)
        if self.abstains and by in FROM_OPERATORS:
            raise InputError(
                f"No ranking by {by}: {self.abstains}. Mend the recording, choose an earlier window, or rank by 'loss', 'margin' or "
                "'area_under_margin', which are observed."
            )
        return self._sortable(by).argsort(descending=SUSPICIOUS_WHEN_LARGE[by], stable=True).tolist()

    def _sortable(self, name: str) -> Tensor:
        """Take a column to rank by; examples that never reached a level come last, the least learned at the very end."""
        values: Tensor = getattr(self, name)
        never = torch.isinf(values)
        if name not in ("half_time", "quarter_time") or not bool(never.any()):
            return values
        latest = float(values[~never].max()) if bool((~never).any()) else 0.0
        return torch.where(never, latest + 1 + self.residual_left, values)

    def table(self) -> dict[str, list[Any]]:
        """List all columns, the examples in the order of the probe: `pandas.DataFrame(examples.table())`.

        Returns:
            Columns by name; `rank` is 1 for the most suspicious, None where the table abstains.
        """
        columns: dict[str, list[Any]] = {"id": self.ids, "label": self.labels or [None] * len(self.ids)}
        if self.is_noise is not None:
            columns |= {"true_label": self.true_labels or [None] * len(self.ids), "is_noise": self.is_noise.tolist()}
        ranks: list[int | None] = [None] * len(self.ids)
        if not self.abstains:
            for rank, position in enumerate(self.ranking()):
                ranks[position] = rank + 1
        columns["rank"] = ranks
        return columns | {name: getattr(self, name).tolist() for name in COLUMNS}

    def to_csv(self, path: str | Path) -> Path:
        """Write the table.

        Args:
            path: The file; whole or not there.

        Returns:
            The file.
        """
        columns = self.table()
        with replace_when_done(Path(path)) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
        return Path(path)

    def to_pandas(self) -> Any:
        """Turn the table into a `pandas.DataFrame`.

        Returns:
            The frame, indexed by example.
        """
        return to_frame(self.table(), index="id")

    @property
    def auroc(self) -> dict[str, float] | None:
        """How well each score ranks the planted wrong labels; None if they are unknown or there is only one kind."""
        if self.is_noise is None or not 0 < int(self.is_noise.sum()) < len(self.ids):
            return None
        scores = {}
        for name, is_large in SUSPICIOUS_WHEN_LARGE.items():
            values = self._sortable(name)
            if not bool(torch.isnan(values).any()):
                scores[name] = area_under_roc(values if is_large else -values, self.is_noise)
        return scores


def area_under_roc(scores: Float[Tensor, " examples"], is_positive: Bool[Tensor, " examples"]) -> float:
    """Compute the chance that a positive scores above a negative; ties count half.

    Args:
        scores: Finite or infinite.
        is_positive: Both kinds present.

    Returns:
        AUROC: the Mann–Whitney U over the number of pairs.

    Example:
        >>> area_under_roc(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, False]))
        1.0
    """
    positives, negatives = scores[is_positive].numpy(), scores[~is_positive].numpy()
    return float(scipy.stats.mannwhitneyu(positives, negatives, method="asymptotic").statistic) / (len(positives) * len(negatives))


def class_labels(targets: Tensor, num_classes: int) -> Tensor | None:
    """Read labels from targets.

    Args:
        targets: Integer labels, or one row per example that peaks at its label.
        num_classes: C.

    Returns:
        Integer labels; None where there are none (regression).
    """
    if num_classes < 2:
        return None
    if targets.ndim == 1 and not targets.is_floating_point():
        return targets.long()
    if targets.ndim == 2 and targets.shape[1] == num_classes:
        peaks = (targets == targets.amax(dim=1, keepdim=True)).sum(dim=1)
        is_one_hot = bool((peaks == 1).all()) and bool((targets.double() >= 0).all())
        return targets.argmax(dim=1) if is_one_hot else None
    return None


def best_score(margin: Float[Tensor, " examples"], labels: Tensor | None) -> str:
    """Choose the score that examples are ranked by, from how much was learned when the window began.

    Args:
        margin: At the window's start.
        labels: Integer labels; None for regression.

    Returns:
        "loss" where at least half of what the largest class leaves to be learned was: right answers lie halfway from its share to all;
        else "half_time".
    """
    if labels is None:
        return RECOMMENDED
    known = margin[~torch.isnan(margin)]
    largest = float(torch.bincount(labels[~torch.isnan(margin)]).max()) if len(known) else 0.0
    return LATER if len(known) > largest and float((known > 0).sum()) >= 0.5 * (len(known) + largest) else RECOMMENDED


def margins(outputs: Float[Tensor, "examples classes"], labels: Tensor) -> Float[Tensor, " examples"]:
    """Compute the output of the label minus the largest other.

    Args:
        outputs: Model outputs.
        labels: Integer labels.

    Returns:
        Margins; negative means misclassified, NaN a label outside the classes (an ignored one).
    """
    is_class = (labels >= 0) & (labels < outputs.shape[1])
    known = torch.where(is_class, labels, 0)[:, None]
    own = outputs.gather(1, known).squeeze(1)
    others = outputs.scatter(1, known, -torch.inf).amax(dim=1)
    return torch.where(is_class, own - others, torch.nan)


def crossing_times(shares: Float[Tensor, "snapshots examples"], times: Sequence[float], level: float) -> Float[Tensor, " examples"]:
    """Find when each example's share of residual first falls below a level, linear in log τ between snapshots.

    Args:
        shares: Share of the initial squared residual that is left.
        times: Optimizer time since the window's start; the first is 0.
        level: For example ½.

    Returns:
        Times; infinite where never reached.
    """
    found = torch.full((shares.shape[1],), torch.inf, dtype=torch.float64)
    logs = torch.tensor(times, dtype=torch.float64).log()
    for j in range(1, len(shares)):
        before, after = shares[j - 1], shares[j]
        fraction = ((before - level) / (before - after)).clamp(0.0, 1.0)
        at = torch.exp(logs[j - 1] + fraction * (logs[j] - logs[j - 1]))
        if times[j - 1] == 0.0:  # log 0: linear in τ on the first interval
            at = fraction * times[j]
        found = torch.where((after < level) & torch.isinf(found), at, found)
    return found
