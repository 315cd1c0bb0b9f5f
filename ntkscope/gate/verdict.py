"""From audited steps to one sentence: would the gate help, harm, or is there no evidence for either?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import scipy  # its subpackages load when first used
from jaxtyping import Float
from torch import Tensor

from ntkscope._display import Displayed
from ntkscope._types import GateKind
from ntkscope.gate.audit_results import FIGURES, LAYER_FIGURES, StepAudit
from ntkscope.gate.compared import Compared, mean_over
from ntkscope.gate.population_risk import HeldoutCorrelation

LEVEL = 0.05  # of p
SMALLEST_ADVANTAGE = 0.02  # of recall over collateral: below it a difference does not matter, however sure
DECAY_WINS = 0.5  # of the squared step
SMALLEST_LAYER = 20  # live parameters: of fewer, permutations say little

VerdictKind = Literal["helps", "harms", "no evidence"]


@dataclass(frozen=True)
class Verdict(Displayed):
    """What the audit concludes.

    Attributes:
        kind: "helps": the gate removes a larger share of reservoir motion than of signal motion, beyond chance; "harms": the reverse;
            "no evidence" otherwise.
        sentence: With its evidence.
        harmed_layers: Parameter tensors in which it does harm, beyond chance and after correction for their number.
    """

    kind: VerdictKind
    sentence: str
    harmed_layers: tuple[str, ...]


@dataclass(frozen=True)
class RiskCurve(Displayed):
    """Population risk without validation data (theory.md section 6); rates per unit of optimizer time.

    Attributes:
        steps: Audited snapshots.
        times: Optimizer time there.
        rate: Decrease of the population risk by the ungated step: the U-statistic over the probe. After the first epoch the weights
            depend on the probe, and it is too high.
        training_rate: Decrease of the training loss.
        streaming_rate: The first, from the running averages over batches.
        by_parameter: `rate` by parameter tensor.
        heldout_loss: Measured loss on the query set; None without one.
        correlation: Of predicted and measured decrease between audited snapshots; None without a query set.
    """

    steps: list[int]
    times: Float[Tensor, " snapshots"]
    rate: Float[Tensor, " snapshots"]
    training_rate: Float[Tensor, " snapshots"]
    streaming_rate: Float[Tensor, " snapshots"]
    by_parameter: dict[str, Tensor]
    heldout_loss: Float[Tensor, " snapshots"] | None
    correlation: HeldoutCorrelation | None


@dataclass(frozen=True)
class GateAudit(Displayed):
    """The gate's decisions against the spectral cutoff, over a run.

    Attributes:
        kind: Of the gate.
        alpha: α.
        lambda_pop: λ.
        strictness: α/α_U, how many times stricter than the unbiased rule (theory.md section 6).
        is_counterfactual: Whether the run had another gate or none: what gating would have done to its steps.
        variance: "streaming" or "exact".
        steps: The audited steps.
        overall: Figures averaged over them, each with its null.
        layers: The same by parameter tensor.
        verdict: What follows.
        risk: Population risk over the run; None where it was not recorded.
        warnings: What a reader must know.
    """

    kind: GateKind
    alpha: float
    lambda_pop: float
    strictness: float
    is_counterfactual: bool
    variance: str
    steps: list[StepAudit]
    overall: dict[str, Compared]
    layers: dict[str, dict[str, Compared]]
    verdict: Verdict
    risk: RiskCurve | None
    warnings: tuple[str, ...]


def average_figures(steps: Sequence[StepAudit]) -> tuple[dict[str, Compared], dict[str, dict[str, Compared]]]:
    """Average the figures over audited steps.

    Args:
        steps: At least one.

    Returns:
        Overall, and by parameter tensor.
    """
    overall = {name: mean_over([step.figures[name] for step in steps]) for name in FIGURES}
    names = list(dict.fromkeys(name for step in steps for name in step.layers))
    layers = {
        layer: {name: mean_over([step.layers[layer].figures[name] for step in steps if layer in step.layers]) for name in LAYER_FIGURES}
        for layer in names
    }
    return overall, layers


def judge(
    steps: Sequence[StepAudit],
    overall: Mapping[str, Compared],
    layers: Mapping[str, Mapping[str, Compared]],
    *,
    gate: str,
    is_counterfactual: bool,
) -> Verdict:
    """Draw the conclusion.

    Args:
        steps: The audited steps.
        overall: From `average_figures`.
        layers: From `average_figures`.
        gate: The gate in words, for example "the soft gate at α = 1".
        is_counterfactual: Whether it was not the run's own.

    Returns:
        The verdict.
    """
    recall, collateral, advantage = overall["recall"], overall["collateral"], overall["advantage"]
    if advantage.reason:
        return Verdict("no evidence", f"No evidence on {gate}: {advantage.reason}.", ())
    is_sure = advantage.p <= LEVEL and abs(advantage.observed - advantage.mean) >= SMALLEST_ADVANTAGE
    kind: VerdictKind = "no evidence" if not is_sure else "helps" if advantage.z > 0 else "harms"
    verb = "would remove" if is_counterfactual else "removed"
    numbers = (
        f"{gate[0].upper()}{gate[1:]} {verb} {recall.observed:.0%} of reservoir motion at the price of {collateral.observed:.0%} of signal "
        f"motion; permuted gates {recall.mean:.0%} and {collateral.mean:.0%} (z = {advantage.z:.1f}, p = {advantage.p:.2g}, "
        f"{len(steps)} steps)"
    )
    conclusions = {
        "helps": "it spares the signal channel more than chance does",
        "harms": "it hits the signal channel more than chance does",
        "no evidence": "no evidence that it tells the channels apart",
    }
    harmed = _harmed(steps, layers)
    sentence = f"{numbers}: {conclusions[kind]}.{_change(steps)}"
    if harmed:
        sentence += f" It does harm in {', '.join(harmed)}."
    return Verdict(kind, sentence, harmed)


def _harmed(steps: Sequence[StepAudit], layers: Mapping[str, Mapping[str, Compared]]) -> tuple[str, ...]:
    """Name the tensors in which the gate removes more signal than chance does."""
    sizes = {name: layer.num_live for step in steps for name, layer in step.layers.items()}
    known = {
        name: figures["advantage"] for name, figures in layers.items() if not figures["advantage"].reason and sizes[name] >= SMALLEST_LAYER
    }
    if not known:
        return ()
    adjusted = scipy.stats.false_discovery_control([figure.p for figure in known.values()])
    return tuple(
        name
        for (name, figure), p in zip(known.items(), adjusted, strict=True)
        if p <= LEVEL and figure.z < 0 and figure.mean - figure.observed >= SMALLEST_ADVANTAGE
    )


def _change(steps: Sequence[StepAudit]) -> str:
    """Say whether the first and the second half of the steps disagree."""
    if len(steps) < 4:
        return ""
    half = len(steps) // 2
    early, late = (mean_over([step.figures["advantage"] for step in part]) for part in (steps[:half], steps[half:]))
    if early.reason or late.reason or max(early.p, late.p) > LEVEL or early.z * late.z > 0:
        return ""
    words = ("helps", "harms") if early.z > 0 else ("harms", "helps")
    return (
        f" It {words[0]} early (to step {steps[half - 1].step:,}, z = {early.z:.1f}) and {words[1]} later "
        f"(from step {steps[half].step:,}, z = {late.z:.1f})."
    )


def decay_warning(steps: Sequence[StepAudit]) -> str:
    """Warn where weight decay makes up most of the step because the gate is closed.

    Args:
        steps: The audited steps of a gated run.

    Returns:
        A sentence; empty where decay does not win.
    """
    worst = max(steps, key=lambda step: step.decay_share if step.decay_share == step.decay_share else -1.0)
    if not worst.decay_share > DECAY_WINS:
        return ""
    return (
        f"At step {worst.step:,} weight decay makes up {worst.decay_share:.0%} of the squared step while {worst.open_share:.1%} of the "
        "gates are open: the closed gate lets decay win. Gate the decay too (decay='gated'), lower alpha ('unbiased'), or set "
        "weight_decay=0."
    )
