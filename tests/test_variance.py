"""The three variances of the batch-mean gradient: each against its definition, and against each other in expectation."""

import math

import numpy as np
import pytest
import torch
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ntkscope
from ntkscope.gate.optimizer import GatedAdamW
from ntkscope.gate.step import gated_adam_step
from ntkscope.gate.variance import (
    MicrobatchVariance,
    StreamingMoments,
    exact_variance,
    microbatch_variance,
    streaming_variance,
)
from ntkscope.gate.variance_ratio import QUANTILES, compare_variances
from ntkscope.kernel.moments import GradientMoments, gradient_moments


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Exact and microbatch ----------------------------------------------------------------------------------------------------


def test_exact_is_the_sample_variance_over_the_number_of_examples():
    gradients = randn(7, 3)
    moments = GradientMoments({"w": gradients.mean(dim=0)}, {"w": gradients.var(dim=0, correction=0)}, 7)
    assert_close(exact_variance(moments)["w"], gradients.var(dim=0) / 7)
    assert_close(exact_variance(moments, batch_size=20)["w"], gradients.var(dim=0) / 20)


@settings(max_examples=30, deadline=None)
@given(num=st.integers(2, 9), seed=st.integers(0, 2**16), offset=st.sampled_from([0.0, 1e6]))
def test_microbatch_matches_its_definition(num, seed, offset):
    gradients = offset + randn(num, 4, seed=seed)
    parts = MicrobatchVariance()
    for gradient in gradients:
        parts.add({"w": gradient})
    mean = gradients.sum(dim=0) / num
    expected = ((gradients - mean) ** 2).sum(dim=0) / (num * (num - 1))
    assert parts.num_parts == num
    assert_close(parts.mean()["w"], mean, 1e-12)
    assert_close(parts.variance()["w"], expected, 1e-7 if offset else 1e-12)
    assert_close(microbatch_variance({"w": gradient} for gradient in gradients)["w"], parts.variance()["w"])


def test_microbatches_of_one_example_are_exact():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs, targets = randn(6, 3), randn(6, 2, seed=1)
    parts = MicrobatchVariance()
    for i in range(6):
        model.zero_grad()
        (0.5 * (model(inputs[i : i + 1]) - targets[i : i + 1]).square().sum()).backward()
        parts.add(model)
    exact = exact_variance(gradient_moments(model, inputs, targets, loss="squared"))
    assert set(exact) == set(parts.variance())
    for name, variance in parts.variance().items():
        assert_close(variance, exact[name], 1e-9)


def test_microbatch_keeps_neither_gradients_nor_their_memory():
    gradient = torch.ones(3)
    parts = MicrobatchVariance()
    parts.add({"w": gradient})
    parts.mean()["w"].fill_(9.0)  # a copy
    gradient.fill_(3.0)
    parts.add({"w": gradient})
    assert parts.mean()["w"].tolist() == [2.0] * 3
    assert parts.variance()["w"].tolist() == [1.0] * 3


# --- Streaming ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", ["paper", "corrected"])
def test_streaming_keeps_the_averages_of_the_gated_step(center):
    tracker = StreamingMoments(beta1=0.8, rho=0.9, center=center)
    weight, m, v, s = (torch.zeros(4, dtype=torch.float64) for _ in range(4))
    for t, gradient in enumerate(randn(6, 4), start=1):
        gated_adam_step(weight, gradient, m, v, s, step=t, lr=0.1, betas=(0.8, 0.99), rho=0.9, center=center)
        tracker.add({"w": gradient})
        samples = t if center == "paper" else t - 1
        s_hat = s / (1 - 0.9**samples) if samples else s
        assert tracker.num_steps == t
        assert_close(tracker.mean()["w"], m / (1 - 0.8**t), 1e-12)
        assert_close(tracker.noise()["w"], s_hat, 1e-12)
        assert_close(tracker.variance()["w"], 0.9 * s_hat, 1e-12)  # (1 + 0.8) / 2


def test_streaming_observes_only():
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    tracker = StreamingMoments()
    for _ in range(3):
        tracker.add(model)
    assert all(torch.equal(parameter.grad, own) for parameter, own in zip(model.parameters(), before, strict=True))
    assert_close(tracker.mean()["weight"], model.weight.grad, 1e-6)
    tracker.mean()["weight"].zero_()
    tracker.noise()["weight"].zero_()
    assert float(tracker.mean()["weight"].abs().min()) > 0
    assert float(tracker.noise()["weight"].abs().min()) > 0


