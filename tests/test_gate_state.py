"""State of GatedAdamW: saving between paths, older state dicts, AdamW and back, counts of its gates."""

import copy
import math
import pickle

import pytest
import torch
from compare import assert_close
from test_gate_paths import PATHS, give_gradients, parameters_of
from torch import nn

import ntkscope
from ntkscope import GatedAdamW
from ntkscope.record.optimizers import Clock, mechanics

SHAPES = [(3, 2), (4,), ()]
every_path = pytest.mark.parametrize("path", PATHS)


def walk(parameters, optimizer, steps, start=0):
    for step in range(start, start + steps):
        give_gradients(parameters, step)
        optimizer.step()


def copies_of(parameters):
    return [nn.Parameter(parameter.detach().clone()) for parameter in parameters]


@pytest.mark.parametrize("source", PATHS)
@pytest.mark.parametrize("target", PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_state_goes_from_any_path_to_any(source, target, dtype, tmp_path):
    ours = parameters_of(SHAPES, dtype)
    first = GatedAdamW(ours, lr=0.1, decay="gated", **PATHS[source])
    walk(ours, first, 4)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    theirs = copies_of(ours)
    second = GatedAdamW(theirs, **PATHS[target])
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert {name: second.param_groups[0][name] for name in PATHS[target]} == PATHS[target]
    assert second.param_groups[0]["decay"] == "gated"
    walk(ours, first, 3, start=4)
    walk(theirs, second, 3, start=4)
    for a, b in zip(ours, theirs, strict=True):
        if source == target:
            assert torch.equal(a, b)
        assert_close(a.double(), b.double(), 1e-11 if dtype == torch.float64 else 2**-7)


@every_path
@pytest.mark.parametrize("through", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["deepcopy", "pickle"])
def test_a_copied_optimizer_goes_on_bit_for_bit(path, through):
    ours = parameters_of(SHAPES)
    first = GatedAdamW(ours, lr=0.1, gate_stats=True, **PATHS[path])
    walk(ours, first, 3)
    theirs, second = through((ours, first))
    walk(ours, first, 3, start=3)
    walk(theirs, second, 3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert second.gate_statistics().num_steps == 3


@every_path
def test_states_of_older_versions_load(path):
    ours = parameters_of(SHAPES)
    first = GatedAdamW(ours, lr=0.1)
    walk(ours, first, 3)
    old = copy.deepcopy(first.state_dict())  # torch shares the tensors of a state dict that it loads
    for name in ("decay", "foreach", "fused", "capturable", "gate_stats"):
        del old["param_groups"][0][name]
    theirs = copies_of(ours)
    second = GatedAdamW(theirs, **PATHS[path])
    second.load_state_dict(old)
    walk(ours, first, 2, start=3)
    walk(theirs, second, 2, start=3)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, 1e-11)
    bare = GatedAdamW(copies_of(ours))
    bare.__setstate__({"state": {}, "param_groups": old["param_groups"]})
    assert bare.param_groups[0]["decay"] == "plain"


def adamw_with_history(dtype=torch.float64, **options):
    parameters = parameters_of(SHAPES, dtype)
    groups = [{"params": parameters[:1], "lr": 0.05}, {"params": parameters[1:], "betas": (0.8, 0.99), "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, **options)
    walk(parameters, optimizer, 5)
    return parameters, optimizer


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"maximize": True}], ids=str)
def test_adamw_goes_through_the_gated_one_unchanged(dtype, options):
    parameters, optimizer = adamw_with_history(dtype, **options)
    twins, twin = copy.deepcopy((parameters, optimizer))
    back = GatedAdamW.from_adamw(optimizer).to_adamw()
    walk(parameters, back, 4, start=5)
    walk(twins, twin, 4, start=5)
    assert all(torch.equal(a, b) for a, b in zip(parameters, twins, strict=True))
    assert type(back) is torch.optim.AdamW
    assert [group["lr"] for group in back.param_groups] == [0.05, 0.1]


@every_path
def test_an_open_gate_goes_on_as_adamw(path):
    parameters, optimizer = adamw_with_history()
    twins, twin = copy.deepcopy((parameters, optimizer))
    gated = GatedAdamW.from_adamw(optimizer, gate="open", **PATHS[path])
    walk(parameters, gated, 4, start=5)
    back = gated.to_adamw()
    walk(parameters, back, 4, start=9)
    walk(twins, twin, 8, start=5)
    for a, b in zip(parameters, twins, strict=True):
        assert_close(a, b, 1e-12)
    assert int(back.state[parameters[0]]["step"]) == 13


@pytest.mark.parametrize("center", ["paper", "corrected"])
def test_the_variance_taken_over_is_that_of_the_moments(center):
    parameters, optimizer = adamw_with_history()
    gated = GatedAdamW.from_adamw(optimizer, center=center, rho=0.95)
    for parameter, betas in zip(parameters, [(0.9, 0.999), (0.8, 0.99), (0.8, 0.99)], strict=True):
        state = optimizer.state[parameter]
        m_hat, v_hat = state["exp_avg"] / (1 - betas[0] ** 5), state["exp_avg_sq"] / (1 - betas[1] ** 5)
        assert_close(gated.variance_of(parameter), (v_hat - m_hat**2).clamp(min=0), 1e-12)
        assert gated.state[parameter]["exp_avg"] is not state["exp_avg"]


