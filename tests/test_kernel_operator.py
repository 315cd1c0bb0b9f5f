"""NTKOperator against dense kernels: every case, kind and route, and the largest eigenpairs."""

import dataclasses
import itertools

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from cases import BY_NAME, CASES
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gram as oracle_gram
from torch import nn

import ntkscope
from ntkscope._checks import InputError, InputTypeError, UnsupportedError
from ntkscope.kernel.operator import NTKOperator

# torch has neither forward-mode AD nor a double backward pass of EmbeddingBag.
UNSUPPORTED = {"embedding_bag_sum", "embedding_bag_mean", "embedding_bag_max", "embedding_bag_padding", "embedding_bag_weights"}
# Stopped gradients, or operations without a formula for forward-mode AD.
TWICE = {
    "embedding_padding",
    "weight_norm",
    "weight_norm_conv",
    "no_grad_branch",
    "gru_packed",
    "own_function",
    "gradient_inside",
}
SUPPORTED = [case for case in CASES if case.name not in UNSUPPORTED]
SOME = [BY_NAME[name] for name in ("mlp", "cnn", "tied_embedding", "gpt", "lstm_two_layers", "experts_hard", "weight_norm", "dict_input")]


def vectors(op, num=3, dtype=torch.float64):
    return torch.randn(op.shape[1], num, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def random_precond(model):
    generator = torch.Generator().manual_seed(1)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    weights = {name: torch.rand(parameter.shape, generator=generator, dtype=torch.float64).to(parameter) for name, parameter in named}
    return weights | {named[-1][0]: 0.7}  # one of them a number


def oracle_precond(model):
    named = dict(model.named_parameters())
    return {name: torch.as_tensor(m).expand(named[name].shape) for name, m in random_precond(model).items()}


# --- Products ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SUPPORTED, ids=str)
def test_products_match_the_matrix(case):
    model, inputs = case.build()
    op, matrix = NTKOperator(model, inputs), oracle_gram(model, inputs)
    assert op.shape == tuple(matrix.shape)
    assert op.dtype == np.float64
    assert op.jvp_route == ("double backward" if case.name in TWICE else "forward")
    assert bool(op.jvp_reason) == (case.name in TWICE)
    assert_close(op(vectors(op)), matrix @ vectors(op), rtol=1e-9)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_unsupported_operations_are_named(name):
    with pytest.raises(UnsupportedError, match=r"(?s)Forward-mode AD: .*_embedding_bag .*double backward pass: .*_embedding_bag_backward"):
        NTKOperator(*BY_NAME[name].build())


@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("kind", ["full", "trace", "sum", "class=1"])
def test_cross_weighted_products_match_the_matrix(case, kind):
    model, inputs = case.build()
    _, query = case.build(draw=1, num_examples=4)
    op = NTKOperator(model, query, inputs, outputs=kind, precond=random_precond(model))
    matrix = oracle_gram(model, query, inputs, precond=oracle_precond(model), outputs=kind)
    assert op.shape == tuple(matrix.shape)
    assert_close(op(vectors(op)), matrix @ vectors(op), rtol=1e-9)
    assert_close(op.T(vectors(op.T)), matrix.T @ vectors(op.T), rtol=1e-9)


@pytest.mark.parametrize("is_cross", [False, True])
def test_loss_products_match_the_matrix(is_cross):
    model, inputs = BY_NAME["mlp"].build()
    _, query = BY_NAME["mlp"].build(draw=1, num_examples=4)
    targets, query_targets = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([2, 2, 0, 1])
    other = {"other": query, "other_targets": query_targets} if is_cross else {}
    op = NTKOperator(model, inputs, outputs="loss", targets=targets, loss="cross_entropy", **other)
    matrix = oracle_gram(model, inputs, outputs="loss", targets=targets, loss=nn.functional.cross_entropy, **other)
    assert_close(op(vectors(op)), matrix @ vectors(op), rtol=1e-9)


@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("kind", ["full", "trace"])
def test_blocks_do_not_change_the_result(case, kind):
    model, inputs = case.build()
    whole = NTKOperator(model, inputs, outputs=kind)
    pieces = NTKOperator(model, inputs, outputs=kind, max_memory=1)
    assert len(whole._blocks(whole._num_rows, 3)) == 1
    assert pieces._chunk_size(3) == 1
    assert len(pieces._blocks(pieces._num_rows, 1)) == pieces._num_rows
    assert_close(pieces(vectors(whole)), whole(vectors(whole)), rtol=1e-9)
    middle = NTKOperator(model, inputs, outputs=kind, max_memory=12 * whole._bytes_per_example)  # two examples and a vector or so
    assert middle._chunk_size(3) < 3
    assert 1 < len(middle._blocks(middle._num_rows, middle._chunk_size(3))) < middle._num_rows
    assert_close(middle(vectors(whole)), whole(vectors(whole)), rtol=1e-9)


@pytest.mark.parametrize("case", SUPPORTED, ids=str)
def test_float32_is_accurate_to_rounding(case):
    model, inputs = case.build(torch.float32)
    op = NTKOperator(model, inputs)
    product = op(vectors(op, dtype=torch.float32))
    assert op.dtype == np.float32
    assert product.dtype == torch.float32
    assert_close(product.double(), oracle_gram(*case.build()) @ vectors(op, dtype=torch.float32).double(), rtol=1e-5)


def test_half_precision_models_take_and_give_float32():
    model, inputs = BY_NAME["mlp"].build(torch.bfloat16)
    op = NTKOperator(model, inputs)
    product = op(vectors(op))
    assert product.dtype == torch.float32
    assert_close(product.double(), oracle_gram(model, inputs) @ vectors(op), rtol=5e-2)


def test_scipy_and_torch_interfaces_agree():
    model, inputs = BY_NAME["mlp"].build()
    _, query = BY_NAME["mlp"].build(draw=1, num_examples=4)
    op = NTKOperator(model, query, inputs)
    matrix = oracle_gram(model, query, inputs).numpy()
    right, left = vectors(op).numpy(), vectors(op.T).numpy()
    assert isinstance(op, scipy.sparse.linalg.LinearOperator)
    assert scipy.sparse.linalg.aslinearoperator(op) is op
    assert_close(op @ right, matrix @ right)
    assert_close(op @ right[:, 0], matrix @ right[:, 0])
    assert_close(op.matvec(right[:, :1]), matrix @ right[:, :1])
    assert_close(op.matmat(right[::-1]), matrix @ right[::-1])  # negative strides
    assert_close(op.rmatvec(left[:, 0]), matrix.T @ left[:, 0])
    assert_close(op.rmatmat(left), matrix.T @ left)
    assert_close(op.T @ left, matrix.T @ left)
    assert_close(op.H @ left, matrix.T @ left)
    assert_close(left.T @ op, left.T @ matrix)
    assert_close((2 * op + op) @ right, 3 * matrix @ right)
    assert_close(op @ np.ones(op.shape[1], dtype=int), matrix.sum(axis=1))
    for product in (op(torch.tensor(right)), op @ torch.tensor(right), op(torch.tensor(right[:, 0]))):
        assert isinstance(product, torch.Tensor)
        assert not product.requires_grad
    assert_close(op(torch.tensor(right[:, 0])), matrix @ right[:, 0])
    assert op(torch.ones(op.shape[1], 0)).shape == (op.shape[0], 0)
    assert not op.is_symmetric
    symmetric = NTKOperator(model, inputs)
    assert symmetric.T is symmetric
    largest = scipy.sparse.linalg.svds(op, 2, return_singular_vectors=False)
    assert_close(np.sort(largest), np.sort(np.linalg.svd(matrix, compute_uv=False)[:2]))


def test_weights_are_read_at_call_time():
    model, inputs = BY_NAME["mlp"].build()
    op = NTKOperator(model, inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert_close(op(vectors(op)), oracle_gram(model, inputs) @ vectors(op))


def test_forward_fn_and_params_choose_what_is_differentiated():
    model, inputs = BY_NAME["mlp"].build()
    names = [name for name, _ in model.named_parameters()][-2:]
    op = NTKOperator(model, {"x": inputs}, forward_fn=lambda m, batch: m(batch["x"])[:, :2], params=names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    assert_close(op(vectors(op)), oracle_gram(model, inputs, forward_fn=lambda m, batch: m(batch)[:, :2]) @ vectors(op))


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    num_examples=st.integers(1, 5),
    seed=st.integers(0, 2**16),
    bias=st.booleans(),
)
def test_operator_is_symmetric_and_positive_semidefinite(sizes, num_examples, seed, bias):
    torch.manual_seed(seed)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b, bias=bias), nn.Tanh())]
    op = NTKOperator(nn.Sequential(*layers[:-1]).double(), torch.randn(num_examples, sizes[0], dtype=torch.float64))
    x, y = torch.randn(2, op.shape[0], dtype=torch.float64)
    left, right = op(x), op(y)
    scale = float(x.norm() * right.norm())
    assert abs(float(x @ right - left @ y)) <= 1e-12 * max(scale, float(y.norm() * left.norm()))
    assert float(x @ left) >= -1e-12 * float(x.norm() * left.norm())


