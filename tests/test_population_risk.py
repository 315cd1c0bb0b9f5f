"""Population risk: the U-statistic against its double sum, its bias, the best diagonal gate, and correlations with held-out losses."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

import ntkscope
from ntkscope.gate.population_risk import correlation_with_heldout, population_risk, streaming_population_risk
from ntkscope.gate.step import gate_values
from ntkscope.gate.variance import StreamingMoments
from ntkscope.kernel.moments import GradientMoments


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(gradients):
    means = {name: rows.mean(dim=0) for name, rows in gradients.items()}
    return GradientMoments(means, {name: rows.var(dim=0, correction=0) for name, rows in gradients.items()}, len(gradients["a"]))


def some_gradients(num, seed):
    return {"a": 0.3 + randn(num, 2, 3, seed=seed), "b": randn(num, 4, seed=seed + 1)}


def double_sum(rows, weight):
    """theory.md section 6: the mean of g_aᵀ M g_a' over pairs of different examples."""
    pairs = [float((rows[a] * weight * rows[other]).sum()) for a, other in itertools.permutations(range(len(rows)), 2)]
    return sum(pairs) / len(pairs)


@settings(max_examples=30, deadline=None)
@given(num=st.integers(2, 7), seed=st.integers(0, 2**16), weighted=st.booleans())
def test_rate_is_the_double_sum_over_pairs(num, seed, weighted):
    gradients = some_gradients(num, seed)
    precond = {"a": randn(2, 3, seed=seed + 2).square(), "b": 0.7} if weighted else None
    found = population_risk(moments_of(gradients), precond)
    expected = {name: double_sum(rows, 1.0 if precond is None else precond[name]) for name, rows in gradients.items()}
    for name, value in expected.items():
        assert found.by_parameter[name].rate == pytest.approx(value, rel=1e-9, abs=1e-12)
    assert found.total.rate == pytest.approx(sum(expected.values()), rel=1e-9, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(num=st.integers(2, 7), seed=st.integers(0, 2**16))
def test_all_rates_match_their_definitions(num, seed):
    gradients = some_gradients(num, seed)
    precond = {"a": randn(2, 3, seed=seed + 2).square(), "b": 0.7}
    found = population_risk(moments_of(gradients), precond)
    kept = total = 0
    for name, rows in gradients.items():
        weight = torch.as_tensor(precond[name], dtype=torch.float64)
        excess = rows.mean(dim=0).square() - rows.var(dim=0) / num
        own = found.by_parameter[name]
        assert own.training_rate == pytest.approx(float((weight * rows.mean(dim=0).square()).sum()))
        assert own.best_rate == pytest.approx(float((weight * excess)[excess > 0].sum()))
        assert own.share_kept == pytest.approx(float((excess > 0).double().mean()))
        assert own.num_entries == excess.numel()
        kept, total = kept + int((excess > 0).sum()), total + excess.numel()
    assert found.total.num_entries == total
    assert found.total.share_kept == pytest.approx(kept / total)
    for field in ("rate", "training_rate", "best_rate"):
        assert getattr(found.total, field) == pytest.approx(sum(getattr(part, field) for part in found.by_parameter.values()))


def test_the_estimate_is_unbiased_and_the_training_rate_is_not():
    """Gradients N(μ, 4) in 6 entries, batches of 5: the rate is ‖μ‖² within 4 standard errors; the training rate exceeds it by 6·4/5."""
    mean, num = 0.5 * randn(6, seed=1), 5
    gradients = mean + 2 * randn(4000, num, 6, seed=2)
    found = [population_risk(moments_of({"a": rows})).total for rows in gradients]
    rates, training = torch.tensor([part.rate for part in found]), torch.tensor([part.training_rate for part in found])
    truth = float(mean.square().sum())
    assert abs(float(rates.mean()) - truth) < 4 * float(rates.std()) / math.sqrt(len(rates))
    assert float(rates.std()) / math.sqrt(len(rates)) < 0.1 * 6 * 4 / num  # so that the bias would be seen
    assert abs(float(training.mean()) - truth - 6 * 4 / num) < 4 * float(training.std()) / math.sqrt(len(training))


@settings(max_examples=40, deadline=None)
@given(num=st.integers(2, 8), seed=st.integers(0, 2**16))
def test_the_best_diagonal_choice_is_the_hard_gate_on_exact_variances(num, seed):
    """No subset of entries has a larger rate than {k: μ_k²/σ_k² > 1/(b−1)}, which is the gate with α = 1 on the variance of the mean."""
    rows = 0.4 + randn(num, 6, seed=seed)
    moments = moments_of({"a": rows})
    weight = randn(6, seed=seed + 1).square() + 0.1
    excess = weight * (moments.mean["a"].square() - moments.variance_of_mean()["a"])
    subsets = [torch.tensor(bits, dtype=torch.float64) for bits in itertools.product([0, 1], repeat=6)]
    best = max(subsets, key=lambda subset: float((subset * excess).sum()))
    gate = gate_values(moments.mean["a"], moments.variance_of_mean()["a"], kind="hard", alpha=1.0)
    assert torch.equal(best, gate)
    assert torch.equal(gate.bool(), moments.signal_to_noise()["a"] > 1 / (num - 1))
    found = population_risk(moments, {"a": weight}).total
    assert found.best_rate == pytest.approx(float((gate * excess).sum()))
    assert found.share_kept == pytest.approx(float(gate.mean()))
    assert found.best_rate >= max(found.rate, 0.0)


def test_equality_is_dropped():
    found = population_risk(GradientMoments({"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([1.0, 1.0])}, 2)).total
    assert (found.share_kept, found.rate, found.best_rate) == (0.5, 3.0, 3.0)


# --- Streaming ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3, None])
@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
def test_streaming_takes_off_the_variance_of_the_average(step, beta1):
    mean, variance = {"a": randn(3)}, {"a": randn(3, seed=1).square()}
    num = step or 2000
    weights = np.array([beta1 ** (num - j) for j in range(1, num + 1)])
    share = float((weights**2).sum() / weights.sum() ** 2)  # of one batch mean's variance, from the definition of m̂
    if step is None:
        assert share == pytest.approx((1 - beta1) / (1 + beta1))
    found = streaming_population_risk(mean, variance, {"a": 2.0}, beta1=beta1, step=step).total
    excess = mean["a"].square() - share * variance["a"]
    assert found.rate == pytest.approx(2 * float(excess.sum()))
    assert found.best_rate == pytest.approx(2 * float(excess.clamp(min=0).sum()))
    assert found.training_rate == pytest.approx(2 * float(mean["a"].square().sum()))
    assert found.share_kept == pytest.approx(float((excess > 0).double().mean()))


@pytest.mark.parametrize("steps", [4, 400])
def test_streaming_rate_is_unbiased_on_a_stationary_problem(steps):
    """With the known variance; and, once the transient of the paper's ŝ is over, with the streaming one."""
    mean, sigma, num_entries = 0.2, 1.5, 4000
    tracker = StreamingMoments()
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        tracker.add({"a": mean + sigma * torch.randn(num_entries, generator=generator, dtype=torch.float64)})
    known = {"a": torch.full((num_entries,), sigma**2, dtype=torch.float64)}
    truth, m_hat = num_entries * mean**2, tracker.mean()["a"]
    error = float(m_hat.square().std()) * math.sqrt(num_entries)
    found = streaming_population_risk(tracker.mean(), known, step=steps).total
    assert abs(found.rate - truth) < 4 * error
    assert found.training_rate - truth > 10 * error
    if steps == 400:
        assert abs(streaming_population_risk(tracker.mean(), tracker.variance()).total.rate - truth) < 4 * error
    else:  # early the asymptote takes off too little
        assert streaming_population_risk(tracker.mean(), known).total.rate - truth > 10 * error


# --- Correlation with held-out losses ----------------------------------------------------------------------------------------


def series(num, noise, seed=0):
    times = torch.cumsum(randn(num + 1, seed=seed).abs() + 0.1, dim=0)
    rates = torch.linspace(2.0, 0.5, num + 1, dtype=torch.float64)
    decrease = 0.5 * (rates[1:] + rates[:-1]) * times.diff()
    losses = 5.0 - torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum(decrease + noise * randn(num, seed=seed + 1), dim=0)])
    return rates, losses, times, decrease


def test_correlation_matches_scipy():
    rates, losses, times, decrease = series(30, noise=0.4)
    found = correlation_with_heldout(rates, losses, times)
    assert_close(found.predicted, decrease, 1e-12)
    assert_close(found.measured, -losses.diff(), 1e-12)
    assert found.reason == ""
    assert found.block == 3
    for own, expected in (
        (found.pearson, scipy.stats.pearsonr(decrease, -losses.diff()).statistic),
        (found.spearman, scipy.stats.spearmanr(decrease, -losses.diff()).statistic),
    ):
        assert own.value == pytest.approx(expected)
        assert -1 <= own.low < own.value < own.high <= 1


def test_a_perfect_prediction_correlates_perfectly():
    rates, losses, times, _ = series(8, noise=0.0)
    found = correlation_with_heldout(rates.tolist(), losses.tolist(), times.tolist())
    assert (found.pearson.value, found.spearman.value) == pytest.approx((1.0, 1.0))
    assert found.pearson.low == pytest.approx(1.0)
    assert correlation_with_heldout(rates, -losses, times).pearson.value == pytest.approx(-1.0)


def test_tiny_decreases_correlate_too():
    rates, losses, times, _ = series(8, noise=0.3)
    tiny = correlation_with_heldout(1e-200 * rates, 1e-180 * losses, times)
    assert tiny.pearson.value == pytest.approx(correlation_with_heldout(rates, losses, times).pearson.value)


def test_ranks_with_ties():
    found = correlation_with_heldout([1.0, 1.0, 1.0, 3.0, 5.0, 5.0], [9.0, 8.0, 7.0, 5.0, 2.0, 2.0], [0, 1, 2, 3, 4, 5])
    assert found.predicted.tolist() == [1.0, 1.0, 2.0, 4.0, 5.0]
    assert found.spearman.value == pytest.approx(scipy.stats.spearmanr([1, 1, 2, 4, 5], [1, 1, 2, 3, 0]).statistic)


def test_interval_is_a_bootstrap_of_blocks_of_successive_intervals():
    """The same resampling, written out; with blocks of one it is the ordinary bootstrap."""
    rates, losses, times, decrease = series(7, noise=0.5)
    measured = -losses.diff()
    for block in (1, 3):
        generator = np.random.default_rng(4)
        starts = generator.integers(0, 7 - block + 1, size=(150, -(-7 // block)))
        values = []
        for row in starts:
            index = [start + k for start in row for k in range(block)][:7]
            values.append(np.corrcoef(decrease[index], measured[index])[0, 1])
        found = correlation_with_heldout(rates, losses, times, block=block, num_resamples=150, seed=4)
        assert (found.pearson.low, found.pearson.high) == pytest.approx(tuple(np.nanquantile(values, (0.025, 0.975))))
        assert found.block == block


def coverage(correlation, block):
    """Share of 60 runs with autocorrelated decreases (AR(1), 0.8, 60 intervals) whose interval holds the true correlation."""
    hits = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        shocks = generator.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], size=160)
        for t in range(1, 160):
            shocks[t] += 0.8 * shocks[t - 1]
        predicted, measured = shocks[100:].T
        # Rates whose trapezoids are the predicted decreases.
        rates = [0.0]
        for value in predicted:
            rates.append(2 * value - rates[-1])
        found = correlation_with_heldout(
            rates, np.concatenate([[0.0], -np.cumsum(measured)]).tolist(), list(range(61)), block=block, num_resamples=200, seed=seed
        )
        hits += found.pearson.low <= correlation <= found.pearson.high
    return hits / 60


def test_blocks_cover_better_than_single_intervals_where_intervals_depend_on_one_another():
    assert coverage(0.5, block=8) > coverage(0.5, block=1) + 0.05
    assert coverage(0.5, block=8) >= 0.75


@pytest.mark.parametrize(
    ("rates", "losses", "times", "reason"),
    [
        ([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 1.0, 0.5], [0, 1, 2, 3], "3 intervals between snapshots; a correlation needs at least 4"),
        ([1.0], [4.0], [0.0], "0 intervals"),
        ([1.0] * 5, [4.0, 3.0, 1.0, 0.5, 0.0], [0, 1, 2, 3, 4], "the predicted decrease is the same in all intervals"),
        ([1.0, 2.0, 3.0, 4.0, 5.0], [4.0, 3.0, 2.0, 1.0, 0.0], [0, 1, 2, 3, 4], "the measured decrease is the same"),
        ([1.0] * 5, [4.0] * 5, [0, 1, 2, 3, 4], "the predicted and the measured decrease is the same"),
        ([1.0] * 12 + [2.0], [4.0] * 12 + [3.0], list(range(13)), "most resamples are constant"),
    ],
)
def test_no_correlation_has_a_reason(rates, losses, times, reason):
    found = correlation_with_heldout(rates, losses, times, block=1 if len(rates) < 13 and len(rates) > 1 else None)
    assert found.pearson is None
    assert found.spearman is None
    assert reason in found.reason
    assert len(found.predicted) == len(rates) - 1


# --- Bad input ---------------------------------------------------------------------------------------------------------------

M = GradientMoments({"w": torch.ones(2)}, {"w": torch.ones(2)}, 3)
W = {"w": torch.ones(2)}
FIVE = [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: population_risk(M, {}), "must name every parameter of the moments, missing: w"),
        (lambda: population_risk(M, {"w": torch.ones(3)}), r"must be one number or have the shape \(2,\), got \(3,\)"),
        (lambda: population_risk(M, {"w": -1.0}), "must be nonnegative, got -1"),
        (lambda: population_risk(M, {"w": math.inf}), "must be finite"),
        (lambda: population_risk(M, {"w": "one"}), "must be a tensor or a number, got str"),
        (lambda: population_risk(M, 2.0), "`precond` must be a dict"),
        (lambda: population_risk(GradientMoments({"w": torch.tensor([math.nan])}, W, 3)), "Moments in `w` must be finite"),
        (lambda: streaming_population_risk(W, {"v": torch.ones(2)}), "`variance` must name the same parameters as `mean`"),
        (lambda: streaming_population_risk(W, W, beta1=1.0), "`beta1` must lie in"),
        (lambda: streaming_population_risk(W, W, step=0), "`step` must lie in"),
        (lambda: streaming_population_risk([1.0], W), "mapping of parameter names"),
        (lambda: correlation_with_heldout(FIVE, FIVE[:4], FIVE), "must be equally long, got 5, 4 and 5"),
        (lambda: correlation_with_heldout(FIVE, FIVE, FIVE[::-1]), "`times` must increase"),
        (lambda: correlation_with_heldout(FIVE, FIVE, [1, 2, 2, 3, 4]), "`times` must increase"),
        (lambda: correlation_with_heldout([1.0, math.nan, 3.0, 4.0, 5.0], FIVE, FIVE), "`rates` must be finite"),
        (lambda: correlation_with_heldout([FIVE], FIVE, FIVE), r"`rates` must be a series .* got shape \(1, 5\)"),
        (lambda: correlation_with_heldout([], [], []), r"`rates` must be a series .* got shape \(0,\)"),
        (lambda: correlation_with_heldout("five", FIVE, FIVE), "`rates` must be numbers, got str"),
        (lambda: correlation_with_heldout(FIVE, FIVE, FIVE, block=3), r"`block` must lie in \[1, 2\]"),
        (lambda: correlation_with_heldout(FIVE, FIVE, FIVE, num_resamples=10), "`num_resamples` must lie in"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ntkscope._checks.UserError, match=message):
        call()
