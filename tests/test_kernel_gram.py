"""ntk_gram against dense Jacobians, on every case and every route."""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import BY_NAME, CASES
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gram as oracle_gram
from oracles import jacobian
from torch import nn

import ntkscope
from ntkscope.kernel import blocks
from ntkscope.kernel.capture import undisturbed


def random_precond(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def dense_kernels(case):
    """The dense oracle of every kind, with and without M, of a batch with itself and with another one; one Jacobian each."""
    model, inputs = case.build(torch.float64)
    _, query = case.build(torch.float64, draw=1, num_examples=4)
    precond = random_precond(model)
    rows, columns = jacobian(model, inputs), jacobian(model, query)
    num_classes = next(iter(rows.values())).shape[0] // 5
    plain = sum(rows[name] @ rows[name].T for name in rows)
    weighted = sum((rows[name] * precond[name].flatten()) @ rows[name].T for name in rows)
    cross = sum((columns[name] * precond[name].flatten()) @ rows[name].T for name in rows)
    blocks = weighted.view(5, num_classes, 5, num_classes)
    return {
        "full": plain,
        "trace": torch.einsum("icjc->ij", plain.view(5, num_classes, 5, num_classes)),
        "weighted": weighted,
        "weighted trace": torch.einsum("icjc->ij", blocks),
        "weighted sum": blocks.sum(dim=(1, 3)),
        "weighted class": blocks[:, num_classes - 1, :, num_classes - 1],
        "cross": cross,
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kind_matches_the_dense_jacobian(case):
    model, inputs = case.build(torch.float64)
    _, query = case.build(torch.float64, draw=1, num_examples=4)
    expected, precond = dense_kernels(case), random_precond(model)
    last = expected["full"].shape[0] // 5 - 1
    calls = {
        "full": lambda: ntkscope.ntk_gram(model, inputs),
        "trace": lambda: ntkscope.ntk_gram(model, inputs, outputs="trace"),
        "weighted": lambda: ntkscope.ntk_gram(model, inputs, precond=precond),
        "weighted trace": lambda: ntkscope.ntk_gram(model, inputs, outputs="trace", precond=precond),
        "weighted sum": lambda: ntkscope.ntk_gram(model, inputs, outputs="sum", precond=precond),
        "weighted class": lambda: ntkscope.ntk_gram(model, inputs, outputs=f"class={last}", precond=precond),
        "cross": lambda: ntkscope.ntk_gram(model, query, inputs, precond=precond),
    }
    for name, call in calls.items():
        assert_close(call().matrix, expected[name], 1e-10, name=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_layers_and_precision(case, monkeypatch):
    """Blocks of two or three examples give the same matrix, layers add up to it, and float32 is accurate to rounding."""
    expected = dense_kernels(case)["full"]
    model, inputs = case.build(torch.float64)
    layered = ntkscope.ntk_gram(model, inputs, by_layer=True)
    assert_close(layered.matrix, expected, name="by layer")
    assert_close(sum(layered.by_layer.values()), expected, name="sum of layers")
    plan = blocks.plan_tiles
    huge = {"bytes_per_example": 2**28, "working_bytes_per_example": 2**28}
    monkeypatch.setattr(blocks, "plan_tiles", lambda n, m, coverage, **options: plan(n, m, replace(coverage, **huge), **options))
    done = []
    pieces = ntkscope.ntk_gram(model, inputs, progress=lambda *progress: done.append(progress))
    assert done[-1] == (4, 4)  # two blocks on the diagonal, three and two examples; two below it
    assert_close(pieces.matrix, expected, name="blocks")
    single, single_inputs = case.build(torch.float32)
    assert_close(ntkscope.ntk_gram(single, single_inputs).matrix.double(), expected, rtol=1e-5, name="float32")


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention", "functional_use", "tied_linear"])
def test_autograd_method_agrees_with_rules(name):
    model, inputs = BY_NAME[name].build(torch.float64)
    gram = ntkscope.ntk_gram(model, inputs, method="autograd")
    assert set(gram.coverage.routes.values()) <= {"torch.func", "loop"}
    assert_close(gram.matrix, ntkscope.ntk_gram(model, inputs).matrix)


def test_routes_are_what_they_should_be():
    names = ("mlp", "cnn", "functional_use", "tied_linear", "weight_norm", "own_function", "gru_packed", "frozen_first", "unused")
    found = {name: ntkscope.ntk_gram(*BY_NAME[name].build()).coverage for name in names}
    assert set(found["mlp"].routes.values()) == {"linear"}
    assert found["cnn"].routes["0.weight"] == "conv2d"
    assert set(found["functional_use"].routes.values()) == {"linear"}
    assert found["weight_norm"].routes["0.parametrizations.weight.original1"] == "linear (computed weight)"
    assert "custom Function" in found["own_function"].reasons["fc.weight"]
    assert found["own_function"].routes["fc.bias"] == "add"
    assert set(found["gru_packed"].routes.values()) == {"loop", "linear"}
    assert "frozen" in found["frozen_first"].excluded["0.weight"]
    assert set(found["unused"].excluded) == {"spare", "idle.weight", "idle.bias"}
    assert not set(found["unused"].excluded) & set(found["unused"].routes)


def test_nearly_every_parameter_has_a_rule():
    """What may go to autograd is listed: a rule that stops matching would otherwise only be slow."""
    expected = {
        "one_image_at_a_time",  # the convolution never sees a batch
        "one_at_a_time",
        "embedding_bag_max",
        "gru_packed",
        "matrix_einsum",
        "matrix_per_position",
        "sorted_rows",  # rows change places with the data
        "experts_hard",
        "own_function",
        "gradient_inside",
    }
    found = {case.name for case in CASES if set(ntkscope.ntk_gram(*case.build()).coverage.routes.values()) & {"torch.func", "loop"}}
    assert found == expected


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


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_random_sequential_models(data):
    """Layers in any order, with any of their options, against dense Jacobians; train and cross, weighted or not."""
    seed = data.draw(st.integers(0, 2**16), label="seed")
    torch.manual_seed(seed)
    layers, shape = [], (data.draw(st.integers(1, 3)), data.draw(st.integers(3, 6)), data.draw(st.integers(3, 5)))
    inputs = torch.randn(3, *shape, dtype=torch.float64)
    for _ in range(data.draw(st.integers(1, 4), label="depth")):
        kind = data.draw(st.sampled_from(["conv", "depthwise", "norm", "group", "act", "inplace", "prelu", "transpose", "linear"]))
        if kind == "conv":
            size = data.draw(st.integers(1, 3))
            options = {"stride": data.draw(st.integers(1, 2)), "padding": data.draw(st.integers(0, 1)), "bias": data.draw(st.booleans())}
            layers.append(nn.Conv2d(shape[0], data.draw(st.integers(1, 4)), min(size, *shape[1:]), **options))
        elif kind == "depthwise":
            layers.append(nn.Conv2d(shape[0], 2 * shape[0], 2, groups=shape[0], padding=1))
        elif kind == "transpose":
            layers.append(nn.ConvTranspose2d(shape[0], 2, 2, stride=data.draw(st.integers(1, 2))))
        elif kind == "norm":
            layers.append(nn.LayerNorm(shape[-1]))
        elif kind == "group":
            layers.append(nn.GroupNorm(1, shape[0]))
        elif kind == "linear":
            layers.append(nn.Linear(shape[-1], data.draw(st.integers(1, 4))))
        elif kind == "prelu":
            layers.append(nn.PReLU())
        else:
            # torch allows to overwrite a result that its own backward pass does not need.
            is_free = bool(layers) and isinstance(layers[-1], nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
            layers.append(nn.LeakyReLU(inplace=True) if kind == "inplace" and is_free else nn.Tanh())
        layers[-1].double()
        try:
            shape = tuple(nn.Sequential(*layers)(inputs.clone()).shape[1:])
        except RuntimeError:  # the image is too small for another such layer
            layers.pop()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 2).double())
    precond = random_precond(model, seed) if data.draw(st.booleans(), label="weighted") else None
    gram = ntkscope.ntk_gram(model, inputs, precond=precond)
    assert not set(gram.coverage.routes.values()) & {"torch.func", "loop"}
    assert_close(gram.matrix, oracle_gram(model, inputs, precond=precond))
    assert_close(
        ntkscope.ntk_gram(model, inputs[:2], inputs, outputs="trace").matrix, oracle_gram(model, inputs[:2], inputs, outputs="trace")
    )


def test_inputs_are_not_written_to():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))
    inputs = torch.randn(5, 3)
    before = inputs.clone()
    ntkscope.ntk_gram(model, inputs)
    assert torch.equal(inputs, before)


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
            lambda: ntkscope.ntk_gram(linear(), ONES, outputs="logits"),
            ntkscope.InputError,
            "`outputs` must be 'full', 'trace'",
        ),
        (lambda: ntkscope.ntk_gram(linear(), ONES, method="magic"), ntkscope.InputError, "`method` must be one of"),
        (lambda: ntkscope.ntk_gram(with_nan(), ONES), ntkscope.InputError, "Parameter `weight` must be finite"),
        (lambda: ntkscope.ntk_gram(overflowing(), ONES), ntkscope.InputError, "outputs must be finite.*activations overflow"),
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
        (lambda: ntkscope.ntk_gram(linear(), ONES, max_memory=200), ntkscope.InputError, "more than half of max_memory"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
