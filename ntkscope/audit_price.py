"""What an audit of the gate costs, before it is run: memory from the shapes, seconds from the speed of one product."""

import time
from dataclasses import dataclass

import torch

from ntkscope._checks import InputError, format_bytes
from ntkscope._display import Displayed
from ntkscope.auditing import AuditedModel, trained_parameters
from ntkscope.gate.audit_options import AuditOptions
from ntkscope.kernel.columns import jacobian_bytes
from ntkscope.kernel.coverage import probe_routes
from ntkscope.record.facts import RunFacts

SAMPLE_COLUMNS = 512
DECOMPOSITION = 20  # multiply-adds of products that take as long as a singular value decomposition, over N³ (measured at N = 1000)


@dataclass(frozen=True)
class AuditPrice(Displayed):
    """The price of one audit, beside that of the analysis.

    Attributes:
        num_steps: Audited steps.
        num_permutations: Of the null.
        multiply_adds: In all.
        peak_bytes: Estimate of what is held at once.
        seconds: Estimate, from the speed of a product of the same shapes on this machine.
    """

    num_steps: int
    num_permutations: int
    multiply_adds: float
    peak_bytes: int
    seconds: float

    def describe(self) -> str:
        """Describe the price.

        Returns:
            One sentence.
        """
        return (
            f"Auditing the gate: {self.num_steps} steps, {self.num_permutations} permutations, about {format_bytes(self.peak_bytes)} and "
            f"{max(1, round(self.seconds)):,} s beside the analysis."
        )


def price_of(facts: RunFacts, audited: AuditedModel, num_steps: int, options: AuditOptions) -> AuditPrice:
    """Price an audit.

    Args:
        facts: Of the run.
        audited: The model.
        num_steps: Steps that will be audited.
        options: The user's.

    Returns:
        The price.

    Raises:
        InputError: If the model is another one.
    """
    names = list(trained_parameters(facts, audited.model))
    _, coverage = probe_routes(audited.model, audited.inputs, params=names, forward_fn=audited.forward_fn)
    num_outputs = facts.num_examples * facts.num_classes
    width = facts.num_examples if facts.outputs == "trace" else num_outputs
    per_parameter = num_outputs * (width + options.num_permutations + facts.num_examples + facts.num_classes)
    multiply_adds = float(num_steps) * (per_parameter * facts.num_params + DECOMPOSITION * width**3)
    held = jacobian_bytes(coverage, facts.num_examples) + 16 * (1 + options.num_permutations) * max(facts.parameter_sizes)
    return AuditPrice(
        num_steps=num_steps,
        num_permutations=options.num_permutations,
        multiply_adds=multiply_adds,
        peak_bytes=held + 8 * (num_steps + 6) * width**2,
        seconds=multiply_adds * _seconds_per_operation(width),
    )


def check_price(price: AuditPrice, max_memory: int | None) -> None:
    """Refuse an audit that needs too much.

    Args:
        price: From `price_of`.
        max_memory: Bytes; no limit if not given.

    Raises:
        InputError: If it needs more.
    """
    if max_memory is not None and price.peak_bytes > max_memory:
        raise InputError(
            f"The audit of the gate needs about {format_bytes(price.peak_bytes)}, more than the {format_bytes(max_memory)} allowed. Raise "
            "max_memory (--max-memory), ask for fewer permutations (AuditOptions), or leave the audit out (audit=False, --no-audit)."
        )


def _seconds_per_operation(width: int) -> float:
    """Time a product as the audit computes them, in float64; the second run counts."""
    left, right = torch.ones(width, width, dtype=torch.float64), torch.ones(width, SAMPLE_COLUMNS, dtype=torch.float64)
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        torch.mm(left, right)
        seconds = time.perf_counter() - start
    return seconds / (width * width * SAMPLE_COLUMNS)
