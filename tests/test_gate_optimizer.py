"""GatedAdamW as a drop-in optimizer."""

import copy
import pickle

import pytest
import torch
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ntkscope
from ntkscope import GatedAdamW


def make_model(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def train(model, optimizer, steps, scheduler=None, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(4, 5, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def groups(model):
    return [{"params": model[0].parameters(), "lr": 3e-3, "weight_decay": 0.1}, {"params": model[2].parameters(), "betas": (0.5, 0.9)}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grouped", [False, True])
def test_open_gate_is_adamw(dtype, grouped):
    gated, plain = make_model(dtype), make_model(dtype)
    ours = GatedAdamW(groups(gated) if grouped else gated.parameters(), lr=1e-2, gate="open")
    theirs = torch.optim.AdamW(groups(plain) if grouped else plain.parameters(), lr=1e-2, foreach=False)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200) for optimizer in (ours, theirs)]
    train(gated, ours, 200, schedulers[0])
    train(plain, theirs, 200, schedulers[1])
    for a, b in zip(gated.parameters(), plain.parameters(), strict=True):
        assert_close(a.detach(), b.detach(), rtol=1e-6 if dtype == torch.float32 else 1e-14)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=3),
    lr=st.floats(1e-5, 1.0),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.999)),
    decay=st.floats(0, 0.5),
    maximize=st.booleans(),
    tensor_lr=st.booleans(),
)
def test_open_gate_is_adamw_for_any_shape(shapes, lr, betas, decay, maximize, tensor_lr):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    options = {"betas": betas, "weight_decay": decay, "maximize": maximize}
    first = GatedAdamW(ours, lr=torch.tensor(lr, dtype=torch.float64) if tensor_lr else lr, gate="open", **options)
    second = torch.optim.AdamW(theirs, lr=lr, foreach=False, **options)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        first.step()
        second.step()
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a.detach(), b.detach(), rtol=1e-12) if a.numel() else None


def test_groups_can_have_their_own_gate():
    model, plain = make_model(torch.float64), make_model(torch.float64)
    mixed = GatedAdamW(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "gate": "open"}], lr=1e-2, gate="hard", alpha="unbiased"
    )
    train(model, mixed, 20)
    assert bool((mixed.gate_of(model[2].weight) == 1).all())
    assert 0 < float(mixed.gate_of(model[0].weight).mean()) < 1
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), 20)
    assert not torch.equal(model[0].weight, plain[0].weight)


def test_gate_of_is_what_the_step_applied():
    weight = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer = GatedAdamW([weight], lr=1e-2, weight_decay=0.0, alpha="unbiased")
    assert bool((optimizer.gate_of(weight) == 1).all())
    assert not optimizer.preconditioner_of(weight).any()
    torch.manual_seed(0)
    for _ in range(8):
        before = weight.detach().clone()
        weight.grad = torch.randn_like(weight) + torch.linspace(0, 3, 50, dtype=torch.float64)
        optimizer.step()
        state = optimizer.state[weight]
        m_hat = state["exp_avg"] / (1 - 0.9 ** int(state["step"]))
        assert_close(before - weight.detach(), 1e-2 * optimizer.gate_of(weight) * optimizer.preconditioner_of(weight) * m_hat)
        assert_close(optimizer.mean_gradient_of(weight), m_hat)


@pytest.mark.parametrize("center", ["paper", "corrected"])
def test_gate_is_made_of_the_mean_and_variance_it_reports(center):
    weight = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer = GatedAdamW([weight], alpha="unbiased", center=center)
    assert not optimizer.variance_of(weight).any()
    assert not optimizer.mean_gradient_of(weight).any()
    torch.manual_seed(0)
    for step in range(5):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        made = ntkscope.gate_values(optimizer.mean_gradient_of(weight), optimizer.variance_of(weight), kind="soft", alpha=1 / 19)
        if step:
            assert_close(optimizer.gate_of(weight), made)


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "file"])
def test_state_dict_round_trip_continues_bit_for_bit(through, tmp_path):
    model = make_model()
    optimizer = GatedAdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 7)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if through == "file":
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    else:
        state = copy.deepcopy(state) if through == "deepcopy" else pickle.loads(pickle.dumps(state))
    other = make_model()
    other.load_state_dict(state["model"])
    resumed = GatedAdamW(other.parameters(), lr=1e-2)
    resumed.load_state_dict(state["optimizer"])
    train(model, optimizer, 5, start=7)
    train(other, resumed, 5, start=7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_half_precision_parameters_keep_float32_state():
    model = make_model(torch.bfloat16)
    optimizer = GatedAdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 3)
    resumed = GatedAdamW(model.parameters(), lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    for held in (optimizer, resumed):
        state = held.state[model[0].weight]
        assert {state[name].dtype for name in ("exp_avg", "exp_avg_sq", "grad_var")} == {torch.float32}
    assert torch.equal(resumed.state[model[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])
    assert model[0].weight.dtype == torch.bfloat16


def test_amp_scaler_skips_steps_with_infinite_gradients():
    scaled, plain = make_model(), make_model()
    ours, theirs = GatedAdamW(scaled.parameters(), lr=1e-2), GatedAdamW(plain.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((scaled, ours), (plain, theirs)):
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            if model is scaled:
                scaler.scale(loss).backward()
                if step == 3:
                    model[0].weight.grad[0, 0] = torch.inf
                scaler.step(optimizer)
                scaler.update()
            elif step != 3:
                loss.backward()
                optimizer.step()
    for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
        assert_close(a.detach(), b.detach(), rtol=1e-6)


def test_closures_and_missing_gradients():
    model = make_model()
    unused = nn.Parameter(torch.ones(2))
    optimizer = GatedAdamW([*model.parameters(), unused], lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 5)).square().mean()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first
    assert unused.tolist() == [1.0, 1.0]
    assert not optimizer.state[unused]


def test_sparse_and_complex_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = GatedAdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ntkscope.UnsupportedError, match="sparse gradients"):
        optimizer.step()
    with pytest.raises(ntkscope.UnsupportedError, match="complex parameters"):
        GatedAdamW([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "`lr` must lie in"),
        ({"betas": (1.0, 0.9)}, r"`betas\[0\]` must lie in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"`betas\[1\]` must lie in"),
        ({"eps": -1e-8}, "`eps` must lie in"),
        ({"weight_decay": float("nan")}, "`weight_decay` must lie in"),
        ({"rho": 1.0}, r"`rho` must lie in \[0, 1\)"),
        ({"gate": "firm"}, "`gate` must be one of"),
        ({"center": "middle"}, "`center` must be one of"),
        ({"gate_warmup": -1}, "`gate_warmup` must lie in"),
        ({"alpha": "finite", "batch_size": 8, "dataset_size": 8}, "no sampling noise"),
        ({"lambda_pop": -0.1}, "`lambda_pop` must lie in"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ntkscope.InputError, match=message):
        GatedAdamW([nn.Parameter(torch.ones(1))], **options)
    optimizer = GatedAdamW([nn.Parameter(torch.ones(1))])
    with pytest.raises(ntkscope.InputError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **options})


def test_a_parameter_of_another_optimizer():
    with pytest.raises(ntkscope.InputError, match="does not hold this parameter"):
        GatedAdamW([nn.Parameter(torch.ones(1))]).gate_of(torch.ones(1))
