"""From a walk along a run to an `Analysis`: every conclusion at the window's end, and what a reader must know of it."""

import math

import torch
from torch import Tensor

from ntkscope._checks import InputError
from ntkscope.dynamics.agreement import GradientAgreement
from ntkscope.dynamics.closure import Circumstances, Closure, measure_closure
from ntkscope.dynamics.dissipation import Dissipation
from ntkscope.dynamics.drift import Regime, judge_regime
from ntkscope.dynamics.loss import ProbeLoss
from ntkscope.dynamics.transfer import Transfer
from ntkscope.findings import (
    abstention,
    agreement_of,
    clean_gradient,
    density_of,
    diffusion_of,
    drift_of,
    has_query_path,
    kernel_action,
    motions_by_example,
    null_of,
    query_motion,
    transfer_of,
)
from ntkscope.record.trace import Trace
from ntkscope.results import Analysis, GateStats, RunInfo, Window
from ntkscope.spectrum.cells import four_cells
from ntkscope.spectrum.channels import split_channels
from ntkscope.spectrum.cutoffs import ALWAYS_SHOWN, Cutoff, apply_cutoff
from ntkscope.spectrum.eigen import Spectrum, dissipation_spectrum
from ntkscope.spectrum.sensitivity import cutoff_sensitivity
from ntkscope.spectrum.truncation import truncate
from ntkscope.tables import examples_of, history_of
from ntkscope.uncertainty import Uncertainty
from ntkscope.walk import Row, Walk
from ntkscope.window import Stop


def conclude(
    trace: Trace,
    walk: Walk,
    end: Stop,
    state: Dissipation,
    summed: Tensor | None,
    *,
    cutoff: str,
    bound: ProbeLoss | None,
    start: int,
    uncertainty: Uncertainty | None,
    gate: tuple[GateStats | None, str],
    device: torch.device | str | None,
) -> Analysis:
    """Draw the conclusions at the window's end.

    Args:
        trace: The record.
        walk: The way along it.
        end: Where the window ends, and why there.
        state: Operators of the window.
        summed: Ω summed over the snapshots, which orders equal eigenvalues by when they were learned; None if it was not kept.
        cutoff: As for `analyze`.
        bound: The loss; None where it is not known.
        start: Index of the window's first snapshot.
        uncertainty: Standard errors; None unless asked for.
        gate: Statistics of the gate, and why there are none.
        device: Where to decompose.

    Returns:
        The analysis.

    Raises:
        InputError: If the chosen cutoff has no answer.
    """
    gradient, facts = walk.first.gradient, trace.facts
    spectrum = dissipation_spectrum(state, walk.whitening, gradient, tie_breaker=summed, device=device)
    caused = motions_by_example(state, walk.whitening, gradient, facts.num_examples)
    cutoffs = _cutoffs(cutoff, spectrum, caused)
    chosen = cutoffs[cutoff]
    if chosen.rank is None:
        raise InputError(f"Cutoff {cutoff!r} has no answer here: {chosen.note}. Choose another rule, for example 'half'.")
    channels = split_channels(spectrum, chosen)
    rows = walk.history[: end.index + 1]
    agreement = agreement_of(rows)
    closure = _closure(walk, rows, state, trace, agreement)
    transfer, transfer_reason = transfer_of(walk, rows, state, trace, bound)
    regime = _regime(transfer, transfer_reason)
    stability = max((row.stability for row in rows[1:]), default=math.nan)
    history = history_of(walk, spectrum)
    examples = examples_of(trace, spectrum, channels, rows, history, abstains=abstention(closure, stability))
    diffusion, diffusion_reason = diffusion_of(walk, end.index, spectrum, bound)
    return Analysis(
        run=RunInfo(
            source=trace.source,
            num_examples=facts.num_examples,
            num_classes=facts.num_classes,
            num_outputs=facts.num_examples * facts.num_classes,
            num_params=facts.num_params,
            num_snapshots=len(trace),
            num_query=facts.num_query,
            num_steps=trace.steps[-1],
            loss=facts.loss,
            optimizer=facts.optimizer,
            precond=facts.precond,
            outputs=facts.outputs,
            training_size=facts.training_size,
        ),
        window=Window(rows[0].snapshot.step, rows[-1].snapshot.step, start, start + end.index, end.reason),
        dissipation=state,
        spectrum=spectrum,
        channels=channels,
        cutoffs=cutoffs,
        closure=closure,
        drift=drift_of(walk, rows, trace),
        stability=stability,
        regime=regime.name,
        regime_reason=regime.reason,
        transfer=transfer,
        transfer_reason=transfer_reason,
        truncation=truncate(state, walk.whitening, spectrum, channels, kernel_action=kernel_action(rows)),
        cells=four_cells(
            state,
            walk.whitening,
            spectrum,
            channels,
            clean_gradient=clean_gradient(trace, walk, bound),
            example_motions=caused,
        ),
        null=null_of(trace, walk, spectrum, bound),
        sensitivity=cutoff_sensitivity(spectrum, list(cutoffs.values()), examples.reservoir_energy, is_noise=examples.is_noise),
        uncertainty=uncertainty,
        diffusion=diffusion,
        diffusion_reason=diffusion_reason,
        agreement=agreement,
        gate=gate[0],
        gate_reason=gate[1],
        examples=examples,
        history=history,
        warnings=_warnings(trace, closure, chosen, stability),
        density=density_of(walk, end.index, device=device),
    )


