"""W, P, D, G and the forced path against dense matrix exponentials and ODEs; the identities of theory.md section 3."""

import pytest
import torch
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import compose, dense, forced, frozen_squared, quadrature, van_loan

import ntkscope
from ntkscope.dynamics.dissipation import accumulate, init
from ntkscope.dynamics.interval import chi, phi, psi


@st.composite
def problems(draw):
    """A constant kernel and Hessian: softmax (singular), squared, or any positive semidefinite blocks."""
    num_examples, num_classes = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    num_outputs = num_examples * num_classes
    rank, num_query = draw(st.integers(1, num_outputs + 2)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    jacobian, query = normal(num_outputs, rank), normal(num_query, rank)
    # The softmax of one class is constant: B = 0, and nothing is left to compare.
    kind = draw(st.sampled_from(["softmax", "squared", "any"] if num_classes > 1 else ["squared", "any"]))
    if kind == "softmax":
        probabilities = normal(num_examples, num_classes).softmax(dim=1)
        blocks = (torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None, :]) / num_examples
    elif kind == "squared":
        blocks = torch.eye(num_classes, dtype=torch.float64).expand(num_examples, -1, -1).clone() / num_examples
    else:
        half = normal(num_examples, num_classes, num_classes)
        blocks = half @ half.mT
    stiffness = draw(st.sampled_from([0.01, 1.0, 30.0]))
    kernel = jacobian @ jacobian.T
    scale = max(float(torch.linalg.matrix_norm(dense(blocks) @ kernel, ord=2)), 1e-3)
    return kernel, blocks, query @ jacobian.T, stiffness / scale, normal(num_outputs)


def window(kernel, blocks, cross, elapsed, gradient):
    state = init(gradient, num_query_outputs=len(cross))
    return accumulate(state, kernel, blocks, elapsed, cross=cross)


