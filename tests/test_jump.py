"""Jumps against closed forms and against a Runge-Kutta oracle with fixed, fine steps."""

import math

import pytest
import torch
from compare import assert_close

from ntkscope._checks import InputError
from ntkscope.dynamics.jump import BLOW_UP, NO_CHANGE, jump, jump_errors

HORIZONS = [0.3, 2.0, 7.0]


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(num_examples=4, num_classes=3, num_query_outputs=5):
    """Kernels of a random linear network that moves, outputs, one-hot targets."""
    num_outputs = num_examples * num_classes
    jacobian, query = normal(num_outputs, num_outputs + 2, seed=0), normal(num_query_outputs, num_outputs + 2, seed=1)
    kernel, cross = jacobian @ jacobian.T / num_outputs, query @ jacobian.T / num_outputs
    drift = normal(num_outputs, num_outputs, seed=2)
    rate = 0.05 * drift @ drift.T / num_outputs - 0.02 * kernel
    cross_rate = 0.05 * normal(num_query_outputs, num_outputs, seed=3)
    outputs = 0.5 * normal(num_examples, num_classes, seed=4)
    targets = torch.eye(num_classes, dtype=torch.float64)[torch.arange(num_examples) % num_classes]
    return kernel, cross, rate, cross_rate, outputs, targets


def squared(targets):
    return lambda outputs: (outputs - targets) / len(targets)


def softmax(targets):
    return lambda outputs: (outputs.softmax(dim=1) - targets) / len(targets)


def runge_kutta(kernel_at, outputs, gradient_of, horizon, num_steps=4000):
    """Classical fourth order with fixed steps, for the state of all outputs that kernel_at's rows cover."""
    num_outputs, step = outputs.numel(), horizon / num_steps

    def velocity(time, state):
        return -kernel_at(time) @ gradient_of(state[:num_outputs].view(outputs.shape)).flatten()

    state = torch.cat([outputs.flatten(), torch.zeros(len(kernel_at(0.0)) - num_outputs, dtype=torch.float64)])
    for k in range(num_steps):
        time = k * step
        first = velocity(time, state)
        second = velocity(time + step / 2, state + step / 2 * first)
        third = velocity(time + step / 2, state + step / 2 * second)
        fourth = velocity(time + step, state + step * third)
        state = state + step / 6 * (first + 2 * second + 2 * third + fourth)
    return state[:num_outputs].view(outputs.shape), state[num_outputs:]


def assert_motion_close(prediction, start, horizons, oracle, rtol=3e-5):
    for position, horizon in enumerate(horizons):
        outputs, query = oracle(horizon)
        assert_close(prediction.outputs[position] - start, outputs - start, rtol, name=f"outputs at {horizon}")
        if prediction.query_motion is not None:
            assert_close(prediction.query_motion[position], query, rtol, name=f"query at {horizon}")


def test_frozen_squared_loss_is_a_matrix_exponential():
    kernel, cross, _, _, outputs, targets = problem()
    residual = (outputs - targets).flatten()

    def oracle(horizon):
        left = torch.linalg.matrix_exp(-horizon / len(outputs) * kernel) @ residual
        return targets + left.view(outputs.shape), cross @ torch.linalg.solve(kernel, left - residual)

    prediction = jump(kernel, cross, outputs, squared(targets), HORIZONS)
    assert_motion_close(prediction, outputs, HORIZONS, oracle)
    assert prediction.kind == "frozen"
    assert prediction.horizons == tuple(HORIZONS)
    assert prediction.reached == HORIZONS[-1]
    assert prediction.reason == ""
    assert prediction.outputs.dtype == prediction.query_motion.dtype == torch.float64


@pytest.mark.parametrize("loss", [squared, softmax])
@pytest.mark.parametrize("extrapolated", [False, True], ids=["frozen", "extrapolated"])
def test_against_runge_kutta(loss, extrapolated):
    kernel, cross, rate, cross_rate, outputs, targets = problem()
    rates = {"kernel_rate": rate, "cross_rate": cross_rate} if extrapolated else {}
    start, slope = torch.cat([kernel, cross]), torch.cat([rate, cross_rate]) * extrapolated
    prediction = jump(kernel, cross, outputs, loss(targets), HORIZONS, **rates)
    assert prediction.kind == ("extrapolated" if extrapolated else "frozen")
    assert_motion_close(
        prediction,
        outputs,
        HORIZONS,
        lambda horizon: runge_kutta(lambda time: start + time * slope, outputs, loss(targets), horizon, num_steps=400),
    )


def test_the_drift_matters_in_this_problem():
    kernel, cross, rate, cross_rate, outputs, targets = problem()
    frozen = jump(kernel, cross, outputs, softmax(targets), HORIZONS)
    moving = jump(kernel, cross, outputs, softmax(targets), HORIZONS, kernel_rate=rate, cross_rate=cross_rate)
    assert float(jump_errors(frozen.outputs, moving.outputs, outputs)[-1]) > 0.05
    assert float(jump_errors(frozen.query_motion, moving.query_motion, torch.zeros(len(cross)))[-1]) > 0.05


