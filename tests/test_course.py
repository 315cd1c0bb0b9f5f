"""Interpolated kernels: against Runge–Kutta on a kernel that moves, and what happens where it jumps."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from compare import assert_close, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import runge_kutta

import ntkscope
from ntkscope.course import Course, factor_leg, output_rows
from ntkscope.dynamics.dissipation import init
from ntkscope.dynamics.form import Form
from ntkscope.dynamics.interpolation import lagrange_weights, mean_weights
from ntkscope.dynamics.loss import bind_loss
from ntkscope.record.facts import RunFacts
from ntkscope.record.snapshot import Snapshot, pack_upper
from ntkscope.record.trace import Trace

N, C, Q, HORIZON = 3, 2, 2, 4.0


def matrices(jump=0.0):
    """Jacobians that turn with time, and at half the time jump."""
    generator = torch.Generator().manual_seed(0)
    first, second, third = (torch.randn(N * C + Q * C, 9, generator=generator, dtype=torch.float64) for _ in range(3))

    def jacobian(time):
        kick = jump * third if time > HORIZON / 2 else 0.0
        return first + math.sin(0.8 * time) * second + kick

    return jacobian


def synthetic_trace(times, jump=0.0):
    """A squared-loss run along a prescribed kernel, its outputs by Runge–Kutta; float64 kernels."""
    jacobian, targets = matrices(jump), torch.zeros(N, C, dtype=torch.float64)
    loss = bind_loss("squared", targets, targets)
    facts = RunFacts(
        num_examples=N, num_classes=C, num_params=9, num_query=Q, loss="squared", optimizer="none", precond="identity", stability_edge=2.0,
        momentum_lag=0.0, parameters=["w"], parameter_sizes=[9], gate=None, probe_hash="", train_only=[],
    )  # fmt: skip
    trace = Trace(facts, {"targets": targets}, "synthetic")
    start, query = torch.ones(N, C, dtype=torch.float64), torch.zeros(Q, C, dtype=torch.float64)
    for step, time in enumerate(times):
        j = jacobian(time)
        path = exact(jacobian, time)
        gradient = path.P @ (start / N).flatten()
        outputs = N * gradient.view(N, C)
        trace.append(
            Snapshot(
                step=step,
                time=float(time),
                learning_rates=(0.1,),
                loss=loss.value(outputs),
                outputs=outputs,
                gradient=loss.gradient(outputs),
                hessian=loss.hessian_blocks(outputs),
                mean_hessian=None if step == 0 else loss.hessian_blocks(outputs),
                kernel_upper=pack_upper(j[: N * C] @ j[: N * C].T),
                query_outputs=query - (path.G @ (start / N).flatten()).view(Q, C),
                cross_kernel=j[N * C :] @ j[: N * C].T,
            )
        )
    return trace, loss


def exact(jacobian, time, num=400):
    """The operators by Runge–Kutta."""
    identity = np.eye(N * C) / N
    kernel = lambda t: (jacobian(t)[: N * C] @ jacobian(t)[: N * C].T).numpy()  # ruff: ignore[lambda-assignment]
    cross = lambda t: (jacobian(t)[N * C :] @ jacobian(t)[: N * C].T).numpy()  # ruff: ignore[lambda-assignment]
    return runge_kutta(kernel, lambda t: identity, cross, float(time), num)


def walk(trace, loss, *, is_refined=True):
    course = Course(trace, 0, len(trace) - 1, loss=loss, is_refined=is_refined)
    state, num_pieces = init(course.moment(0).gradient, num_query_outputs=Q * C), []
    for leg in course.legs():
        pieces = factor_leg(leg)
        num_pieces.append(len(pieces))
        for piece in pieces:
            state = piece.extend(state)
    return state, num_pieces


def test_halves_lower_the_error_per_snapshot_at_least_threefold():
    trace, loss = synthetic_trace(np.linspace(0, HORIZON, 9))
    expected = exact(matrices(), HORIZON)
    refined, num_pieces = walk(trace, loss)
    coarse, _ = walk(trace, loss, is_refined=False)
    assert num_pieces == [2] * 8
    for name, letter in (("gramian", "W"), ("displacement", "D"), ("transfer", "G")):
        error = relative_error(getattr(refined, name), getattr(expected, letter))
        assert error < relative_error(getattr(coarse, name), getattr(expected, letter)) / 3, name
        assert error < 0.05


def test_refinement_converges():
    errors = []
    for num in (9, 17):
        trace, loss = synthetic_trace(np.linspace(0, HORIZON, num))
        errors.append(relative_error(walk(trace, loss)[0].gramian, exact(matrices(), HORIZON).W))
    assert errors[1] < errors[0] / 3.5


def test_a_jump_is_left_to_the_trapezoid():
    """Around a jump a cubic overshoots: those legs, and no others, are one piece."""
    trace, loss = synthetic_trace(np.linspace(0, HORIZON, 17), jump=3.0)
    state, num_pieces = walk(trace, loss)
    assert num_pieces[:6] == [2] * 6
    assert num_pieces[-6:] == [2] * 6
    assert 1 in num_pieces[6:-6]
    # Not only where an interpolated kernel is indefinite: beside the jump the cubic's mean is off, and there are no halves to try.
    legs = list(Course(trace, 0, len(trace) - 1, loss=loss).legs())
    assert legs[8].start.snapshot.time == HORIZON / 2
    assert [bool(legs[k].halves) for k in (6, 7, 9, 10)] == [True, False, False, True]
    assert relative_error(state.gramian, exact(matrices(3.0), HORIZON).W) < 0.2


def test_without_a_loss_every_leg_is_one_piece():
    trace, _ = synthetic_trace(np.linspace(0, HORIZON, 6))
    assert walk(trace, None)[1] == [1] * 5


def test_an_interpolated_kernel_that_is_not_positive_falls_back():
    trace, loss = synthetic_trace(np.linspace(0, HORIZON, 9))
    course = Course(trace, 0, 8, loss=loss)
    leg = list(course.legs())[2]
    broken = type(leg)(leg.start, leg.stop, leg.whole, tuple(_negated(piece) for piece in leg.halves), leg.tolerance)
    assert len(factor_leg(broken)) == 1
    assert len(factor_leg(leg)) == 2


def _negated(piece):
    return type(piece)(-piece.kernel, piece.blocks, piece.elapsed, piece.cross, piece.forcing, piece.query_forcing)


def test_merged_legs_span_the_course_with_time_weighted_hessians():
    trace, loss = synthetic_trace(np.array([0.0, 0.3, 1.0, 1.1, 2.0, 3.5]))
    course = Course(trace, 0, 5, loss=loss)
    legs = list(course.merged_legs(2))
    assert [leg.stop.snapshot.step for leg in legs] == [2, 5]
    assert sum(leg.whole.elapsed for leg in legs) == pytest.approx(3.5)
    # Hessians that differ: weighted by the time that each stands for, 0.3 and 0.7 of the first merged leg.
    for step in (1, 2):
        snapshot = trace.entries[step]
        trace.entries[step] = dataclasses.replace(snapshot, mean_hessian=step * snapshot.mean_hessian)
    (merged, _) = Course(trace, 0, 5, loss=loss).merged_legs(2)
    assert_close(merged.whole.blocks, (0.3 * 1 + 0.7 * 2) * trace[3].mean_hessian)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.floats(0, 1))
def test_weights_are_exact_for_cubics(coefficients, place):
    nodes = [0.0, 0.4, 1.1, 2.0]
    polynomial = np.polynomial.Polynomial(coefficients)
    values = polynomial(np.array(nodes))
    scale = 1 + np.abs(coefficients).sum() * 8
    assert lagrange_weights(nodes, 2 * place) @ values == pytest.approx(polynomial(2 * place), abs=1e-11 * scale)
    integral = polynomial.integ()
    assert mean_weights(nodes, 0.4, 1.1) @ values == pytest.approx((integral(1.1) - integral(0.4)) / 0.7, abs=1e-11 * scale)


def test_forms_read_kernels_alike():
    generator = torch.Generator().manual_seed(3)
    small = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    small = small @ small.T
    full = torch.kron(small, torch.eye(3, dtype=torch.float64))
    for kernel, form in ((small, Form(is_trace=True)), (full, Form(is_trace=False))):
        assert_close(form.trace_kernel(kernel, 4, 3), 3 * small)
        assert_close(form.self_influence(kernel, 4, 3), 3 * small.diagonal())
    p = torch.randn(4, 3, generator=generator, dtype=torch.float64).softmax(dim=1)
    softmax = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert_close(Form(is_trace=True).blocks(softmax).flatten(), softmax.diagonal(dim1=1, dim2=2).sum(dim=1) / 2)
    assert_close(
        Form(is_trace=True).blocks(torch.eye(3, dtype=torch.float64).repeat(4, 1, 1)).flatten(), torch.ones(4, dtype=torch.float64)
    )


def test_output_rows():
    assert output_rows(torch.tensor([0, 2]), 2).tolist() == [0, 1, 4, 5]


def test_time_must_pass_forwards():
    trace, loss = synthetic_trace(np.array([0.0, 1.0, 0.5]))
    with pytest.raises(ntkscope.InputError, match="backwards"):
        walk(trace, loss)
