"""ntk_gram against dense Jacobians, on every case and every route."""

import itertools

import pytest
import torch
from cases import BY_NAME, CASES
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gram as oracle_gram
from torch import nn

import ntkscope
from ntkscope.kernel.capture import undisturbed


def random_precond(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("outputs", ["full", "trace"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_gram_matches_jacobian(case, outputs, weighted):
    model, inputs = case.build(torch.float64)
    precond = random_precond(model) if weighted else None
    gram = ntkscope.ntk_gram(model, inputs, outputs=outputs, precond=precond)
    assert_close(gram.matrix, oracle_gram(model, inputs, precond=precond, outputs=outputs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cross_gram_matches_jacobian(case):
    model, inputs = case.build(torch.float64)
    _, query = case.build(torch.float64, draw=1, num_examples=4)
    gram = ntkscope.ntk_gram(model, query, inputs, precond=random_precond(model))
    assert_close(gram.matrix, oracle_gram(model, query, inputs, precond=random_precond(model)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_do_not_change_the_result(case):
    model, inputs = case.build(torch.float64)
    whole = ntkscope.ntk_gram(model, inputs)
    # Room for the result and the factors of one or two examples.
    budget = 2 * whole.matrix.numel() * 8 + 4 * whole.coverage.bytes_per_example
    blocks = []
    pieces = ntkscope.ntk_gram(model, inputs, max_memory=budget, progress=lambda done, total: blocks.append(total))
    assert blocks[-1] > 1
    assert_close(pieces.matrix, whole.matrix)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_is_accurate_to_rounding(case):
    model, inputs = case.build(torch.float32)
    assert_close(ntkscope.ntk_gram(model, inputs).matrix.double(), oracle_gram(*case.build(torch.float64)), rtol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention", "functional_use", "tied_linear"])
def test_autograd_method_agrees_with_rules(name):
    model, inputs = BY_NAME[name].build(torch.float64)
    gram = ntkscope.ntk_gram(model, inputs, method="autograd")
    assert set(gram.coverage.routes.values()) <= {"torch.func", "loop"}
    assert_close(gram.matrix, ntkscope.ntk_gram(model, inputs).matrix)


def test_routes_are_what_they_should_be():
    routes = {name: ntkscope.ntk_gram(*BY_NAME[name].build()).coverage for name in ("mlp", "cnn", "functional_use", "tied_linear")}
    assert set(routes["mlp"].routes.values()) == {"Linear"}
    assert "Conv2d" in routes["cnn"].routes.values()
    assert "outside its own module" in " ".join(routes["functional_use"].reasons.values())
    assert set(routes["tied_linear"].routes.values()) == {"Linear"}


def test_a_model_vmap_refuses_takes_the_loop():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            return torch.stack([row * self.scale if row.sum().item() > 0 else row * self.scale.square() for row in x])

    torch.manual_seed(0)
    model, inputs = Branching(), torch.randn(5, 3, dtype=torch.float64)
    gram = ntkscope.ntk_gram(model, inputs)
    assert gram.coverage.routes == {"scale": "loop"}
    rows = [2 * row if row.sum() <= 0 else row for row in inputs]  # d(scale²)/d scale = 2 at 1
    jacobian = torch.cat([torch.diag(row) for row in rows])
    assert_close(gram.matrix, jacobian @ jacobian.T)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    num_examples=st.integers(1, 6),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_gram_is_a_kernel(sizes, num_examples, bias, seed):
    torch.manual_seed(seed)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b, bias=bias), nn.Tanh())]
    model = nn.Sequential(*layers[:-1]).double()
    inputs = torch.randn(num_examples, sizes[0], dtype=torch.float64)
    matrix = ntkscope.ntk_gram(model, inputs).matrix
    assert_close(matrix, oracle_gram(model, inputs))
    assert_close(matrix, matrix.T)
    eigvals = torch.linalg.eigvalsh(matrix)
    assert float(eigvals.min()) >= -1e-12 * float(eigvals.max())
    order = torch.randperm(num_examples)
    blocks = matrix.view(num_examples, sizes[-1], num_examples, sizes[-1])
    permuted = ntkscope.ntk_gram(model, inputs[order]).matrix
    assert_close(permuted, blocks[order][:, :, order].reshape(matrix.shape))
    squares = 0.0
    for row in model(inputs).flatten():
        grads = torch.autograd.grad(row, list(model.parameters()), retain_graph=True)
        squares += sum(float(grad.square().sum()) for grad in grads)
    assert_close(matrix.trace(), torch.tensor(squares, dtype=torch.float64))


def test_trace_is_not_the_kernel_of_summed_outputs():
    model, inputs = BY_NAME["mlp"].build()
    trace = ntkscope.ntk_gram(model, inputs, outputs="trace").matrix
    summed = oracle_gram(model, inputs, outputs="sum")
    assert float((trace - summed).abs().max()) > 0.1 * float(trace.abs().max())


def test_forward_fn_and_params_choose_what_is_differentiated():
    model, inputs = BY_NAME["mlp"].build()
    names = [name for name, _ in model.named_parameters()][-2:]
    gram = ntkscope.ntk_gram(model, {"x": inputs}, forward_fn=lambda m, batch: m(batch["x"])[:, :2], params=names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    expected = oracle_gram(model, inputs, forward_fn=lambda m, batch: m(batch)[:, :2])
    assert_close(gram.matrix, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_model_is_left_as_found(case):
    model, inputs = case.build(torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    rng = torch.random.get_rng_state()
    ntkscope.ntk_gram(model, inputs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for module in model.modules())


def test_model_is_left_as_found_after_an_exception():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            torch.rand(1)
            if self.calls > 1:
                raise RuntimeError("mid-forward")
            return self.fc(x)

    model = Failing().train()
    rng = torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match="mid-forward"):
        ntkscope.ntk_gram(model, torch.ones(3, 2))
    assert model.training
    assert float(model.calls) == 0.0
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert not model.fc._forward_hooks


def test_undisturbed_restores_buffers_in_train_mode():
    norm = nn.BatchNorm1d(3)
    before = norm.running_mean.clone()
    with undisturbed(norm):
        norm.running_mean += 1
    assert torch.equal(norm.running_mean, before)
    assert norm.training


class Coupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x):
        out = self.fc(x)
        return out - out.mean(dim=0)


def linear():
    torch.manual_seed(0)
    return nn.Linear(2, 2)


def with_nan():
    model = linear()
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    return model


def overflowing():
    model = nn.Sequential(linear(), linear())
    with torch.no_grad():
        model[1].weight.fill_(3e38)
    return model


class Returns(nn.Module):
    def __init__(self, pick):
        super().__init__()
        self.fc, self.pick = nn.Linear(2, 2), pick

    def forward(self, x):
        return self.pick(self.fc(x))


ONES = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ntkscope.ntk_gram(linear(), torch.ones(0, 2)), ntkscope.InputError, "n = 0"),
        (lambda: ntkscope.ntk_gram(linear(), [[1.0, 2.0]]), ntkscope.InputTypeError, "must be a tensor"),
        (lambda: ntkscope.ntk_gram(linear(), {"a": ONES, "b": ONES[:2]}), ntkscope.InputError, "lengths"),
        (
            lambda: ntkscope.ntk_gram(linear(), ONES, outputs="sum"),
            ntkscope.InputError,
            "`outputs` must be one of 'full', 'trace'",
        ),
        (lambda: ntkscope.ntk_gram(linear(), ONES, method="magic"), ntkscope.InputError, "`method` must be one of"),
        (lambda: ntkscope.ntk_gram(with_nan(), ONES), ntkscope.InputError, "Parameter `weight` must be finite"),
        (lambda: ntkscope.ntk_gram(overflowing(), ONES), ntkscope.InputError, "kernel must be finite"),
        (lambda: ntkscope.ntk_gram(Coupled(), ONES), ntkscope.InputError, "their own input row only"),
        (
            lambda: ntkscope.ntk_gram(nn.Sequential(linear(), nn.BatchNorm1d(2, track_running_stats=False)), ONES),
            ntkscope.InputError,
            r"BatchNorm without running statistics: 1",
        ),
        (lambda: ntkscope.ntk_gram(Returns(lambda u: (u,)), ONES), ntkscope.InputTypeError, "must return a tensor"),
        (lambda: ntkscope.ntk_gram(Returns(lambda u: u.argmax(1)), ONES), ntkscope.InputTypeError, "floating-point outputs"),
        (lambda: ntkscope.ntk_gram(Returns(lambda u: u.sum()), ONES), ntkscope.InputError, "one row per example"),
        (
            lambda: ntkscope.ntk_gram(Returns(lambda u: u.detach()), ONES),
            ntkscope.UnsupportedError,
            "none of its trained parameters",
        ),
        (lambda: ntkscope.ntk_gram(linear().requires_grad_(False), ONES), ntkscope.InputError, "no parameter with requires_grad"),
        (lambda: ntkscope.ntk_gram(linear(), ONES, params=["nope"]), ntkscope.InputError, r"names \['nope'\]"),
        (lambda: ntkscope.ntk_gram(nn.LazyLinear(2), ONES), ntkscope.UnsupportedError, "lazy"),
        (lambda: ntkscope.ntk_gram(linear(), ONES, precond={"weight": 1.0}), ntkscope.InputError, "missing: bias"),
        (lambda: ntkscope.ntk_gram(linear(), ONES, precond={"weight": 1.0, "bias": -1.0}), ntkscope.InputError, "nonnegative"),
        (
            lambda: ntkscope.ntk_gram(linear(), ONES, precond={"weight": torch.ones(3), "bias": 1.0}),
            ntkscope.InputError,
            r"parameter's shape \(2, 2\)",
        ),
        (lambda: ntkscope.ntk_gram(linear(), ONES, max_memory=100), ntkscope.InputError, "more than half of max_memory"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
