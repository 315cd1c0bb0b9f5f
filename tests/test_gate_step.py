"""The gated-Adam step against a plain float64 reference, and its documented behaviour."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ntkscope
from ntkscope.gate.step import gate_values, gated_adam_step, resolve_alpha

KINDS = ("soft", "hard", "snr", "open")


def reference(
    weight, gradients, *, kind, alpha, lambda_pop, center, warmup, lr, beta1, beta2, eps, decay, rho, is_decay_gated=False, variances=None
):
    """theory.md section 6, one scalar at a time; `variances` holds ŝ from outside by step."""
    m = v = s = 0.0
    gates = []
    for t, g in enumerate(gradients, start=1):
        if center == "paper":
            s = rho * s + (1 - rho) * (g - m) ** 2
        elif t >= 2:
            s = rho * s + (1 - rho) * (g - m / (1 - beta1 ** (t - 1))) ** 2
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        samples = t if center == "paper" else t - 1
        correction = 1 - rho**samples if samples else 1.0
        if variances and t in variances:
            s = variances[t] * correction
        s_hat = s / correction
        if t <= warmup or kind == "open":
            q = 1.0
        elif kind == "hard":
            q = float(m_hat**2 > alpha * s_hat)
        elif kind == "soft":
            d = max(m_hat**2 - alpha * s_hat, 0.0)
            q = d / (d + lambda_pop * s_hat + 1e-30)
        else:
            q = m_hat**2 / (m_hat**2 + lambda_pop * s_hat + 1e-30)
        weight = weight - lr * q * m_hat / (math.sqrt(v_hat) + eps) - lr * decay * (q if is_decay_gated else 1.0) * weight
        gates.append(q)
    return weight, gates


def run(weight, gradients, **options):
    """The code under test, all scalars at once."""
    weight = torch.tensor(weight, dtype=torch.float64)
    m, v, s = (torch.zeros_like(weight) for _ in range(3))
    gates = []
    for t, g in enumerate(gradients, start=1):
        gates.append(gated_adam_step(weight, torch.tensor(g, dtype=torch.float64), m, v, s, step=t, **options).clone())
    return weight, torch.stack(gates)


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    center=st.sampled_from(["paper", "corrected"]),
    alpha=st.sampled_from([0.0, 1 / 19, 1.0, 3.0]),
    lambda_pop=st.sampled_from([0.0, 0.3, 1.0]),
    warmup=st.integers(1, 4),
    rho=st.sampled_from([0.9, 0.99]),
    beta1=st.sampled_from([0.0, 0.9]),
    decay=st.sampled_from([0.0, 0.1]),
    is_decay_gated=st.booleans(),
    size=st.integers(1, 5),
    steps=st.integers(1, 15),
    seed=st.integers(0, 2**16),
)
def test_matches_the_reference(kind, center, alpha, lambda_pop, warmup, rho, beta1, decay, is_decay_gated, size, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(size, generator=generator, dtype=torch.float64).tolist()
    mean = torch.randn(size, generator=generator, dtype=torch.float64)
    gradients = mean + torch.randn(steps, size, generator=generator, dtype=torch.float64)
    settings_of_both = {"alpha": alpha, "lambda_pop": lambda_pop, "center": center, "rho": rho, "lr": 0.01, "eps": 1e-8}
    actual, gates = run(
        weights,
        gradients.tolist(),
        gate=kind,
        gate_warmup=warmup,
        betas=(beta1, 0.999),
        weight_decay=decay,
        decay="gated" if is_decay_gated else "plain",
        **settings_of_both,
    )
    for k in range(size):
        expected, expected_gates = reference(
            weights[k],
            gradients[:, k].tolist(),
            kind=kind,
            warmup=warmup,
            beta1=beta1,
            beta2=0.999,
            decay=decay,
            is_decay_gated=is_decay_gated,
            **settings_of_both,
        )
        assert float(actual[k]) == pytest.approx(expected, rel=1e-12, abs=1e-14)
        assert gates[:, k].tolist() == pytest.approx(expected_gates, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("center", ["paper", "corrected"])
def test_a_variance_from_outside_is_what_the_gate_uses(center):
    weight, gradient = torch.ones(3, dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    m, v, s = (torch.zeros_like(weight) for _ in range(3))
    given = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for step in (1, 2, 3):
        q = gated_adam_step(weight, gradient, m, v, s, step=step, lr=0.1, gate="snr", gate_warmup=0, center=center, variance=given)
        assert q.tolist() == pytest.approx((gradient**2 / (gradient**2 + given)).tolist(), rel=1e-12)


@pytest.mark.parametrize(("step", "expected"), [(1, 0.0), (5, 0.32), (30, 0.84)])
def test_transient_of_a_noiseless_constant_gradient(step, expected):
    """theory.md section 6: m_{t−1} is not bias-corrected, so the paper's ŝ first mistakes signal for noise."""
    _, gates = run([1.0], [[0.7]] * step, lr=0.0, gate="soft", gate_warmup=0)
    assert float(gates[-1]) == pytest.approx(expected, abs=0.005)