def test_streaming_averages_half_precision_in_float32():
    tracker = StreamingMoments()
    tracker.add({"w": torch.ones(2, dtype=torch.bfloat16)})
    assert tracker.mean()["w"].dtype == torch.float32


def test_streaming_variance_of_the_optimizer_is_that_of_the_tracker():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = GatedAdamW(
        [{"params": [model.weight], "betas": (0.8, 0.99)}, {"params": [model.bias]}], lr=1e-2, rho=0.95
    )  # biases: β₁ = 0.9
    trackers = {"weight": StreamingMoments(beta1=0.8, rho=0.95), "bias": StreamingMoments(beta1=0.9, rho=0.95)}
    for seed in range(5):
        optimizer.zero_grad()
        (model(randn(4, 3, seed=seed)) - randn(4, 2, seed=seed + 50)).square().mean().backward()
        for name, tracker in trackers.items():
            tracker.add({name: dict(model.named_parameters())[name].grad})
        optimizer.step()
    found = streaming_variance(optimizer, model)
    assert set(found) == {"weight", "bias"}
    for name, tracker in trackers.items():
        assert_close(found[name], tracker.variance()[name], 1e-9)
    assert set(streaming_variance(optimizer, {"b": model.bias})) == {"b"}


class StubOptimizer(GatedAdamW):
    """ŝ is 2 everywhere."""

    def variance_of(self, parameter):
        return torch.full_like(parameter, 2.0)


def test_streaming_variance_divides_by_the_groups_own_factor():
    first, second, frozen = (nn.Parameter(torch.zeros(2), requires_grad=flag) for flag in (True, True, False))
    model = nn.ParameterDict({"a": first, "b": second, "c": frozen})
    optimizer = StubOptimizer([{"params": [first], "betas": (0.5, 0.9)}, {"params": [second], "betas": (0.0, 0.9)}])
    found = streaming_variance(optimizer, model)
    assert {name: value.tolist() for name, value in found.items()} == {"a": [1.5, 1.5], "b": [1.0, 1.0]}


# --- The three agree ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", ["paper", "corrected"])
def test_backends_agree_in_expectation_on_a_stationary_problem(center):
    """Gradients N(1, 9) per example, batches of 20: Var ḡ = 0.45. Over 400 entries the means agree within 4 standard errors."""
    num_entries, size, steps, true = 400, 20, 1500, 9 / 20
    tracker, exact, micro = StreamingMoments(center=center), [], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        gradients = 1 + 3 * torch.randn(size, num_entries, generator=generator, dtype=torch.float64)
        tracker.add({"w": gradients.mean(dim=0)})
        if len(exact) < 20:
            moments = GradientMoments({"w": gradients.mean(dim=0)}, {"w": gradients.var(dim=0, correction=0)}, size)
            exact.append(exact_variance(moments)["w"])
            micro.append(microbatch_variance([{"w": part.mean(dim=0)} for part in gradients.chunk(4)])["w"])
    streaming = tracker.variance()["w"]
    for name, values in (("streaming", streaming), ("exact", torch.cat(exact)), ("microbatch", torch.cat(micro))):
        error = float(values.std()) / math.sqrt(len(values))
        assert abs(float(values.mean()) - true) < 4 * error, name
        assert error < 0.01 * true, name
    # Spread of one estimate: 19 degrees of freedom, 3, and about (1+ρ)/(1−ρ) = 199 dependent ones.
    relative = [float(values.std()) / true for values in (torch.cat(exact), torch.cat(micro), streaming)]
    assert relative[0] == pytest.approx(math.sqrt(2 / 19), rel=0.1)
    assert relative[1] == pytest.approx(math.sqrt(2 / 3), rel=0.1)
    assert relative[2] == pytest.approx(math.sqrt(2 / 199), rel=0.25)


