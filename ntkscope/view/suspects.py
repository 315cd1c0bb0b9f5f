"""The table of suspicious examples: reservoir energy, and beside it the usual scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ntkscope.view.words import AnalysisLike, number, percent


@dataclass(frozen=True)
class Score:
    """One column of the table of suspicious examples.

    Attributes:
        name: Attribute of `Examples`, and key of its AUROC.
        title: Column head.
        short: Column head in the terminal.
        meaning: One sentence.
    """

    name: str
    title: str
    short: str
    meaning: str


SCORES = (
    Score(
        "reservoir_energy",
        "reservoir energy",
        "reservoir",
        "How much of the example's error at the window's start lies in reservoir directions (squared, loss units times two). "
        "Large is suspicious.",
    ),
    Score("loss", "loss", "loss", "The example's own loss at the window's end. Large is suspicious."),
    Score(
        "margin",
        "margin",
        "margin",
        "Output for the given label minus the largest other output, at the window's end. "
        "Negative means that the network disagrees with the label.",
    ),
    Score(
        "area_under_margin",
        "area under margin",
        "avg margin",
        "The margin, averaged over the steps of the window. Small is suspicious.",
    ),
    Score(
        "self_influence",
        "self-influence",
        "self-infl",
        "How strongly a training step on the example moves its own output. Large is suspicious.",
    ),
    Score(
        "half_time",
        "half-time",
        "half-time",
        "Optimizer time until half of the example's squared error was gone. Late or never is suspicious.",
    ),
    Score(
        "quarter_time",
        "quarter-time",
        "quart-time",
        "Optimizer time until only a quarter of it was left. Late or never is suspicious.",
    ),
)


@dataclass(frozen=True)
class Suspect:
    """One row of the table of suspicious examples.

    Attributes:
        position: Position in the probe.
        id: Its name there.
        label: Given label; "" if unknown.
        true_label: Clean label; "" if unknown.
        is_noise: Whether its label was planted wrong; None if unknown.
        values: One text for every score shown.
    """

    position: int
    id: str
    label: str
    true_label: str
    is_noise: bool | None
    values: tuple[str, ...]


def ranked(analysis: AnalysisLike) -> list[int]:
    """Order the examples, most suspicious first, leaving out those without a number; by loss where the table abstains.

    Args:
        analysis: The result.

    Returns:
        Positions.
    """
    values = getattr(analysis.examples, ranked_by(analysis))
    return [i for i in analysis.examples.ranking(ranked_by(analysis)) if not math.isnan(float(values[i]))]


def ranked_by(analysis: AnalysisLike) -> str:
    """Name the score that examples are ordered by.

    Args:
        analysis: The result.

    Returns:
        The one that finds wrong labels best in this window; "loss" where the table abstains.
    """
    return "loss" if analysis.examples.abstains else analysis.examples.ranked_by


def order_words(analysis: AnalysisLike) -> str:
    """Say in which order examples are listed, and why in another than usual.

    Args:
        analysis: The result.

    Returns:
        Sentences.
    """
    if ranked_by(analysis) == "half_time":
        return "Learned last comes first."
    if analysis.examples.abstains:
        return "Largest loss first."
    return "Largest loss first: most labels were learned before the window began, so that half-times do not compare."


def shown_scores(analysis: AnalysisLike, names: Sequence[str] | None = None) -> list[Score]:
    """Choose the scores that have at least one number.

    Args:
        analysis: The result.
        names: Restrict to these.

    Returns:
        Scores, in the order of `SCORES`.
    """
    chosen = [score for score in SCORES if names is None or score.name in names]
    return [score for score in chosen if not bool(torch.isnan(getattr(analysis.examples, score.name)).all())]


def suspects(analysis: AnalysisLike, scores: Sequence[Score], count: int = 10) -> list[Suspect]:
    """Fill the table of the most suspicious examples.

    Args:
        analysis: The result.
        scores: Columns.
        count: Rows.

    Returns:
        Rows, most suspicious first; in each column all numbers have as many decimals.
    """
    examples, rows = analysis.examples, ranked(analysis)[:count]
    labels, truth, noise = examples.labels, examples.true_labels, examples.is_noise
    columns = [_column_texts([float(getattr(examples, score.name)[i]) for i in rows], score) for score in scores]
    return [
        Suspect(
            position=i,
            id=str(examples.ids[i]),
            label="" if labels is None else str(labels[i]),
            true_label="" if truth is None else str(truth[i]),
            is_noise=None if noise is None else bool(noise[i]),
            values=tuple(column[k] for column in columns),
        )
        for k, i in enumerate(rows)
    ]


def _column_texts(values: Sequence[float], score: Score) -> list[str]:
    """Write a column of numbers: three significant digits for the largest, and as many decimals for all; "never" for a time not reached."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    decimals = max(0, 2 - math.floor(math.log10(largest))) if largest > 0 else 0
    is_plain = largest == 0 or 1e-3 <= largest < 1e7

    def write(value: float) -> str:
        if math.isnan(value):
            return "-"
        if math.isinf(value):
            return "never" if score.name.endswith("_time") else number(value)
        return f"{value:,.{decimals}f}" if is_plain else number(value)

    return [write(value) for value in values]


def auroc_sentence(analysis: AnalysisLike) -> str:
    """Say how well the score that examples are ranked by finds the planted wrong labels, beside the best of the others.

    Args:
        analysis: The result.

    Returns:
        Sentences; "" if the planted labels are unknown.
    """
    scores = analysis.examples.auroc
    chosen = analysis.examples.ranked_by
    if not scores or chosen not in scores:
        return ""
    own = scores[chosen]
    others = {name: value for name, value in scores.items() if name != chosen and math.isfinite(value)}
    text = (
        f"Some labels were planted wrong on purpose: {title(chosen)} ranks a wrong one above a right one in "
        f"{percent(own)} of pairs (AUROC {own:.2f}; chance is 0.50)"
    )
    if not others:
        return text + "."
    best = max(others, key=lambda name: others[name])
    gap = round(others[best], 2) - round(own, 2)
    relation = "does better here" if gap > 0 else "does worse" if gap < 0 else "does as well"
    return f"{text}. The best other score, {title(best)}, {relation}: {others[best]:.2f}."


def title(name: str) -> str:
    """Name a score for people.

    Args:
        name: Of the score.

    Returns:
        Its column head.
    """
    return next(score.title for score in SCORES if score.name == name)


def found_among(analysis: AnalysisLike, count: int) -> tuple[int, int] | None:
    """Count planted wrong labels among the most suspicious examples.

    Args:
        analysis: The result.
        count: How many examples to look at.

    Returns:
        Wrong ones among them, and how many were looked at; None if unknown.
    """
    noise = analysis.examples.is_noise
    if noise is None:
        return None
    chosen = ranked(analysis)[:count]
    return sum(bool(noise[i]) for i in chosen), len(chosen)
