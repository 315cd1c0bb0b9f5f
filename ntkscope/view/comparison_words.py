"""What differs between two results, in plain words, and whether the difference may be believed."""

import math
from collections.abc import Callable, Sequence

import torch

from ntkscope.view.comparison_examples import STYLES
from ntkscope.view.findings import SATURATED, stop_row
from ntkscope.view.matching import Matching, half_steps
from ntkscope.view.words import AnalysisLike, number, percent


def headline(first: AnalysisLike, second: AnalysisLike) -> str:
    """State the main difference, or first that it is not to be believed.

    Args:
        first: Result A.
        second: Result B.

    Returns:
        One sentence.
    """
    bad = [style.name for style, analysis in zip(STYLES, (first, second), strict=True) if not analysis.closure.trustworthy]
    if bad:
        whose = "A and B do not describe their runs" if len(bad) == 2 else f"{bad[0]} do not describe its run"
        return f"Do not believe this comparison as it stands: the numbers of {whose}."
    learned = [percent(signal_directions(analysis)) for analysis in (first, second)]
    removed = [percent(loss_removed(analysis)) for analysis in (first, second)]
    return (
        f"A learned {learned[0]} of its directions and B {learned[1]}; training removed {removed[0]} of A's loss and {removed[1]} of B's."
    )


def differences(first: AnalysisLike, second: AnalysisLike) -> list[str]:
    """Say what differs, most important first.

    Args:
        first: Result A.
        second: Result B.

    Returns:
        Sentences.
    """
    runs = (first, second)
    sentences = [
        f"{learned_words(first, 'A learned', ' of its directions')}, {learned_words(second, 'B', '')}.",
        f"Training removed {percent(loss_removed(first))} of the loss in A and {percent(loss_removed(second))} in B.",
    ]
    typical = [_reached(analysis) for analysis in runs]
    sentences.append(
        f"Training steps until half of the error of a typical example was gone: {typical[0]} in A, {typical[1]} in B. "
        f"Of the examples {_in_both(runs, never_half_learned)} had not got there by the last snapshot."
    )
    if all(_has_noise(analysis) for analysis in runs):
        sentences.append(
            f"Of the error of examples with labels planted wrong, {_in_both(runs, memorized)} was gone at the window's end: that much was "
            f"memorized. Of the other examples it was {_in_both(runs, lambda analysis: memorized(analysis, of_noise=False))}."
        )
    return sentences


def settings(first: AnalysisLike, second: AnalysisLike) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """Compare the recorded settings.

    Args:
        first: Result A.
        second: Result B.

    Returns:
        Those that differ, (name, in A, in B); and those that are the same, (name, in both).
    """
    pairs = [(name, read(first), read(second)) for name, read in SETTINGS.items()]
    return [row for row in pairs if row[1] != row[2]], [row[:2] for row in pairs if row[1] == row[2]]


def cautions(first: AnalysisLike, second: AnalysisLike, matching: Matching) -> list[str]:
    """Warn of what makes the two results hard to compare, and say what it does to the reading.

    Args:
        first: Result A.
        second: Result B.
        matching: Their common examples.

    Returns:
        Sentences; none where nothing stands in the way.
    """
    a, b = first.run, second.run
    found = []
    if not matching:
        found.append(f"{matching.sentence} What differs may be due to the examples, and figures of common examples are left out.")
    if a.outputs != b.outputs:
        found.append(
            f"The kernels differ in form ({a.outputs} and {b.outputs}): in the trace form all classes share one kernel, so that it has one "
            "direction for each example, and is an approximation. Record both runs in the same form."
        )
    if (a.num_examples, a.num_classes) != (b.num_examples, b.num_classes):
        found.append(
            f"The probes differ in size ({a.num_examples:,} examples with {a.num_classes:,} outputs, {b.num_examples:,} with "
            f"{b.num_classes:,}): counts of directions grow with the probe. Compare shares; the spectra are drawn over shares of modes."
        )
    if a.loss != b.loss:
        found.append(
            f"The losses differ ({a.loss} and {b.loss}): ω and the reservoir are measured by each loss's own curvature, and values of the "
            "loss have no common scale. Compare shares and the order of examples, not sizes."
        )
    windows = [(analysis.window.start_step, analysis.window.stop_step) for analysis in (first, second)]
    if windows[0] != windows[1]:
        start, stop = max(window[0] for window in windows), min(window[1] for window in windows)
        remedy = f" Analyze both over the same one, for example --window {start}:{stop}." if start < stop else ""
        found.append(
            f"The windows differ (steps {windows[0][0]:,} to {windows[0][1]:,} and {windows[1][0]:,} to {windows[1][1]:,}): a longer one "
            f"removes more in any run, so that shares and ranks differ for that reason alone.{remedy}"
        )
    rules = (first.channels.rule, second.channels.rule)
    if rules[0] != rules[1]:
        found.append(
            f"The cutoff rules differ ('{rules[0]}' and '{rules[1]}'): the signal channels are two different things, and their ranks are "
            "not to be compared. Analyze both with the same rule, for example --cutoff half."
        )
    if (a.optimizer, a.precond) != (b.optimizer, b.precond):
        found.append(
            "The optimizers or their settings differ, so that optimizer times have no common unit: this page counts training steps, and "
            "batches may differ in what a step sees."
        )
    for style, analysis in zip(STYLES, (first, second), strict=True):
        if analysis.channels.signal_rank > SATURATED * analysis.channels.num_modes:
            found.append(f"Almost every direction of {style.name} counts as learned: its window ends too late for its rank to mean much.")
    return found


