"""Kinds, batch normalization, precision, probe and price of ntk_gram."""

import itertools

import pytest
import torch
from cases import BY_NAME
from compare import assert_close
from oracles import gram as oracle_gram
from torch import nn
from torch.nn import functional as F

import ntkscope
from ntkscope.kernel.contract import contract
from ntkscope.kernel.cost import costs
from ntkscope.kernel.factor import FactoredJacobian, OuterFactor

LABELS = torch.tensor([0, 2, 1, 1, 0])
OTHER_LABELS = torch.tensor([1, 0, 2, 2])


def cross_entropy_sum(outputs, targets):
    return F.cross_entropy(outputs, targets, weight=torch.tensor([0.5, 1.0, 2.0], dtype=outputs.dtype), reduction="sum")


@pytest.mark.parametrize("name", ["mlp", "cnn", "dict_input", "attention", "lstm_last_hidden"])
@pytest.mark.parametrize(
    "loss", ["cross_entropy", cross_entropy_sum, nn.CrossEntropyLoss(label_smoothing=0.1)], ids=["name", "function", "module"]
)
def test_loss_kernel(name, loss):
    model, inputs = BY_NAME[name].build(torch.float64)
    _, query = BY_NAME[name].build(torch.float64, draw=1, num_examples=4)
    function = F.cross_entropy if loss == "cross_entropy" else loss
    gram = ntkscope.ntk_gram(model, inputs, outputs="loss", targets=LABELS, loss=loss)
    assert gram.num_classes == 3
    assert_close(gram.matrix, oracle_gram(model, inputs, outputs="loss", loss=function, targets=LABELS))
    cross = ntkscope.ntk_gram(model, query, inputs, outputs="loss", targets=OTHER_LABELS, other_targets=LABELS, loss=loss)
    assert_close(cross.matrix, oracle_gram(model, query, inputs, outputs="loss", loss=function, targets=OTHER_LABELS, other_targets=LABELS))


@pytest.mark.parametrize("loss", ["squared", "mse"])
def test_loss_kernel_of_regression(loss):
    model, inputs = BY_NAME["mlp"].build(torch.float64)
    targets = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    function = F.mse_loss if loss == "mse" else lambda u, y: 0.5 * (u - y).square().sum()
    expected = oracle_gram(model, inputs, outputs="loss", loss=function, targets=targets)
    assert_close(ntkscope.ntk_gram(model, inputs, outputs="loss", targets=targets, loss=loss).matrix, expected)


def test_kinds_differ():
    model, inputs = BY_NAME["mlp"].build()
    kinds = ["trace", "sum", "class=0", "class=1"]
    found = [ntkscope.ntk_gram(model, inputs, outputs=kind).matrix for kind in kinds]
    for first, second in itertools.combinations(found, 2):
        assert float((first - second).abs().max()) > 0.01 * float(first.abs().max())


def test_batch_norm_with_the_statistics_of_the_batch():
    """bn="batch" is evaluation mode with running statistics replaced by those of the inputs; afterwards they are as before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    inputs = torch.randn(8, 4, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gram = ntkscope.ntk_gram(model, inputs, bn="batch")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[1].momentum == 0.1
    assert model.training
    hidden = model[0](inputs).detach()
    model[1].running_mean.copy_(hidden.mean(dim=0))
    model[1].running_var.copy_(hidden.var(dim=0))
    assert_close(gram.matrix, oracle_gram(model, inputs))


def test_fresh_batch_norm_is_warned_of():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    with pytest.warns(UserWarning, match="BatchNorm 1 has running statistics that were never updated"):
        ntkscope.ntk_gram(model, torch.randn(4, 4))


def test_float64_sums_of_a_float32_model():
    """dtype=float64 contracts in float64; what is left of the error is that of float32 derivatives."""
    model, inputs = BY_NAME["mlp_deep_tanh"].build(torch.float32)
    exact = oracle_gram(*BY_NAME["mlp_deep_tanh"].build(torch.float64))
    double = ntkscope.ntk_gram(model, inputs, dtype=torch.float64).matrix
    assert double.dtype == torch.float64
    assert_close(double, exact, 1e-5)
    single = ntkscope.ntk_gram(model, inputs, dtype=torch.float32).matrix
    assert single.dtype == torch.float32
    assert_close(single.double(), exact, 1e-5)


def test_half_precision_models_are_contracted_in_float32():
    model, inputs = BY_NAME["mlp"].build(torch.float32)
    gram = ntkscope.ntk_gram(model.bfloat16(), inputs.bfloat16())
    assert gram.matrix.dtype == torch.float32
    assert_close(gram.matrix.double(), oracle_gram(model.double(), inputs.bfloat16().double()), 0.05)


def test_matmul_precision_is_put_back():
    model, inputs = BY_NAME["mlp"].build(torch.float32)
    torch.set_float32_matmul_precision("medium")
    try:
        ntkscope.ntk_gram(model, inputs)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_device_is_a_copy():
    model, inputs = BY_NAME["mlp"].build()
    gram = ntkscope.ntk_gram(model, inputs, device="cpu")
    assert_close(gram.matrix, ntkscope.ntk_gram(model, inputs).matrix)


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x):
        return F.dropout(self.fc(x), 0.5, training=True)


class RowCoupledGradient(nn.Module):
    """The value of a row does not depend on its neighbours, its gradient does."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x):
        hidden = self.fc(x)
        shared = hidden.mean()
        return hidden + shared - shared.detach()


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(2, 3)

    def forward(self, x):
        rows = [self.second(row[None]) if row.sum() > 100 else self.first(row[None]) for row in x]
        return torch.cat(rows)


