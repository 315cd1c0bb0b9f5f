"""What the gate of an optimizer let through over its steps: counted on the device, read when asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._display import Displayed

# Below this mean gate, motion that is mostly decay is blamed on the gate.
NEARLY_CLOSED = 0.1

MOSTLY_DECAY = (
    "Weight decay makes up {share:.0%} of the squared motion of {where}, because the gate is nearly closed (mean gate {gate:.3f}): "
    "the weights shrink and learn nothing. Use decay='gated', a smaller alpha ('unbiased') or weight_decay=0."
)


@dataclass(frozen=True)
class GateShare(Displayed):
    """What the gate of one parameter let through.

    Attributes:
        num_elements: Its size; of a sharded parameter, this rank's part.
        num_steps: Steps that were counted.
        open_share: Share of open gates (q > ½), over elements and steps; NaN for an empty parameter.
        mean_gate: Mean q; NaN for an empty parameter.
        decay_share: Squared motion by weight decay over the squared motion of the whole update; more than 1 where the gradient opposes
            decay, 0 where nothing moved.
    """

    num_elements: int
    num_steps: int
    open_share: float
    mean_gate: float
    decay_share: float


@dataclass(frozen=True)
class OptimizerGateStatistics(Displayed):
    """What the gates of an optimizer let through since the last reset.

    Attributes:
        num_steps: Steps that were counted; the most over parameters.
        open_share: Share of open gates (q > ½), over elements and steps; NaN before the first step.
        mean_gate: Mean q; NaN before the first step.
        decay_share: As for `GateShare`.
        by_parameter: Each counted parameter's, by number of its group and its place in it.
        warnings: Sentences about motion that is mostly decay behind a closed gate.
    """

    num_steps: int
    open_share: float
    mean_gate: float
    decay_share: float
    by_parameter: dict[tuple[int, int], GateShare]
    warnings: tuple[str, ...]


def new_counts(device: torch.device) -> Float[Tensor, " counts"]:
    """Make counts of no step.

    Args:
        device: Of the parameter.

    Returns:
        Zeros: open gates, sum of q, squared motion by decay, squared motion, steps.
    """
    return torch.zeros(5, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)


def count_step(
    counts: Float[Tensor, " counts"],
    gate: Float[Tensor, "*shape"],
    before: Float[Tensor, "*shape"],
    after: Float[Tensor, "*shape"],
    *,
    strength: float | Tensor,
    is_gated: bool,
) -> None:
    """Add one step of one parameter, without reading anything back from the device.

    Args:
        counts: From `new_counts`, updated.
        gate: q that was applied.
        before: Weights before the step.
        after: Weights after it.
        strength: η λ_wd.
        is_gated: Whether the gate multiplied the decay.
    """
    start = before.to(gate.dtype)
    shrinkage = strength * (start * gate if is_gated else start)
    moved = after.to(gate.dtype) - start
    sums = [(gate > 0.5).sum(), gate.sum(), shrinkage.square().sum(), moved.square().sum(), torch.ones((), device=gate.device)]
    counts.add_(torch.stack([value.to(counts.dtype) for value in sums]))


def summarize_counts(counts: Mapping[tuple[int, int], Tensor], sizes: Mapping[tuple[int, int], int]) -> OptimizerGateStatistics:
    """Read counts, all at once, and say what they mean.

    Args:
        counts: By number of the group and place in it.
        sizes: Elements, likewise.

    Returns:
        The statistics.
    """
    device = next(iter(counts.values())).device if counts else torch.device("cpu")
    rows = torch.stack([value.to(device) for value in counts.values()]).tolist() if counts else []
    by_parameter = {key: _share_of(row, sizes[key], sizes[key] * row[4]) for key, row in zip(counts, rows, strict=True)}
    total = [sum(column) for column in zip(*rows, strict=True)] or [0.0] * 5
    whole = _share_of(total, sum(sizes[key] for key in counts), sum(sizes[key] * row[4] for key, row in zip(counts, rows, strict=True)))
    found = [("all parameters", whole)] if _is_mostly_decay(whole) else []
    found += [(f"parameter {key[1]} of group {key[0]}", share) for key, share in by_parameter.items() if _is_mostly_decay(share)]
    return OptimizerGateStatistics(
        num_steps=max((share.num_steps for share in by_parameter.values()), default=0),
        open_share=whole.open_share,
        mean_gate=whole.mean_gate,
        decay_share=whole.decay_share,
        by_parameter=by_parameter,
        warnings=tuple(MOSTLY_DECAY.format(share=share.decay_share, where=where, gate=share.mean_gate) for where, share in found),
    )


def _share_of(row: Sequence[float | int], num_elements: int, num_gates: float | int) -> GateShare:
    """Turn counts into shares."""
    opened, total, decayed, moved, steps = row
    per_gate = 1 / num_gates if num_gates else float("nan")
    return GateShare(num_elements, int(steps), opened * per_gate, total * per_gate, decayed / moved if moved else 0.0)


def _is_mostly_decay(share: GateShare) -> bool:
    """Say whether decay is more than half of the squared motion because the gate is nearly closed."""
    return share.decay_share > 0.5 and share.mean_gate < NEARLY_CLOSED
