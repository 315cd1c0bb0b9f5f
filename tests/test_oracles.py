"""The oracles agree among themselves and with theory.md, sections 1 to 5; test_oracles imports nothing of ntkscope."""

import copy
import math

import numpy as np
import oracles
import pytest
import scipy.integrate
import torch
from cases import BY_NAME, CASES
from compare import assert_close, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Operators, compose, dense, forced, frozen_squared, log_dissipation, omega, quadrature, runge_kutta, van_loan
from torch.nn import functional as F
from torch.utils import _pytree as pytree

EYE = torch.eye
pinv = torch.linalg.pinv
drawn = settings(max_examples=12, deadline=None, derandomize=True, database=None)


def softmax_blocks(outputs):
    """B_i = (diag pi - pi pi^T) / n."""
    probs = outputs.softmax(dim=1)
    return (torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]) / len(outputs)


class Problem:
    """Constant K = J J^T (rank `rank`, perhaps less than N), K_query, B of one kind, gradient in range B, elapsed."""

    def __init__(self, seed, n, classes, rank, kind, stiffness):
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        self.n, self.C, self.N, self.kind, self.seed = n, classes, n * classes, kind, seed
        self.rank = min(rank, self.N)
        self.J, self.J_query = normal(self.N, self.rank), normal(4, self.rank)
        self.K, self.K_query = self.J @ self.J.T, self.J_query @ self.J.T
        if kind == "softmax":
            self.B = dense(softmax_blocks(2 * normal(n, classes)))
            self.basis = oracles.softmax_basis(n, classes)
        elif kind == "squared":
            self.B, self.basis = EYE(self.N, dtype=torch.float64) / n, EYE(self.N, dtype=torch.float64)
        else:  # "invertible", not a multiple of the identity
            root = normal(n, classes, classes)
            self.B = dense((root @ root.mT + 0.1 * EYE(classes)) / n)
            self.basis = EYE(self.N, dtype=torch.float64)
        self.gradient = self.B @ normal(self.N)
        self.forcing = normal(self.N)
        self.elapsed = stiffness / float(torch.linalg.matrix_norm(self.B @ self.K, 2))

    @property
    def constant(self):
        return self.K, self.B, self.K_query, self.elapsed

    def varying(self):
        """K(tau) = J(tau) J(tau)^T and K_query(tau) with the rank kept, as functions of tau."""
        turn = torch.randn(self.rank, self.rank, generator=torch.Generator().manual_seed(self.seed + 1), dtype=torch.float64)

        def at(tau):
            mix = EYE(self.rank) + math.sin(2 * tau / self.elapsed) * turn / 2
            return mix @ mix.T

        return lambda tau: self.J @ at(tau) @ self.J.T, lambda tau: self.J_query @ at(tau) @ self.J.T


def problems(kinds=("softmax", "squared", "invertible"), stiffness=(0.3, 30.0)):
    return st.builds(
        Problem,
        seed=st.integers(0, 10_000),
        n=st.integers(1, 3),
        classes=st.integers(2, 3),
        rank=st.integers(1, 9),
        kind=st.sampled_from(kinds),
        stiffness=st.floats(*stiffness),
    )


def assert_operators(actual, expected, rtol):
    for name, left, right in zip(Operators._fields, actual, expected, strict=True):
        assert_close(left, right, rtol, name=name)


# --- The three integrators (sections 2, 3) -----------------------------------------------------------------------------------


@drawn
@given(problem=problems())
def test_van_loan_equals_quadrature(problem):
    assert_operators(van_loan(*problem.constant), quadrature(*problem.constant), 1e-11)


@drawn
@given(problem=problems(stiffness=(0.3, 10.0)))
def test_runge_kutta_equals_van_loan_for_constant_operators(problem):
    K, B, K_query, elapsed = problem.constant
    actual = runge_kutta(lambda _: K, lambda _: B, lambda _: K_query, elapsed, 400)
    assert_operators(actual, van_loan(K, B, K_query, elapsed), 1e-7)


