"""The findings in plain containers, as in summary.json (docs/summary.md)."""

import math
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from torch import Tensor

SCHEMA = "ntkscope.summary/2"


def summarize(analysis: Any) -> dict[str, Any]:
    """Put an analysis into plain containers.

    Args:
        analysis: An `Analysis`.

    Returns:
        JSON-able values; what is infinite or undefined is null.
    """
    table = analysis.examples.table()
    closure, stop = analysis.closure, analysis.window.stop - analysis.window.start
    gate = None
    if analysis.gate is not None:
        gate = {
            "kind": analysis.gate.kind,
            "open_share": dict(zip(analysis.gate.steps, analysis.gate.open_share.tolist(), strict=True)),
            "final_by_parameter": {name: float(share[-1]) for name, share in analysis.gate.by_parameter.items()},
            "audit": None if analysis.gate.audit is None else _audit(analysis.gate.audit),
            "audit_reason": analysis.gate.audit_reason,
            "live": None if analysis.gate.live is None else analysis.gate.live.tolist(),
        }
    return _jsonable({
        "schema": SCHEMA,
        **asdict(analysis.run),
        "window": asdict(analysis.window),
        "loss_name": analysis.run.loss,
        "loss": {"start": float(analysis.history.loss[0]), "end": float(analysis.history.loss[stop])},
        "energy_balance": {
            "predicted": closure.energy_predicted,
            "observed": closure.energy_observed,
            "relative_error": closure.energy_error,
        },
        "gradient_closure": closure.gradient_error,
        "gradient_closure_initial": closure.gradient_error_initial,
        "query_closure": closure.query_error,
        "forcing_share": closure.forcing_share,
        "trustworthy": closure.trustworthy,
        "causes": list(closure.causes),
        "density": None if analysis.density is None else asdict(analysis.density) | {"sentence": analysis.density.sentence},
        "kernel_drift": {"kernel": analysis.drift.kernel, "max": analysis.drift.max, "final": analysis.drift.final},
        "stability": analysis.stability,
        "cutoff": {"rule": analysis.channels.rule, "value": analysis.channels.threshold},
        "num_modes": analysis.channels.num_modes,
        "signal_rank": analysis.channels.signal_rank,
        "signal_share": float(analysis.history.signal_share[stop]),
        "effective_rank": analysis.spectrum.effective_rank,
        "stable_rank": analysis.spectrum.stable_rank,
        "cutoffs": {rule: cutoff.rank for rule, cutoff in analysis.cutoffs.items()},
        "regime": analysis.regime,
        "regime_reason": analysis.regime_reason,
        "gate": gate,
        "gate_reason": analysis.gate_reason,
        "auroc": analysis.examples.auroc,
        "transfer": _transfer(analysis),
        "transfer_reason": analysis.transfer_reason,
        "cells": None if analysis.cells is None else {"is_estimate": analysis.cells.is_estimate, **analysis.cells.norms},
        "reservoir": {
            "train_share": analysis.truncation.reservoir_train_share,
            "query_share": analysis.truncation.reservoir_query_share,
            "visibility": analysis.truncation.reservoir_visibility,
        },
        "null": _plain(analysis.null),
        "sensitivity": [asdict(row) for row in analysis.sensitivity.rows],
        "uncertainty": _uncertainty(analysis),
        "diffusion": _plain(analysis.diffusion),
        "diffusion_reason": analysis.diffusion_reason,
        "gradient_agreement": _plain(analysis.agreement),
        "alignment": {
            "start": float(analysis.drift.alignment_start[stop]),
            "targets": {"start": float(analysis.drift.alignment_targets[0]), "end": float(analysis.drift.alignment_targets[stop])},
        },
        "kernel_velocity": float(analysis.drift.velocity[stop]),
        "refined_share": sum(analysis.history.is_refined[1 : stop + 1]) / stop,
        "examples_ranked_by": analysis.examples.ranked_by,
        "examples_abstain": analysis.examples.abstains,
        "examples": [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)],
        "warnings": list(analysis.warnings),
    })


def _transfer(analysis: Any) -> dict[str, Any] | None:
    """Say how well test motion was predicted."""
    found = analysis.transfer
    if found is None:
        return None
    return {
        "operators": asdict(found.fit),
        "predictor": asdict(found.predictor_fit) | {"rank": found.predictor_rank},
        **{name: asdict(fit) for name, fit in found.baselines.items()},
        "missing": dict(found.missing),
    }


def _uncertainty(analysis: Any) -> dict[str, Any] | None:
    """List the standard errors that are one number."""
    found = analysis.uncertainty
    if found is None:
        return None
    return {
        "num_groups": found.num_groups,
        "signal_rank": found.signal_rank,
        "effective_rank": found.effective_rank,
        "reservoir_share": found.reservoir_share,
    }


def _plain(value: Any) -> Any:
    """Turn a result of any depth into containers and numbers."""
    if isinstance(value, Tensor):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _jsonable(value: Any) -> Any:
    """Replace what JSON has no word for (NaN, infinity) by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(part) for part in value]
    return value


def _audit(audit: Any) -> dict[str, Any]:
    """Put a gate audit into plain containers; every figure with its null."""

    def figures(found: dict[str, Any]) -> dict[str, Any]:
        return {
            name: {"value": figure.observed, "null": figure.mean, "z": figure.z, "p": figure.p, "reason": figure.reason}
            for name, figure in found.items()
        }

    steps = [
        {
            "step": step.step,
            "signal_rank": step.rank,
            "open_share": step.open_share,
            "num_live": step.num_live,
            "num_dead": step.num_dead,
            "ungated_direction": step.ungated_direction,
            "decay_share": step.decay_share,
            "spectral_gate_rank": step.spectral_gate.rank,
            "spectral_gate_in_signal": step.spectral_gate.in_signal,
            **figures(step.figures),
        }
        for step in audit.steps
    ]
    risk = None
    if audit.risk is not None:
        found = audit.risk.correlation
        risk = {
            "steps": audit.risk.steps,
            "rate": audit.risk.rate.tolist(),
            "training_rate": audit.risk.training_rate.tolist(),
            "streaming_rate": audit.risk.streaming_rate.tolist(),
            "heldout_loss": None if audit.risk.heldout_loss is None else audit.risk.heldout_loss.tolist(),
            "spearman": None if found is None or found.spearman is None else asdict(found.spearman),
            "pearson": None if found is None or found.pearson is None else asdict(found.pearson),
        }
    return {
        "gate": audit.kind,
        "alpha": audit.alpha,
        "lambda_pop": audit.lambda_pop,
        "alpha_over_unbiased": audit.strictness,
        "is_counterfactual": audit.is_counterfactual,
        "variance": audit.variance,
        "verdict": audit.verdict.kind,
        "sentence": audit.verdict.sentence,
        "harmed_layers": list(audit.verdict.harmed_layers),
        "overall": figures(audit.overall),
        "layers": {name: figures(found) for name, found in audit.layers.items()},
        "steps": steps,
        "population_risk": risk,
        "warnings": list(audit.warnings),
    }