def assert_propagators_close(actual, expected):
    """P in what it does, I − P = ∫BKP: where all is dissipated P itself is rounding (theory.md section 5: κ beyond 29 is not resolved)."""
    identity = torch.eye(len(actual), dtype=torch.float64)
    assert_close(identity - actual, identity - expected)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_constant_interval_is_exact(problem):
    kernel, blocks, cross, elapsed, _ = problem
    state = window(*problem)
    for expected in (van_loan(kernel, dense(blocks), cross, elapsed), quadrature(kernel, dense(blocks), cross, elapsed)):
        assert_close(state.gramian, expected.W)
        assert_close(state.displacement, expected.D)
        assert_close(state.transfer, expected.G)
        assert_propagators_close(state.propagator, expected.P)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_identities_of_a_constant_window(problem):
    kernel, blocks, _, elapsed, gradient = problem
    hessian, state = dense(blocks), window(*problem)
    identity = torch.eye(len(kernel), dtype=torch.float64)
    # 1 and 2: with a quadratic loss, gradient and loss change are those of the window itself.
    path = forced(kernel, hessian, torch.zeros_like(gradient), gradient, elapsed)
    assert_close(gradient - state.propagator @ gradient, gradient - path.gradient, rtol=1e-7)
    assert_close(gradient @ state.gramian @ gradient, path.energy, rtol=1e-7)
    assert_close(torch.tensor(state.energy, dtype=torch.float64), gradient @ state.gramian @ gradient)
    assert_close(gradient - state.gradient, gradient - state.propagator @ gradient)
    # 3
    assert_close(-state.displacement @ gradient, path.displacement, rtol=1e-7)
    # 4: constant B
    assert_close(identity - state.propagator, hessian @ state.displacement, rtol=1e-9)
    # 6: what W cannot see moves neither train nor test outputs.
    eigvals, eigvecs = torch.linalg.eigh(state.gramian)
    hidden = eigvecs[:, eigvals < 1e-13 * eigvals[-1]]
    scale = float(state.displacement.abs().max()) + float(state.transfer.abs().max())
    assert float((state.displacement @ hidden).abs().sum() + (state.transfer @ hidden).abs().sum()) <= 1e-5 * scale * hidden.shape[1]
    # 7: D = C W^½ for some C, so D W† W = D (and G likewise).
    projector = eigvecs[:, eigvals >= 1e-13 * eigvals[-1]]
    assert_close(state.displacement @ projector @ projector.T, state.displacement, rtol=1e-5)
    assert_close(state.transfer @ projector @ projector.T, state.transfer, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(problems(), problems())
def test_identity_5_windows_compose(first, second):
    if first[0].shape != second[0].shape or first[1].shape != second[1].shape or first[2].shape != second[2].shape:
        second = (2 * first[0], 0.5 * first[1], -first[2], first[3], first[4])
    both = accumulate(window(*first), second[0], second[1], second[3], cross=second[2])
    parts = compose(*(van_loan(k, dense(b), c, t) for k, b, c, t, _ in (first, second)))
    assert_propagators_close(both.propagator, parts.P)
    assert_close(both.gramian, parts.W)
    assert_close(both.displacement, parts.D)
    assert_close(both.transfer, parts.G)


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(0, 2**16))
def test_forcing_matches_the_ode(problem, seed):
    kernel, blocks, cross, elapsed, gradient = problem
    forcing = torch.randn(len(gradient), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    state = accumulate(init(gradient, num_query_outputs=len(cross)), kernel, blocks, elapsed, cross=cross, forcing=forcing)
    expected = forced(kernel, dense(blocks), forcing, gradient, elapsed)
    scale = float(gradient.abs().max() + expected.gradient.abs().max())
    assert float((state.gradient - expected.gradient).abs().max()) <= 1e-7 * scale
    size = abs(float(expected.energy)) + float(gradient.abs() @ expected.displacement.abs())
    assert abs(state.energy - float(expected.energy)) <= 1e-7 * size
    # The operators are those of the homogeneous window: they define the channels.
    assert torch.equal(state.gramian, window(*problem).gramian)


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(0, 2**16))
def test_query_motion_under_forcing_matches_the_ode(problem, seed):
    """Query outputs as further outputs with no loss of their own: one larger forced ODE gives their motion."""
    kernel, blocks, cross, elapsed, gradient = problem
    generator = torch.Generator().manual_seed(seed)
    forcing = torch.randn(len(gradient), generator=generator, dtype=torch.float64)
    query_forcing = torch.randn(len(cross), generator=generator, dtype=torch.float64)
    state = accumulate(
        init(gradient, num_query_outputs=len(cross)), kernel, blocks, elapsed, cross=cross, forcing=forcing, query_forcing=query_forcing
    )
    num_outputs, num_query = len(kernel), len(cross)
    large = torch.zeros(num_outputs + num_query, num_outputs + num_query, dtype=torch.float64)
    large[:num_outputs, :num_outputs], large[num_outputs:, :num_outputs] = kernel, cross
    hessian = torch.zeros_like(large)
    hessian[:num_outputs, :num_outputs] = dense(blocks)
    start = torch.cat([gradient, torch.zeros(num_query, dtype=torch.float64)])
    expected = forced(large, hessian, torch.cat([forcing, query_forcing]), start, elapsed).displacement[num_outputs:]
    size = float((elapsed * query_forcing).abs().max() + expected.abs().max() + (elapsed * cross @ gradient).abs().max())
    assert float((state.query_motion - expected).abs().max()) <= 1e-7 * size
    without = window(*problem)
    assert_close(without.query_motion, -without.transfer @ gradient, rtol=1e-9)


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(2, 4))
def test_the_trace_form_is_the_full_form_of_a_shared_kernel(problem, num_classes):
    """K = k ⊗ I_C and B_i = b_i I: one n x n problem with a column per class must be the same as the N x N one."""
    kernel, _, cross, elapsed, _ = problem
    n = len(kernel)
    generator = torch.Generator().manual_seed(n)
    weights = torch.rand(n, generator=generator, dtype=torch.float64)[:, None, None]
    gradient, forcing = torch.randn(2, n, num_classes, generator=generator, dtype=torch.float64)
    eye = torch.eye(num_classes, dtype=torch.float64)
    small = accumulate(init(gradient, num_query_outputs=len(cross)), kernel, weights, elapsed, cross=cross, forcing=forcing)
    full = accumulate(
        init(gradient.flatten(), num_query_outputs=len(cross) * num_classes),
        torch.kron(kernel, eye),
        weights * eye,
        elapsed,
        cross=torch.kron(cross, eye),
        forcing=forcing.flatten(),
    )
    assert_close(torch.kron(small.gramian, eye), full.gramian)
    assert_close(torch.kron(small.transfer, eye), full.transfer)
    assert_close(small.gradient.flatten(), full.gradient, rtol=1e-8)
    assert_close(small.query_motion.flatten(), full.query_motion, rtol=1e-8)
    assert small.energy == pytest.approx(full.energy, rel=1e-8, abs=1e-12)
    assert small.homogeneous_energy == pytest.approx(full.homogeneous_energy, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(2, 5))