def test_runge_kutta_is_fourth_order_for_varying_operators():
    problem = Problem(seed=1, n=2, classes=3, rank=4, kind="softmax", stiffness=2.0)
    (K, K_query), B = problem.varying(), lambda tau: problem.B * (1 + tau / problem.elapsed)
    coarse, fine, exact = (runge_kutta(K, B, K_query, problem.elapsed, steps).W for steps in (20, 40, 640))
    assert 13 < relative_error(coarse, exact) / relative_error(fine, exact) < 19


def test_van_loan_survives_a_stiffness_that_overflows_the_block_exponential():
    problem = Problem(seed=3, n=3, classes=3, rank=5, kind="squared", stiffness=1e5)
    K, B, K_query, elapsed = problem.constant
    actual = van_loan(K, B, K_query, elapsed)
    assert_close(actual.W, frozen_squared(K, problem.n, elapsed), 1e-10)  # the problem's condition: stiffness * eps


def test_operators_without_query_and_without_time():
    problem = Problem(seed=4, n=2, classes=2, rank=3, kind="softmax", stiffness=3.0)
    K, B = problem.K, problem.B
    for operators in (
        van_loan(K, B, None, 1.0),
        quadrature(K, B, None, 1.0),
        runge_kutta(lambda _: K, lambda _: B, None, 1.0, 9),
    ):
        assert operators.G is None
    still = van_loan(K, B, problem.K_query, 0.0)
    zero = torch.zeros(4, 4)
    assert_operators(still, Operators(EYE(4), zero, zero, zero), 1e-15)


# --- Identities of section 3 -------------------------------------------------------------------------------------------------


class NetworkFlow:
    """Gradient flow with diagonal M of a tanh network on softmax cross-entropy or squared loss; everything by autograd."""

    n, elapsed = 3, 1.0

    def __init__(self, loss):
        rng = torch.Generator().manual_seed(7)
        self.model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3)).double()
        self.start = torch.randn(21, generator=rng, dtype=torch.float64)
        self.precond = 0.5 + torch.rand(21, generator=rng, dtype=torch.float64)
        self.inputs, self.query = (torch.randn(self.n, 2, generator=rng, dtype=torch.float64) for _ in range(2))
        if loss == "softmax":
            self.loss = lambda u: F.cross_entropy(u.reshape(-1, 3), torch.tensor([0, 2, 1]))
        else:
            self.loss = lambda u: u.sub(torch.arange(9.0) / 2).square().sum() / (2 * self.n)
        solution = scipy.integrate.solve_ivp(
            self.velocity, (0, self.elapsed), self.start, method="DOP853", rtol=1e-10, atol=1e-12, dense_output=True
        )
        self.weights = lambda tau: torch.tensor(solution.sol(tau))

    def outputs(self, weights, inputs):
        names = dict(self.model.named_parameters())
        parts = weights.split([p.numel() for p in names.values()])
        state = {name: part.reshape(p.shape) for (name, p), part in zip(names.items(), parts, strict=True)}
        return torch.func.functional_call(self.model, state, (inputs,)).reshape(-1)

    def gradient(self, tau):
        return torch.func.grad(self.loss)(self.outputs(self.weights(tau), self.inputs).detach())

    def velocity(self, _tau, weights):
        weights = torch.tensor(weights, requires_grad=True)
        (slope,) = torch.autograd.grad(self.loss(self.outputs(weights, self.inputs)), weights)
        return -(self.precond * slope).numpy()

    def kernel(self, tau, inputs):
        J, J_rows = (torch.func.jacrev(self.outputs)(self.weights(tau), x) for x in (self.inputs, inputs))
        return (J_rows * self.precond) @ J.T

    def hessian(self, tau):
        return torch.func.jacrev(torch.func.grad(self.loss))(self.outputs(self.weights(tau), self.inputs).detach())