def _cutoffs(cutoff: str, spectrum: Spectrum, motions: Tensor) -> dict[str, Cutoff]:
    """Apply every rule, the chosen one first."""
    rules = [cutoff, *(rule for rule in ALWAYS_SHOWN if rule != cutoff)]
    return {rule: apply_cutoff(rule, spectrum, example_motions=motions) for rule in rules}


def _closure(walk: Walk, rows: list[Row], state: Dissipation, trace: Trace, agreement: GradientAgreement | None) -> Closure:
    """Measure the errors at the window's end."""
    first, last, facts = rows[0].snapshot, rows[-1].snapshot, trace.facts
    # Each interval from the gradient observed at its start: errors do not build up, so only a wrong scale or noise shows.
    local = sum(row.local_energy for row in rows)
    observed = query_motion(first, last)
    return measure_closure(
        state,
        losses=(first.loss, last.loss),
        gradients=(walk.first.gradient, walk.form.field(last.gradient)),
        query_motion=None if observed is None or not has_query_path(last) else walk.form.field(observed),
        circumstances=Circumstances(
            stability=max((row.stability for row in rows[1:]), default=math.nan),
            largest_kernel_step=max(row.kernel_step for row in rows),
            scale_ratio=(first.loss - last.loss) / local if local > 0 else 1.0,
            momentum_lag=facts.momentum_lag,
            train_only=tuple(facts.train_only),
            training_size=facts.training_size,
            kinked=tuple(facts.kinked),
            is_trace=walk.form.is_trace,
            stated=None if agreement is None else agreement.warnings(),
            is_from_checkpoints=trace.is_from_checkpoints,
        ),
    )


def _regime(transfer: Transfer | None, reason: str) -> Regime:
    """Ask whether a frozen kernel would have predicted the test motion."""
    if transfer is None:
        return Regime("not judged", f"the rule compares test motions, and {reason}")
    if "frozen_kernel" not in transfer.baselines:
        return Regime("not judged", transfer.missing["frozen_kernel"])
    return judge_regime(transfer.baselines["frozen_kernel"].relative_error)


def _warnings(trace: Trace, closure: Closure, cutoff: Cutoff, stability: float) -> tuple[str, ...]:
    """Collect what a reader must know."""
    found = []
    if trace.facts.stopped:
        found.append(trace.facts.stopped)
    if not closure.trustworthy:
        found.append(
            f"Not trustworthy: energy error {closure.energy_error:.1%} (limit 5 %), "
            f"gradient closure error {closure.gradient_error:.1%} (limit 25 %)."
        )
    if closure.trustworthy:
        found.extend(closure.causes)
    if stability > 1:
        found.append(f"The run crossed the edge of stability ({stability:.2f} of the stable limit).")
    if cutoff.rank == 0:
        found.append(f"Cutoff {cutoff.rule!r} finds no signal direction: everything is reservoir in this window.")
    if abs(closure.forcing_share) > 0.01:
        found.append(f"Weight decay accounts for {closure.forcing_share:.1%} of the dissipated loss; it is left out of the channels.")
    if trace.facts.training_size is not None:
        found.append(
            f"The probe is a sample of {trace.facts.num_examples} of {trace.facts.training_size} training examples: every number is a "
            "Monte-Carlo estimate of the whole, and the closure errors include the sampling error."
        )
    if trace.facts.outputs == "trace":
        found.append("Trace form: the classes share one kernel, K = K_tr / C. All numbers are approximate.")
    found.extend(trace.facts.notes)
    if trace.facts.train_only:
        kinds = ", ".join(trace.facts.train_only)
        found.append(f"{kinds} act differently in training; the probe is followed in evaluation mode, so some error may be theirs.")
    if trace.facts.momentum_lag > 0:
        found.append(f"Momentum: the flow lags the optimizer by about {trace.facts.momentum_lag:.0f} steps.")
    return tuple(found)
