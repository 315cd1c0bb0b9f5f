"""One or two sentences on what a single result says, by the name of its class: what a notebook shows above the table."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ntkscope._checks import format_bytes
from ntkscope.view.evidence import ABOUT_CHANNELS, against_shuffles, cutoff_dependence, four_cells, predicted_motion
from ntkscope.view.findings import headline, rule_words, verdict
from ntkscope.view.words import counted, number, percent

AUTOGRAD = ("torch.func", "loop")  # routes of parameters that no rule takes


def sentence_of(result: Any) -> str:
    """Say what a result says.

    Args:
        result: Any result.

    Returns:
        Sentences; empty where there is only a table.
    """
    say = next((SENTENCES[kind.__name__] for kind in type(result).__mro__ if kind.__name__ in SENTENCES), None)
    return "" if say is None else say(result)


def _closure(closure: Any) -> str:
    """Say whether to believe the operators, and likely causes if not."""
    judged = verdict(closure)
    return " ".join([f"{judged.short}.", *judged.sentences, *closure.causes])


def _channels(channels: Any) -> str:
    """Say how many directions were learned, and by which rule."""
    meaning = rule_words(channels.rule)
    said = f" Signal by rule '{channels.rule}': {meaning}." if meaning != channels.rule else ""
    return headline(SimpleNamespace(channels=channels)) + said


def _cutoff(cutoff: Any) -> str:
    """Say what a rule decides."""
    verb = "has no answer here" if cutoff.rank is None else f"counts {counted(cutoff.rank, 'direction')} as signal"
    meaning = rule_words(cutoff.rule)
    said = "" if meaning == cutoff.rule else f": {meaning}"
    return f"Rule '{cutoff.rule}' {verb}{said}." + (f" {_sentence(cutoff.note)}" if cutoff.note else "")


def _spectrum(spectrum: Any) -> str:
    """Say how many directions lost most of their loss."""
    mostly = int((spectrum.eigvals > 0.5).sum())
    return (
        f"Training removed more than half of the loss along {mostly:,} of {counted(len(spectrum.eigvals), 'direction')}; "
        f"it acted as if on about {number(spectrum.effective_rank)} of them (effective rank)."
    )


def _dissipation(dissipation: Any) -> str:
    """Say how much loss was dissipated, and that this is a prediction."""
    return (
        f"Over optimizer time {number(dissipation.elapsed)} the operators say that training dissipated {number(dissipation.energy)} of "
        "the loss. Whether it did is what `closure` tells."
    )


def _drift(drift: Any) -> str:
    """Say how far the kernel moved."""
    return f"The kernel moved by at most {percent(drift.max)} of its size inside the window, and by {percent(drift.final)} to its end."


def _truncation(truncation: Any) -> str:
    """Say what the reservoir's directions contribute."""
    said = f"The signal channel alone misses {percent(truncation.reservoir_train_share)} of the predicted motion of training outputs"
    share = truncation.reservoir_query_share
    return said + ("." if share is None else f", and {percent(share)} of held-out ones.")


def _uncertainty(errors: Any) -> str:
    """Give the standard errors."""
    return (
        f"Standard errors over examples, {errors.num_groups} groups left out in turn: signal rank ± {number(errors.signal_rank, 2)}, "
        f"effective rank ± {number(errors.effective_rank, 2)}, share in the reservoir ± {percent(errors.reservoir_share)}."
    )


def _history(history: Any) -> str:
    """Give the span of the record and the loss at its ends."""
    return (
        f"{counted(len(history.steps), 'snapshot')}, steps {history.steps[0]:,} to {history.steps[-1]:,}: the loss went from "
        f"{number(float(history.loss[0]))} to {number(float(history.loss[-1]))}."
    )


def _agreement(agreement: Any) -> str:
    """Compare received gradients with those of the loss."""
    return (
        f"At {counted(agreement.num_audits, 'step')} the optimizer received {number(agreement.factor)} times the gradient of the loss on "
        f"the probe (1: the trained scale, nothing clipped); {percent(agreement.unexplained)} of the squared gradient is something else."
    )


def _fit(fit: Any) -> str:
    """Give error and correlation."""
    return f"Predicted with an error of {percent(fit.relative_error)} and correlation {number(fit.correlation)}."


def _gram(gram: Any) -> str:
    """Say what kind of kernel this is, and how it was computed."""
    rows, columns = gram.matrix.shape
    return (
        f"The '{gram.outputs}' kernel, {rows:,} × {columns:,}, of {counted(gram.num_examples, 'example')} with "
        f"{counted(gram.num_classes, 'output')} each. {_coverage(gram.coverage)}"
    )