@pytest.mark.parametrize("loss", ["softmax", "squared"])
def test_identities_1_2_3_on_a_network(loss):
    """Energy balance, gradient closure, displacement, on the gradient flow of a nonlinear network with M != I."""
    flow = NetworkFlow(loss)
    P, W, D, G = runge_kutta(
        lambda tau: flow.kernel(tau, flow.inputs),
        flow.hessian,
        lambda tau: flow.kernel(tau, flow.query),
        flow.elapsed,
        60 if loss == "softmax" else 200,
    )
    first, last = flow.weights(0.0), flow.weights(flow.elapsed)
    gradient = flow.gradient(0.0)
    drift = relative_error(flow.kernel(flow.elapsed, flow.inputs), flow.kernel(0.0, flow.inputs))
    assert drift > 0.2  # not the lazy regime
    u_s, u_T, query_s, query_T = (flow.outputs(w, x) for x in (flow.inputs, flow.query) for w in (first, last))
    assert_close(gradient @ W @ gradient, flow.loss(u_s) - flow.loss(u_T), 1e-6, name="energy")
    assert_close(P @ gradient, flow.gradient(flow.elapsed), 1e-6, name="closure")
    assert_close(-D @ gradient, u_T - u_s, 1e-6, name="displacement")
    assert_close(-G @ gradient, query_T - query_s, 1e-6, name="test displacement")


@drawn
@given(problem=problems())
def test_identity_1_2_3_for_constant_operators(problem):
    """The same for a quadratic loss, from the ODE in the outputs."""
    P, W, D, _ = van_loan(*problem.constant)
    end = forced(problem.K, problem.B, torch.zeros(problem.N), problem.gradient, problem.elapsed)
    assert_close(end.energy, problem.gradient @ W @ problem.gradient, 1e-9)
    assert (end.gradient - P @ problem.gradient).abs().max() < 1e-9 * problem.gradient.abs().max()
    assert_close(end.displacement, -D @ problem.gradient, 1e-9)


@drawn
@given(problem=problems())
def test_identity_4_propagator(problem):
    K, B, _, elapsed = problem.constant
    P, W, D, _ = van_loan(K, B, None, elapsed)
    unit = EYE(problem.N)
    assert_close(unit - P, B @ D, 1e-11)
    if problem.kind != "softmax":
        inverse = torch.linalg.inv(B)
        assert_close(W, (inverse - P.T @ inverse @ P) / 2, 1e-10)
    if problem.kind == "squared":
        assert_close(W, problem.n / 2 * (unit - P.T @ P), 1e-10)


@pytest.mark.parametrize("kind", ["softmax", "squared"])
def test_identity_4_always(kind):
    """I - P = int B K P for varying K and B; for constant B still I - P = B D, for beta I still W = (I - P^T P) / (2 beta)."""
    problem = Problem(seed=2, n=2, classes=3, rank=4, kind=kind, stiffness=2.0)
    (K, _), unit = problem.varying(), EYE(6)

    def B(tau):
        return problem.B * (1 + tau / problem.elapsed)

    operators = runge_kutta(K, B, lambda tau: B(tau) @ K(tau), problem.elapsed, 100)
    assert_close(unit - operators.P, operators.G, 1e-13)
    operators = runge_kutta(K, lambda _: problem.B, None, problem.elapsed, 100)
    assert_close(unit - operators.P, problem.B @ operators.D, 1e-13)
    if kind == "squared":
        assert_close(operators.W, problem.n / 2 * (unit - operators.P.T @ operators.P), 1e-7)


@drawn
@given(first=problems(), share=st.floats(0.01, 0.99))
def test_identity_5_composition(first, share):
    K, B, K_query, elapsed = first.constant
    parts = van_loan(K, B, K_query, share * elapsed), van_loan(K, B, K_query, (1 - share) * elapsed)
    assert_operators(compose(*parts), van_loan(K, B, K_query, elapsed), 1e-11)


def test_identity_5_composition_of_different_operators():
    """The order of the two windows matters: K and B differ between them."""
    one, two = (Problem(seed=seed, n=2, classes=3, rank=4, kind="softmax", stiffness=3.0) for seed in (5, 6))
    composed = compose(van_loan(*one.constant), van_loan(*two.constant))
    gradient = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    middle = forced(one.K, one.B, torch.zeros(6), gradient, one.elapsed)
    end = forced(two.K, two.B, torch.zeros(6), middle.gradient, two.elapsed)
    assert_close(composed.P @ gradient, end.gradient, 1e-9)
    assert_close(gradient @ composed.W @ gradient, middle.energy + end.energy, 1e-9)
    assert_close(-composed.D @ gradient, middle.displacement + end.displacement, 1e-9)
    assert relative_error(compose(van_loan(*two.constant), van_loan(*one.constant)).P, composed.P) > 0.1