def test_examples_that_the_probe_did_not_see():
    """A model that takes another way for a rare example is differentiated example by example, not silently wrong."""
    torch.manual_seed(0)
    model = DataDependent().double()
    inputs = torch.randn(9, 2, dtype=torch.float64)
    inputs[4] = 1000.0  # the probe takes examples 0, 2, 5 and 8
    assert_close(ntkscope.ntk_gram(model, inputs).matrix, oracle_gram(model, inputs))


def test_rules_are_left_when_a_block_is_unlike_the_probe():
    """One rare example makes the model call a layer that the probe has not seen."""

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.read = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 2)

        def forward(self, x):
            hidden = self.first(x)
            rare = x.sum(dim=1) > 100
            if rare.any():
                hidden = torch.where(rare[:, None], self.second(x), hidden)
            return self.read(torch.tanh(hidden))

    torch.manual_seed(0)
    model = Half().double()
    inputs = torch.randn(9, 2, dtype=torch.float64)
    inputs[4] = 60.0
    assert_close(ntkscope.ntk_gram(model, inputs).matrix, oracle_gram(model, inputs))


ONES = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ntkscope.ntk_gram(Random(), ONES), ntkscope.InputError, "another output every time"),
        (lambda: ntkscope.ntk_gram(RowCoupledGradient(), ONES), ntkscope.InputError, "Jacobian in `fc.weight`.* differs from autograd"),
        (lambda: ntkscope.ntk_gram(nn.Linear(2, 2), ONES, outputs="class=2"), ntkscope.InputError, "asks for class 2"),
        (lambda: ntkscope.ntk_gram(nn.Linear(2, 2), ONES, outputs="class=x"), ntkscope.InputError, "'class=k'"),
        (lambda: ntkscope.ntk_gram(nn.Linear(2, 2), ONES, outputs="loss"), ntkscope.InputError, "needs `targets`"),
        (
            lambda: ntkscope.ntk_gram(nn.Linear(2, 2), ONES, outputs="loss", targets=torch.zeros(2), loss="mse"),
            ntkscope.InputError,
            "one entry per example, got 2 for 3",
        ),
        (
            lambda: ntkscope.ntk_gram(nn.Linear(2, 2), ONES, outputs="loss", targets=torch.zeros(3, 2)),
            ntkscope.InputTypeError,
            "needs `loss`",
        ),
        (
            lambda: ntkscope.ntk_gram(nn.Linear(2, 2), ONES, outputs="loss", targets=torch.zeros(3, 2), loss="hinge"),
            ntkscope.InputError,
            "`loss` must be one of",
        ),
        (
            lambda: ntkscope.ntk_gram(nn.Linear(2, 2), ONES, outputs="loss", targets=torch.zeros(3, 2), loss=lambda u, y: (u - y).square()),
            ntkscope.InputError,
            "must return one number",
        ),
        (lambda: ntkscope.ntk_gram(nn.Linear(2, 2), ONES, targets=torch.zeros(3)), ntkscope.InputError, "is for outputs='loss'"),
        (lambda: ntkscope.ntk_gram(nn.Linear(2, 2), ONES, bn="train"), ntkscope.InputError, "`bn` must be one of"),
        (lambda: ntkscope.ntk_gram(nn.Linear(2, 2), ONES, dtype=torch.bfloat16), ntkscope.InputError, "need the precision"),
        (lambda: ntkscope.ntk_gram(nn.Linear(2, 2), ONES, device="nowhere"), ntkscope.InputError, "cannot be used here"),
        (
            lambda: ntkscope.ntk_gram(nn.Sequential(nn.Embedding(5, 2, max_norm=1.0), nn.Flatten()), torch.tensor([[1], [2]])),
            ntkscope.UnsupportedError,
            "max_norm",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- Contractions: every way is exact, also where the cost model would not choose it --------------------------------------------


def random_factor(seed, *, examples=3, classes=2, units=4, positions=1, inputs=5, is_separable=False):
    generator = torch.Generator().manual_seed(seed)
    shape = (examples, classes, units, 1 if is_separable else positions)
    grads = torch.randn(shape, generator=generator, dtype=torch.float64)
    if is_separable:
        grads = grads * torch.randn(examples, 1, units, positions, generator=generator, dtype=torch.float64)
    return OuterFactor(grads, torch.randn(examples, positions, inputs, generator=generator, dtype=torch.float64), slice(0, units), False)


def as_jacobian(factor):
    outputs = torch.zeros(factor.grads.shape[:2], dtype=torch.float64)
    shape = torch.Size((factor.grads.shape[2], factor.inputs.shape[2]))
    return FactoredJacobian(outputs, {"w": [factor]}, {}, {"w": shape}, torch.float64)


WAYS = [
    ("grams", 1, False, False),  # way, positions, weighted, separable
    ("modes", 1, False, False),
    ("modes", 1, True, False),
    ("modes", 3, False, True),
    ("modes", 3, True, True),
    ("positions", 3, False, False),
    ("positions", 3, False, True),
    ("gradients", 1, False, False),
    ("gradients", 3, True, False),
    ("gradients", 3, True, True),
]


@pytest.mark.parametrize(("way", "positions", "weighted", "is_separable"), WAYS)
@pytest.mark.parametrize("trace", [False, True], ids=["full", "trace"])
@pytest.mark.parametrize("same", [False, True], ids=["cross", "same"])
@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_every_contraction_is_exact(monkeypatch, way, positions, weighted, is_separable, trace, same, chunk_bytes):
    left = random_factor(0, positions=positions, is_separable=is_separable)
    right = left if same else random_factor(1, positions=positions, examples=4, is_separable=is_separable)
    dense = [torch.einsum("icut,itk->icuk", factor.grads, factor.inputs).flatten(2) for factor in (left, right)]
    scale = torch.rand(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    first = dense[0] * scale.flatten() if weighted else dense[0]
    full = torch.einsum("icp,jdp->icjd", first, dense[1])
    expected = torch.einsum("icjc->ij", full) if trace else full.flatten(2).flatten(0, 1)
    sizes = {"num_rows": 3, "num_columns": 4, "num_classes": 2, "units": 4, "inputs": 5, "positions": positions}
    one = left.separated()
    assert (one.patterns is not None) == is_separable
    assert way in costs(**sizes, has_modes=one.has_modes, is_weighted=weighted, is_trace=trace)
    monkeypatch.setattr("ntkscope.kernel.contract.cheapest", lambda **_: way)
    jacobian = as_jacobian(one)
    other = jacobian if same else as_jacobian(right.separated())
    total = torch.zeros_like(expected)
    contract(jacobian, other, total, precond={"w": scale} if weighted else None, trace=trace, chunk_bytes=chunk_bytes)
    if same:
        total = total.tril() + total.tril(-1).T
    assert_close(total, expected, 1e-13)


@pytest.mark.parametrize(
    ("way", "positions", "weighted"), [("grams", 1, False), ("positions", 3, False), ("gradients", 3, False), ("gradients", 1, True)]
)
@pytest.mark.parametrize("trace", [False, True], ids=["full", "trace"])
@pytest.mark.parametrize("same", [False, True], ids=["cross", "same"])
@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_every_contraction_of_tokens_is_exact(monkeypatch, way, positions, weighted, trace, same, chunk_bytes):
    vocabulary = 7
    generator = torch.Generator().manual_seed(0)

    def tokens_of(num):
        grads = torch.randn(num, 2, 4, positions, generator=generator, dtype=torch.float64)
        tokens = torch.randint(vocabulary, (num, positions), generator=generator)
        return OuterFactor(grads, tokens, slice(0, vocabulary), True)

    left = tokens_of(3)
    right = left if same else tokens_of(4)
    scale = torch.rand(vocabulary, 4, generator=generator, dtype=torch.float64)
    hot = [F.one_hot(factor.inputs, vocabulary).double() for factor in (left, right)]
    dense = [torch.einsum("icut,itv->icvu", factor.grads, own).flatten(2) for factor, own in zip((left, right), hot, strict=True)]
    full = torch.einsum("icp,jdp->icjd", dense[0] * scale.flatten() if weighted else dense[0], dense[1])
    expected = torch.einsum("icjc->ij", full) if trace else full.flatten(2).flatten(0, 1)
    monkeypatch.setattr("ntkscope.kernel.contract.cheapest", lambda **_: way)
    shapes = {"w": torch.Size((vocabulary, 4))}
    one, other = (FactoredJacobian(torch.zeros(f.grads.shape[:2]), {"w": [f]}, {}, shapes, torch.float64) for f in (left, right))
    total = torch.zeros_like(expected)
    contract(one, one if same else other, total, precond={"w": scale} if weighted else None, trace=trace, chunk_bytes=chunk_bytes)
    if same:
        total = total.tril() + total.tril(-1).T
    assert_close(total, expected, 1e-13)


def test_separation_is_found_only_where_it_is():
    separable = random_factor(0, positions=6, is_separable=True)
    assert separable.separated().patterns is not None
    assert_close(separable.separated().joined().grads, separable.grads, 1e-13)
    assert random_factor(0, positions=6).separated().patterns is None
    nearly = separable.grads.clone()
    nearly[2, 1, 3, 2] += 1e-9 * nearly.abs().max()  # one entry of one example
    assert OuterFactor(nearly, separable.inputs, separable.part, False).separated().patterns is None
    dead = separable.grads.clone()
    dead[:, :, 1] = 0.0
    assert OuterFactor(dead, separable.inputs, separable.part, False).separated().patterns is not None


# --- Price ---------------------------------------------------------------------------------------------------------------------


def test_price_counts_what_the_job_does():
    model, inputs = BY_NAME["cnn"].build(torch.float32, num_examples=40)
    price, coverage = ntkscope.price_gram(model, inputs)
    gram = ntkscope.ntk_gram(model, inputs)
    assert price.num_outputs == len(gram.matrix) == 120
    assert price.result_bytes == 8 * 120**2
    assert price.num_params == sum(parameter.numel() for parameter in model.parameters())
    assert price.num_passes == 40 * 3
    assert price.num_blocks == 1
    assert coverage.routes == gram.coverage.routes
    assert price.seconds > 0
    budget = 2 * 8 * 120**2 + 5 * (coverage.bytes_per_example + coverage.working_bytes_per_example)
    small, _ = ntkscope.price_gram(model, inputs, max_memory=budget)
    assert small.num_blocks > 1
    assert small.num_passes > price.num_passes
    assert small.peak_bytes <= budget


@pytest.mark.alone  # alternatives are priced by measured times
def test_price_says_when_the_full_kernel_is_bound_by_products():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 64, 10))
    price, _ = ntkscope.price_gram(model, torch.randn(200, 1, 12, 12))
    assert price.is_bound_by_products
    assert any("trace" in other.name for other in price.alternatives)
    assert any("class" in other.name for other in price.alternatives)
    linear, _ = ntkscope.price_gram(nn.Linear(20, 10), torch.randn(50, 20))
    assert not linear.is_bound_by_products
    assert linear.alternatives == ()


def test_price_refuses_what_does_not_fit():
    with pytest.raises(ntkscope.InputError, match="more than half of max_memory"):
        ntkscope.price_gram(nn.Linear(4, 10), torch.randn(50, 4), max_memory=10_000)
