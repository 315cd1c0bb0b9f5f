"""The figures of an audit from its sums, each with its permutation null (theory.md section 7).

Gates are permuted within each parameter tensor, over its live columns. Ranks, thresholds and gate values are permuted along, so that
every null is a sum over tensors.
"""

from collections.abc import Sequence

import scipy  # its subpackages load when first used
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ntkscope.gate.compared import Compared, compare

RESOLVED = 9  # decimals of a share that float64 resolves after a pass over the columns


def ratio(above: float, below: float) -> float:
    """Divide.

    Args:
        above: Numerator.
        below: Denominator.

    Returns:
        The ratio; NaN for 0/0 and whatever else has no denominator.
    """
    return above / below if below > 0 else float("nan")


def parameter_figures(
    shares: Sequence[Float[Tensor, " _"]],
    gates: Sequence[Float[Tensor, " _"]],
    is_open: Sequence[Bool[Tensor, " _"]],
    orders: Sequence[Int[Tensor, "draws _"]],
    *,
    threshold: float,
    no_split: str,
) -> dict[str, Compared]:
    """Compare gates with the signal shares ρ of their parameters (item 1).

    Args:
        shares: ρ of the live parameters, by tensor.
        gates: q.
        is_open: Which gates count as open.
        orders: Permutations of each tensor's live parameters.
        threshold: r / dim R, above which a parameter counts as signal for Cohen's kappa.
        no_split: Why there are no two channels; empty if there are.

    Returns:
        `auroc`, `rank_correlation` and `kappa`.
    """
    rho, opened = torch.cat(list(shares)), torch.cat(list(is_open))
    num, num_open = len(rho), int(opened.sum())
    no_classes = no_split or ("every gate is open" if num_open == num else "every gate is closed" if num_open == 0 else "")

    ranks = _ranks(rho)
    rank_sums = _permuted_sums(ranks, [part.double() for part in is_open], orders)
    auroc = (rank_sums - num_open * (num_open + 1) / 2) / max(1, num_open * (num - num_open))

    gate_ranks = _ranks(torch.cat(list(gates))) - (num + 1) / 2
    centered = ranks - (num + 1) / 2
    size = float(centered.square().sum() * gate_ranks.square().sum()) ** 0.5
    sizes = [len(part) for part in gates]
    correlation = _permuted_sums(centered, list(gate_ranks.split(sizes)), orders) / (size if size > 0 else float("nan"))
    no_ranks = no_split or ("all gates, or all signal shares, are equal" if size == 0 else "")

    is_signal = (rho > threshold).double()
    both = _permuted_sums(is_signal, [part.double() for part in is_open], orders)
    share, num_signal = num_open / num, float(is_signal.sum())
    agreement = (num - num_signal - num_open + 2 * both) / num
    expected = share * num_signal / num + (1 - share) * (1 - num_signal / num)
    kappa = (agreement - expected) / (1 - expected) if expected < 1 else torch.full_like(agreement, torch.nan)
    return {
        "auroc": compare(float(auroc[0]), auroc[1:], reason=no_classes),
        "rank_correlation": compare(float(correlation[0]), correlation[1:], reason=no_ranks),
        "kappa": compare(float(kappa[0]), kappa[1:], reason=no_classes),
    }


def motion_figures(ungated: Float[Tensor, " rows"], gated: Float[Tensor, "rows gates"], rank: int, num_modes: int) -> dict[str, Compared]:
    """Compare the motion that the gate removed with the channels (item 2).

    Args:
        ungated: δ⁰ in the channel's coordinates, signal rows first.
        gated: δ, of the gate itself and of permuted ones.
        rank: r.
        num_modes: dim R.

    Returns:
        `precision`, `recall`, `collateral`, `advantage`.
    """
    first = rank * (len(ungated) // num_modes)
    removed = ungated[:, None] - gated
    # What is left by rounding where the gate is open is no motion.
    nothing = removed.square().sum(dim=0) <= (torch.finfo(torch.float64).eps * 1e3) ** 2 * ungated.square().sum()
    removed = torch.where(nothing, 0.0, removed)
    total = removed.square().sum(dim=0)
    signal, reservoir = removed[:first], removed[first:]
    sizes = ungated[:first].square().sum(), ungated[first:].square().sum()
    undefined = torch.full_like(total, torch.nan)
    precision = torch.where(nothing, undefined, reservoir.square().sum(dim=0) / total)
    recall = reservoir.T @ ungated[first:] / sizes[1] if sizes[1] > 0 else undefined
    collateral = signal.T @ ungated[:first] / sizes[0] if sizes[0] > 0 else undefined
    no_split = "the cutoff finds no signal direction" if rank == 0 else "every direction is signal" if rank == num_modes else ""
    no_motion = "the gate removed no motion" if bool(nothing[0]) else ""
    reasons = {"precision": no_split or no_motion, "recall": no_split, "collateral": no_split, "advantage": no_split}
    values = {"precision": precision, "recall": recall, "collateral": collateral, "advantage": recall - collateral}
    return {name: compare(float(value[0]), value[1:], reason=reasons[name]) for name, value in values.items()}


def kernel_figures(kept: Float[Tensor, "2 gates"], whole: Float[Tensor, "2"], no_split: str) -> Compared:
    """Compare how much of the kernel's trace the gate keeps on the two channels (item 4).

    Args:
        kept: Σ_k q_k M⁰_k ‖·‖² on signal and reservoir, of the gate itself and of permuted ones.
        whole: The same with q = 1.
        no_split: Why there are no two channels; empty if there are.

    Returns:
        The gate's selectivity.
    """
    shares = kept / whole[:, None]
    selectivity = shares[0] / shares[1]
    return compare(float(selectivity[0]), selectivity[1:], reason=no_split)


def _ranks(values: Float[Tensor, " entries"]) -> Float[Tensor, " entries"]:
    """Rank, ties by their mean; what differs by rounding only is tied (weights of one unit into a two-class softmax)."""
    return torch.from_numpy(scipy.stats.rankdata(values.round(decimals=RESOLVED).numpy())).double()


def _permuted_sums(
    weights: Float[Tensor, " all"], parts: Sequence[Float[Tensor, " _"]], orders: Sequence[Int[Tensor, "draws _"]]
) -> Float[Tensor, " gates"]:
    """Compute Σ_k weight_k part_k, as it is and with every tensor's part permuted."""
    total = torch.zeros(1 + len(orders[0]), dtype=torch.float64)
    for own, part, order in zip(weights.split([len(part) for part in parts]), parts, orders, strict=True):
        total[0] += own @ part
        total[1:] += part[order] @ own
    return total
