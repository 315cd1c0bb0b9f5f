"""What an audit of the gate costs, before it is run: memory from the shapes, seconds from the speed of one product."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ntkscope._checks import InputError, format_bytes
from ntkscope._display import Displayed
from ntkscope._types import ForwardFn
from ntkscope.auditing import AuditedModel, audited_positions, trained_parameters
from ntkscope.gate.audit_options import AuditOptions
from ntkscope.kernel.batch import to_device
from ntkscope.kernel.blocks import DEFAULT_MEMORY
from ntkscope.kernel.columns import jacobian_bytes
from ntkscope.kernel.coverage import probe_routes
from ntkscope.record.facts import RunFacts
from ntkscope.record.probe import hash_of
from ntkscope.record.recorder import Recorder
from ntkscope.record.source import open_source
from ntkscope.record.trace import Trace

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
            f"{max(1.0, self.seconds):,.0f} s beside the analysis."
        )


def price_audit(
    source: str | Path | Trace | Recorder,
    *,
    model: nn.Module | None = None,
    data: tuple[Any, Tensor] | None = None,
    forward_fn: ForwardFn | None = None,
    audit: AuditOptions | None = None,
) -> AuditPrice | None:
    """Say what the audit in `analyze` will take, before it is run.

    Args:
        source: As for `analyze`; recorded.
        model: As for `analyze`.
        data: As for `analyze`.
        forward_fn: As for `analyze`.
        audit: As for `analyze`.

    Returns:
        The price; None where no audit will be run.

    Raises:
        InputError: If the source cannot be read, or the model or the data are others.
    """
    options = AuditOptions() if audit is None else audit
    trace = source.trace if isinstance(source, Recorder) else source if isinstance(source, Trace) else open_source(source)
    audited, _ = audited_model(source, trace, model, data, options, 0, forward_fn=forward_fn)
    return None if audited is None else price_of(trace.facts, audited, len(audited_positions(trace, 0, options.num_steps)), options)


def audited_model(
    source: object,
    trace: Trace,
    model: nn.Module | None,
    data: tuple[Any, Tensor] | None,
    options: AuditOptions | None,
    start: int,
    *,
    forward_fn: ForwardFn | None,
) -> tuple[AuditedModel | None, str]:
    """Find the model and the probe's inputs for an audit, or say why there is none.

    Args:
        source: What is analyzed; a `Recorder` has its model.
        trace: Its record.
        model: As for `analyze`.
        data: As for `analyze`.
        options: How to audit; None for no audit.
        start: Index of the window's first snapshot.
        forward_fn: As for `analyze`.

    Returns:
        The model or None, and the reason.

    Raises:
        InputError: If `data` is not the probe.
    """
    if options is None:
        return None, "no audit was asked for"
    if not audited_positions(trace, start, 1):
        return None, "no step was recorded for an audit: Recorder(audit=True)"
    if isinstance(source, Recorder):
        return AuditedModel(source.model, source.probe.inputs, source.probe.forward_fn), ""
    if model is None:
        return None, "an audit needs the model that was trained: model= (--model SPEC)"
    inputs = trace.probe.get("inputs") if data is None else data[0]
    if inputs is None:
        return None, "an audit needs the probe: data= (--data SPEC)"
    if data is not None and hash_of(*data) != trace.facts.probe_hash:
        raise InputError("`data` is not the probe of this record (inputs or targets differ). Give what the recorder was given.")
    return AuditedModel(model, to_device(inputs, next(model.parameters()).device), forward_fn), ""


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
        max_memory: Bytes; 8 GiB if not given, which only very many permutations reach.

    Raises:
        InputError: If it needs more.
    """
    limit = 4 * DEFAULT_MEMORY if max_memory is None else max_memory
    if price.peak_bytes > limit:
        raise InputError(
            f"The audit of the gate needs about {format_bytes(price.peak_bytes)}, more than the {format_bytes(limit)} allowed. Raise "
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