def signal_directions(analysis: AnalysisLike) -> float:
    """Compute which share of the directions is signal.

    Args:
        analysis: The result.

    Returns:
        The share; NaN without directions.
    """
    total = analysis.channels.num_modes
    return analysis.channels.signal_rank / total if total else math.nan


def loss_removed(analysis: AnalysisLike) -> float:
    """Compute which share of the loss is gone at the window's end.

    Args:
        analysis: The result.

    Returns:
        The share; NaN where there was no loss.
    """
    start, end = float(analysis.history.loss[0]), float(analysis.history.loss[stop_row(analysis)])
    return 1 - end / start if start > 0 else math.nan


def typical_half_step(analysis: AnalysisLike) -> float:
    """Compute the median over examples of the steps to half of the error.

    Args:
        analysis: The result.

    Returns:
        Steps; infinite where half of the examples had not got there by the last snapshot, NaN where nothing is known.
    """
    steps = half_steps(analysis)
    known = steps[~torch.isnan(steps)]
    return float(known.median()) if len(known) else math.nan


def never_half_learned(analysis: AnalysisLike) -> float:
    """Compute the share of examples that had not lost half of their error by the last snapshot.

    Args:
        analysis: The result.

    Returns:
        The share; NaN where nothing is known.
    """
    known = analysis.examples.half_time[~torch.isnan(analysis.examples.half_time)]
    return float(torch.isinf(known).double().mean()) if len(known) else math.nan


def memorized(analysis: AnalysisLike, *, of_noise: bool = True) -> float:
    """Compute how much of the error of examples with wrong labels is gone at the window's end.

    Args:
        analysis: The result; its planted noise may be unknown.
        of_noise: Whether to take the examples with wrong labels, or those with right ones.

    Returns:
        Mean share over these examples; NaN where there are none.
    """
    if not _has_noise(analysis):
        return math.nan
    left = analysis.history.example_residual[stop_row(analysis)]
    return 1 - float(left[analysis.examples.is_noise == of_noise].nanmean())


def learned_words(analysis: AnalysisLike, begin: str, noun: str) -> str:
    """Say which share of the directions is signal.

    Args:
        analysis: The result.
        begin: What comes before the number.
        noun: What comes after it.

    Returns:
        For example "A learned 17.9 % of its directions (179 of 1,000)".
    """
    rank, total = analysis.channels.signal_rank, analysis.channels.num_modes
    return f"{begin} {percent(signal_directions(analysis))}{noun} ({rank:,} of {total:,})"


SETTINGS: dict[str, Callable[[AnalysisLike], str]] = {
    "optimizer": lambda analysis: str(analysis.run.optimizer),
    "preconditioner": lambda analysis: str(analysis.run.precond),
    "loss": lambda analysis: str(analysis.run.loss),
    "training steps": lambda analysis: f"{analysis.run.num_steps:,}",
    "window": lambda analysis: f"steps {analysis.window.start_step:,} to {analysis.window.stop_step:,}",
    "cutoff rule": lambda analysis: str(analysis.channels.rule),
    "examples followed": lambda analysis: f"{analysis.run.num_examples:,}",
    "outputs of an example": lambda analysis: f"{analysis.run.num_classes:,}",
    "held-out examples": lambda analysis: f"{analysis.run.num_query:,}",
    "size of the training set": lambda analysis: (
        "the probe, or unknown" if analysis.run.training_size is None else f"{analysis.run.training_size:,}"
    ),
    "parameters": lambda analysis: f"{analysis.run.num_params:,}",
    "form of the kernel": lambda analysis: str(analysis.run.outputs),
    "snapshots": lambda analysis: f"{analysis.run.num_snapshots:,}",
}


def _in_both(runs: Sequence[AnalysisLike], measure: Callable[[AnalysisLike], float]) -> str:
    """Write a share of both runs."""
    shares = [percent(measure(analysis)) for analysis in runs]
    return f"{shares[0]} in A and {shares[1]} in B"


def _reached(analysis: AnalysisLike) -> str:
    """Say after how many steps a typical example had lost half of its error."""
    steps = typical_half_step(analysis)
    if math.isinf(steps):
        return f"more than the record has (it ends at step {analysis.history.steps[-1]:,})"
    return number(steps)


def _has_noise(analysis: AnalysisLike) -> bool:
    """Say whether wrong labels were planted, and which."""
    noise = analysis.examples.is_noise
    return noise is not None and 0 < int(noise.sum()) < len(noise)