@pytest.mark.parametrize("kind", ["softmax", "squared", "invertible"])
@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("varying", [False, True])
def test_identity_6_reservoir_invisibility(kind, rank, varying):
    problem = Problem(seed=8, n=2, classes=3, rank=rank, kind=kind, stiffness=3.0)
    if varying:
        K, K_query = problem.varying()
        operators = runge_kutta(K, lambda _: problem.B, K_query, problem.elapsed, 200)
    else:
        operators = van_loan(*problem.constant)
    eigvals, eigvecs = torch.linalg.eigh(operators.W)
    null = eigvecs[:, eigvals < 1e-12 * eigvals.max()]
    assert null.shape[1] == 6 - rank  # here J(tau) keeps its column space, so that there is a reservoir
    assert (operators.D @ null).abs().max() < 1e-12 * operators.D.abs().max()
    assert (operators.G @ null).abs().max() < 1e-12 * operators.G.abs().max()


@drawn
@given(problem=problems(stiffness=(0.3, 5.0)))
def test_identity_7_factorization(problem):
    """D = C_S W^1/2, G = C_Q W^1/2; both forms of A agree and predict the test motion for any gradient."""
    _, W, D, G = van_loan(*problem.constant)
    cut = {"rtol": 1e-9, "hermitian": True}
    assert_close(D @ pinv(W, **cut) @ W, D, 1e-6)
    assert_close(G @ pinv(W, **cut) @ W, G, 1e-6)
    direct = G @ pinv(D, rtol=1e-9)
    assert_close(direct @ D, G, 1e-8)
    assert_close(direct @ (D @ problem.gradient), G @ problem.gradient, 1e-8)
    regression = G @ pinv(W, **cut) @ D.T @ pinv(D @ pinv(W, **cut) @ D.T, **cut)
    assert_close(regression, direct, 1e-5)


def test_identity_7_kernels_are_equal_for_constant_singular_hessian_and_varying_kernel():
    """Ker D = ker W for any constant B, also singular, also with K(tau)."""
    problem = Problem(seed=9, n=2, classes=3, rank=2, kind="softmax", stiffness=3.0)
    K, _ = problem.varying()
    operators = runge_kutta(K, lambda _: problem.B, None, problem.elapsed, 200)
    ranks = [int(torch.linalg.matrix_rank(matrix, rtol=1e-10)) for matrix in (operators.W, operators.D)]
    assert ranks == [2, 2]


def test_identity_7_interpolation_variance():
    """Sum_j ||J_Q M^1/2 v_j||^2 / sigma_j^2 is the variance of the interpolant K_QS K^+ (y + unit noise) over all outputs."""
    problem = Problem(seed=10, n=2, classes=3, rank=8, kind="squared", stiffness=1.0)
    problem.J, problem.J_query = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, sigma, right = torch.linalg.svd(problem.J, full_matrices=False)
    formula = ((problem.J_query @ right.T) / sigma).square().sum()
    K, K_query = problem.J @ problem.J.T, problem.J_query @ problem.J.T
    predictor = K_query @ torch.linalg.inv(K)
    assert_close(formula, torch.trace(predictor @ predictor.T), 1e-9)
    late = van_loan(K, problem.B, K_query, 1e6)
    assert_close(late.G @ problem.B, predictor, 1e-9)  # G g_s with g_s = noise / n


@drawn
@given(problem=problems(kinds=["squared"]))
def test_identity_8_frozen_squared(problem):
    assert_close(van_loan(*problem.constant).W, frozen_squared(problem.K, problem.n, problem.elapsed), 1e-11)


# --- Section 4 ---------------------------------------------------------------------------------------------------------------


def interval(K, B, K_query, elapsed):
    """Section 4 verbatim: W_step, E, D_step, P_step, G_step."""
    eigvals, eigvecs = torch.linalg.eigh(K)
    L = eigvecs * eigvals.clamp(min=0).sqrt()
    z, V = torch.linalg.eigh(elapsed * L.T @ B @ L)

    def phi(x):
        return torch.where(x.abs() < 1e-3, 1 - x / 2 + x**2 / 6 - x**3 / 24 + x**4 / 120 - x**5 / 720, -torch.expm1(-x) / x)

    def psi(x):
        series = 1 / 2 - x / 6 + x**2 / 24 - x**3 / 120 + x**4 / 720
        return torch.where(x.abs() < 1e-3, series, (1 - phi(x)) / x)

    W = elapsed * L @ (V * phi(2 * z)) @ V.T @ L.T
    E = elapsed * (EYE(len(K)) - elapsed * B @ L @ (V * psi(z)) @ V.T @ L.T)
    return Operators(EYE(len(K)) - B @ K @ E, W, K @ E, K_query @ E), E


