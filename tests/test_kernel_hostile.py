"""Models on which the engine was once wrong or crashed: found by a hostile user, kept as tests.

The probe takes examples 0, 3, 7 and 11 of twelve. What they do not show must be noticed on the others.
"""

import collections

import jaxtyping
import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from cases_base import Net, bare
from compare import assert_close
from oracles import gram as oracle_gram
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import ntkscope
from ntkscope.kernel import blocks

PROBED = [0, 3, 7, 11]


@pytest.fixture(autouse=True)
def seeded_and_unchecked(monkeypatch):
    """Users run without jaxtyping's checks: what they give of a wrong type must get our message."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def by_single_examples(model, inputs):
    """The oracle for models whose batch is one example at a time."""
    rows = []
    for i in range(len(inputs[0]) if isinstance(inputs, tuple) else len(inputs)):
        one = tuple(part[i : i + 1] for part in inputs) if isinstance(inputs, tuple) else inputs[i : i + 1]
        for output in model(one)[0]:
            grads = torch.autograd.grad(output, list(model.parameters()), allow_unused=True, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([grad.flatten() for grad in grads]))
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.T


# --- The probe shows one layout, other examples have another --------------------------------------------------------------------


def sorted_by_length(m, batch):
    x, lengths = batch
    order = torch.argsort(lengths, stable=True, descending=True)
    return m.read(m.fc(x[order]).tanh()[torch.argsort(order)])


def permuted_by_expert(m, x):
    order = torch.argsort((x[:, 0] > 0).long(), stable=True)
    hidden = m.fc(x[order]).tanh()
    return m.read(torch.empty_like(hidden).index_copy(0, order, hidden))


def unpadded(m, batch):
    x, mask = batch
    hidden = m.fc(x[mask.bool()]).tanh()
    padded = x.new_zeros(*mask.shape, 3)
    padded[mask.bool()] = hidden
    return m.read(padded.sum(dim=1))


def gated_branch(m, x):
    num, steps, _ = x.shape
    hidden = m.fc(x.transpose(0, 1).reshape(steps * num, -1)).tanh().reshape(steps, num, -1).mean(dim=0)
    return m.read(x.mean(dim=1)) + torch.relu(x[:, 0, 0])[:, None] * hidden


def layouts():
    torch.manual_seed(0)
    lengths = torch.randint(1, 5, (12,))
    lengths[PROBED] = 4
    yield "sorted", Net(sorted_by_length, fc=nn.Linear(4, 3), read=nn.Linear(3, 2)), (torch.randn(12, 4), lengths)
    x = torch.randn(12, 4)
    x[PROBED, 0] = 1.0
    yield "experts", Net(permuted_by_expert, fc=nn.Linear(4, 3), read=nn.Linear(3, 2)), x
    mask = torch.zeros(6, 4, dtype=torch.long)
    for i, length in enumerate([3, 3, 2, 3, 4, 3]):  # as many tokens as if all had three
        mask[i, :length] = 1
    yield "unpadded", Net(unpadded, fc=nn.Linear(4, 3), read=nn.Linear(3, 2)), (torch.randn(6, 4, 4), mask)
    x = torch.randn(12, 3, 4)
    x[:, 0, 0] = x[:, 0, 0].abs()
    x[PROBED, 0, 0] = -1.0
    yield "gated", Net(gated_branch, fc=nn.Linear(4, 2), read=nn.Linear(4, 2)), x


@pytest.mark.parametrize("name", ["sorted", "experts", "unpadded", "gated"])
def test_a_layout_that_does_not_hold_for_all_examples(name):
    model, inputs = {key: (model, inputs) for key, model, inputs in layouts()}[name]
    model = model.double()
    inputs = tuple(part.double() if part.is_floating_point() else part for part in inputs) if isinstance(inputs, tuple) else inputs.double()
    assert_close(ntkscope.ntk_gram(model, inputs).matrix, by_single_examples(model, inputs))


def test_memory_is_planned_anew_when_autograd_takes_over(monkeypatch):
    """Rows of all parameters are much larger than factors: a job that starts again must not keep the tiles of the first try."""
    plan, planned = blocks.plan_tiles, []

    def note(num_rows, num_columns, coverage, **options):
        planned.append(coverage.bytes_per_example)
        return plan(num_rows, num_columns, coverage, **options)

    monkeypatch.setattr(blocks, "plan_tiles", note)
    _, model, inputs = next(layouts())
    ntkscope.ntk_gram(model, inputs)
    assert planned[-1] == 2 * sum(parameter.numel() for parameter in model.parameters()) * 4
    assert len(planned) == 2
    assert planned[0] < planned[1]


# --- Blocks that use different rows of a weight ---------------------------------------------------------------------------------


def test_blocks_that_use_different_rows_of_a_weight():
    model = Net(lambda m, x: m.read((x.mT @ m.table[: x.shape[1]]).tanh().mean(dim=1)), table=bare(9, 4), read=nn.Linear(4, 3)).double()
    short, long = torch.randn(5, 3, 2, dtype=torch.float64), torch.randn(4, 6, 2, dtype=torch.float64)
    assert_close(ntkscope.ntk_gram(model, short, long).matrix, oracle_gram(model, short, long))
    slices = Net(lambda m, x: m.read(torch.nn.functional.linear(x, m.weight[: int(x[0, 0])]).tanh().sum(dim=1, keepdim=True)),
                 weight=bare(9, 4), read=nn.Linear(1, 2)).double()  # fmt: skip
    few, many = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    few[:, 0], many[:, 0] = 4.0, 7.0
    assert_close(ntkscope.ntk_gram(slices, few, many).matrix, oracle_gram(slices, few, many))


def test_other_with_another_number_of_outputs():
    x = torch.randn(8, 4)
    with pytest.raises(ntkscope.InputError, match="2 outputs on `inputs`, but 4 on `other`"):
        ntkscope.ntk_gram(nn.Linear(4, 2), x.view(8, 1, 4), x[:4].view(2, 2, 4))


# --- Rows that are no functions of their own input -----------------------------------------------------------------------------


def quantized(m, x):
    scale = x.abs().max()
    return m.read(m.fc(x / scale).tanh())


@pytest.mark.parametrize("engine", [ntkscope.ntk_gram, ntkscope.NTKOperator])
@pytest.mark.parametrize(
    "function",
    [quantized, lambda m, x: m.read(m.fc(x.cumsum(dim=0))), lambda m, x: m.read(m.fc(x + torch.arange(len(x), dtype=x.dtype)[:, None]))],
    ids=["largest of the batch", "cumulative", "place in the batch"],
)
def test_rows_that_depend_on_the_batch_are_refused(engine, function):
    x = torch.randn(12, 4)
    x[0] *= 10
    with pytest.raises(ntkscope.InputError, match="their own input row only"):
        engine(Net(function, fc=nn.Linear(4, 3), read=nn.Linear(3, 2)), x)


@pytest.mark.parametrize("engine", [ntkscope.ntk_gram, ntkscope.NTKOperator])
def test_reentrant_checkpoints_are_refused(engine):
    def checkpointed(m, x):
        return m.read(torch.utils.checkpoint.checkpoint(m.block, x.requires_grad_(), use_reentrant=True))

    model = Net(checkpointed, block=nn.Sequential(nn.Linear(4, 3), nn.Tanh()), read=nn.Linear(3, 1))
    with pytest.raises(ntkscope.UnsupportedError, match="use_reentrant=False"):
        engine(model, torch.randn(5, 4))


# --- Values of every kind ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [np.full((2, 3), 2.0), np.array(2.0), [[2.0] * 3] * 2, True, 2, torch.full((2, 3), 2.0, requires_grad=True)]
)
def test_preconditioners_of_every_kind(value):
    model, x = nn.Linear(3, 2, bias=False), torch.randn(4, 3)
    scale = 1.0 if value is True else 2.0
    for outputs in ("full", "trace"):
        gram = ntkscope.ntk_gram(model, x, x[:2], precond={"weight": value}, outputs=outputs)
        assert not gram.matrix.requires_grad
        assert_close(gram.matrix, scale * ntkscope.ntk_gram(model, x, x[:2], outputs=outputs).matrix, 1e-6)


def test_computed_weights_that_are_kept_between_calls():
    model, x = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(5, 3).double()
    expected = oracle_gram(model, x)
    with parametrize.cached():
        assert_close(ntkscope.ntk_gram(model, x).matrix, expected)


Pair = collections.namedtuple("Pair", ["left", "right"])


def test_batches_of_every_container():
    model = Net(lambda m, batch: m.read(batch.left * batch.right), read=nn.Linear(3, 2))
    left, right = torch.randn(4, 3), torch.randn(4, 3)
    plain = ntkscope.ntk_gram(nn.Linear(3, 2), left).matrix.shape
    assert ntkscope.ntk_gram(model, Pair(left, right)).matrix.shape == plain

    class Encoding(collections.UserDict):
        def __getattr__(self, name):
            return self.data[name]

    assert ntkscope.ntk_gram(model, Encoding(left=left, right=right)).matrix.shape == plain


def test_mixed_and_lower_precision_are_not_called_coupled():
    mixed = Net(lambda m, x: m.read(m.fc(x.float()).double()), fc=nn.Linear(4, 8), read=nn.Linear(8, 2).double())
    x = torch.randn(5, 4, dtype=torch.float64)
    found = ntkscope.ntk_gram(mixed, x).matrix
    assert_close(found, oracle_gram(nn.Sequential(mixed.fc, mixed.read), x), 1e-5)

    def autocast(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = m.read(m.fc(x).tanh())
        return y.float()

    model = Net(autocast, fc=nn.Linear(4, 8), read=nn.Linear(8, 2))
    with pytest.warns(UserWarning, match="lower precision than its outputs"):
        gram = ntkscope.ntk_gram(model, x.float())
    plain = nn.Sequential(model.fc, nn.Tanh(), model.read)
    assert_close(gram.matrix, oracle_gram(plain, x), 0.05)


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1  # another tensor under the same name
        self.register_buffer("late", torch.ones(1))
        return self.fc(x)


def test_buffers_that_are_bound_anew_are_put_back():
    model = Counter()
    kept = model.count
    ntkscope.ntk_gram(model, torch.randn(3, 2))
    assert model.count is kept
    assert float(kept) == 0.0
    assert dict(model.named_buffers()).keys() == {"count"}


X = torch.ones(3, 2) + torch.arange(3.0)[:, None]
LINEAR = nn.Linear(2, 2)


def in_inference_mode():
    with torch.inference_mode():
        ntkscope.ntk_gram(nn.Linear(2, 2), X)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (in_inference_mode, ntkscope.InputError, "inference_mode"),
        (lambda: ntkscope.ntk_gram(None, X), ntkscope.InputTypeError, "must be a torch.nn.Module"),
        (lambda: ntkscope.ntk_gram(LINEAR, torch.ones(3, 5)), ntkscope.InputError, "failed on the first examples"),
        (lambda: ntkscope.ntk_gram(LINEAR, X.double()), ntkscope.InputError, "dtype"),
        (lambda: ntkscope.ntk_gram(LINEAR, X, params="weight"), ntkscope.InputTypeError, r"Give \['weight'\]"),
        (lambda: ntkscope.ntk_gram(LINEAR, X, params=[]), ntkscope.InputError, "`params` is empty"),
        (lambda: ntkscope.ntk_gram(LINEAR, X * torch.nan), ntkscope.InputError, "inputs hold NaN"),
        (lambda: ntkscope.ntk_gram(LINEAR, X, max_memory="1G"), ntkscope.InputTypeError, "4 \\* 2\\*\\*30"),
        (lambda: ntkscope.ntk_gram(LINEAR, X, max_memory=float("nan")), ntkscope.InputError, "max_memory"),
        (lambda: ntkscope.price_gram(LINEAR, X, max_memory=0), ntkscope.InputError, "max_memory"),
        (lambda: ntkscope.ntk_gram(LINEAR, X, precond=2.0), ntkscope.InputTypeError, "must be a dict"),
        (lambda: ntkscope.ntk_gram(LINEAR, X, precond={"weight": "a", "bias": 1.0}), ntkscope.InputTypeError, "tensor or a number"),
        (lambda: ntkscope.ntk_gram(LINEAR, X, loss="mse"), ntkscope.InputError, "`loss` is for outputs='loss'"),
        (lambda: ntkscope.ntk_gram(LINEAR, X, bn="batch", forward_fn=lambda m, x: m(x)[:, :0]), ntkscope.InputError, "at least one output"),
        (
            lambda: ntkscope.ntk_gram(LINEAR, X, outputs="loss", targets=torch.tensor([0, 1, 5]), loss="cross_entropy"),
            ntkscope.InputError,
            "loss failed on one example",
        ),
        (
            lambda: ntkscope.ntk_gram(LINEAR, X, outputs="loss", targets=torch.zeros(3, 2), loss=lambda u, y: (u - y).sum().item()),
            ntkscope.InputTypeError,
            "must return a tensor",
        ),
        (
            lambda: ntkscope.ntk_gram(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), X[:1], bn="batch"),
            ntkscope.InputError,
            "statistics of a batch",
        ),
        (
            lambda: ntkscope.ntk_gram(nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Flatten()), torch.tensor([[1], [2]])),
            ntkscope.UnsupportedError,
            "sparse=True",
        ),
        (
            lambda: ntkscope.ntk_gram(nn.Linear(2, 5000), X, outputs="trace", max_memory=10**8),
            ntkscope.InputError,
            "5,000 outputs per example",
        ),
    ],
)
def test_bad_input_has_a_message(call, error, message):
    with pytest.raises(error, match=message):
        call()
