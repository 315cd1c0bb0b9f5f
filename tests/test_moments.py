"""Moments of per-example loss gradients against dense ones: every case, chunks, cancellation, memory, bad losses."""

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from cases import BY_NAME, CASES
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import double
from oracles import jacobian as oracle_jacobian
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import ntkscope
from ntkscope.kernel import moments as module
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.contract import CACHE_BYTES
from ntkscope.kernel.coverage import probe_routes
from ntkscope.kernel.factor import FactoredJacobian, OuterFactor
from ntkscope.kernel.moments import GradientMoments, gradient_moments, loss_pulls, make_pulled_readout, moments_of
from ntkscope.kernel.readout import make_readout

SOME = [BY_NAME[name] for name in ("mlp", "cnn", "tied_embedding", "embedding", "gpt", "lstm_two_layers", "experts_hard", "tied_linear")]
TINY = [1, 3000, 30_000]


def squared(outputs, targets):
    return 0.5 * (outputs - targets).square().sum(dim=1).mean()


def outputs_of(model, inputs):
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        return model(double(copy.deepcopy(inputs))).flatten(1)


def targets_of(model, inputs, seed=3):
    outputs = outputs_of(model, inputs)
    return torch.randn(outputs.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(model, inputs, targets, loss=squared):
    """Every example's gradient by autograd, one backward pass per output: name -> (b, *shape)."""
    outputs = outputs_of(model, inputs)
    pulls = [torch.func.grad(lambda u, i=i: loss(u, targets[i : i + 1]))(outputs[i : i + 1]) for i in range(len(outputs))]
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {
        name: torch.einsum("ic,icp->ip", torch.cat(pulls), rows.view(*outputs.shape, -1)).view(-1, *shapes[name])
        for name, rows in oracle_jacobian(model, inputs).items()
    }


def assert_moments(found, gradients, rtol=1e-9):
    assert set(found.mean) == set(found.variance) == set(gradients)
    for name, rows in gradients.items():
        mean = rows.sum(dim=0) / len(rows)
        assert_close(found.mean[name], mean, rtol, name=f"mean of {name}")
        assert_close(found.variance[name], ((rows - mean) ** 2).sum(dim=0) / len(rows), rtol, name=f"variance of {name}")
        assert bool((found.variance[name] >= 0).all())
    assert found.num_examples == len(next(iter(gradients.values())))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_moments_match_dense_gradients(case):
    model, inputs = case.build()
    targets = targets_of(model, inputs)
    assert_moments(gradient_moments(model, inputs, targets, loss="squared"), dense(model, inputs, targets))


@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("max_memory", TINY)
def test_blocks_and_chunks_do_not_change_the_result(case, max_memory):
    model, inputs = case.build()
    targets = targets_of(model, inputs)
    found = gradient_moments(model, inputs, targets, loss="squared", max_memory=max_memory)
    assert_moments(found, dense(model, inputs, targets))


@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss(label_smoothing=0.1)], ids=["name", "module"])
def test_cross_entropy(loss):
    model, inputs = BY_NAME["mlp"].build()
    labels = torch.tensor([0, 1, 2, 1, 0])
    found = gradient_moments(model, inputs, labels, loss=loss)
    assert_moments(found, dense(model, inputs, labels, nn.functional.cross_entropy if isinstance(loss, str) else loss))


def test_float32_models_are_summed_in_float64():
    model, inputs = BY_NAME["cnn"].build(torch.float32)
    targets = targets_of(model, inputs)
    found = gradient_moments(model, inputs, targets.float(), loss="squared")
    assert all(value.dtype == torch.float64 for value in (*found.mean.values(), *found.variance.values()))
    assert_moments(found, dense(model, inputs, targets), rtol=1e-4)


def test_chosen_parameters_and_forward_fn():
    model, inputs = BY_NAME["mlp"].build()
    targets = targets_of(model, inputs)
    found = gradient_moments(model, inputs, targets, loss="squared", params=["2.bias"], forward_fn=lambda model, x: model(x))
    assert_moments(found, {"2.bias": dense(model, inputs, targets)["2.bias"]})