# --- The model is left as found ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SUPPORTED, ids=str)
def test_model_is_left_as_found(case):
    model, inputs = case.build(torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    modes = [module.training for module in model.modules()]
    rng = torch.random.get_rng_state()
    backends = (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.mha.get_fastpath_enabled())
    with torch.no_grad():  # as in an evaluation loop
        op = NTKOperator(model, inputs, max_memory=1)
        op(vectors(op, 1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.mha.get_fastpath_enabled()) == backends


class Failing(nn.Module):
    """Draws random numbers, counts its calls, and fails when it is told to."""

    def __init__(self):
        super().__init__()
        self.fc, self.fails = nn.Linear(2, 2), False
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        torch.rand(1)
        if self.fails:
            raise RuntimeError("mid-forward")
        return self.fc(x)


@pytest.mark.parametrize("when", ["construction", "product"])
def test_model_is_left_as_found_after_an_exception(when):
    torch.manual_seed(0)
    model = Failing().train()
    op = NTKOperator(model, torch.ones(3, 2))
    weight, rng = model.fc.weight, torch.random.get_rng_state()
    model.fails = True
    expected = ntkscope.InputError if when == "construction" else RuntimeError
    with pytest.raises(expected, match="mid-forward"):
        NTKOperator(model, torch.ones(3, 2)) if when == "construction" else op(torch.ones(6))
    assert model.training
    assert model.fc.weight is weight
    assert float(model.calls) == 0.0
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled


# --- Eigenpairs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["eigsh", "lobpcg"])
@pytest.mark.parametrize("name", ["mlp", "gpt", "weight_norm"])
@pytest.mark.parametrize("kind", ["full", "trace"])
def test_top_eigenpairs_match_the_matrix(solver, name, kind):
    model, inputs = BY_NAME[name].build(num_examples=16)
    op, matrix = NTKOperator(model, inputs, outputs=kind), oracle_gram(model, inputs, outputs=kind)
    pairs = op.top(3, solver=solver)
    assert_close(pairs.eigvals, torch.linalg.eigvalsh(matrix).flip(0)[:3], rtol=1e-9)
    assert pairs.eigvecs.shape == (len(matrix), 3)
    assert pairs.eigvals.dtype == pairs.eigvecs.dtype == torch.float64
    assert_close(pairs.eigvecs.T @ pairs.eigvecs, torch.eye(3))
    residuals = torch.linalg.vector_norm(matrix @ pairs.eigvecs - pairs.eigvecs * pairs.eigvals, dim=0) / pairs.eigvals[0]
    assert float(residuals.max()) < 1e-8
    assert float((pairs.residuals - residuals).abs().max()) < 1e-13
    assert pairs.solver == solver
    assert 3 < pairs.num_products < 3 * len(matrix)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pairs.solver = "other"


@pytest.mark.parametrize("solver", ["eigsh", "lobpcg"])
def test_top_eigenpairs_in_float32(solver):
    model, inputs = BY_NAME["mlp"].build(torch.float32, num_examples=16)
    pairs = NTKOperator(model, inputs).top(3, solver=solver)
    assert_close(pairs.eigvals, torch.linalg.eigvalsh(oracle_gram(model, inputs)).flip(0)[:3], rtol=1e-5)
    assert float(pairs.residuals.max()) < 1e-4


@pytest.mark.parametrize("solver", ["eigsh", "lobpcg"])
def test_top_eigenpairs_repeat_with_the_seed(solver):
    op = NTKOperator(*BY_NAME["mlp"].build(num_examples=8))
    first, second = op.top(2, solver=solver, seed=3), op.top(2, solver=solver, seed=3)
    assert torch.equal(first.eigvecs, second.eigvecs)
    assert first.num_products == second.num_products


def test_num_products_counts_vectors():
    op = NTKOperator(*BY_NAME["mlp"].build(num_examples=8))
    counted = []
    whole = op._apply_full
    op._apply_full = lambda vectors: (counted.append(vectors.shape[1]), whole(vectors))[1]
    assert op.top(2, solver="lobpcg").num_products == sum(counted)


@pytest.mark.parametrize("solver", ["eigsh", "lobpcg"])
@pytest.mark.parametrize("rank", [1, 4, 5, 7])
def test_top_eigenpairs_of_a_kernel_of_low_rank(solver, rank):
    """Of rank below the three blocks of LOBPCG."""
    torch.manual_seed(rank)
    model, inputs = nn.Linear(rank, 1, bias=False).double(), torch.randn(40, rank, dtype=torch.float64)
    pairs = NTKOperator(model, inputs).top(3, solver=solver)
    assert_close(pairs.eigvals, torch.linalg.eigvalsh(inputs @ inputs.T).flip(0)[:3], rtol=1e-9)


@pytest.mark.parametrize("solver", ["eigsh", "lobpcg"])
def test_top_eigenpairs_of_a_zero_kernel(solver):
    model, inputs = nn.Linear(2, 1, bias=False).double(), torch.zeros(10, 2, dtype=torch.float64)
    pairs = NTKOperator(model, inputs).top(1, solver=solver)
    assert float(pairs.eigvals[0]) == 0.0
    assert float(pairs.residuals[0]) == 0.0


# --- Routes ------------------------------------------------------------------------------------------------------------------


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2.0 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2.0 * grad


class WrongTangent(torch.autograd.Function):
    """Its jvp is wrong, its backward is right."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return 2.0 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def jvp(ctx, tangent):
        return 2.001 * tangent

    @staticmethod
    def backward(ctx, grad):
        return 2.0 * grad


class Through(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.fc, self.function = nn.Linear(2, 2).double(), function

    def forward(self, x):
        return self.function(self.fc(x))


ONES = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]], dtype=torch.float64)


def test_a_wrong_forward_formula_is_not_taken():
    model = Through(WrongTangent.apply)
    op = NTKOperator(model, ONES)
    assert op.jvp_route == "double backward"
    assert "differ by" in op.jvp_reason
    assert_close(op(vectors(op)), 4 * (ONES @ ONES.T + 1).kron(torch.eye(2)) @ vectors(op))


def test_a_model_vmap_refuses_is_taken_vector_by_vector():
    def branching(u):  # vmap refuses .item() of what depends on the vectors
        tangent = torch.autograd.forward_ad.unpack_dual(u).tangent
        return u if tangent is None else u + 0.0 * tangent.sum().item()

    model = Through(branching)
    op = NTKOperator(model, ONES)
    assert not op._routes.jvp.batched
    assert_close(op(vectors(op)), (ONES @ ONES.T + 1).kron(torch.eye(2)) @ vectors(op))


# --- Bad input ---------------------------------------------------------------------------------------------------------------


def linear():
    torch.manual_seed(0)
    return nn.Linear(2, 2).double()


def plain(**options):
    return NTKOperator(linear(), ONES, **options)


def with_nan():
    model = linear()
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    return model


TARGETS = torch.tensor([0, 1, 0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: NTKOperator(linear(), ONES[:0]), InputError, "n = 0"),
        (lambda: NTKOperator(linear(), ONES, ONES[:0]), InputError, "n = 0"),
        (lambda: NTKOperator(linear(), [[1.0, 2.0]]), InputTypeError, "must be a tensor"),
        (lambda: plain(outputs="magic"), InputError, "`outputs` must be 'full'"),
        (lambda: plain(outputs="class=2"), InputError, "asks for class 2"),
        (lambda: plain(params=["nope"]), InputError, r"names \['nope'\]"),
        (lambda: NTKOperator(with_nan(), ONES), InputError, "Parameter `weight` must be finite"),
        (lambda: NTKOperator(linear().requires_grad_(False), ONES), InputError, "no parameter with requires_grad"),
        (lambda: NTKOperator(Through(lambda u: (u,)), ONES), InputTypeError, "must return a tensor"),
        (lambda: NTKOperator(Through(lambda u: u.sum()), ONES), InputError, "one row per example"),
        (lambda: NTKOperator(Through(lambda u: u - u.mean(dim=0)), ONES), InputError, "their own input row only"),
        (lambda: NTKOperator(Through(lambda u: u.detach()), ONES), UnsupportedError, "none of its trained parameters"),
        (lambda: NTKOperator(Through(lambda u: u * torch.rand(1)), ONES), InputError, "another output every time"),
        (
            lambda: NTKOperator(Through(OnceDifferentiable.apply), ONES),
            UnsupportedError,
            "(?s)Forward-mode AD: .*setup_context.*double backward pass: .*cannot be differentiated itself.*`ntk_gram`",
        ),
        (lambda: plain(precond={"weight": 1.0}), InputError, "missing: bias"),
        (lambda: plain(precond={"weight": 1.0, "bias": -1.0}), InputError, "nonnegative"),
        (lambda: plain(precond={"weight": torch.ones(3), "bias": 1.0}), InputError, r"parameter's shape \(2, 2\)"),
        (lambda: plain(max_memory=0), InputError, "`max_memory` must lie in"),
        (lambda: plain(outputs="loss", loss="mse"), InputError, "needs `targets`"),
        (lambda: plain(outputs="loss", targets=TARGETS), InputTypeError, "needs `loss`"),
        (lambda: plain(outputs="loss", targets=TARGETS, loss="magic"), InputError, "`loss` must be one of"),
        (lambda: plain(outputs="loss", targets=TARGETS[:2], loss="cross_entropy"), InputError, "lengths"),
        (lambda: plain(other=ONES, outputs="loss", targets=TARGETS, loss="cross_entropy"), InputError, "needs `other_targets`"),
        (
            lambda: plain(outputs="loss", targets=TARGETS, other_targets=TARGETS, loss="cross_entropy"),
            InputError,
            "`other_targets` belong to `other`",
        ),
        (lambda: plain(targets=TARGETS), InputError, "`targets` is for outputs='loss'"),
        (
            lambda: NTKOperator(nn.Conv1d(1, 2, 1), torch.ones(3, 1, 4), torch.ones(3, 1, 5)),
            InputError,
            "8 outputs on `inputs`, but 10 on `other`",
        ),
        (lambda: plain()(torch.ones(5)), InputError, r"takes \(6,\) or \(6, k\), got shape \(5,\)"),
        (lambda: plain()(torch.ones(6, 1, 1)), InputError, "got shape"),
        (lambda: plain()(torch.ones(6, dtype=torch.complex64)), InputTypeError, "operator is real"),
        (lambda: plain() @ np.ones(6, dtype=complex), InputTypeError, "operator is real"),
        (lambda: plain()(torch.ones(6, device="meta")), InputError, r"Move them with `.to\('cpu'\)`"),
        (lambda: plain()(torch.full((6,), torch.nan)), InputError, "product K v must be finite"),
        (lambda: plain().top(6), InputError, "`k` must be below the number of rows N = 6"),
        (lambda: plain().top(2, solver="lobpcg"), InputError, r"`k` must be at most N / 5 = 1 for solver='lobpcg' \(N = 6\)"),
        (lambda: plain().top(0), InputError, "`k` must be a whole number"),
        (lambda: plain().top(1.5), InputError, "`k` must be a whole number"),
        (lambda: plain().top(1, solver="magic"), InputError, "`solver` must be one of 'eigsh', 'lobpcg'"),
        (lambda: plain().top(1, tolerance=-1.0), InputError, "`tolerance` must lie in"),
        (lambda: plain(other=ONES).top(1), InputError, "cross kernel"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("solver", ["eigsh", "lobpcg"])
def test_no_convergence_is_an_error(solver, monkeypatch):
    monkeypatch.setattr("ntkscope.kernel.top_eig.MAX_ITERATIONS", 1)
    monkeypatch.setattr("ntkscope.kernel.top_eig.MAX_RESTARTS", 1)
    op = NTKOperator(*BY_NAME["mlp"].build(num_examples=40))
    with pytest.raises(InputError, match=rf"solver='{solver}' stopped with \d+ of 10 eigenpairs"):
        op.top(10, solver=solver)
