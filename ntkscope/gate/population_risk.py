"""How fast a step lowers the population risk, from the gradients of the training batch alone (theory.md, section 6).

With per-example gradients g_a of a batch of b, and the optimizer's diagonal M⁰, training by dw/dτ = −M⁰ μ lowers the training loss of
the batch by Σ_k M⁰_k μ_k² per unit of optimizer time. What it does to examples that were not drawn is ‖E g‖²_{M⁰}, of which

    (1/(b(b−1))) Σ_{a≠a'} g_aᵀ M⁰ g_a' = Σ_k M⁰_k (μ_k² − σ_k²/(b−1))

is an estimate: an example's gradient is never multiplied with itself. It has no bias where w (and M⁰) do not depend on the batch: a fresh
batch, or the first epoch. In later epochs w has been fitted to the very examples, and the estimate is optimistic; how far is what
`correlation_with_heldout` is for. Optimizer time: `theory.md` section 2; rates are in loss per unit of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # its subpackages load when first used
import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._checks import InputError, InputTypeError, check_finite, check_number
from ntkscope._display import Displayed
from ntkscope.gate.variance import Gradients, check_same, named_gradients
from ntkscope.kernel.moments import GradientMoments
from ntkscope.kernel.precond import Precond

FEWEST_INTERVALS = 4
FEWEST_RESAMPLES = 0.5  # of those asked for, that have a correlation


@dataclass(frozen=True)
class RiskRate(Displayed):
    """Decrease per unit of optimizer time, over the entries of one parameter or all of them.

    Attributes:
        rate: Of the population risk: Σ M⁰ (mean² − its variance). Negative where noise outweighs signal.
        training_rate: Of the training loss: Σ M⁰ mean².
        best_rate: Of the population risk, as estimated, under the best diagonal gate: Σ M⁰ max(mean² − its variance, 0). The gate is
            chosen by the numbers that it is judged by, so that this one is optimistic even on fresh data.
        share_kept: Share of entries that gate keeps: mean² > its variance; equality is dropped.
        num_entries: Entries.
    """

    rate: float
    training_rate: float
    best_rate: float
    share_kept: float
    num_entries: int


@dataclass(frozen=True)
class PopulationRisk(Displayed):
    """Rates of a model.

    Attributes:
        total: Over all parameters.
        by_parameter: By parameter name; they add up to the total.
    """

    total: RiskRate
    by_parameter: dict[str, RiskRate]


def population_risk(moments: GradientMoments, precond: Precond | None = None) -> PopulationRisk:
    """Estimate the first-order decrease of the population risk per unit of optimizer time: the U-statistic.

    Unbiased on data that w does not depend on; in later epochs optimistic (see the module).

    Args:
        moments: Of a batch of b >= 2 examples drawn independently.
        precond: Diagonal M⁰ by parameter name: a nonnegative tensor shaped as the parameter, or one number. Identity if not given.

    Returns:
        Rates, per parameter and in all.

    Raises:
        InputError: If `precond` lacks a parameter, or does not fit it, or a mean is not finite.
        InputTypeError: If `precond` is no mapping.

    Example:
        >>> moments = GradientMoments({"w": torch.tensor([2.0, 0.5])}, {"w": torch.tensor([1.0, 1.0])}, num_examples=2)
        >>> population_risk(moments).total
        RiskRate(rate=2.25, training_rate=4.25, best_rate=3, share_kept=50.0 %, num_entries=2)

    Source:
        theory.md section 6.
    """
    return _rates(moments.mean, moments.variance_of_mean(), precond)


def streaming_population_risk(
    mean: Gradients, variance: Gradients, precond: Precond | None = None, *, beta1: float = 0.9, step: int | None = None
) -> PopulationRisk:
    """Estimate the same from the running averages of an optimizer: Σ M⁰ (m̂² − α_U Var ḡ), α_U = (1−β₁)/(1+β₁).

    Var m̂ is α_U of the batch mean's variance where batches are drawn independently and the gradient does not drift over 1/(1−β₁) steps.

    Args:
        mean: m̂ by parameter name.
        variance: Variance of the batch-mean gradient, by any backend of `gate.variance`: streaming it is ŝ (1+β₁)/2, not ŝ.
        precond: As for `population_risk`.
        beta1: β₁ of the mean, in [0, 1).
        step: t, gradients that m̂ averages; not given, many. Early Var m̂ is larger by (1+β₁ᵗ)/(1−β₁ᵗ).

    Returns:
        Rates, per parameter and in all.

    Raises:
        InputError: If names or shapes differ, a number is out of range, or a value is not finite.
        InputTypeError: If an argument is no mapping.

    Source:
        theory.md section 6.
    """
    check_number("beta1", beta1, low=0.0, high=1.0, open_high=True)
    share = (1 - beta1) / (1 + beta1)
    if step is not None:
        check_number("step", step, low=1)
        share *= (1 + beta1**step) / (1 - beta1**step)
    means, variances = named_gradients(mean), named_gradients(variance)
    check_same(variances, means, "`mean`", label="`variance`")
    return _rates(means, {name: share * value for name, value in variances.items()}, precond)


def _rates(mean: Gradients, noise: Gradients, precond: Precond | None) -> PopulationRisk:
    """Add up M (mean² − noise), the variance of `mean` being `noise`."""
    if precond is not None and not isinstance(precond, Mapping):
        raise InputTypeError(f"`precond` must be a dict of parameter names to tensors or numbers, got {type(precond).__name__}.")
    found = {}
    for name, value in mean.items():
        weight = torch.ones((), dtype=torch.float64) if precond is None else _weight(precond, name, value)
        squared, own = value.double().square(), noise[name].double()
        check_finite(f"Moments in `{name}`", squared + own, "The run has diverged: use an earlier snapshot.")
        excess = squared - own
        rates = [float((weight.to(part.device) * part).sum()) for part in (excess, squared, excess.clamp(min=0.0))]
        kept = float((excess > 0).double().mean()) if value.numel() else 0.0
        found[name] = RiskRate(*rates, share_kept=kept, num_entries=value.numel())
    num = sum(part.num_entries for part in found.values())
    total = RiskRate(
        rate=sum(part.rate for part in found.values()),
        training_rate=sum(part.training_rate for part in found.values()),
        best_rate=sum(part.best_rate for part in found.values()),
        share_kept=sum(part.share_kept * part.num_entries for part in found.values()) / max(1, num),
        num_entries=num,
    )
    return PopulationRisk(total, found)


def _weight(precond: Precond, name: str, mean: Tensor) -> Float[Tensor, "..."]:
    """Check and cut out M⁰ of one parameter."""
    if name not in precond:
        raise InputError(f"`precond` must name every parameter of the moments, missing: {name}.")
    try:
        weight = torch.as_tensor(precond[name], dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(f"`precond[{name!r}]` must be a tensor or a number, got {type(precond[name]).__name__}.") from error
    if weight.shape not in (mean.shape, torch.Size([])):
        raise InputError(f"`precond[{name!r}]` must be one number or have the shape {tuple(mean.shape)}, got {tuple(weight.shape)}.")
    check_finite(f"`precond[{name!r}]`", weight, "Check the optimizer's state.")
    if bool((weight < 0).any()):
        raise InputError(f"`precond[{name!r}]` must be nonnegative, got {float(weight.min()):.3g}: a step would climb along these entries.")
    return weight


@dataclass(frozen=True)
class Correlation(Displayed):
    """A correlation and its 95 % interval.

    Attributes:
        value: In [-1, 1].
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class HeldoutCorrelation(Displayed):
    """How predicted decreases of population risk go with measured decreases of a held-out loss.

    Attributes:
        predicted: Decrease of every interval between snapshots: trapezoid of the rate over optimizer time.
        measured: Decrease of the held-out loss.
        pearson: Of the two; None with the reason.
        spearman: Of their ranks; None with the reason.
        block: Intervals that a resample keeps together.
        reason: Why there is no correlation; empty if there is.
    """

    predicted: Float[Tensor, " intervals"]
    measured: Float[Tensor, " intervals"]
    pearson: Correlation | None
    spearman: Correlation | None
    block: int
    reason: str