@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_loss_that_reads_the_parameters_itself(case):
    """Every example's loss then holds the penalty, whose gradient no pull of outputs has."""
    model, inputs = case.build()
    targets = targets_of(model, inputs)
    first = next(model.parameters())
    found = gradient_moments(model, inputs, targets, loss=lambda u, y: squared(u, y) + 0.5 * first.square().sum())
    gradients = dense(model, inputs, targets)
    name = next(name for name, parameter in model.named_parameters() if parameter is first)
    assert_moments(found, gradients | {name: gradients[name] + first.detach()})


@pytest.mark.parametrize("case", SOME, ids=str)
def test_pulls_are_output_gradients_of_single_examples(case):
    model, inputs = case.build()
    targets = targets_of(model, inputs)
    with undisturbed(model):
        pulls, is_direct = loss_pulls(model, (inputs, targets), loss="mse", budget=1)
    assert not is_direct
    assert_close(pulls, 2 * (outputs_of(model, inputs) - targets) / targets.shape[1])


def test_per_example_losses_give_the_same_as_pulls():
    model, inputs = BY_NAME["cnn"].build()
    targets = targets_of(model, inputs)
    readout = make_readout("loss", loss="squared")
    routes, coverage = probe_routes(model, (inputs, targets), forward_fn=readout)
    with undisturbed(model):
        assert_moments(moments_of(model, (inputs, targets), routes, coverage), dense(model, inputs, targets))


def test_routes_are_probed_once_and_used_again():
    model, inputs = BY_NAME["mlp"].build()
    _, others = BY_NAME["mlp"].build(draw=1, num_examples=7)
    routes, coverage = probe_routes(model, (inputs, targets_of(model, inputs)), forward_fn=make_pulled_readout())
    for batch in (inputs, others):
        targets = targets_of(model, batch)
        with undisturbed(model):
            found = moments_of(model, (batch, outputs_of(model, batch) - targets), routes, coverage)
        assert_moments(found, dense(model, batch, targets))


class Branching(nn.Module):
    """Takes another way, with other layers, where an example exceeds its bound: the first and last examples do not."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 3)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return torch.where((x[:, :1] > 5), self.second(hidden), hidden) if bool((x > 5).any()) else hidden


@pytest.mark.parametrize("max_memory", [None, 1])
def test_an_example_that_goes_another_way_than_the_probe(max_memory):
    torch.manual_seed(0)
    model, inputs = Branching().double(), torch.randn(9, 2, dtype=torch.float64)
    inputs[7] = 6.0  # not among those of the probe: 0, 8 // 3, 16 // 3 and 8
    targets = targets_of(model, inputs)
    readout = make_readout("loss", loss="squared")
    routes, coverage = probe_routes(model, (inputs, targets), forward_fn=readout)
    assert routes.ruled  # by rules first
    with undisturbed(model):
        found = moments_of(model, (inputs, targets), routes, coverage, budget=2**20 if max_memory is None else max_memory)
    assert_moments(found, dense(model, inputs, targets))


def test_the_model_is_left_as_found():
    model, inputs = BY_NAME["dropout"].build()
    assert model.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state = torch.get_rng_state()
    gradient_moments(model, inputs, targets_of(model, inputs), loss="squared")
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None


# --- Cancellation ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_memory", [None, 2000])
@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9])
def test_a_large_common_mean_leaves_the_variance_exact(gap, max_memory):
    """A linear layer whose examples' gradients are equal but for `gap`: Σ g² − b μ² alone would have lost 2, 4 and 6 digits or all."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    inputs = 1 + gap * torch.randn(8, 3, dtype=torch.float64)
    targets = outputs_of(model, inputs) - 1e3 * (1 + gap * torch.randn(8, 2, dtype=torch.float64))
    found = gradient_moments(model, inputs, targets, loss="squared", max_memory=max_memory)
    pulls = outputs_of(model, inputs) - targets
    rows = pulls[:, :, None] * inputs[:, None]
    # Centered by hand, the deviations themselves with relative error eps / gap.
    assert_close(found.variance["weight"], rows.var(dim=0, correction=0), rtol=max(1e-8, 1e-15 / gap))
    naive = rows.square().mean(dim=0) - rows.mean(dim=0).square()
    if gap == 1e-9:
        assert not torch.allclose(naive, rows.var(dim=0, correction=0), rtol=1e-2, atol=0)


