"""What stands behind the split, in sentences: did test points move as predicted, is it more than chance, does the cutoff matter."""

import math
from typing import Any

from ntkscope.view.words import AnalysisLike, number, percent

BASELINES = {
    "frozen_kernel": "the kernel frozen at the start",
    "linearized": "the model linearized at the start, at the real weights",
    "regression_start": "kernel regression from the observed training motion with the first kernel",
    "regression_end": "with the last kernel",
}
RULE_DEPENDENT = 0.8  # rank correlation of examples under other cutoffs below which the cutoff decides


def reach(analysis: AnalysisLike) -> list[str]:
    """Say how well held-out outputs were predicted, and what reached them.

    Args:
        analysis: The result.

    Returns:
        Sentences; the reason where there is nothing to say.
    """
    transfer = analysis.transfer
    if transfer is None:
        return [f"Held-out outputs were not compared: {analysis.transfer_reason}."]
    sentences = predicted_motion(transfer)
    share = analysis.truncation.reservoir_query_share
    if share is not None:
        sentences.append(f"Predicting with the signal channel only would miss {percent(share)} of that motion.")
    if analysis.cells is not None:
        sentences.append(four_cells(analysis.cells))
    return sentences


def predicted_motion(transfer: Any) -> list[str]:
    """Say how well the motion of held-out outputs was predicted.

    Args:
        transfer: A `Transfer`, or what has its fields.

    Returns:
        Sentences.
    """
    sentences = [
        f"How held-out outputs moved is predicted from the training examples with correlation {number(transfer.fit.correlation)} and an "
        f"error of {percent(transfer.fit.relative_error)}."
    ]
    others = [f"{BASELINES[name]} {percent(fit.relative_error)}" for name, fit in transfer.baselines.items()]
    if others:
        sentences.append(f"Simpler predictions: {', '.join(others)}.")
    return sentences


def four_cells(cells: Any) -> str:
    """Say how much of the predicted motion is due to clean labels and to noise.

    Args:
        cells: A `Cells`, or what has its fields.

    Returns:
        One sentence.
    """
    kind = "Estimated roughly, by the population-risk rule" if cells.is_estimate else "By the planted noise"
    norms = cells.norms
    return (
        f"{kind}, of the predicted motion's size: clean labels through the signal channel {percent(norms['signal_clean'])}, "
        f"through the reservoir {percent(norms['reservoir_clean'])}; label noise {percent(norms['signal_noise'])} and "
        f"{percent(norms['reservoir_noise'])}."
    )


ABOUT_CHANNELS = (
    "This is about channels of the probe, not about test accuracy: on digits, where it found no evidence, gated runs overfitted later than "
    "AdamW and were no better at their best (docs/gate.md)."
)


def gating(analysis: AnalysisLike) -> list[str]:
    """Say whether the gate helps, and how well population risk was predicted; empty where nothing was audited.

    Args:
        analysis: The result.

    Returns:
        Sentences.
    """
    audit = None if analysis.gate is None else analysis.gate.audit
    if audit is None:
        return []
    sentences = [audit.verdict.sentence, ABOUT_CHANNELS, *audit.warnings]
    found = None if audit.risk is None else audit.risk.correlation
    if found is not None and found.spearman is not None:
        sentences.append(
            f"The population risk estimated from training examples alone predicts the measured held-out decrease with rank correlation "
            f"{number(found.spearman.value, 2)} (95 % interval {number(found.spearman.low, 2)} to {number(found.spearman.high, 2)})."
        )
    return sentences


def gate_head(analysis: AnalysisLike) -> str:
    """Give what is said of the gate a title.

    Args:
        analysis: The result.

    Returns:
        A question where the gate was none of the run's own.
    """
    audit = None if analysis.gate is None else analysis.gate.audit
    return "What would gating do?" if audit is not None and audit.is_counterfactual else "The gate"


def chance(analysis: AnalysisLike) -> list[str]:
    """Say whether there is more signal than shuffled labels would show, and how far the split depends on cutoff and examples.

    Args:
        analysis: The result.

    Returns:
        Sentences.
    """
    sentences = []
    if analysis.null is not None:
        sentences.append(against_shuffles(analysis.null))
    depends = cutoff_dependence(analysis.sensitivity)
    if depends:
        sentences.append(depends)
    errors = analysis.uncertainty
    if errors is not None:
        sentences.append(
            f"Standard errors over examples ({errors.num_groups} groups left out in turn): signal rank "
            f"{analysis.channels.signal_rank:,} ± {number(errors.signal_rank, 2)}, effective rank "
            f"{number(analysis.spectrum.effective_rank)} ± {number(errors.effective_rank, 2)}, share in the reservoir "
            f"± {percent(errors.reservoir_share)}."
        )
    diffusion = analysis.diffusion
    if diffusion is not None:
        sentences.append(f"Minibatches: {diffusion.sampler.reason}")
    return sentences


def against_shuffles(null: Any) -> str:
    """Say whether there is more signal than shuffled labels would show.

    Args:
        null: A `Null`, or what has its fields.

    Returns:
        One sentence or two.
    """
    verdict = "More signal than chance" if null.p <= 0.05 else "No more signal than chance"
    # Far out the number says nothing more: where a softmax is saturated it reaches 1e15.
    away = "over 100" if null.z > 100 else number(null.z)
    score = "" if math.isnan(null.z) else f"{away} standard deviations away, "
    return (
        f"{verdict}: training removed {percent(null.observed)} of the squared error, and would have removed {percent(null.mean)} of that "
        f"of shuffled labels ({null.num_shuffles} shuffles; {score}p = {number(null.p, 2)})."
    )


def cutoff_dependence(sensitivity: Any) -> str:
    """Say whether the order of examples depends on the cutoff.

    Args:
        sensitivity: A `Sensitivity`, or what has its fields.

    Returns:
        One sentence; empty where it cannot be told.
    """
    lowest = sensitivity.smallest_rank_correlation
    if math.isnan(lowest):
        return ""
    depends = "depends on the cutoff" if lowest < RULE_DEPENDENT else "hardly depends on the cutoff"
    return f"The order of examples {depends}: for cutoffs of ω from 0.25 to 0.9 its rank correlation is at least {number(lowest, 2)}."
