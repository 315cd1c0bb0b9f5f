"""Time at the scale of the gradients that the optimizer received: for clipped runs, and losses recorded at another scale."""

import torch
from torch import Tensor

from ntkscope._checks import InputError
from ntkscope.record.retiming import Retiming
from ntkscope.record.trace import Trace


def rescaled(trace: Trace) -> Trace:
    """Multiply the time of every interval by the measured factor between received gradients and ∇Φ.

    The factor of an interval is the mean of those audited in it and just after it, that is at both of its ends; of the whole run where no
    step of it was audited, or where noise makes it negative. Learning rates are multiplied with it, weight decay is divided by it: a
    clipped gradient leaves decay as it is.

    Args:
        trace: With audits.

    Returns:
        A view: snapshots are those of `trace`, read when asked for, and kernels are shared.

    Raises:
        InputError: If no step was audited, or gradients went against those of the loss on the whole.

    Source:
        theory.md section 2, "Clipping and loss scaling".
    """
    audits = trace.gradient_audits()
    rows = [part for part in audits if part is not None]
    overall = _factor(torch.cat(rows)) if rows else None
    if overall is None:
        raise InputError(
            f"Time cannot be rescaled: {trace.source} holds no audit of gradients, or they point away from the loss's. "
            "Record the run again with this version, and check that `loss` is the loss that is trained."
        )
    own = [None if part is None else _factor(part) for part in audits]
    times = Trace(trace.facts, trace.probe, trace.source, trace.entries).times
    retimed = {}
    now = times[0] if times else 0.0
    for position, (step, time) in enumerate(zip(trace.steps, times, strict=True)):
        # The first snapshot begins no interval, but its weight decay is that of the first.
        ends = [own[k] for k in ((position, position + 1) if position else (1,)) if k < len(own)]
        known = [factor for factor in ends if factor is not None]
        factor = sum(known) / len(known) if known else overall
        if position:
            now += factor * (time - times[position - 1])
        retimed[step] = Retiming(now - factor * time, factor)
    return Trace(trace.facts, trace.probe, trace.source, trace.entries, retimed)


def _factor(rows: Tensor) -> float | None:
    """Compute Σ⟨p.grad, ∇Φ⟩ / Σ‖∇Φ‖²; None where it is not positive."""
    product, square = float(rows[:, 0].sum()), float(rows[:, 1].sum())
    return product / square if square > 0 and product > 0 else None
