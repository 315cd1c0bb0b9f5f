"""The audit of a recorded run: from snapshots with audit data and the model to `GateAudit`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ntkscope._checks import InputError
from ntkscope._types import ForwardFn, GateKind
from ntkscope.dynamics.dissipation import Dissipation
from ntkscope.dynamics.loss import ProbeLoss, bind_loss
from ntkscope.findings import motions_by_example
from ntkscope.gate.audit_options import AuditOptions
from ntkscope.gate.audit_results import StepAudit
from ntkscope.gate.audit_step import Update, audit_step
from ntkscope.gate.channel import Channel, channel_at
from ntkscope.gate.population_risk import correlation_with_heldout
from ntkscope.gate.step import gate_values, resolve_alpha
from ntkscope.gate.variance import exact_variance
from ntkscope.gate.variance_ratio import compare_variances
from ntkscope.gate.verdict import GateAudit, RiskCurve, average_figures, decay_warning, judge
from ntkscope.kernel.blocks import DEFAULT_MEMORY
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.columns import Columns, columns_of, whole_jacobian
from ntkscope.kernel.coverage import probe_routes
from ntkscope.kernel.model import forward_rows
from ntkscope.kernel.moments import make_pulled_readout, moments_of
from ntkscope.record.beginning import State, weights_of
from ntkscope.record.facts import RunFacts
from ntkscope.record.files import read_tensor
from ntkscope.record.snapshot import Snapshot
from ntkscope.record.trace import Trace
from ntkscope.spectrum.cutoffs import apply_cutoff
from ntkscope.spectrum.eigen import dissipation_spectrum
from ntkscope.walk import Progress, Walk

CHUNK_BYTES = 2**24
SAME_OUTPUTS = 1e-3  # relative: the recorded weights are exact, so that more is another model


@dataclass(frozen=True)
class AuditedModel:
    """The model of a run, and what its probe was.

    Attributes:
        model: Its trained weights are put back after every audited step.
        inputs: Of the probe, on the model's device.
        forward_fn: The model's call.
    """

    model: nn.Module
    inputs: Any
    forward_fn: ForwardFn | None


def audited_positions(trace: Trace, start: int, num_steps: int) -> list[int]:
    """Choose the snapshots to audit.

    Args:
        trace: The record.
        start: Index of the window's first snapshot, which has no window before it.
        num_steps: At most so many.

    Returns:
        Indices, evenly over those that hold audit data.
    """
    found = []
    for position, step in enumerate(trace.steps):
        entry = trace.entries[step]
        data = read_tensor(entry, "audit_decay") if isinstance(entry, Path) else entry.audit_decay
        if data is not None and position > start:
            found.append(position)
    if len(found) <= num_steps:
        return found
    return [found[round(k)] for k in torch.linspace(0, len(found) - 1, num_steps).tolist()] if num_steps > 1 else found[-1:]


class ChannelKeeper:
    """Keeps the signal channel at audited snapshots while a trajectory is walked.

    Args:
        positions: Which snapshots.
        cutoff: Rule that separates signal from reservoir.
    """

    def __init__(self, positions: Sequence[int], cutoff: str) -> None:
        self.cutoff = cutoff
        self.channels: dict[int, Channel | str] = dict.fromkeys(positions, "the walk did not come here")

    def visit(self, position: int, state: Dissipation, walk: Walk) -> None:
        """Look at a snapshot; the arguments are those of `walk_trajectory`'s `visit`.

        Args:
            position: Index in the trace.
            state: Operators of the window that ends there.
            walk: The walk so far.
        """
        if position not in self.channels:
            return
        gradient, facts = walk.first.gradient, walk.course.trace.facts
        spectrum = dissipation_spectrum(state, walk.whitening, gradient, tie_breaker=walk.summed)
        caused = motions_by_example(state, walk.whitening, gradient, facts.num_examples)
        found = apply_cutoff(self.cutoff, spectrum, example_motions=caused)
        self.channels[position] = found.note if found.rank is None else channel_at(state, walk.whitening, found.rank)


def audit_run(
    trace: Trace,
    keeper: ChannelKeeper,
    audited: AuditedModel,
    options: AuditOptions,
    *,
    loss: ProbeLoss | None,
    max_memory: int | None,
    progress: Progress | None,
) -> GateAudit:
    """Audit the chosen snapshots.

    Args:
        trace: The record.
        keeper: With the channels at these snapshots.
        audited: The model.
        options: Which gate, and how.
        loss: The loss, for the held-out curve.
        max_memory: Bytes; 2 GiB for Jacobians if not given.
        progress: Called with (steps done, steps in all).

    Returns:
        The audit.

    Raises:
        InputError: If the model is another one, or there is nothing to audit.
    """
    rule = Rule.of(trace.facts, options)
    parameters = trained_parameters(trace.facts, audited.model)
    budget = DEFAULT_MEMORY if max_memory is None else max_memory
    steps: list[StepAudit] = []
    warnings: list[str] = []
    for done, (position, channel) in enumerate(keeper.channels.items()):
        snapshot = trace[position]
        if isinstance(channel, str):
            warnings.append(f"Step {snapshot.step} was not audited: {channel}.")
        else:
            with weights_of(audited.model, _state_of(snapshot, trace.facts, audited.model)):
                audit, words = _audit_snapshot(snapshot, channel, audited, parameters, rule, options, budget)
            steps.append(audit)
            warnings += words
        if progress is not None:
            progress(done + 1, len(keeper.channels))
    if not steps:
        raise InputError(f"No step could be audited: {' '.join(warnings) or 'no audited snapshot lies after the start of the window.'}")
    overall, layers = average_figures(steps)
    if not rule.is_counterfactual:
        warnings += [words for words in [decay_warning(steps)] if words]
    return GateAudit(
        kind=rule.kind,
        alpha=rule.alpha,
        lambda_pop=rule.lambda_pop,
        strictness=rule.strictness,
        is_counterfactual=rule.is_counterfactual,
        variance=options.variance,
        steps=steps,
        overall=overall,
        layers=layers,
        verdict=judge(steps, overall, layers, gate=rule.describe(), is_counterfactual=rule.is_counterfactual),
        risk=risk_curve(trace, loss),
        warnings=tuple(warnings),
    )


@dataclass(frozen=True)
class Rule:
    """The gate that is audited, in numbers."""

    kind: GateKind
    alpha: float
    lambda_pop: float
    strictness: float
    is_counterfactual: bool

    @staticmethod
    def of(facts: RunFacts, options: AuditOptions) -> "Rule":
        """Read it off the run, or off the options.

        Args:
            facts: Of the run.
            options: The user's.

        Returns:
            The rule.
        """
        own = resolve_alpha("unbiased", beta1=facts.beta1, batch_size=None, dataset_size=None)
        has_gate = facts.gate is not None and facts.alpha is not None and facts.lambda_pop is not None
        asked: Any = options.alpha
        if asked is None:
            asked = facts.alpha if has_gate else "unbiased"
        alpha = resolve_alpha(
            asked, beta1=facts.beta1, batch_size=options.batch_size, dataset_size=facts.training_size or facts.num_examples
        )
        weight = options.lambda_pop
        if weight is None:
            weight = facts.lambda_pop if facts.lambda_pop is not None else alpha
        kind: Any = options.gate or (facts.gate if has_gate else "soft")
        strictness = alpha / own if own > 0 else math.inf
        return Rule(kind, alpha, weight, strictness, is_counterfactual=not (has_gate and options.is_own))

    def describe(self) -> str:
        """Describe the gate.

        Returns:
            For example "the soft gate at α = 1 (19 times the unbiased rule)".
        """
        return f"the {self.kind} gate at α = {self.alpha:.3g} ({self.strictness:.3g} times the unbiased rule)"


def _audit_snapshot(
    snapshot: Snapshot,
    channel: Channel,
    audited: AuditedModel,
    parameters: dict[str, nn.Parameter],
    rule: Rule,
    options: AuditOptions,
    budget: int,
) -> tuple[StepAudit, list[str]]:
    """Audit one snapshot, the model being at its weights."""
    model = audited.model
    with undisturbed(model), torch.no_grad():
        outputs = forward_rows(model, audited.inputs, audited.forward_fn).cpu().double()
    gap = float(torch.linalg.vector_norm(outputs - snapshot.outputs.double())) / float(torch.linalg.vector_norm(outputs).clamp(min=1e-300))
    if not gap <= SAME_OUTPUTS:
        raise InputError(
            f"With the weights recorded at step {snapshot.step} this model gives other outputs on the probe (relative gap {gap:.1e}). Give "
            "the model that was trained: frozen weights are not recorded, so load its state_dict first; or data of the same probe."
        )
    routes, coverage = probe_routes(model, audited.inputs, params=list(parameters), forward_fn=audited.forward_fn)
    mean, variance, precond = (
        _split(value, parameters) for value in (snapshot.audit_mean, snapshot.audit_variance, snapshot.audit_precond)
    )
    warnings: list[str] = []
    if options.variance == "exact":
        assert options.batch_size is not None
        exact = _exact_variance(snapshot, audited, parameters, options.batch_size, budget)
        beta1 = 1 - 2 * (rule.alpha / rule.strictness) / (1 + rule.alpha / rule.strictness)  # of α_U = (1−β₁)/(1+β₁)
        streaming = {name: value * ((1 + beta1) / 2) for name, value in variance.items()}
        compared = compare_variances(streaming, exact, mean, alpha=rule.alpha, beta1=beta1)
        warnings += [f"Step {snapshot.step}: {words}" for words in compared.warnings]
        variance = {name: value * (2 / (1 + beta1)) for name, value in exact.items()}
    if rule.is_counterfactual or snapshot.audit_gate is None:
        gate = {
            name: gate_values(mean[name], variance[name], kind=rule.kind, alpha=rule.alpha, lambda_pop=rule.lambda_pop) for name in mean
        }
    else:
        gate = _split(snapshot.audit_gate, parameters)
    decay = snapshot.audit_decay
    with undisturbed(model):
        jacobian = whole_jacobian(model, audited.inputs, routes=routes, coverage=coverage, budget=budget)

        def walk(name: str) -> Iterator[Columns]:
            return columns_of(jacobian, name, chunk_bytes=CHUNK_BYTES)

        audit = audit_step(
            walk,
            Update(mean, precond, gate, variance, is_hard=rule.kind == "hard"),
            channel,
            snapshot.gradient,
            step=snapshot.step,
            strictness=rule.strictness,
            batch_size=options.batch_size,
            decay_share=float(decay[0] / decay[1]) if decay is not None and not rule.is_counterfactual and decay[1] > 0 else math.nan,
            num_permutations=options.num_permutations,
            seed=options.seed + snapshot.step,
        )
    return audit, warnings


def _exact_variance(
    snapshot: Snapshot, audited: AuditedModel, parameters: dict[str, nn.Parameter], batch_size: int, budget: int
) -> dict[str, Tensor]:
    """Compute the variance of the gradient of a batch from all probe examples."""
    weight = next(iter(parameters.values()))
    batch = (audited.inputs, (snapshot.gradient * len(snapshot.gradient)).to(weight))
    readout = make_pulled_readout(audited.forward_fn)
    routes, coverage = probe_routes(audited.model, batch, params=list(parameters), forward_fn=readout)
    with undisturbed(audited.model):
        return exact_variance(moments_of(audited.model, batch, routes, coverage, budget=budget), batch_size=batch_size)


def risk_curve(trace: Trace, loss: ProbeLoss | None) -> RiskCurve | None:
    """Collect the population risk over the run.

    Args:
        trace: The record.
        loss: The loss, to measure it on the query set.

    Returns:
        The curve; None where it was not recorded.
    """
    held = [snapshot for snapshot in trace if snapshot.audit_risk is not None]
    if not held:
        return None
    rates = torch.stack([snapshot.audit_risk for snapshot in held if snapshot.audit_risk is not None])  # [snapshots, tensors, 3]
    times = torch.tensor([snapshot.time for snapshot in held], dtype=torch.float64)
    heldout = correlation = None
    targets = trace.probe.get("query_targets")
    if loss is not None and targets is not None:
        outputs = [snapshot.query_outputs for snapshot in held if snapshot.query_outputs is not None]
        own = bind_loss(loss.unbound, targets, outputs[0])
        heldout = torch.tensor([own.value(values) for values in outputs], dtype=torch.float64)
        if len(held) > 1:
            correlation = correlation_with_heldout(rates[:, :, 0].sum(dim=1), heldout, times)
    total = rates.sum(dim=1)
    return RiskCurve(
        steps=[snapshot.step for snapshot in held],
        times=times,
        rate=total[:, 0],
        training_rate=total[:, 1],
        streaming_rate=total[:, 2],
        by_parameter={name: rates[:, k, 0].contiguous() for k, name in enumerate(trace.facts.parameters)},
        heldout_loss=heldout,
        correlation=correlation,
    )


def trained_parameters(facts: RunFacts, model: nn.Module) -> dict[str, nn.Parameter]:
    """Find the trained parameters of the run in the model.

    Args:
        facts: Of the run.
        model: The model that was trained.

    Returns:
        Parameters by name, in the record's order.

    Raises:
        InputError: If one is missing or of another size.
    """
    own = dict(model.named_parameters())
    wrong = [
        name for name, size in zip(facts.parameters, facts.parameter_sizes, strict=True) if name not in own or own[name].numel() != size
    ]
    if wrong:
        raise InputError(
            f"The model does not fit the record: {', '.join(wrong[:5])} missing or of another size. Give the model that was trained."
        )
    return {name: own[name] for name in facts.parameters}


def _split(values: Tensor | None, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Cut a flat vector into tensors shaped as the parameters, float64."""
    assert values is not None
    parts = values.double().split([parameter.numel() for parameter in parameters.values()])
    return {name: part.view(parameter.shape) for (name, parameter), part in zip(parameters.items(), parts, strict=True)}


def _state_of(snapshot: Snapshot, facts: RunFacts, model: nn.Module) -> State:
    """Put the recorded weights and buffers of a snapshot into the form of `weights_of`."""
    parameters = trained_parameters(facts, model)
    state: State = {name: part.to(parameters[name]) for name, part in _split(snapshot.audit_weights, parameters).items()}
    if snapshot.audit_buffers is not None:
        buffers = {name: value for name, value in model.named_buffers() if value.is_floating_point()}
        if sum(value.numel() for value in buffers.values()) != snapshot.audit_buffers.numel():
            raise InputError("The model's buffers do not fit the record. Give the model that was trained.")
        parts = snapshot.audit_buffers.split([value.numel() for value in buffers.values()])
        state |= {name: part.view(value.shape).to(value) for (name, value), part in zip(buffers.items(), parts, strict=True)}
    return state