def test_streaming_overestimates_where_the_gradient_drifts():
    """A ramp of 0.1 a step lags by β₁/(1−β₁) + 1 = 10 steps: (g − m)² gains 1 on a variance of 0.01."""
    tracker = StreamingMoments()
    generator = torch.Generator().manual_seed(0)
    for t in range(1500):
        tracker.add({"w": 0.1 * t + 0.1 * torch.randn(200, generator=generator, dtype=torch.float64)})
    found, true = tracker.variance()["w"], torch.full((200,), 0.01, dtype=torch.float64)
    assert float(found.mean()) == pytest.approx(0.95 * (1 + 0.01 * 2 / 1.9), rel=0.02)
    compared = compare_variances({"w": found}, {"w": true}, {"w": torch.full_like(true, 0.5)})
    assert compared.overall.bias > 90
    assert (compared.overall.open_streaming, compared.overall.open_exact, compared.overall.differing) == (0.0, 1.0, 1.0)
    (warning,) = compared.warnings
    assert "takes the drift of the gradient for noise" in warning
    assert all(advice in warning for advice in ("Lower rho", "center='corrected'", "step(variance=...)"))


# --- Comparing ---------------------------------------------------------------------------------------------------------------


def dense_gates(mean, variance, alpha, beta1):
    """theory.md section 6, one gate at a time: m̂² > α ŝ."""
    return [float(m) ** 2 > alpha * float(v) * 2 / (1 + beta1) for m, v in zip(mean, variance, strict=True)]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), alpha=st.sampled_from([0.25, 1.0, 2.0]), beta1=st.sampled_from([0.0, 0.5, 0.9]))
def test_comparison_matches_its_definition(seed, alpha, beta1):
    streaming, exact, mean = randn(40, seed=seed).square(), randn(40, seed=seed + 1).square(), 1.5 * randn(40, seed=seed + 2)
    streaming[0] = exact[1] = 0.0
    names = {"a": slice(0, 25), "b": slice(25, 40)}
    parts = [{name: part[where] for name, where in names.items()} for part in (streaming, exact, mean)]
    found = compare_variances(*parts, alpha=alpha, beta1=beta1)
    for ratio, where in ((found.overall, slice(0, 40)), (found.by_parameter["a"], names["a"]), (found.by_parameter["b"], names["b"])):
        own, other = (dense_gates(mean[where], variance[where], alpha, beta1) for variance in (streaming, exact))
        assert ratio.num_entries == len(own)
        assert ratio.bias == pytest.approx(float(streaming[where].sum() / exact[where].sum()))
        assert ratio.open_streaming == pytest.approx(np.mean(own))
        assert ratio.open_exact == pytest.approx(np.mean(other))
        assert ratio.differing == pytest.approx(np.mean([a != b for a, b in zip(own, other, strict=True)]))
        logs = [math.log(a / b) for a, b in zip(streaming[where].tolist(), exact[where].tolist(), strict=True) if a > 0 and b > 0]
        low, high = np.quantile(logs, (0.25, 0.75))
        assert ratio.spread == pytest.approx(high - low)
        assert ratio.quantiles == pytest.approx([math.exp(value) for value in np.quantile(logs, QUANTILES)])


def test_a_gate_of_the_optimizer_is_what_is_compared():
    """With v = ŝ (1+β₁)/2 the threshold is α ŝ, not α v: m̂² = 0.98 exceeds v = 0.95 but not ŝ = 1."""
    s_hat, m_hat = torch.tensor([1.0]), torch.tensor([math.sqrt(0.98)])
    v = {"w": s_hat * 0.95}
    found = compare_variances(v, {"w": s_hat * 0.9}, {"w": m_hat}, beta1=0.9)
    assert (found.overall.open_streaming, found.overall.open_exact) == (0.0, 1.0)


def test_alpha_unbiased_is_resolved():
    one = {"w": torch.ones(3)}
    assert compare_variances(one, one, one, alpha="unbiased", beta1=0.9).alpha == pytest.approx(1 / 19)


def with_differing(num_entries, num_differing):
    exact, mean = torch.ones(num_entries), torch.full((num_entries,), 2.0)
    streaming = exact.clone()
    streaming[:num_differing] = 100.0
    return streaming, exact, mean


@pytest.mark.parametrize(
    ("sizes", "differing", "place"),
    [
        ({"a": 200}, {"a": 20}, None),  # exactly the limit
        ({"a": 200}, {"a": 21}, "a 10%|a 11%"),
        ({"a": 100, "b": 900}, {"a": 11, "b": 0}, "a 11%; of all 1,000"),
        ({"a": 99, "b": 900}, {"a": 99, "b": 0}, None),  # a small tensor, and few of all
        ({"a": 20}, {"a": 3}, "in small tensors; of all 20"),
    ],
)
def test_warning_says_where(sizes, differing, place):
    parts = {name: with_differing(size, differing[name]) for name, size in sizes.items()}
    found = compare_variances(*({name: part[k] for name, part in parts.items()} for k in range(3)))
    assert len(found.warnings) == (place is not None)
    if place is not None:
        assert any(text in found.warnings[0] for text in place.split("|"))