@drawn
@given(problem=problems(stiffness=(1e-3, 100.0)))
def test_section_4_is_exact_for_constant_operators(problem):
    assert_operators(interval(*problem.constant)[0], van_loan(*problem.constant), 1e-11)


@drawn
@given(problem=problems())
def test_section_4_forcing(problem):
    """g <- P g - E B r, delta u = -D g - E^T r, energy = -g^T delta u - 1/2 delta u^T B delta u."""
    K, B, K_query, elapsed = problem.constant
    g, r = problem.gradient, problem.forcing
    (P, _, D, _), E = interval(K, B, K_query, elapsed)
    end = forced(K, B, r, g, elapsed)
    displacement = -D @ g - E.T @ r
    assert_close(P @ g - E @ B @ r, end.gradient, 1e-8, name="gradient")
    assert_close(displacement, end.displacement, 1e-8, name="displacement")
    energy = -g @ displacement - displacement @ B @ displacement / 2
    size = float((g @ displacement).abs() + displacement @ B @ displacement)  # the energy may vanish
    assert abs(float(energy - end.energy)) < 1e-8 * size


def test_forced_energy_is_the_work_along_the_path():
    """Phi(s) - Phi(T) = int g^T (K g + r) dtau, with g from the closed form by quadrature."""
    problem = Problem(seed=11, n=2, classes=3, rank=4, kind="softmax", stiffness=3.0)
    K, B, K_query, elapsed = problem.constant
    g, r = problem.gradient, problem.forcing
    nodes, weights = np.polynomial.legendre.leggauss(30)
    work = 0.0
    for node, weight in zip(elapsed * (nodes + 1) / 2, weights * elapsed / 2, strict=True):
        operators, E = interval(K, B, K_query, node)
        now = operators.P @ g - E @ B @ r
        work += weight * float(now @ (K @ now + r))
    assert_close(forced(K, B, r, g, elapsed).energy, work, 1e-9)


def test_section_4_is_second_order():
    problem = Problem(seed=12, n=2, classes=3, rank=4, kind="softmax", stiffness=2.0)
    (K, K_query), B = problem.varying(), lambda tau: problem.B * (1 + tau / problem.elapsed)
    exact = runge_kutta(K, B, K_query, problem.elapsed, 640)

    def scheme(intervals):
        total, width = None, problem.elapsed / intervals
        for s in width * np.arange(intervals):
            step, _ = interval((K(s) + K(s + width)) / 2, B(s + width / 2), (K_query(s) + K_query(s + width)) / 2, width)
            total = step if total is None else compose(total, step)
        return total

    for coarse, fine, reference in zip(scheme(10), scheme(20), exact, strict=True):
        assert 3.6 < relative_error(coarse, reference) / relative_error(fine, reference) < 4.4


# --- Section 5 ---------------------------------------------------------------------------------------------------------------


@drawn
@given(problem=problems(stiffness=(0.3, 5.0)))
def test_spectrum_for_constant_hessian(problem):
    """Omega = I - P~^T P~, 0 <= omega < 1, kappa = -1/2 log(1 - omega), the dissipated loss is 1/2 sum omega_i h_i^2."""
    operators = van_loan(*problem.constant)
    eigvals, eigvecs = omega(operators.W, problem.B, problem.basis)
    assert eigvals.shape == (problem.basis.shape[1],)
    assert (eigvals.diff() <= 0).all()
    assert eigvals.min() > -1e-12
    assert eigvals.max() < 1
    whitened = oracles.whitened_propagator(operators.P, problem.B, problem.basis)
    onto = problem.basis @ problem.basis.T
    assert_close(eigvecs @ torch.diag(eigvals) @ eigvecs.T, onto - whitened.T @ whitened, 1e-10)
    assert_close(log_dissipation(operators.P, problem.B, problem.basis), -torch.log1p(-eigvals.clamp(min=0)) / 2, 1e-9)
    plain = torch.linalg.eigh(problem.B)
    inverse_root = torch.where(plain.eigenvalues > 1e-12 * plain.eigenvalues.max(), plain.eigenvalues, torch.inf).rsqrt()
    h = eigvecs.T @ (plain.eigenvectors * inverse_root) @ plain.eigenvectors.T @ problem.gradient
    assert_close((eigvals * h.square()).sum() / 2, problem.gradient @ operators.W @ problem.gradient, 1e-9)