def test_a_rate_of_zero_is_frozen():
    kernel, cross, rate, cross_rate, outputs, targets = problem()
    frozen = jump(kernel, cross, outputs, softmax(targets), HORIZONS)
    still = jump(kernel, cross, outputs, softmax(targets), HORIZONS, kernel_rate=0 * rate, cross_rate=0 * cross_rate)
    assert_close(still.outputs, frozen.outputs)
    assert_close(still.query_motion, frozen.query_motion)


def test_horizons_do_not_change_each_other():
    kernel, cross, rate, cross_rate, outputs, targets = problem()
    together = jump(kernel, cross, outputs, softmax(targets), HORIZONS, kernel_rate=rate, cross_rate=cross_rate)
    for position, horizon in enumerate(HORIZONS):
        alone = jump(kernel, cross, outputs, softmax(targets), [horizon], kernel_rate=rate, cross_rate=cross_rate)
        assert_close(together.outputs[position] - outputs, alone.outputs[0] - outputs, 3e-5)
        assert_close(together.query_motion[position], alone.query_motion[0], 3e-5)


def test_without_query():
    kernel, _, rate, _, outputs, targets = problem()
    prediction = jump(kernel, None, outputs, squared(targets), HORIZONS, kernel_rate=rate)
    assert prediction.query_motion is None
    assert prediction.outputs.shape == (3, 4, 3)


def test_units_do_not_matter():
    """Outputs and targets times s, the kernel too and time over s: the same motion times s, also where outputs start at zero."""
    kernel, cross, _, _, _, targets = problem()
    start = torch.zeros_like(targets)
    one = jump(kernel, cross, start, squared(targets), HORIZONS)
    for scale in (1e-9, 1e9):
        other = jump(scale * kernel, scale * cross, start, squared(scale * targets), [horizon / scale for horizon in HORIZONS])
        assert_close(other.outputs / scale, one.outputs, 1e-5)
        assert_close(other.query_motion / scale, one.query_motion, 1e-5)


def test_single_precision_goes_in_and_double_comes_out():
    kernel, cross, _, _, outputs, targets = problem()
    rough = jump(kernel.float(), cross.float(), outputs.float(), squared(targets), HORIZONS)
    assert rough.outputs.dtype == torch.float64
    assert_close(rough.outputs, jump(kernel, cross, outputs, squared(targets), HORIZONS).outputs, 1e-5)


@pytest.mark.parametrize("rate", [0.0, 20.0])
def test_stiff_problems_take_few_evaluations(rate):
    """200 outputs, λτ = 2,000: explicit steps would take some 4,000 evaluations, and a Jacobian by columns 200 each."""
    rotation = torch.linalg.qr(normal(200, 200, seed=5)).Q
    eigvals, horizon = torch.arange(1, 201, dtype=torch.float64) ** -1.5, 2000 * 50.0
    kernel = rotation @ torch.diag(eigvals) @ rotation.T
    outputs, targets = 0.3 * normal(50, 4, seed=6), torch.eye(4, dtype=torch.float64)[torch.arange(50) % 4]
    prediction = jump(kernel, None, outputs, squared(targets), [horizon], kernel_rate=rate / horizon * kernel)
    assert prediction.num_evaluations < 550
    left = (rotation.T @ (outputs - targets).flatten()) * torch.exp(-2000 * (1 + rate / 2) * eigvals)
    assert_close(prediction.outputs[0] - outputs, targets + (rotation @ left).view(50, 4) - outputs, 1e-5)


def test_nothing_moves_without_gradient():
    kernel, cross, rate, cross_rate, outputs, _ = problem()
    for gradient_of in (squared(outputs), torch.zeros_like):
        prediction = jump(kernel, cross, outputs, gradient_of, HORIZONS, kernel_rate=rate, cross_rate=cross_rate)
        assert_close(prediction.outputs, outputs.expand(3, -1, -1))
        assert_close(prediction.query_motion, torch.zeros(3, len(cross)))


def test_blow_up_breaks_off():
    """u' = −(1 − τ) u, from 1: decays until τ = 1, back at 1 at τ = 2, then e^{τ²/2 − τ}; 1,001 is reached at τ = 1 + √(1 + 2 log 1001)."""
    one = torch.ones(1, 1, dtype=torch.float64)
    horizons = [1.0, 2.0, 4.5, 4.9, 100.0]
    prediction = jump(one, one, one, lambda u: u, horizons, kernel_rate=-one, cross_rate=-one)
    end = 1 + math.sqrt(1 + 2 * math.log(BLOW_UP + 1))
    assert 4.5 < end < 4.9
    assert prediction.reached == pytest.approx(end, rel=1e-4)
    assert "1,000 times the scale of the start" in prediction.reason
    assert "lose its positive eigenvalues" in prediction.reason
    expected = torch.tensor([math.exp(t * t / 2 - t) for t in horizons[:3]], dtype=torch.float64)
    assert_close(prediction.outputs[:3, 0, 0], expected, 1e-3)
    assert_close(prediction.query_motion[:3, 0], expected - 1, 1e-3)
    assert bool(torch.isnan(prediction.outputs[3:]).all())
    assert bool(torch.isnan(prediction.query_motion[3:]).all())


