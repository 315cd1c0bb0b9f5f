"""What an analysis says, in plain words: the sentences and rows that the report, the terminal and notebooks share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkscope.dynamics.closure import ENERGY_LIMIT, GRADIENT_LIMIT

AnalysisLike = Any

SPACE = "\u00a0"  # does not break
MOSTLY = 0.5  # share of an example's error in the reservoir above which it is said to be left there
SATURATED = 0.9  # share of signal directions above which a cutoff separates nothing


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
        "How much of the example's error at the window's start lies in reservoir directions (squared, loss units times two). Large is suspicious.",
    ),
    Score("loss", "loss", "loss", "The example's own loss at the window's end. Large is suspicious."),
    Score(
        "margin",
        "margin",
        "margin",
        "Output for the given label minus the largest other output, at the window's end. Negative means that the network disagrees with the label.",
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
class Verdict:
    """Whether to believe the numbers.

    Attributes:
        is_good: Both errors are within their limits.
        short: A few words.
        sentences: The errors, then what they mean.
        causes: Likely causes, each with a remedy.
    """

    is_good: bool
    short: str
    sentences: tuple[str, ...]
    causes: tuple[str, ...]


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


def number(value: float, digits: int = 3) -> str:
    """Write a number with few digits.

    Args:
        value: Any float.
        digits: Significant ones.

    Returns:
        For example "0.0123", "1,200", "3.1e-05", "unknown" or "infinite".
    """
    if math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    decimals = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
    return f"{value:.{decimals}f}"


def percent(share: float) -> str:
    """Write a share as percentage.

    Args:
        share: 1 is all.

    Returns:
        For example "3.7 %", "< 0.1 %" or "unknown"; the space does not break.
    """
    if math.isnan(share):
        return "unknown"
    if math.isinf(share) or abs(share) >= 100:
        return f"more than 9,999{SPACE}%" if share > 0 else f"less than -9,999{SPACE}%"
    if 0 < share < 0.0005:
        return f"< 0.1{SPACE}%"
    if 0.9995 <= share < 1:
        return f"> 99.9{SPACE}%"
    return f"{100 * share:,.1f}{SPACE}%" if abs(share) < 1 else f"{100 * share:,.0f}{SPACE}%"


def counted(count: int, noun: str) -> str:
    """Write a count with its noun.

    Args:
        count: How many.
        noun: Singular; its plural takes an s.

    Returns:
        For example "1 example" or "1,000 examples".
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def stop_row(analysis: AnalysisLike) -> int:
    """Find the row of the history at the window's end.

    Args:
        analysis: The result.

    Returns:
        Index into its history.
    """
    return max(0, min(analysis.window.stop - analysis.window.start, len(analysis.history.steps) - 1))


def signal_modes(analysis: AnalysisLike) -> list[bool]:
    """Tell for every direction whether it is signal.

    Args:
        analysis: The result.

    Returns:
        One flag a mode: the leading ones, or those that the rule selected.
    """
    cutoff = analysis.cutoffs.get(analysis.channels.rule)
    selected = getattr(cutoff, "selected", None)
    if selected is not None:
        return [bool(flag) for flag in selected]
    return [k < analysis.channels.signal_rank for k in range(len(analysis.spectrum.eigvals))]


def rule_words(rule: str) -> str:
    """Explain a cutoff rule.

    Args:
        rule: For example "half" or "fixed:0.9".

    Returns:
        What makes a direction signal.
    """
    name, _, value = rule.partition(":")
    if name == "rank" and value:
        return f"the {value} strongest directions"
    return {
        "half": "training removed more than half of the loss along it (ω > ½)",
        "fixed": f"ω is above {value}",
        "energy": f"the fewest leading directions that explain {percent(_float(value, 0.95))} of the removed loss",
        "gap": "it comes before the largest drop of log ω",
        "rank": "ω is above rounding error: training acted on it at all",
        "mp": "√ω is above the Marchenko–Pastur edge, 2.475 times the median (heuristic)",
        "gd": "√ω is above the Gavish–Donoho threshold, 2.858 times the median (heuristic)",
        "risk": "the examples agree on it: their mean motion beats its leave-one-out noise",
    }.get(name, rule)


def headline(analysis: AnalysisLike) -> str:
    """State the main finding.

    Args:
        analysis: The result.

    Returns:
        One sentence.
    """
    rank, total = analysis.channels.signal_rank, analysis.channels.num_modes
    if rank == 0:
        return f"So far training has learned none of {counted(total, 'direction')}."
    return f"Training learned {rank:,} of {counted(total, 'direction')} and left {total - rank:,} in the reservoir."


def learned(analysis: AnalysisLike) -> list[str]:
    """Describe the signal channel.

    Args:
        analysis: The result.

    Returns:
        Sentences.
    """
    history, row, window = analysis.history, stop_row(analysis), analysis.window
    rank, total = analysis.channels.signal_rank, analysis.channels.num_modes
    start, end = float(history.loss[0]), float(history.loss[row])
    share = float(history.signal_share[row])
    sentences = [
        f"From step {window.start_step:,} to {window.stop_step:,} the loss went from {number(start)} to {number(end)}: "
        f"training removed {percent(share)} of the initial squared error."
    ]
    of_removed = _signal_share_of_removed(analysis)
    carried = "" if math.isnan(of_removed) else f"; they carry {percent(of_removed)} of the removed error"
    sentences.append(f"{rank:,} of {counted(total, 'direction')} count as learned by rule '{analysis.channels.rule}'{carried}.")
    return sentences