def _coverage(coverage: Any) -> str:
    """Count the routes of parameters."""
    slow = sum(route in AUTOGRAD for route in coverage.routes.values())
    excluded = f", {len(coverage.excluded)} excluded" if coverage.excluded else ""
    return (
        f"{counted(len(coverage.routes) - slow, 'parameter')} by rules, {slow} by autograd (exact too, only slower){excluded}; checked "
        "against autograd on examples of yours."
    )


def _price(price: Any) -> str:
    """Say what the kernel takes, and what is cheaper."""
    bound = (
        f" {percent(price.product_share)} of the work are products of weight gradients, which no rule makes cheaper."
        if price.is_bound_by_products
        else ""
    )
    cheaper = "; ".join(f"{each.name} about {_duration(each.seconds)}, {format_bytes(each.bytes)}" for each in price.alternatives)
    return (
        f"A {price.num_outputs:,} × {price.num_outputs:,} kernel ({format_bytes(price.result_bytes)}) takes about "
        f"{_duration(price.seconds)} and {format_bytes(price.peak_bytes)} at its peak.{bound}"
        + (f" Cheaper: {cheaper}." if cheaper else "")
    )


def _operator(operator: Any) -> str:
    """Say what the operator stands for, and how to use it."""
    return (
        f"The '{operator.outputs}' kernel of {counted(operator.num_examples, 'example')} as a linear operator, without the matrix: "
        "`op @ v` multiplies, `op.top(k)` finds leading eigenpairs."
    )


def _top(pairs: Any) -> str:
    """Say how exact the eigenpairs are."""
    worst = float(pairs.residuals.max()) if len(pairs.residuals) else math.nan
    return (
        f"{counted(len(pairs.eigvals), 'eigenpair')} in {counted(pairs.num_products, 'product')}; the largest residual is "
        f"{number(worst, 2)} of the largest eigenvalue."
    )


def _moments(moments: Any) -> str:
    """Say what the moments are over."""
    return f"Mean and variance over {counted(moments.num_examples, 'example')}, of {counted(len(moments.mean), 'parameter')}."


def _audit(audit: Any) -> str:
    """Give the verdict, what it is not about, and warnings."""
    return " ".join([audit.verdict.sentence, ABOUT_CHANNELS, *audit.warnings])


def _compared(figure: Any) -> str:
    """Give a figure beside its null."""
    if figure.reason:
        return f"{number(figure.observed)}; not compared with chance: {figure.reason}."
    return (
        f"{number(figure.observed)}, by chance {number(figure.mean)} ± {number(figure.deviation, 2)} "
        f"(z = {number(figure.z, 2)}, p = {number(figure.p, 2)})."
    )


def _risk_curve(risk: Any) -> str:
    """Say how well population risk was predicted."""
    found = None if risk.correlation is None else risk.correlation.spearman
    if found is None:
        return "Rates of an estimate from training examples alone; nothing held out to compare it with, so take it as a hint."
    return (
        f"The estimate from training examples alone goes with the measured held-out decrease at rank correlation {number(found.value, 2)} "
        f"(95 % interval {number(found.low, 2)} to {number(found.high, 2)})."
    )


def _step_audit(step: Any) -> str:
    """Say what the gate does at one step."""
    recall, collateral = step.figures["recall"].observed, step.figures["collateral"].observed
    return (
        f"Step {step.step:,}: {percent(step.open_share)} of gates open; the gate removes {percent(recall)} of reservoir motion and "
        f"{percent(collateral)} of signal motion."
    )


def _layer_audit(layer: Any) -> str:
    """Say what the gate does in one tensor."""
    opened = f"{percent(layer.open_share)} of {counted(layer.num_live, 'gate')} open"
    return f"{opened}; {percent(layer.removed_share)} of the squared motion removed."


def _spectral_gate(gate: Any) -> str:
    """Say which directions the rule keeps."""
    return (
        f"Applied to directions, the gate's rule keeps {gate.rank:,} of {gate.num_modes:,}; {gate.in_signal:,} of them are among the "
        f"{gate.cutoff_rank:,} of the cutoff."
    )


def _gate_stats(stats: Any) -> str:
    """Say how open the gate was, and what the audit found."""
    said = stats.audit.verdict.sentence if stats.audit is not None else _sentence(f"Not audited: {stats.audit_reason}")
    if not len(stats.open_share):
        return said
    return (
        f"The share of open gates went from {percent(float(stats.open_share[0]))} to {percent(float(stats.open_share[-1]))} over "
        f"{counted(len(stats.steps), 'snapshot')}. {said}"
    )


def _gate_share(share: Any) -> str:
    """Say what a gate let through."""
    return (
        f"{percent(share.open_share)} of gates open (mean {number(share.mean_gate)}) over {counted(share.num_steps, 'step')}; weight decay "
        f"makes up {percent(share.decay_share)} of the squared motion."
    )