def test_equal_examples_have_no_variance_and_none_below_zero():
    for name in ("mlp", "cnn", "embedding", "tied_embedding"):
        model, inputs = BY_NAME[name].build()
        inputs = inputs[:1].expand(6, *inputs.shape[1:]).clone()
        targets = targets_of(model, inputs)[:1].expand(6, -1).clone()
        found = gradient_moments(model, inputs, targets, loss="squared")
        for own, mean in zip(found.variance.values(), found.mean.values(), strict=True):
            assert float(own.min()) >= 0
            assert float(own.max()) <= 1e-28 * max(1.0, float(mean.square().max()))


# --- Factors that no readout of one number gives -----------------------------------------------------------------------------


def moments_of_factors(factors, num_examples, shape, chunk_bytes):
    jacobian = FactoredJacobian(
        torch.zeros(num_examples, 1, dtype=torch.float64), {"w": factors}, {}, {"w": torch.Size(shape)}, torch.float64
    )
    return module._block_moments(jacobian, "w", chunk_bytes)


@pytest.mark.parametrize("chunk_bytes", [1, 500, CACHE_BYTES])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("kind", ["whole", "parts", "overlapping", "patterns", "same rows twice"])
def test_factors(kind, positions, transposed, chunk_bytes):
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, rows, columns = 4, 6, 3
    parts = {
        "whole": [slice(0, 6)],
        "parts": [slice(0, 2), slice(3, 6)],
        "overlapping": [slice(0, 4), slice(3, 6)],
        "patterns": [slice(0, 6)],
        "same rows twice": [slice(0, 6), slice(0, 6)],
    }[kind]
    factors, dense_rows = [], torch.zeros(n, rows, columns, dtype=torch.float64)
    for part in parts:
        height = part.stop - part.start
        units, inputs = (columns, height) if transposed else (height, columns)
        grads, patterns = draw(n, 1, units, positions), None
        if kind == "patterns":
            grads, patterns = draw(n, 1, units, 1), draw(n, units, positions)
        activations = draw(n, positions, inputs)
        factors.append(OuterFactor(grads, activations, part, transposed, patterns))
        full = grads[:, 0] if patterns is None else grads[:, 0] * patterns
        for i in range(n):
            formed = full[i] @ activations[i]
            dense_rows[i, part] += formed.T if transposed else formed
    mean, squares = moments_of_factors(factors, n, (rows, columns), chunk_bytes)
    assert_close(mean, dense_rows.mean(dim=0))
    assert_close(squares, n * dense_rows.var(dim=0, correction=0))


@pytest.mark.parametrize("chunk_bytes", [1, CACHE_BYTES])
def test_tokens_that_repeat_within_an_example_are_added_before_they_are_squared(chunk_bytes):
    tokens = torch.tensor([[1, 1, 2], [0, 3, 3], [1, 2, 0]])  # token 4 never
    grads = torch.randn(3, 1, 2, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    rows = torch.zeros(3, 5, 2, dtype=torch.float64)
    for i in range(3):
        for t in range(3):
            rows[i, tokens[i, t]] += grads[i, 0, :, t]
    mean, squares = moments_of_factors([OuterFactor(grads, tokens, slice(0, 5), True)], 3, (5, 2), chunk_bytes)
    assert_close(mean, rows.mean(dim=0))
    assert_close(squares, 3 * rows.var(dim=0, correction=0))


# --- Properties --------------------------------------------------------------------------------------------------------------


def random_problem(seed, num_examples, sizes=(3, 4, 2)):
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(*sizes[:2]), nn.Tanh(), nn.Linear(*sizes[1:])).double()
    draw = [torch.randn(num_examples, size, generator=generator, dtype=torch.float64) for size in (sizes[0], sizes[-1])]
    return model, *draw


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**16), num_examples=st.integers(2, 7), scale=st.sampled_from([1e-3, 0.5, 40.0]))
def test_moments_do_not_depend_on_the_order_of_examples_and_scale_with_the_loss(seed, num_examples, scale):
    model, inputs, targets = random_problem(seed, num_examples)
    found = gradient_moments(model, inputs, targets, loss="squared")
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))
    permuted = gradient_moments(model, inputs[order], targets[order], loss="squared", max_memory=4000)
    doubled = gradient_moments(model, inputs.repeat(2, 1), targets.repeat(2, 1), loss="squared")
    scaled = gradient_moments(model, inputs, targets, loss=lambda u, y: scale * squared(u, y))
    for name, mean in found.mean.items():
        for other in (permuted, doubled):
            assert_close(other.mean[name], mean, 1e-9)
            assert_close(other.variance[name], found.variance[name], 1e-9)
        assert_close(scaled.mean[name], scale * mean, 1e-9)
        assert_close(scaled.variance[name], scale**2 * found.variance[name], 1e-9)
    assert doubled.num_examples == 2 * num_examples


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**16), num_examples=st.integers(2, 6))
def test_the_mean_is_the_gradient_of_the_batch(seed, num_examples):
    model, inputs, targets = random_problem(seed, num_examples)
    squared(model(inputs), targets).backward()
    found = gradient_moments(model, inputs, targets, loss="squared")
    for name, parameter in model.named_parameters():
        assert_close(found.mean[name], parameter.grad, 1e-9)