@pytest.mark.parametrize(
    ("factor", "cause"), [(5.0, "drift of the gradient"), (0.1, "the noise has grown since"), (None, "noisy in single entries")]
)
def test_warning_names_the_cause(factor, cause):
    exact, mean = torch.ones(100), torch.full((100,), 1.2 if factor != 0.1 else 0.9)
    streaming = exact * factor if factor else torch.cat([exact[:50] * 1.9, exact[:50] * 0.1])
    (warning,) = compare_variances({"w": streaming}, {"w": exact}, {"w": mean}).warnings
    assert cause in warning


def test_zero_variances_have_no_ratio():
    zero, one = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    nothing = compare_variances(zero, zero, one).overall
    assert math.isnan(nothing.bias)
    assert math.isnan(nothing.spread)
    assert all(math.isnan(value) for value in nothing.quantiles)
    assert math.isinf(compare_variances(one, zero, one).overall.bias)


# --- Bad input ---------------------------------------------------------------------------------------------------------------

W, TWO = {"w": torch.ones(2)}, {"w": torch.ones(2), "b": torch.ones(1)}


def after(accumulator, gradients):
    accumulator.add(W)
    accumulator.add(gradients)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact_variance(GradientMoments(W, W, 3), batch_size=0), "`batch_size` must lie in"),
        (lambda: MicrobatchVariance().variance(), "needs at least two of them, got 0"),
        (lambda: microbatch_variance([W]), "needs at least two of them, got 1"),
        (lambda: after(MicrobatchVariance(), TWO), "same parameters as the first microbatch; they differ in b"),
        (lambda: after(MicrobatchVariance(), {"w": torch.ones(3)}), r"`w` is \(3,\), there it is \(2,\)"),
        (lambda: after(StreamingMoments(), {"v": torch.ones(2)}), "same parameters as the first step; they differ in v, w"),
        (lambda: StreamingMoments().add(nn.Linear(2, 1)), "There is no gradient"),
        (lambda: StreamingMoments().add({"w": torch.ones(2, dtype=torch.long)}), "must be real and dense, got torch.int64"),
        (lambda: StreamingMoments().add({"w": torch.ones(2).to_sparse()}), "must be real and dense"),
        (lambda: StreamingMoments().add([torch.ones(2)]), "a model or a mapping of parameter names to tensors, got list"),
        (lambda: StreamingMoments().add({"w": 1.0}), "mapping of parameter names to tensors"),
        (lambda: StreamingMoments(beta1=1.0), r"`beta1` must lie in \[0, 1\)"),
        (lambda: StreamingMoments(rho=-0.1), r"`rho` must lie in \[0, 1\)"),
        (lambda: StreamingMoments(center="middle"), "`center` must be one of 'paper', 'corrected'"),
        (lambda: streaming_variance(GatedAdamW([nn.Parameter(torch.ones(1))]), nn.Linear(1, 1)), "does not hold bias, weight"),
        (lambda: compare_variances(W, TWO, W), "`exact` must name the same parameters as `streaming`; they differ in b"),
        (lambda: compare_variances(W, W, {"w": torch.ones(2, 1)}), r"`mean` must have the shapes of `streaming`: `w` is \(2, 1\)"),
        (lambda: compare_variances({"w": -torch.ones(2)}, W, W), "Variances in `w` must be finite and nonnegative"),
        (lambda: compare_variances(W, W, {"w": torch.full((2,), math.nan)}), "means finite"),
        (lambda: compare_variances(W, W, W, alpha=-1.0), "`alpha` must lie in"),
        (lambda: compare_variances(W, W, W, alpha="finite"), "needs `batch_size` and `dataset_size`"),
        (lambda: compare_variances(W, W, W, beta1=1.0), "`beta1` must lie in"),
        (lambda: compare_variances(W, W, W, limit=2.0), "`limit` must lie in"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ntkscope._checks.UserError, match=message):
        call()