def _statistics(statistics: Any) -> str:
    """Say what an optimizer's gates let through, with warnings."""
    if not statistics.num_steps:
        return "No step was counted yet."
    return " ".join([_gate_share(statistics), *statistics.warnings])


def _risk_rate(rate: Any) -> str:
    """Give the rates, and when they are too high."""
    return (
        f"Per unit of optimizer time a step lowers the training loss by {number(rate.training_rate)}, and by estimate the loss on new data "
        f"by {number(rate.rate)}. The estimate is too high once the weights have been fitted to these examples."
    )


def _variances(found: Any) -> str:
    """Compare two variances."""
    ratio = found.overall
    said = (
        f"In sum the streaming variance is {number(ratio.bias)} times the exact one; {percent(ratio.differing)} of gates are decided "
        "otherwise."
    )
    return " ".join([said, *found.warnings])


def _trace(trace: Any) -> str:
    """Say what was recorded."""
    facts, steps = trace.facts, trace.steps
    if not steps:
        return "No snapshot yet."
    stopped = f" {_sentence(facts.stopped)}" if facts.stopped else ""
    return (
        f"{counted(len(steps), 'snapshot')}, steps {steps[0]:,} to {steps[-1]:,}, of {counted(facts.num_examples, 'example')} with "
        f"{counted(facts.num_classes, 'output')} each, {facts.loss} loss, {facts.optimizer}.{stopped} `ntkscope.analyze(trace)` goes on."
    )


def _recorder(recorder: Any) -> str:
    """Say how far recording is, and what comes next."""
    if not recorder.is_attached:
        return "Not attached to an optimizer: `recorder.attach(optimizer)`, then train as always."
    if not recorder.num_snapshots:
        return "Attached; nothing is recorded before the first optimizer step."
    return (
        f"{counted(recorder.num_snapshots, 'snapshot')} in {counted(recorder.num_steps, 'step')}. `ntkscope.analyze(recorder)` says what "
        "was learned; `recorder.state_dict()` goes into a checkpoint."
    )


def _jump_errors(errors: Any) -> str:
    """Give the error of the nearest and the farthest jump."""
    return (
        f"From step {errors.start_step:,}, kernel frozen: an error of {percent(float(errors.frozen[0]))} at step {errors.steps[0]:,} and "
        f"of {percent(float(errors.frozen[-1]))} at step {errors.steps[-1]:,} (100 % is predicting that nothing moves)."
    )


def _jumps(study: Any) -> str:
    """Say how far a frozen kernel sees."""
    reach = ", ".join(f"from step {start:,} to {last:,}" for start, last in study.reach().items())
    return f"A frozen kernel predicts training outputs within 10 % {reach}."


def _sentence(text: str) -> str:
    """Make a sentence of a reason."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _duration(seconds: float) -> str:
    """Write seconds as people do."""
    return f"{seconds:.2g} s" if seconds < 120 else f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


SENTENCES: dict[str, Callable[[Any], str]] = {
    "AuditPrice": lambda price: price.describe(),
    "Cells": four_cells,
    "ChannelSplit": _channels,
    "Closure": _closure,
    "Compared": _compared,
    "Coverage": _coverage,
    "Cutoff": _cutoff,
    "Density": lambda density: density.sentence,
    "Diffusion": lambda diffusion: _sentence(diffusion.sampler.reason),
    "Dissipation": _dissipation,
    "Drift": _drift,
    "Fit": _fit,
    "GateAudit": _audit,
    "GateShare": _gate_share,
    "GateStats": _gate_stats,
    "GradientAgreement": _agreement,
    "GradientMoments": _moments,
    "Gram": _gram,
    "History": _history,
    "JumpErrors": _jump_errors,
    "JumpStudy": _jumps,
    "LayerAudit": _layer_audit,
    "NTKOperator": _operator,
    "Null": against_shuffles,
    "OptimizerGateStatistics": _statistics,
    "PopulationRisk": lambda risk: _risk_rate(risk.total),
    "Price": _price,
    "Recorder": _recorder,
    "RiskCurve": _risk_curve,
    "RiskRate": _risk_rate,
    "Sampler": lambda sampler: _sentence(sampler.reason),
    "Sensitivity": cutoff_dependence,
    "SpectralGate": _spectral_gate,
    "Spectrum": _spectrum,
    "StepAudit": _step_audit,
    "TopEigenpairs": _top,
    "Trace": _trace,
    "Transfer": lambda transfer: " ".join(predicted_motion(transfer)),
    "Truncation": _truncation,
    "Uncertainty": _uncertainty,
    "VarianceComparison": _variances,
    "Verdict": lambda found: f"{found.sentence} {ABOUT_CHANNELS}",
    "Window": lambda window: f"Steps {window.start_step:,} to {window.stop_step:,}: {_sentence(window.reason)}",
}