def stored(analysis: AnalysisLike) -> list[str]:
    """Describe the reservoir.

    Args:
        analysis: The result.

    Returns:
        Sentences.
    """
    left = analysis.channels.num_modes - analysis.channels.signal_rank
    share = _reservoir_share(analysis)
    lying = "" if math.isnan(share) else f", with {percent(share)} of the initial error along them"
    omega = analysis.spectrum.eigvals[~torch.tensor(signal_modes(analysis))]
    most = f": training removed at most {percent(float(omega.max()))} of the loss along any of them" if len(omega) else ""
    sentences = [f"The other {counted(left, 'direction')} form the reservoir{lying}{most}."]
    shares = analysis.examples.reservoir_share
    if bool(torch.isfinite(shares).any()):
        count = int((shares > MOSTLY).sum())
        some = f"{count:,} of {counted(len(analysis.examples.ids), 'example')}"
        sentences.append(f"{some} {'has' if count == 1 else 'have'} more than half of the initial error there.")
    return sentences


def verdict(analysis: AnalysisLike) -> Verdict:
    """Judge whether to believe the numbers.

    Args:
        analysis: The result.

    Returns:
        The verdict.
    """
    closure = analysis.closure
    energy = (
        f"Loss decrease: predicted {number(closure.energy_predicted)}, observed {number(closure.energy_observed)}, "
        f"an error of {percent(closure.energy_error)} (limit {100 * ENERGY_LIMIT:.0f}{SPACE}%)."
    )
    gradient = (
        f"Gradient at the window's end: predicted with an error of {percent(closure.gradient_error)} (limit {100 * GRADIENT_LIMIT:.0f}{SPACE}%)."
    )
    if closure.trustworthy:
        return Verdict(True, "Yes: prediction and run agree", (energy, gradient), ())
    return Verdict(False, "Not as they stand: prediction and run disagree", (energy, gradient), tuple(closure.causes))


def next_steps(analysis: AnalysisLike) -> list[str]:
    """Say what to do next.

    Args:
        analysis: The result.

    Returns:
        One to four sentences, most important first.
    """
    steps = []
    if not analysis.closure.trustworthy:
        steps.append("Mend the likely causes of the error first, then analyze again; until then read the figures as hints.")
    rank, total = analysis.channels.signal_rank, analysis.channels.num_modes
    if rank == 0:
        steps.append("Nothing counts as learned yet: train longer, end the window later (--window START:STOP), or choose a lower cutoff.")
    elif rank > SATURATED * total:
        steps.append("Almost everything counts as learned, so the cutoff separates nothing: end the window earlier (--window START:STOP).")
    suspects = ranked(analysis)[:10]
    if suspects and analysis.examples.labels is not None:
        listed = ", ".join(str(analysis.examples.ids[i]) for i in suspects)
        steps.append(
            f"Look at these examples and their labels, most suspicious first: {listed}. A high rank is a reason to look, no proof."
        )
    elif suspects:
        listed = ", ".join(str(analysis.examples.ids[i]) for i in suspects)
        steps.append(f"Look at these examples and their targets, the least learned first: {listed}.")
    ranks = [cutoff.rank for cutoff in analysis.cutoffs.values() if cutoff.rank is not None]
    if ranks and max(ranks) > 2 * max(1, min(ranks)):
        steps.append(
            f"The rules for drawing the line disagree (from {min(ranks):,} to {max(ranks):,} directions): quote the rule beside the number."
        )
    if analysis.run.num_query == 0:
        steps.append("Record a held-out query set (query=...) to see whether a fixed kernel would have predicted the test outputs.")
    return steps[:4]


def ranked(analysis: AnalysisLike) -> list[int]:
    """Order the examples, most suspicious first, leaving out those without a number.

    Args:
        analysis: The result.

    Returns:
        Positions.
    """
    energies = analysis.examples.reservoir_energy
    return [i for i in analysis.examples.ranking() if math.isfinite(float(energies[i]))]


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
    """Say how well reservoir energy finds the planted wrong labels, beside the best of the others.

    Args:
        analysis: The result.

    Returns:
        Sentences; "" if the planted labels are unknown.
    """
    scores = analysis.examples.auroc
    if not scores or "reservoir_energy" not in scores:
        return ""
    own = scores["reservoir_energy"]
    others = {name: value for name, value in scores.items() if name != "reservoir_energy" and math.isfinite(value)}
    text = (
        "Some labels were planted wrong on purpose: reservoir energy ranks a wrong one above a right one in "
        f"{percent(own)} of pairs (AUROC {own:.2f}; chance is 0.50)"
    )
    if not others:
        return text + "."
    best = max(others, key=lambda name: others[name])
    title = next((score.title for score in SCORES if score.name == best), best.replace("_", " "))
    relation = "less" if others[best] < own else "more" if others[best] > own else "as much"
    return f"{text}. The best other score, {title}, reaches {others[best]:.2f}: {relation}."


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


def _signal_share_of_removed(analysis: AnalysisLike) -> float:
    """Compute which share of the removed squared error the signal directions carry."""
    spectrum = analysis.spectrum
    removed: Tensor = spectrum.eigvals * (spectrum.eigvecs.T @ spectrum.residual).square()
    total = float(removed.sum())
    return float(removed[torch.tensor(signal_modes(analysis))].sum()) / total if total > 0 else math.nan


def _reservoir_share(analysis: AnalysisLike) -> float:
    """Compute which share of the initial squared error lies in the reservoir."""
    spectrum = analysis.spectrum
    squares = (spectrum.eigvecs.T @ spectrum.residual).square()
    total = float(squares.sum())
    return float(squares[~torch.tensor(signal_modes(analysis))].sum()) / total if total > 0 else math.nan


def _float(text: str, default: float) -> float:
    """Read a number, or fall back."""
    try:
        return float(text)
    except ValueError:
        return default