@drawn
@given(problem=problems(stiffness=(0.3, 5.0)))
def test_spectrum_does_not_depend_on_the_basis(problem):
    operators = van_loan(*problem.constant)
    for function, matrix in ((lambda *a: omega(*a)[0], operators.W), (log_dissipation, operators.P)):
        assert_close(function(matrix, problem.B), function(matrix, problem.B, problem.basis), 1e-9)


def test_spectrum_may_leave_the_unit_interval_when_the_hessian_varies():
    """Omega > 1 when B falls along the window, kappa < 0 when it turns: two spectra, never derived from one another."""
    problem, other = (Problem(seed=seed, n=2, classes=3, rank=6, kind="invertible", stiffness=8.0) for seed in (13, 14))
    falling = runge_kutta(lambda _: problem.K, lambda tau: problem.B * math.exp(-tau / problem.elapsed), None, problem.elapsed, 300)
    assert omega(falling.W, problem.B)[0].max() > 1.01
    turned = van_loan(problem.K, other.B, None, 0.1 * other.elapsed)
    window = compose(van_loan(problem.K, problem.B, None, 1e-3 * problem.elapsed), turned)
    assert log_dissipation(window.P, problem.B).min() < -0.01


# --- Section 1: losses, Jacobians, kernels -----------------------------------------------------------------------------------


N_LOSS, C_LOSS = 4, 3
U = torch.randn(N_LOSS, C_LOSS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
LABELS, VALUES = torch.tensor([0, 2, 1, 1]), torch.randn(N_LOSS, C_LOSS, generator=torch.Generator().manual_seed(4))
WEIGHT = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)


def squared(u, y):
    return (u - y).square().sum(dim=1).mean() / 2


def unit_blocks(scale):
    return (scale * EYE(C_LOSS, dtype=torch.float64)).expand(N_LOSS, -1, -1)


@pytest.mark.parametrize(
    ("loss", "targets", "blocks"),
    [
        (squared, VALUES, unit_blocks(1 / N_LOSS)),
        (F.mse_loss, VALUES, unit_blocks(2 / (N_LOSS * C_LOSS))),
        (F.cross_entropy, LABELS, softmax_blocks(U)),
        (F.cross_entropy, VALUES.double().softmax(dim=1), softmax_blocks(U)),
        (
            lambda u, y: F.cross_entropy(u, y, weight=WEIGHT),
            LABELS,
            softmax_blocks(U) * N_LOSS * (WEIGHT[LABELS] / WEIGHT[LABELS].sum())[:, None, None],
        ),
        (lambda u, y: 2 / 3 * F.cross_entropy(u, y, reduction="sum"), LABELS, softmax_blocks(U) * N_LOSS * 2 / 3),
        (lambda u, y: F.huber_loss(u, y, delta=1e-3), VALUES, unit_blocks(0.0)),
    ],
    ids=["squared", "mse", "softmax", "soft labels", "class weights", "sum", "huber, linear zone"],
)
def test_loss_hessian_closed_forms(loss, targets, blocks):
    assert_close(oracles.loss_hessian_blocks(loss, U, targets), blocks, 1e-12)
    step, direction = 1e-6, torch.linspace(-1, 1, U.numel(), dtype=torch.float64).reshape(U.shape)
    ends = [loss(U + sign * step * direction, oracles.double(targets)) for sign in (1, -1)]
    slope = (oracles.loss_gradient(loss, U, targets) * direction).sum()
    assert_close(slope, (ends[0] - ends[1]) / (2 * step), 1e-8)


def test_loss_that_couples_examples_is_refused():
    with pytest.raises(AssertionError, match="coupled by the loss"):
        oracles.loss_hessian_blocks(lambda u, y: (u - y).square().mean().sqrt(), U, VALUES)


