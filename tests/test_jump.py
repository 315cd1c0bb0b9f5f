"""The analytic jump against closed forms and Runge–Kutta, and the study on a real run."""

import numpy as np
import pytest
import scipy
import torch
from compare import assert_close
from test_findings import trained

import ntkscope
from ntkscope.dynamics.jump import jump, jump_errors

N, C, Q = 3, 2, 2
GENERATOR = torch.Generator().manual_seed(0)
JACOBIAN, RATE = (torch.randn(N * C + Q * C, 8, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
KERNEL, CROSS = JACOBIAN[: N * C] @ JACOBIAN[: N * C].T, JACOBIAN[N * C :] @ JACOBIAN[: N * C].T
KERNEL_RATE, CROSS_RATE = 0.1 * RATE[: N * C] @ RATE[: N * C].T, 0.1 * RATE[N * C :] @ RATE[: N * C].T
START = torch.randn(N, C, generator=GENERATOR, dtype=torch.float64)
HORIZONS = [0.01, 0.1, 1.0, 5.0]


def squared(outputs):
    return outputs / N


def softmax(outputs):
    return (outputs.softmax(dim=1) - torch.nn.functional.one_hot(torch.tensor([0, 1, 1]), C)) / N


def oracle(gradient_of, kernel, rate, cross, cross_rate, horizon):
    """u and the query motion by DOP853 on the definition, K and K_QS formed at every time."""

    def velocity(time, state):
        g = gradient_of(torch.from_numpy(state[: N * C].copy()).view(N, C)).flatten()
        return torch.cat([-(kernel + time * rate) @ g, -(cross + time * cross_rate) @ g]).numpy()

    start = np.concatenate([START.flatten().numpy(), np.zeros(Q * C)])
    return torch.from_numpy(
        scipy.integrate.solve_ivp(velocity, (0, horizon), start, method="DOP853", rtol=1e-10, atol=1e-12).y[:, -1].copy()
    )


def test_frozen_squared_loss_is_a_matrix_exponential():
    found = jump(KERNEL, CROSS, START, squared, HORIZONS)
    for k, time in enumerate(HORIZONS):
        expected = torch.linalg.matrix_exp(-time * KERNEL / N) @ START.flatten()
        assert_close(found.outputs[k].flatten(), expected, 2e-3)


@pytest.mark.parametrize("gradient_of", [squared, softmax])
@pytest.mark.parametrize("is_moving", [False, True])
def test_jumps_match_runge_kutta(gradient_of, is_moving):
    rates = {"kernel_rate": KERNEL_RATE, "cross_rate": CROSS_RATE} if is_moving else {}
    found = jump(KERNEL, CROSS, START, gradient_of, HORIZONS, **rates)
    for k, time in enumerate(HORIZONS):
        expected = oracle(gradient_of, KERNEL, KERNEL_RATE * is_moving, CROSS, CROSS_RATE * is_moving, time)
        assert_close(found.outputs[k].flatten(), expected[: N * C], 3e-3)
        assert_close(found.query_motion[k].flatten(), expected[N * C :], 3e-3)


def test_a_prediction_that_blows_up_is_no_number_from_there_on():
    found = jump(KERNEL, None, START, squared, [0.1, 1.0, 50.0], kernel_rate=-KERNEL)
    assert bool(torch.isfinite(found.outputs[0]).all())
    assert bool(torch.isnan(found.outputs[2]).all())
    assert found.query_motion is None
    errors = jump_errors(found.outputs, found.outputs.nan_to_num() + 1, START)
    assert torch.isnan(errors[2])


def test_the_trace_form_moves_every_class_by_one_kernel():
    small = KERNEL[:N, :N]
    eye = torch.eye(C, dtype=torch.float64)
    shared = jump(small, CROSS[:Q, :N], START, softmax, HORIZONS, kernel_rate=KERNEL_RATE[:N, :N], cross_rate=CROSS_RATE[:Q, :N])
    full = jump(
        torch.kron(small, eye),
        torch.kron(CROSS[:Q, :N], eye),
        START,
        softmax,
        HORIZONS,
        kernel_rate=torch.kron(KERNEL_RATE[:N, :N], eye),
        cross_rate=torch.kron(CROSS_RATE[:Q, :N], eye),
    )
    assert_close(shared.outputs, full.outputs, 1e-9)
    assert_close(shared.query_motion, full.query_motion, 1e-9)


def test_standing_still_has_an_error_of_one():
    observed = START[None] + torch.tensor([1.0, 2.0], dtype=torch.float64)[:, None, None]
    assert_close(jump_errors(START[None].repeat(2, 1, 1), observed, START), torch.ones(2, dtype=torch.float64))


def test_a_study_of_a_real_run():
    study = ntkscope.jump_study(trained(steps=300, lr=0.01), num_starts=3)
    first, *_, last = study.jumps
    assert first.start_step == 0
    assert len({jump.start_step for jump in study.jumps}) == 3
    assert bool(torch.isnan(first.extrapolated).all())  # no drift yet
    assert float(first.frozen[0]) < 0.05  # one step ahead the kernel is as good as frozen
    assert float(first.frozen[-1]) > float(first.frozen[0])
    assert len(last.steps) == len(last.frozen_query) >= 1
    reach = study.reach(0.1)
    assert reach[0] > 0
    assert study.reach(0.0)[0] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jump(KERNEL, None, START, squared, [1.0, 0.5]), "positive and ascending"),
        (lambda: jump(KERNEL, None, START, squared, []), "positive and ascending"),
        (lambda: ntkscope.jump_study(trained(steps=1)), "at least three snapshots"),
        (lambda: ntkscope.jump_study(trained(steps=5), num_starts=0), "`num_starts` must lie in"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ntkscope.InputError, match=message):
        call()