def correlation_with_heldout(
    rates: Sequence[float | int] | Tensor,
    losses: Sequence[float | int] | Tensor,
    times: Sequence[float | int] | Tensor,
    *,
    block: int | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> HeldoutCorrelation:
    """Correlate the predicted decrease of the population risk between snapshots with the measured one on held-out data.

    Intervals are from a moving-block bootstrap, percentiles 2.5 and 97.5: successive intervals of a run are dependent, so that Fisher's
    interval, which takes them as independent, is too narrow. With few blocks the percentiles are rough, and too narrow themselves.

    Args:
        rates: Rate at every snapshot [loss per unit of optimizer time], `PopulationRisk.total.rate`.
        losses: Held-out loss there.
        times: Optimizer time τ there, increasing.
        block: Intervals kept together in a resample, at most half of them; the cube root of their number, and at least 2, if not given.
        num_resamples: Resamples, `>= 100`.
        seed: Of the resampling.

    Returns:
        The correlations; None with the reason where there are fewer than four intervals, or a side is constant.

    Raises:
        InputError: If lengths differ, times do not increase, a value is not finite, or an option is out of range.
        InputTypeError: If a series is not numbers.

    Source:
        Künsch 1989 (moving blocks; the block length n^(1/3) is his rate). The rest is ours.
    """
    check_number("num_resamples", num_resamples, low=100)
    series = [_series(name, values) for name, values in (("rates", rates), ("losses", losses), ("times", times))]
    rate, loss, time = series
    if not len(rate) == len(loss) == len(time):
        raise InputError(f"`rates`, `losses` and `times` must be equally long, got {len(rate)}, {len(loss)} and {len(time)}.")
    width = np.diff(time)
    if bool((width <= 0).any()):
        raise InputError("`times` must increase from snapshot to snapshot. Give optimizer time, in the order of training.")
    predicted, measured = 0.5 * width * (rate[1:] + rate[:-1]), -np.diff(loss)
    num = len(predicted)
    if block is not None:
        check_number("block", block, low=1, high=max(1, num // 2))
    length = min(max(2, round(num ** (1 / 3))), max(1, num // 2)) if block is None else int(block)
    reason = _why_not(predicted, measured)
    pearson = spearman = None
    if not reason:
        generator = np.random.default_rng(seed)
        starts = generator.integers(0, num - length + 1, size=(num_resamples, -(-num // length)))
        index = (starts[:, :, None] + np.arange(length)).reshape(num_resamples, -1)[:, :num]
        pearson, spearman = (_bootstrap(statistic, predicted, measured, index) for statistic in (_pearson, _spearman))
        if pearson is None or spearman is None:
            reason, pearson, spearman = "most resamples are constant: the correlation rests on one or two intervals", None, None
    return HeldoutCorrelation(torch.from_numpy(predicted), torch.from_numpy(measured), pearson, spearman, length, reason)


def _series(name: str, values: object) -> np.ndarray:
    """Check a series of numbers."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputTypeError(f"`{name}` must be numbers, got {type(values).__name__}.") from error
    if array.ndim != 1 or not len(array):
        raise InputError(f"`{name}` must be a series with one number per snapshot, got shape {array.shape}.")
    check_finite(f"`{name}`", torch.from_numpy(array), "The run has diverged: leave these snapshots out.")
    return array


def _why_not(predicted: np.ndarray, measured: np.ndarray) -> str:
    """Say why there is no correlation; nothing if there is."""
    if len(predicted) < FEWEST_INTERVALS:
        return f"{len(predicted)} intervals between snapshots; a correlation needs at least {FEWEST_INTERVALS}"
    constant = [name for name, values in (("predicted", predicted), ("measured", measured)) if np.ptp(values) == 0]
    return f"the {' and the '.join(constant)} decrease is the same in all intervals" if constant else ""


def _bootstrap(
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray], predicted: np.ndarray, measured: np.ndarray, index: np.ndarray
) -> Correlation | None:
    """Resample a correlation; None where most resamples are constant, and have none."""
    first, second = predicted[index], measured[index]
    varied = (np.ptp(first, axis=1) > 0) & (np.ptp(second, axis=1) > 0)
    if varied.mean() < FEWEST_RESAMPLES:
        return None
    low, high = np.quantile(statistic(first[varied], second[varied]), (0.025, 0.975))
    value = float(statistic(predicted[None], measured[None])[0])
    return Correlation(value, min(float(low), value), max(float(high), value))


def _pearson(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Compute Pearson's correlation along the last axis, on which neither side is constant."""
    a, b = (values - values.mean(axis=-1, keepdims=True) for values in (first, second))
    a, b = (values / np.abs(values).max(axis=-1, keepdims=True) for values in (a, b))  # squares of tiny decreases would vanish
    return np.clip((a * b).sum(axis=-1) / np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1)), -1.0, 1.0)


def _spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Compute Spearman's correlation along the last axis, ties at their mean rank."""
    return _pearson(scipy.stats.rankdata(first, axis=-1), scipy.stats.rankdata(second, axis=-1))