def test_halves_equal_the_whole(problem, pieces):
    kernel, blocks, cross, elapsed, gradient = problem
    state = init(gradient, num_query_outputs=len(cross))
    for _ in range(pieces):
        state = accumulate(state, kernel, blocks, elapsed / pieces, cross=cross)
    whole = window(*problem)
    assert_close(state.gramian, whole.gramian)
    assert_propagators_close(state.propagator, whole.propagator)
    assert_close(state.displacement, whole.displacement)
    assert state.elapsed == pytest.approx(whole.elapsed)


@pytest.mark.parametrize("num_examples", [1, 3, 7])
def test_identity_8_linear_model_closed_form(num_examples):
    """A linear model's kernel never moves: W has a closed form, and the recorder must reproduce it from a real run."""
    torch.manual_seed(num_examples)
    model = torch.nn.Linear(4, 2, bias=False).double()
    inputs, targets = torch.randn(num_examples, 4, dtype=torch.float64), torch.randn(num_examples, 2, dtype=torch.float64)
    kernel = ntkscope.ntk_gram(model, inputs).matrix
    blocks = torch.eye(2, dtype=torch.float64).expand(num_examples, 2, 2) / num_examples
    gradient = ((model(inputs) - targets) / num_examples).detach().flatten()
    state = init(gradient)
    for _ in range(10):
        state = accumulate(state, kernel, blocks, 0.3)
    assert_close(state.gramian, frozen_squared(kernel, num_examples, 3.0))


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1e4))
def test_phi_psi_and_chi(z):
    """Against long series or the definition in extended precision, whichever is exact at z."""
    import numpy as np

    wide = np.longdouble(z)
    if z < 0.5:
        terms = [np.longdouble(1)]
        for k in range(1, 30):
            terms.append(terms[-1] * -wide / (k + 1))
        expected_phi = float(sum(terms))
        terms = [np.longdouble(0.5)]
        for k in range(1, 30):
            terms.append(terms[-1] * -wide / (k + 2))
        expected_psi = float(sum(terms))
        terms = [np.longdouble(1) / 6]
        for k in range(1, 30):
            terms.append(terms[-1] * -wide / (k + 3))
        expected_chi = float(sum(terms))
    else:
        exact = (1 - np.exp(-wide)) / wide
        expected_phi, expected_psi = float(exact), float((1 - exact) / wide)
        expected_chi = float((np.longdouble(0.5) - (1 - exact) / wide) / wide)
    value = torch.tensor([z], dtype=torch.float64)
    assert float(phi(value)) == pytest.approx(expected_phi, rel=1e-14)
    assert float(psi(value)) == pytest.approx(expected_psi, rel=1e-12)
    assert float(chi(value)) == pytest.approx(expected_chi, rel=1e-11)


GRADIENT, KERNEL, BLOCKS = torch.ones(2), torch.eye(2), torch.eye(2)[None]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accumulate(init(GRADIENT), KERNEL, BLOCKS, -1.0), "Time must not run backwards"),
        (lambda: accumulate(init(GRADIENT), KERNEL, BLOCKS, float("nan")), "Time must not run backwards"),
        (lambda: accumulate(init(GRADIENT), -KERNEL, BLOCKS, 1.0), "positive semidefinite"),
        (
            lambda: accumulate(init(GRADIENT), torch.diag(torch.tensor([1.0, -1e-3])), BLOCKS, 1.0, negative_tolerance=1e-4),
            "-1.00e-03",
        ),
        (lambda: accumulate(init(GRADIENT), torch.eye(3), BLOCKS, 1.0), r"`gram` must have shape \(2, 2\)"),
        (lambda: accumulate(init(GRADIENT), KERNEL, torch.eye(3)[None], 1.0), "`hessian_blocks` must have shape"),
        (lambda: accumulate(init(GRADIENT, num_query_outputs=1), KERNEL, BLOCKS, 1.0), "Give `cross` for every interval"),
        (lambda: accumulate(init(GRADIENT), KERNEL, BLOCKS, 1.0, cross=torch.ones(1, 2)), "Give `cross` for every interval"),
        (
            lambda: accumulate(init(GRADIENT, num_query_outputs=1), KERNEL, BLOCKS, 1.0, cross=torch.ones(2, 2)),
            r"`cross` must have shape \(1, 2\)",
        ),
        (lambda: accumulate(init(GRADIENT), KERNEL * torch.nan, BLOCKS, 1.0), "must be finite"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ntkscope.InputError, match=message):
        call()
