"""What an analysis says, in plain words: the sentences that the report, the terminal and notebooks share."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkscope.dynamics.closure import ENERGY_LIMIT, GRADIENT_LIMIT
from ntkscope.view.suspects import ranked
from ntkscope.view.words import SPACE, AnalysisLike, counted, number, percent

MOSTLY = 0.5  # share of an example's error in the reservoir above which it is said to be left there
SATURATED = 0.9  # share of signal directions above which a cutoff separates nothing


@dataclass(frozen=True)
class Verdict:
    """Whether to believe the numbers.

    Attributes:
        is_good: Both errors are within their limits.
        short: A few words.
        sentences: The errors, then of bare checkpoints whether there are enough.
        causes: Likely causes, each with a remedy.
    """

    is_good: bool
    short: str
    sentences: tuple[str, ...]
    causes: tuple[str, ...]


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
    which = f"{rank:,} of {counted(total, 'direction')} {'counts' if rank == 1 else 'count'}" if rank else "No direction counts"
    sentences.append(f"{which} as learned by rule '{analysis.channels.rule}'{carried if rank else ''}.")
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
    which = f"{'The other' if left < analysis.channels.num_modes else 'All'} {counted(left, 'direction')} form the reservoir"
    sentences = [f"{which}{lying}{most}." if left else "No direction is left in the reservoir."]
    shares = analysis.examples.reservoir_share
    if bool(torch.isfinite(shares).any()):
        count = int((shares > MOSTLY).sum())
        some = f"{count:,} of {counted(len(analysis.examples.ids), 'example')}"
        sentences.append(
            f"{some} {'has' if count == 1 else 'have'} more than half of {'its' if count == 1 else 'their'} initial error there."
        )
    return sentences


def verdict(closure: Any, density: Any = None) -> Verdict:
    """Judge whether to believe the numbers.

    Args:
        closure: A `Closure`, or what has its fields.
        density: A `Density` of bare checkpoints, or what has its fields; None for a recorded run.

    Returns:
        The verdict.
    """
    energy = (
        f"Loss decrease: predicted {number(closure.energy_predicted)}, observed {number(closure.energy_observed)}, "
        f"an error of {percent(closure.energy_error)} (limit {100 * ENERGY_LIMIT:.0f}{SPACE}%)."
    )
    gradient = (
        f"Gradient at the window's end: predicted with an error of {percent(closure.gradient_error)} "
        f"(limit {100 * GRADIENT_LIMIT:.0f}{SPACE}%)."
    )
    sentences = (energy, gradient) if density is None else (energy, gradient, density.sentence)
    if closure.trustworthy:
        return Verdict(True, "Yes: prediction and run agree", sentences, ())
    return Verdict(False, "Not as they stand: prediction and run disagree", sentences, tuple(closure.causes))


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
        by = "by loss, since the reservoir is not to be believed here" if analysis.examples.abstains else "most suspicious first"
        steps.append(f"Look at these examples and their labels, {by}: {listed}. A high rank is a reason to look, no proof.")
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


def _signal_share_of_removed(analysis: AnalysisLike) -> float:
    """Compute which share of the removed squared error the signal directions carry."""
    spectrum = analysis.spectrum
    removed: Tensor = spectrum.eigvals * analysis.spectrum.residual_energy
    total = float(removed.sum())
    return float(removed[torch.tensor(signal_modes(analysis))].sum()) / total if total > 0 else math.nan


def _reservoir_share(analysis: AnalysisLike) -> float:
    """Compute which share of the initial squared error lies in the reservoir."""
    squares = analysis.spectrum.residual_energy
    total = float(squares.sum())
    return float(squares[~torch.tensor(signal_modes(analysis))].sum()) / total if total > 0 else math.nan


def _float(text: str, default: float) -> float:
    """Read a number, or fall back."""
    try:
        return float(text)
    except ValueError:
        return default