def test_what_is_derived_from_moments():
    moments = GradientMoments({"w": torch.tensor([2.0, 3.0, 0.0])}, {"w": torch.tensor([8.0, 0.0, 0.0])}, num_examples=5)
    assert moments.variance_of_mean()["w"].tolist() == [2.0, 0.0, 0.0]
    assert moments.signal_to_noise()["w"].tolist() == [0.5, float("inf"), 0.0]


# --- Memory ------------------------------------------------------------------------------------------------------------------


class HeldBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that are still alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._sizes, self._users = {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor)
        return result

    def _hold(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if not size:
            return
        if not self._users.get(key):
            self.now += size
            self._sizes[key] = size
        self._users[key] = self._users.get(key, 0) + 1
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
        weakref.finalize(tensor, self._release, key)

    def _release(self, key):
        self._users[key] -= 1
        if not self._users[key]:
            self.now -= self._sizes.pop(key)


def wide(kind):
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 3)), torch.randn(400, 200)
    if kind == "sequence":
        model = nn.Sequential(nn.Linear(60, 100), nn.Tanh(), nn.Flatten(), nn.Linear(500, 3))
        return model, torch.randn(400, 5, 60)
    model = nn.Sequential(nn.Embedding(3000, 20), nn.Flatten(), nn.Linear(80, 3))
    return model, torch.randint(3000, (400, 4))


@pytest.mark.parametrize("kind", ["linear", "sequence", "embedding"])
def test_memory_stays_far_below_that_of_all_gradients(kind):
    model, inputs = wide(kind)
    targets = torch.randn(len(inputs), 3)
    num_params = sum(parameter.numel() for parameter in model.parameters())
    every_gradient = len(inputs) * num_params * 4
    with HeldBytes() as held:
        gradient_moments(model, inputs, targets, loss="squared", max_memory=2**20)
    result = 16 * num_params
    # The budget, moments, those of one block and what they are joined with.
    assert held.peak <= 2**20 + 4 * result
    assert held.peak < every_gradient / 4
    with HeldBytes() as whole:  # the test sees what it is to see
        gradient_moments(model, inputs, targets, loss="squared", max_memory=2**33)
    assert whole.peak > 1.2 * held.peak or kind == "embedding"


def test_held_bytes_sees_tensors_that_live():
    with HeldBytes() as held:
        kept = torch.ones(1000) * 2
        del kept
        torch.zeros(10, dtype=torch.float64)
    assert held.peak == 8000  # ones and their double
    assert held.now == 0


# --- Losses that are no mean -------------------------------------------------------------------------------------------------