def test_corrected_centering_has_no_transient():
    _, gates = run([1.0], [[0.7]] * 5, lr=0.0, gate="soft", center="corrected")
    assert gates.min() > 1 - 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["soft", "snr", "hard"])
def test_small_gradients_without_noise_open_the_gate(kind, dtype):
    """ε_q = 1e-12 would close them."""
    assert float(gate_values(torch.tensor(1e-8, dtype=dtype), torch.tensor(0.0, dtype=dtype), kind=kind)) == pytest.approx(1.0)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1e3), st.floats(0, 1e3), st.floats(0, 1e3), st.sampled_from(["soft", "hard", "snr"]), st.floats(0, 5), st.floats(0, 5))
def test_gates_are_monotone_and_between_zero_and_one(smaller, larger, noise, kind, alpha, lambda_pop):
    means = torch.tensor(sorted([smaller, larger]), dtype=torch.float64)
    gates = gate_values(means, torch.full_like(means, noise), kind=kind, alpha=alpha, lambda_pop=lambda_pop)
    assert bool(((gates >= 0) & (gates <= 1)).all())
    assert float(gates[0]) <= float(gates[1]) + 1e-12


def test_zero_over_zero_is_closed():
    zero = torch.zeros(1)
    assert [float(gate_values(zero, zero, kind=kind)) for kind in KINDS] == [0.0, 0.0, 0.0, 1.0]


def test_hard_equality_is_closed():
    assert float(gate_values(torch.tensor(2.0), torch.tensor(4.0), kind="hard")) == 0.0


def test_alpha_choices():
    sizes = {"batch_size": 20, "dataset_size": 100}
    assert resolve_alpha(0.25, beta1=0.9, batch_size=None, dataset_size=None) == 0.25
    assert resolve_alpha("unbiased", beta1=0.9, batch_size=None, dataset_size=None) == pytest.approx(1 / 19)
    assert resolve_alpha("finite", beta1=0.9, **sizes) == 0.25


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gate_values(ONE, ONE, kind="firm"), "`kind` must be one of 'soft', 'hard', 'snr', 'open'"),
        (lambda: gate_values(ONE, ONE, kind="soft", alpha=-1.0), "`alpha` must lie in"),
        (lambda: gate_values(ONE, ONE, kind="soft", lambda_pop=math.nan), "`lambda_pop` must lie in"),
        (lambda: resolve_alpha("best", beta1=0.9, batch_size=1, dataset_size=2), "`alpha` must be one of 'unbiased', 'finite'"),
        (lambda: resolve_alpha("finite", beta1=0.9, batch_size=None, dataset_size=2), "needs `batch_size` and `dataset_size`"),
        (lambda: resolve_alpha("finite", beta1=0.9, batch_size=2, dataset_size=2), "no sampling noise to gate"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ntkscope.InputError, match=message):
        call()