# torch.func refuses saved-tensor hooks, autograd functions without setup_context, autograd.grad inside, packed sequences.
WITHOUT_TORCH_FUNC = {"checkpoint", "own_function", "gradient_inside", "gru_packed"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_jacobian_is_that_of_torch_func(case):
    model, inputs = case.build(torch.float64)
    actual = oracles.jacobian(model, inputs)
    assert model.training == case.training
    model.eval()
    params = {name: param.detach() for name, param in model.named_parameters() if param.requires_grad}
    assert list(actual) == list(params)
    assert sum(param.numel() for param in model.parameters()) < 1500
    assert max(row.abs().max() for row in actual.values()) > 1e-3
    if case.name not in WITHOUT_TORCH_FUNC:
        # One row at a time, no vmap: weight_norm, for one, has no batching rule.
        expected = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (inputs,)).flatten(), chunk_size=1)(params)
        for name, row in expected.items():
            assert_close(actual[name], row.reshape(actual[name].shape), 1e-12, name=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_depend_on_their_own_row_only(case):
    model, inputs = case.build(torch.float64)
    outputs = model.eval()(inputs)
    assert outputs.ndim == 2
    assert 1 <= outputs.shape[1] <= 3 or case.name == "tied_embedding"
    for rows in (slice(0, 1), slice(1, 3), slice(3, 5)):
        assert_close(model(pytree.tree_map(lambda x, rows=rows: x[rows], inputs)), outputs[rows], 1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if not case.stops_gradient], ids=str)