def bad_cases():
    model, inputs = BY_NAME["mlp"].build()
    labels = torch.tensor([0, 1, 2, 1, 0])
    weights = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    readout = make_readout("loss", loss="cross_entropy")
    routes, coverage = probe_routes(model, (inputs, labels), forward_fn=readout)

    def of(loss, own=labels, batch=inputs, **options):
        return lambda: gradient_moments(model, batch, own, loss=loss, **options)

    return {
        "sum": (of(nn.CrossEntropyLoss(reduction="sum")), r"differs .* by 400.0% .* 5 times as large.*reduction='sum'"),
        "weights": (of(nn.CrossEntropyLoss(weight=weights)), "mean over examples of a per-example loss.*class weights"),
        "none": (of(nn.CrossEntropyLoss(reduction="none")), r"one number for a batch, got shape \(5,\).*reduction='mean'"),
        "coupled": (of(lambda u, y: (u - u.mean(dim=0)).square().mean() + u.square().mean()), "compares examples"),
        "all ignored": (
            of(nn.CrossEntropyLoss(ignore_index=1), torch.tensor([0, 1, 2, 2, 0])),
            "in the outputs differs from the mean of per-example gradients.*ignore_index",
        ),
        "no gradient": (
            of(lambda u, y: u.sum(dim=1).mean() + float("nan") * u[y == 1].sum()),
            "The loss of example 1 alone has a gradient that is not finite",
        ),
        "one example": (of("cross_entropy", labels[:1], inputs[:1]), "needs at least two examples"),
        "no example": (of("cross_entropy", labels[:0], inputs[:0]), "holds no example"),
        "lengths": (of("cross_entropy", labels[:4]), "`targets` must have one entry per example, got 4 for 5"),
        "unknown": (of("hinge"), "`loss` must be one of"),
        "no callable": (of(3), "needs `loss`"),
        "memory": (of("cross_entropy", max_memory=0), "`max_memory` must lie in"),
        "params": (of("cross_entropy", params=["nothing"]), "`params` names"),
        "model": (lambda: gradient_moments(lambda x: x, inputs, labels, loss="cross_entropy"), "torch.nn.Module"),
        "readout": (
            lambda: moments_of(model, (inputs, labels), routes, replace(coverage, num_classes=3)),
            "one number per example, but the readout gives 3",
        ),
        "one example, core": (lambda: moments_of(model, (inputs[:1], labels[:1]), routes, coverage), "at least two examples"),
    }


@pytest.mark.parametrize("name", list(bad_cases()))
def test_bad_input(name):
    call, message = bad_cases()[name]
    with pytest.raises(ntkscope._checks.UserError, match=message):
        call()


def test_a_gradient_that_is_not_finite_is_named():
    model, inputs = BY_NAME["mlp"].build()
    inputs[1] = float("nan")  # not one of the probe's: 0, 1 ...
    with pytest.raises(ntkscope._checks.UserError, match="finite"):
        gradient_moments(model, inputs, torch.tensor([0, 1, 2, 1, 0]), loss="cross_entropy")


def test_moments_that_are_not_finite_are_refused_by_the_core():
    model, inputs = BY_NAME["mlp"].build()
    labels = torch.tensor([0, 1, 2, 1, 0])
    routes, coverage = probe_routes(model, (inputs, labels), forward_fn=make_readout("loss", loss="cross_entropy"))
    inputs[1] = float("inf")
    with undisturbed(model), pytest.raises(ntkscope.InputError, match=r"The mean gradient in `0\.weight` must be finite"):
        moments_of(model, (inputs, labels), routes, coverage)


def test_saturated_cross_entropy_is_still_a_mean():
    """Gradients at the size of rounding must not look like another loss."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(3, 3), 10 * torch.randn(50, 3)
    with torch.no_grad():
        model.weight.mul_(60)
        labels = model(inputs).argmax(dim=1)
    found = gradient_moments(model, inputs, labels, loss="cross_entropy")
    assert all(bool(torch.isfinite(value).all()) for value in found.variance.values())


def test_fresh_batch_norm_is_warned_of():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    with pytest.warns(UserWarning, match="BatchNorm 1 has running statistics that were never updated"):
        gradient_moments(model, torch.randn(4, 4), torch.randn(4, 3), loss="squared")


def test_rounding_of_probabilities_is_no_difference_of_losses():
    """Softmax minus labels of float32 is off by 1e-8 per example and class; a difference of 1e-3 is another loss."""
    expected = torch.full((20, 3), 1e-9, dtype=torch.float64)
    module._check_is_mean(expected + 2e-9, expected, torch.float32)
    with pytest.raises(ntkscope.InputError, match="must be the mean over examples"):
        module._check_is_mean(expected + 1e-3, expected, torch.float32)