def test_what_adamw_does_not_know_stays():
    parameters, optimizer = adamw_with_history()
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    assert GatedAdamW.from_adamw(optimizer).param_groups[0]["initial_lr"] == 0.05
    assert GatedAdamW.from_adamw(optimizer, fused=True).param_groups[0]["fused"]
    fresh = GatedAdamW.from_adamw(torch.optim.AdamW(parameters))
    assert not fresh.state
    assert not fresh.to_adamw(amsgrad=True).state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.Adam, "got Adam: its weight decay"),
        (torch.optim.SGD, "got SGD: its weight decay"),
        (lambda params: torch.optim.AdamW(params, amsgrad=True), r"AdamW\(amsgrad=True\): the largest v"),
        (lambda params: torch.optim.AdamW(params, differentiable=True), r"AdamW\(differentiable=True\): steps here"),
    ],
)
def test_bad_optimizers_to_start_from(make, message):
    with pytest.raises(ntkscope.UnsupportedError, match=message):
        GatedAdamW.from_adamw(make(parameters_of(SHAPES)))


@every_path
@pytest.mark.parametrize("decay", ["plain", "gated"])
def test_statistics_are_counts_by_hand(path, decay):
    parameters = parameters_of([(3, 2), (4,), (0,)])
    groups = [{"params": parameters[:1], "gate": "hard"}, {"params": parameters[1:], "weight_decay": 0.5}]
    optimizer = GatedAdamW(groups, lr=0.1, alpha="unbiased", gate_stats=True, decay=decay, **PATHS[path])
    opened, total, shrunk, moved = (dict.fromkeys(((0, 0), (1, 0)), 0.0) for _ in range(4))
    for step in range(5):
        give_gradients(parameters, step)
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.step()
        for key, index, strength in (((0, 0), 0, 1e-3), ((1, 0), 1, 0.05)):
            gate = optimizer.gate_of(parameters[index])
            opened[key] += float((gate > 0.5).sum())
            total[key] += float(gate.sum())
            shrunk[key] += float((strength * before[index] * (gate if decay == "gated" else 1)).square().sum())
            moved[key] += float((parameters[index].detach() - before[index]).square().sum())
    found = optimizer.gate_statistics()
    assert found.num_steps == 5
    for key, size in (((0, 0), 6), ((1, 0), 4)):
        share = found.by_parameter[key]
        assert (share.num_elements, share.num_steps) == (size, 5)
        expected = (opened[key] / size / 5, total[key] / size / 5, shrunk[key] / moved[key])
        assert (share.open_share, share.mean_gate, share.decay_share) == pytest.approx(expected, rel=1e-9)
    assert math.isnan(found.by_parameter[1, 1].mean_gate)
    whole = (sum(opened.values()) / 50, sum(total.values()) / 50, sum(shrunk.values()) / sum(moved.values()))
    assert (found.open_share, found.mean_gate, found.decay_share) == pytest.approx(whole, rel=1e-9)
    optimizer.reset_gate_statistics()
    assert optimizer.gate_statistics().num_steps == 0


def noise_only(**options):
    weight = nn.Parameter(torch.full((200,), 3.0))
    optimizer = GatedAdamW([weight], lr=0.1, weight_decay=0.1, gate_stats=True, **options)
    generator = torch.Generator().manual_seed(0)
    for step in range(40):
        weight.grad = torch.randn(200, generator=generator)
        optimizer.step()
        if step == 9:
            optimizer.reset_gate_statistics()
    return optimizer.gate_statistics()


def test_decay_behind_closed_gates_is_warned_of():
    found = noise_only()
    assert found.decay_share > 0.5
    assert found.mean_gate < 0.1
    assert "of all parameters, because the gate is nearly closed" in found.warnings[0]
    assert "of parameter 0 of group 0" in found.warnings[1]
    assert "Use decay='gated', a smaller alpha ('unbiased') or weight_decay=0." in found.warnings[0]
    assert noise_only(decay="gated").decay_share < found.decay_share
    assert not noise_only(gate="open").warnings
    assert not noise_only(gate="hard", alpha="unbiased").warnings


def test_statistics_before_a_step_and_without_the_option():
    weight = nn.Parameter(torch.ones(2))
    found = GatedAdamW([weight], gate_stats=True).gate_statistics()
    assert (found.num_steps, found.by_parameter, found.warnings) == (0, {}, ())
    assert math.isnan(found.open_share)
    with pytest.raises(ntkscope.InputError, match="Make the optimizer with gate_stats=True"):
        GatedAdamW([weight]).gate_statistics()


def test_the_recorder_sees_gated_decay():
    (weight,) = parameters_of([(60,)])
    plain, gated = (GatedAdamW([weight], gate="snr", weight_decay=0.3, decay=decay, gate_warmup=0) for decay in ("plain", "gated"))
    seen = []
    for optimizer in (plain, gated):
        for step in range(3):
            give_gradients([weight], step)
            optimizer.step()
        clock = Clock()
        clock.tick(optimizer)
        at = {"w": torch.ones(60, dtype=torch.float64)}
        seen.append(mechanics(optimizer, {"w": weight}, clock, at=at, precond=None).decay["w"])
        assert 0 < float(optimizer.gate_of(weight).mean()) < 1
    assert_close(seen[0], torch.full((60,), 0.3, dtype=torch.float64))
    assert_close(seen[1], 0.3 * gated.gate_of(weight))