def test_jacobian_is_the_finite_difference(case):
    model, inputs = case.build(torch.float64)
    J = oracles.stacked_jacobian(model, inputs)
    model.eval()
    params = [param for param in model.parameters() if param.requires_grad]
    direction = torch.randn(J.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = direction.split([param.numel() for param in params])
    ends = []
    with torch.no_grad():
        for shift in (1e-6, -2e-6):
            for param, part in zip(params, parts, strict=True):
                param.add_(shift * part.reshape(param.shape))
            ends.append(model(inputs).flatten())
    assert_close((ends[0] - ends[1]) / 2e-6, J @ direction, 1e-7)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases_are_the_same_in_every_dtype_and_untouched(case):
    state = torch.random.get_rng_state()
    model, inputs = case.build(torch.float64)
    single, single_inputs = case.build(torch.float32)
    assert torch.equal(state, torch.random.get_rng_state())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in single.state_dict().items():
        assert torch.equal(value.to(before[name].dtype), before[name])
    assert_close(oracles.gram(single, single_inputs), oracles.gram(model, inputs), 1e-15)
    assert_close(copy.deepcopy(single).eval()(single_inputs), copy.deepcopy(model).eval()(inputs), 1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())
    other, query = case.build(torch.float64, draw=1, num_examples=3)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    assert relative_error(oracles.gram(other, query, outputs="trace"), oracles.gram(model, inputs, outputs="trace")[:3, :3]) > 1e-6


def test_half_of_the_cases_are_in_train_mode():
    assert abs(2 * sum(case.training for case in CASES) - len(CASES)) <= 2
    assert BY_NAME["batch_norm"].training
    assert BY_NAME["dropout"].training
    assert len(BY_NAME) == len(CASES)


@pytest.mark.parametrize("name", ["mlp", "tied_linear", "dict_input"])
def test_gram_kinds(name):
    """Each kind from its own definition: gradients of single outputs, of their sum, and sums over classes."""
    case = BY_NAME[name]
    model, inputs = case.build()
    _, query = case.build(draw=1, num_examples=4)
    precond = {key: 0.5 + torch.rand_like(param) for key, param in model.named_parameters()}
    M = torch.cat([value.flatten() for value in precond.values()])
    J, J_query = (oracles.stacked_jacobian(model, x).reshape(-1, 3, len(M)) for x in (inputs, query))
    full = oracles.gram(model, query, inputs, precond)
    assert_close(full[2 * 3 + 1, 4 * 3 + 2], (J_query[2, 1] * M * J[4, 2]).sum())
    for outputs, rows, columns in (
        ("trace", J_query, J),
        ("class=1", J_query[:, 1:2], J[:, 1:2]),
        ("sum", J_query.sum(1, keepdim=True), J.sum(1, keepdim=True)),
    ):
        expected = torch.einsum("icp,p,jcp->ij", rows, M, columns)
        assert_close(oracles.gram(model, query, inputs, precond, outputs), expected, name=outputs)
    square = oracles.gram(model, inputs)
    assert_close(square, oracles.gram(model, inputs, inputs))
    assert_close(square, square.T)
    assert torch.linalg.eigvalsh(square).min() > -1e-12 * square.abs().max()
    named = oracles.gram(model, inputs, forward_fn=lambda m, x: m(x)[:, :2], outputs="class=1")
    assert_close(named, oracles.gram(model, inputs, outputs="class=1"))


@pytest.mark.parametrize("name", ["mlp", "tied_linear", "dict_input"])
@pytest.mark.parametrize("kind", ["squared", "softmax", "class weights"])
def test_gram_of_the_loss(name, kind):
    """K_ij = sum_p M_p s_ip s_jp with s_i = sum_c r_ic J_icp: the residual r is of one example, whatever the mean over the batch."""
    case = BY_NAME[name]
    model, inputs = case.build()
    _, query = case.build(draw=1, num_examples=4)
    model.eval()
    precond = {key: 0.5 + torch.rand_like(param) for key, param in model.named_parameters()}
    M = torch.cat([value.flatten() for value in precond.values()])
    rng = torch.Generator().manual_seed(0)
    labels, values = torch.tensor([0, 2, 1, 1, 0, 2, 0, 1, 2]), torch.randn(9, 3, generator=rng)
    loss, targets = {
        "squared": (squared, values),
        "softmax": (F.cross_entropy, labels),
        "class weights": (lambda u, y: F.cross_entropy(u, y, weight=WEIGHT, reduction="sum"), labels),
    }[kind]

    def scores(x, y):
        u, J = model(x).detach(), oracles.stacked_jacobian(model, x).reshape(-1, 3, len(M))
        if kind == "squared":
            residual = u - y
        else:
            residual = u.exp() / u.exp().sum(dim=1, keepdim=True) - EYE(3)[y]
            residual = residual * (WEIGHT[y][:, None] if kind == "class weights" else 1.0)
        return (residual[:, :, None] * J).sum(dim=1)

    y, y_query = targets[:5], targets[5:]
    own, other = scores(inputs, y), scores(query, y_query)
    assert_close(oracles.gram(model, inputs, outputs="loss", loss=loss, targets=y), own @ own.T)
    cross = oracles.gram(model, query, inputs, precond, "loss", loss=loss, targets=y_query, other_targets=y)
    assert_close(cross, (other * M) @ own.T)
    # A backward pass through the loss of one example.
    single = pytree.tree_map(lambda x: x[2:3], inputs)
    loss(model(single), oracles.double(y[2:3])).backward()
    grads = torch.cat([param.grad.flatten() for param in model.parameters()])
    assert_close(own[2], grads)


# --- The comparison itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (
            [[1.0, 2.0], [3.0, 4.1]],
            [[1.0, 2.0], [3.0, 4.0]],
            r"worst at \(1, 1\): actual 4.09.*expected 4, actual/expected 1.025",
        ),
        ([1.0, 2.0], [1.0, 2.0, 3.0], r"shape \(2,\), expected \(3,\)"),
        ([1.0, math.nan], [1.0, 2.0], r"actual has 1 NaN of 2, first at \(1,\)"),
        ([1.0], [math.nan], r"expected has 1 NaN"),
        ([math.inf, 1.0], [2.0, 1.0], r"relative error inf"),
        ([-math.inf, 1.0], [math.inf, 1.0], r"relative error inf"),
        ([1e-3], [0.0], r"relative error 1.000e-03"),
        (None, [0.0], r"actual is None"),
    ],
)
def test_assert_close_refuses(actual, expected, message):
    with pytest.raises(AssertionError, match=message):
        assert_close(actual, expected)


def test_assert_close_accepts():
    assert_close(torch.tensor([1.0, math.inf]), np.array([1.0 + 1e-12, math.inf]))
    assert_close(torch.zeros(0, 3), np.zeros((0, 3)))
    assert_close([1e6, 1e-6], [1e6, 0.0])  # relative to the norm, not entry by entry
