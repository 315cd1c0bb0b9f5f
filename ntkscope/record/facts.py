"""What does not change along a run, and the schema under which it is kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ntkscope._checks import InputError
from ntkscope._display import Displayed
from ntkscope.record.fields import RESCUE, check_fields

SCHEMA = "ntkscope.trace/3"
OLD_SCHEMAS = ("ntkscope.trace/1", "ntkscope.trace/2")
# What came with schemas 2 and 3, and what an older record means by its absence.
NEW_FACTS: dict[str, Any] = {
    **{"outputs": "full", "training_size": None, "steps_per_epoch": None, "notes": [], "kinked": []},
    **{"beta1": 0.9, "alpha": None, "lambda_pop": None},
}
KERNEL_FORMS = ("full", "trace")


@dataclass(frozen=True)
class RunFacts(Displayed):
    """What does not change along a run.

    Attributes:
        num_examples: n of the probe.
        num_classes: C.
        num_params: p, parameters that the optimizer trains.
        num_query: q, 0 without a query set.
        loss: Name of the loss.
        optimizer: Class and settings, for people.
        precond: Kind of M: "identity", "adam", "gate" or "custom".
        stability_edge: θ of theory.md section 2: training is stable while lr * λ_max < θ; None if unknown.
        momentum_lag: Steps by which momentum makes the flow lag, β/(1 − β).
        parameters: Names of the trained parameter tensors.
        parameter_sizes: Their numbers of entries.
        gate: Kind of the gate, None without.
        probe_hash: SHA-256 of probe inputs and targets.
        train_only: Kinds of modules that act differently in training (Dropout, BatchNorm); the probe is followed in evaluation mode.
        stopped: Why recording ended early; empty if it did not.
        outputs: Form of the kernels: "full", or "trace" for K_tr / C, one entry per pair of examples.
        training_size: Examples in the whole training set, where the probe is a random subset of it.
        steps_per_epoch: Optimizer steps that pass over the training set once.
        notes: Sentences that a reader must know, for example that the time allowed for recording was too short for the tolerance.
        beta1: Decay β₁ of the mean gradient that gates look at, of the first group; 0.9 where the optimizer keeps none.
        alpha: α of the first group's gate, a number; None without a gate.
        lambda_pop: λ of the first group's gate; None without a gate.
        kinked: Operations with kinks (relu, max_pool2d) in the model's forward pass: kernels jump where a value crosses one.
    """

    num_examples: int
    num_classes: int
    num_params: int
    num_query: int
    loss: str
    optimizer: str
    precond: str
    stability_edge: float | None
    momentum_lag: float
    parameters: list[str]
    parameter_sizes: list[int]
    gate: str | None
    probe_hash: str
    train_only: list[str]
    stopped: str = ""
    outputs: str = "full"
    training_size: int | None = None
    steps_per_epoch: int | None = None
    notes: list[str] = field(default_factory=list)
    kinked: list[str] = field(default_factory=list)
    beta1: float = 0.9
    alpha: float | None = None
    lambda_pop: float | None = None


def stop_early(facts: RunFacts, reason: str) -> RunFacts:
    """Note why recording ended.

    Args:
        facts: The facts so far.
        reason: One sentence.

    Returns:
        New facts.
    """
    return replace(facts, stopped=reason)


def check_schema(schema: object, source: str) -> None:
    """Check that a schema is ours and known.

    Args:
        schema: What a record says of itself.
        source: Where it was found, for messages.

    Raises:
        InputError: If it is not.
    """
    if schema not in (SCHEMA, *OLD_SCHEMAS):
        raise InputError(
            f"{source} has schema {schema!r}; this version reads {SCHEMA!r} and {', '.join(map(repr, OLD_SCHEMAS))}. "
            "If it was written by a newer ntkscope, update this one; else it is no trace."
        )


def facts_from(values: Mapping[str, Any], source: str, schema: str) -> RunFacts:
    """Rebuild facts; what older schemas did not know takes its default.

    Args:
        values: By field name.
        source: Where they came from, for messages.
        schema: Under which they were written.

    Returns:
        The facts.

    Raises:
        InputError: If something is missing, unknown or of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{source} is damaged: its facts are {type(values).__name__}, not a table. {RESCUE}")
    if schema in OLD_SCHEMAS:
        values = NEW_FACTS | dict(values)
    check_fields(RunFacts, values, source)
    if values["outputs"] not in KERNEL_FORMS:
        raise InputError(f"{source} is damaged: `outputs` must be one of {KERNEL_FORMS}, got {values['outputs']!r:.60}. {RESCUE}")
    return RunFacts(**dict(values))
