"""One variance of the batch-mean gradient against another, and whether a streaming one is stale."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._checks import InputError, check_number
from ntkscope._display import Displayed
from ntkscope.gate.step import Alpha, gate_values, resolve_alpha
from ntkscope.gate.variance import Gradients, check_same, named_gradients

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SMALLEST_TENSOR = 100  # gates: of fewer, one or two decide the share that differs
STALE = (
    "In {share:.0%} of the gates ({where}) the streaming variance decides otherwise than the exact one (limit {limit:.0%}). In sum it is "
    "{bias:.3g} times the exact one: {cause}. Lower rho, take center='corrected', or step with a fresh variance: "
    "optimizer.step(variance=...)."
)
DRIFTED = "it is stale, and takes the drift of the gradient for noise"
GROWN = "it is stale, the noise has grown since"
SCATTERED = "it is right in sum but stale or noisy in single entries"


@dataclass(frozen=True)
class VarianceRatio(Displayed):
    """How one variance differs from another, over the entries of one tensor or all of them.

    Attributes:
        num_entries: Entries compared.
        bias: Sum of the streaming over sum of the exact variances; NaN where both are zero.
        quantiles: Of streaming/exact over entries where both are positive, at `QUANTILES`; NaN where there is none.
        spread: Interquartile range of log(streaming/exact) over the same entries; NaN where there is none.
        differing: Share of hard gates that differ.
        open_streaming: Share of gates open under the streaming variance.
        open_exact: Share of gates open under the exact one.
    """

    num_entries: int
    bias: float
    quantiles: tuple[float, ...]
    spread: float
    differing: float
    open_streaming: float
    open_exact: float


@dataclass(frozen=True)
class VarianceComparison(Displayed):
    """A streaming variance against an exact one, and what the difference does to the hard gate m̂² > α ŝ.

    Attributes:
        overall: Over all entries.
        by_parameter: By parameter name.
        alpha: α of ŝ.
        beta1: β₁.
        warnings: What to do where too many gates differ; empty if they do not.
    """

    overall: VarianceRatio
    by_parameter: dict[str, VarianceRatio]
    alpha: float
    beta1: float
    warnings: tuple[str, ...]


def compare_variances(
    streaming: Gradients,
    exact: Gradients,
    mean: Gradients,
    *,
    alpha: Alpha = 1.0,
    beta1: float = 0.9,
    limit: float = 0.1,
) -> VarianceComparison:
    """Compare two variances of the batch-mean gradient, entry by entry and in the gates they decide.

    Args:
        streaming: By parameter name, from `StreamingMoments.variance` or `streaming_variance`.
        exact: From `exact_variance` or `MicrobatchVariance.variance`. Take moments of many more examples than a batch has: with those
            of one batch of 20 alone, 10 to 17 % of the gates differ from the truth by the noise of this side (benchmarks/RESULTS.md).
        mean: m̂, the mean gradient that the gate squares.
        alpha: α as GatedAdamW has it, the multiple of ŝ; a number or "unbiased".
        beta1: β₁: the gate compares m̂² with α ŝ, ŝ = 2/(1+β₁) times the variance of the batch mean.
        limit: Share of differing gates above which there is a warning, overall or in a tensor of 100 entries or more; in [0, 1].

    Returns:
        The comparison.

    Raises:
        InputError: If names or shapes differ, a variance is negative or not finite, or an option is out of range.
        InputTypeError: If an argument is no mapping of names to tensors.
    """
    check_number("beta1", beta1, low=0.0, high=1.0, open_high=True)
    check_number("limit", limit, low=0.0, high=1.0)
    multiple = resolve_alpha(alpha, beta1=beta1, batch_size=None, dataset_size=None)
    found = named_gradients(streaming)
    for name, other in (("exact", exact), ("mean", mean)):
        check_same(named_gradients(other), found, "`streaming`", label=f"`{name}`")
    columns: dict[str, np.ndarray] = {}
    for name in found:
        own = torch.stack([part[name].detach().double().flatten().cpu() for part in (streaming, exact, mean)])
        if not bool(torch.isfinite(own).all()) or bool((own[:2] < 0).any()):
            raise InputError(f"Variances in `{name}` must be finite and nonnegative, means finite. Check the gradients that went in.")
        columns[name] = np.concatenate([own.numpy(), _gates(own, multiple, beta1)])
    by_parameter = {name: _ratio(column) for name, column in columns.items()}
    overall = _ratio(np.concatenate(list(columns.values()), axis=1))
    return VarianceComparison(overall, by_parameter, multiple, beta1, _warnings(overall, by_parameter, limit))


def _gates(columns: Float[Tensor, "3 entries"], alpha: float, beta1: float) -> np.ndarray:
    """Decide the hard gates of both variances."""
    gates = [gate_values(columns[2], variance * (2 / (1 + beta1)), kind="hard", alpha=alpha) for variance in columns[:2]]
    return torch.stack(gates).numpy()


def _ratio(columns: np.ndarray) -> VarianceRatio:
    """Summarize rows: streaming, exact, mean, and the two gates."""
    streaming, exact, _, own, other = columns
    both = (streaming > 0) & (exact > 0)
    logs = np.log(streaming[both]) - np.log(exact[both])
    quantiles = np.quantile(logs, QUANTILES) if len(logs) else np.full(len(QUANTILES), math.nan)
    bias = streaming.sum() / exact.sum() if exact.any() else math.inf if streaming.any() else math.nan
    return VarianceRatio(
        num_entries=len(streaming),
        bias=float(bias),
        quantiles=tuple(float(value) for value in np.exp(quantiles)),
        spread=float(quantiles[3] - quantiles[1]),
        differing=float(np.mean(own != other)),
        open_streaming=float(own.mean()),
        open_exact=float(other.mean()),
    )


def _warnings(overall: VarianceRatio, by_parameter: Mapping[str, VarianceRatio], limit: float) -> tuple[str, ...]:
    """Say where too many gates differ, and what to do."""
    places = [name for name, ratio in by_parameter.items() if ratio.differing > limit and ratio.num_entries >= SMALLEST_TENSOR]
    if overall.differing <= limit and not places:
        return ()
    parts = ", ".join(f"{name} {by_parameter[name].differing:.0%}" for name in places)
    where = f"{parts or 'in small tensors'}; of all {overall.num_entries:,}"
    cause = DRIFTED if overall.bias > 1.25 else GROWN if overall.bias < 0.8 else SCATTERED
    return (STALE.format(share=overall.differing, where=where, limit=limit, bias=overall.bias, cause=cause),)