def test_broken_off_before_the_first_horizon():
    one = torch.ones(1, 1, dtype=torch.float64)
    prediction = jump(-one, one, one, lambda u: u, [50.0, 60.0])
    assert prediction.reached < 50
    assert "is the kernel positive semidefinite?" in prediction.reason
    assert bool(torch.isnan(prediction.outputs).all())
    assert bool(torch.isnan(prediction.query_motion).all())


def test_a_gradient_that_ends_breaks_off():
    """g is NaN beyond u = 5, which u' = +1 reaches from 1 at τ = 4."""
    one = torch.ones(1, 1, dtype=torch.float64)
    prediction = jump(one, one, one, lambda u: torch.where(u < 5, -torch.ones_like(u), float("nan")), [3.0, 10.0])
    assert prediction.reached == pytest.approx(4.0, abs=0.01)
    assert "no step that is short enough" in prediction.reason
    assert_close(prediction.outputs[0], 4 * one)
    assert_close(prediction.query_motion[0], [3.0])
    assert bool(torch.isnan(prediction.outputs[1]).all())


def test_errors_are_relative_to_the_motion():
    start = normal(2, 3, seed=7)
    observed = start + normal(4, 2, 3, seed=8)
    predicted = observed + 0.1 * (observed - start)
    predicted[1] = float("nan")
    predicted[2] = start
    observed[3] = predicted[3] = start
    errors = jump_errors(predicted, observed, start)
    assert bool(torch.isnan(errors[1]))
    assert_close(errors[[0, 2, 3]], [0.1, NO_CHANGE, 0.0])
    predicted[3] = start + 1
    assert math.isinf(float(jump_errors(predicted, observed, start)[3]))


SQUARE, WIDE, OUTPUTS = torch.eye(6), torch.ones(2, 6), torch.ones(3, 2)
BAD = [
    (lambda g: jump(SQUARE, WIDE, torch.ones(6), g, [1.0]), r"`outputs` must have shape \(examples, classes\), got \(6,\)"),
    (lambda g: jump(SQUARE, WIDE, torch.ones(0, 2), g, [1.0]), r"`outputs` must have shape \(examples, classes\), got \(0, 2\)"),
    (lambda g: jump(WIDE, WIDE, OUTPUTS, g, [1.0]), r"`kernel` must have shape \(6, 6\) .*, got \(2, 6\). Use the kernel kind 'full'"),
    (lambda g: jump(SQUARE, None, OUTPUTS, g, [1.0], kernel_rate=WIDE), r"`kernel_rate` must have shape \(6, 6\)"),
    (lambda g: jump(SQUARE, WIDE.T, OUTPUTS, g, [1.0]), r"`cross` must have shape \(query_outputs, 6\), got \(6, 2\)"),
    (lambda g: jump(SQUARE, WIDE, OUTPUTS, g, [1.0], kernel_rate=SQUARE), "`cross_rate` is needed if both"),
    (lambda g: jump(SQUARE, WIDE, OUTPUTS, g, [1.0], cross_rate=WIDE), "and only then"),
    (lambda g: jump(SQUARE, None, OUTPUTS, g, [1.0], kernel_rate=SQUARE, cross_rate=WIDE), "and only then"),
    (lambda g: jump(SQUARE, WIDE, OUTPUTS, g, [1.0], kernel_rate=SQUARE, cross_rate=SQUARE), r"shape of `cross`, \(2, 6\), got \(6, 6\)"),
    (lambda g: jump(SQUARE / 0, WIDE, OUTPUTS, g, [1.0]), "`kernel` must be finite.*before training diverged"),
    (lambda g: jump(SQUARE, WIDE, OUTPUTS * float("nan"), g, [1.0]), "`outputs` must be finite"),
    (lambda g: jump(SQUARE, WIDE, OUTPUTS, lambda u: u / 0, [1.0]), "The output gradient at the snapshot must be finite"),
    (lambda g: jump(SQUARE, WIDE, OUTPUTS, g, []), r"`horizons` must be .*got \[\]"),
    (lambda g: jump(SQUARE, WIDE, OUTPUTS, g, [0.0, 1.0]), r"positive and ascending, got \[0.0, 1.0\]. They count from the snapshot on"),
    (lambda g: jump(SQUARE, WIDE, OUTPUTS, g, [2.0, 1.0]), "positive and ascending"),
    (lambda g: jump(SQUARE, WIDE, OUTPUTS, g, [1.0, math.inf]), "finite time"),
    (
        lambda g: jump_errors(torch.ones(2, 3), torch.ones(3, 3), torch.ones(3)),
        r"got \(2, 3\), \(3, 3\) and \(3,\). Observe at the horizons",
    ),
    (lambda g: jump_errors(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2)), r"and \(2,\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:28] for _, message in BAD])
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call(lambda outputs: outputs)
