"""M from a stored optimizer equals, bit for bit, what the live optimizer gives; and what does not match is explained."""

import itertools
import re

import pytest
import torch
from loading_case import save_distributed, small_model, trained
from torch import nn

from ntkscope._checks import InputError, UnsupportedError
from ntkscope.gate.optimizer import GatedAdamW
from ntkscope.record.checkpoint import load_checkpoint
from ntkscope.record.matching import match_parameters
from ntkscope.record.optimizer_state import find_optimizers, read_optimizer, stored_number
from ntkscope.record.optimizers import Clock, mechanics, momentum_lag, stability_edge
from ntkscope.record.weights import unwrap

SPLIT = {"lr": 0.01, "weight_decay": 0.1}


def split_groups(model, **options):
    """Weights of two or more dimensions first, the rest without decay, as GPT scripts do."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], **options},
        {"params": [p for p in parameters if p.ndim < 2], "lr": 0.002, "weight_decay": 0.0},
    ]


OPTIMIZERS = {
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "adam coupled": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, weight_decay=0.1),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, betas=(0.8, 0.9), eps=1e-3),
    "amsgrad": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, amsgrad=True),
    "tensor lr": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.01)),
    "groups": lambda m: torch.optim.AdamW(split_groups(m, **SPLIT)),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.8, nesterov=True),
    "gated": lambda m: GatedAdamW(m.parameters(), lr=0.01, gate="hard", alpha="unbiased"),
    "nadam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.01, weight_decay=0.1),
    "nadam decoupled": lambda m: torch.optim.NAdam(m.parameters(), lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": lambda m: torch.optim.RAdam(m.parameters(), lr=0.01),
    "radam adapting": lambda m: torch.optim.RAdam(m.parameters(), lr=0.01, betas=(0.9, 0.9999)),
    "radam groups": lambda m: torch.optim.RAdam(split_groups(m, **SPLIT), betas=(0.9, 0.99)),
    "adamax": lambda m: torch.optim.Adamax(m.parameters(), lr=0.01, weight_decay=0.1),
    "gated groups": lambda m: GatedAdamW(split_groups(m, lr=0.01), gate="soft", decay="gated"),
}


def live_mechanics(optimizer, model):
    """M of the live optimizer, as the recorder reads it after its steps."""
    clock = Clock()
    for group in optimizer.param_groups:
        beta = group.get("momentum", 0.0)
        clock.buildup.append((1 - group["dampening"]) / (1 - beta) if beta else 0.0)
    clock.tick(optimizer)
    parameters = dict(model.named_parameters())
    return mechanics(optimizer, parameters, clock, at=parameters, precond=None)


def identical(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("place", ["optimizer", "optimizer_state_dict", "optim", "list", "top", "nested"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_m_is_that_of_the_live_optimizer_bit_for_bit(name, place, tmp_path):
    model, optimizer = trained(OPTIMIZERS[name], steps=5)
    state = optimizer.state_dict()
    content = {"list": {"optimizer_states": [state]}, "top": state, "nested": {"trainer": {"opt": {"main": state}}}}
    weights = {} if place == "top" else {"model": model.state_dict()}
    torch.save(weights | content.get(place, {place: state}), tmp_path / "x.pt")
    loaded = load_checkpoint(tmp_path / "x.pt")
    known = live_mechanics(optimizer, model)
    for parameters in (dict(model.named_parameters()), *([unwrap(loaded, "x.pt").parameters()] if weights else [])):
        found = read_optimizer(loaded, parameters, "x.pt")
        identical(found.precond, known.precond)
        identical(found.ungated, known.ungated)
        assert (found.gates is None) == (known.gates is None)
        assert (found.decay is None) == (known.decay is None)
        if known.gates is not None:
            identical(found.gates, known.gates)
        if known.decay is not None:
            identical(found.decay, known.decay)
        assert found.momentum_lag == momentum_lag(optimizer)
        assert found.stability_edge == stability_edge(optimizer)
        assert found.step == (None if name in ("sgd", "momentum", "nesterov") else 5)
        assert found.learning_rates == tuple(float(group["lr"]) for group in optimizer.param_groups)
        assert found.learning_rate == max(found.learning_rates)
        assert found.left_out == ()
        assert repr(found).startswith("StoredOptimizer(")


def test_the_formulas_of_the_theory():
    """The oracle, without any of our code: theory.md section 2."""
    model, optimizer = trained(lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, betas=(0.8, 0.95), eps=1e-4, amsgrad=True), steps=4)
    found = read_optimizer(optimizer.state_dict(), dict(model.named_parameters()), "x.pt")
    for index, name in enumerate(found.precond):
        largest = optimizer.state_dict()["state"][index]["max_exp_avg_sq"].double()
        torch.testing.assert_close(found.precond[name].double(), 1 / ((largest / (1 - 0.95**4)).sqrt() + 1e-4), rtol=1e-5, atol=0)


def test_momentum_of_sgd_is_the_lag_and_m_is_one():
    model, optimizer = trained(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
    found = read_optimizer(optimizer.state_dict(), dict(model.named_parameters()), "x.pt")
    assert set(found.precond.values()) == {1.0}
    assert found.momentum_lag == pytest.approx(9.0)
    assert found.kind == "sgd"


def layered(momentum, **first):
    """Two groups in the model's order, with other learning rates."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    groups = [{"params": [*model[0].parameters()], "lr": 0.4, **first}, {"params": [*model[1].parameters()]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=momentum)
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_groups_are_scaled_by_the_largest_learning_rate():
    model, optimizer = layered(momentum=0.5)
    found = read_optimizer(optimizer.state_dict(), dict(model.named_parameters()), "x.pt")
    assert found.precond == {"0.weight": 1.0, "0.bias": 1.0, "1.weight": 0.25, "1.bias": 0.25}
    assert (found.learning_rate, found.learning_rates) == (0.4, (0.4, 0.1))


def test_momentum_makes_a_group_faster():
    model, optimizer = layered(momentum=0.9, lr=0.1)
    optimizer.param_groups[0]["momentum"] = 0.5
    found = read_optimizer(optimizer.state_dict(), dict(model.named_parameters()), "x.pt")
    # After many steps a constant gradient moves each by lr / (1 - momentum).
    assert found.precond == pytest.approx({"0.weight": 0.2, "0.bias": 0.2, "1.weight": 1.0, "1.bias": 1.0})


def test_groups_without_any_shape_are_not_guessed():
    model, optimizer = layered(momentum=0.0)
    with pytest.raises(InputError, match=r"can be matched in 3 ways.* Save names with it"):
        read_optimizer(optimizer.state_dict(), dict(model.named_parameters()), "x.pt")


def test_a_distributed_checkpoint_gives_the_same(tmp_path):
    model, optimizer = trained(OPTIMIZERS["groups"], steps=5)
    save_distributed({"model": model.state_dict(), "optim": optimizer.state_dict()}, tmp_path / "dcp")
    found = read_optimizer(load_checkpoint(tmp_path / "dcp"), dict(model.named_parameters()), "dcp")
    identical(found.precond, live_mechanics(optimizer, model).precond)


def test_states_by_name_as_fsdp_writes_them(tmp_path):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, optimizer = trained(OPTIMIZERS["groups"], steps=5)
    state = get_optimizer_state_dict(model, optimizer)
    assert "0.weight" in state["state"]
    prefixed = {
        "state": {f"_orig_mod.{name}": value for name, value in state["state"].items()},
        "param_groups": [group | {"params": [f"_orig_mod.{name}" for name in group["params"]]} for group in state["param_groups"]],
    }
    torch.save({"a": state}, tmp_path / "x.pt")
    for content in (load_checkpoint(tmp_path / "x.pt"), {"optim": prefixed}):
        found = read_optimizer(content, dict(model.named_parameters()), "x.pt")
        assert found.matched == "by name"
        identical(dict(sorted(found.precond.items())), dict(sorted(live_mechanics(optimizer, model).precond.items())))


def test_stored_names_decide_where_order_would_not():
    """Two layers of one shape, given in the other order: only names can tell."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    optimizer = torch.optim.Adam(list(model.named_parameters())[::-1], lr=0.1)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    found = read_optimizer(optimizer.state_dict(), dict(model.named_parameters()), "x.pt")
    identical(dict(sorted(found.precond.items())), live_mechanics(optimizer, model).precond)
    assert found.matched == "by name"


# --- matching ---------------------------------------------------------------------------------------------------------------------


def test_frozen_parameters_are_left_out():
    model = small_model()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(torch.linspace(0, 1, 15).reshape(5, 3)).sum().backward()
    optimizer.step()
    parameters = dict(model.named_parameters())
    found = read_optimizer(optimizer.state_dict(), parameters, "x.pt")
    assert found.left_out == ("0.weight", "0.bias")
    identical(found.precond, live_mechanics(optimizer, model).precond)
    with pytest.raises(InputError, match=r"holds 4 of the model's 6 parameters.* Several choices fit the shapes\. Set requires_grad"):
        read_optimizer(optimizer.state_dict(), {name: p.detach() for name, p in parameters.items()}, "x.pt")


def test_a_frozen_body_is_found_by_shape_where_that_is_certain():
    model = small_model()
    optimizer = torch.optim.Adam(model[3].parameters(), lr=0.1)
    model(torch.linspace(0, 1, 15).reshape(5, 3)).sum().backward()
    optimizer.step()
    found = read_optimizer(optimizer.state_dict(), {name: p.detach() for name, p in model.named_parameters()}, "x.pt")
    assert set(found.precond) == {"3.weight", "3.bias"}
    assert "frozen" in found.matched


def test_parameters_without_gradient_have_not_moved():
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model[3](torch.ones(2, 4)).sum().backward()
    optimizer.step()
    found = read_optimizer(optimizer.state_dict(), dict(model.named_parameters()), "x.pt")
    assert [name for name, value in found.precond.items() if isinstance(value, float)] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    identical(found.precond, live_mechanics(optimizer, model).precond)


def test_two_groups_are_told_by_rules_and_ambiguity_is_refused():
    model, optimizer = trained(OPTIMIZERS["groups"])
    found = read_optimizer(optimizer.state_dict(), dict(model.named_parameters()), "x.pt")
    assert found.matched == "by order and shape, groups split with matrices first"
    square = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    groups = [{"params": [p for n, p in square.named_parameters() if not n.endswith("bias")]},
              {"params": [p for n, p in square.named_parameters() if n.endswith("bias")]}]  # fmt: skip
    optimizer = torch.optim.Adam(groups, lr=0.1)
    square(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    found = read_optimizer(optimizer.state_dict(), dict(square.named_parameters()), "x.pt")
    identical(dict(sorted(found.precond.items())), dict(sorted(live_mechanics(optimizer, square).precond.items())))
    flat = {name: torch.zeros(3) for name in ("a.bias", "b.weight", "c.bias", "d.weight")}
    with pytest.raises(InputError, match=r"can be matched in \d ways: its entry 0 may be 'a.bias' or 'b.weight'.*named_parameters\(\)"):
        match_parameters([{"params": [0, 1]}, {"params": [2, 3]}], [(3,)] * 4, flat, "x.pt")


def reference_embeddings(shapes, sizes):
    """All ways to choose entries in order, by brute force."""
    return [
        chosen
        for chosen in itertools.combinations(range(len(sizes)), len(shapes))
        if all(shape is None or sizes[k] == shape for k, shape in zip(chosen, shapes, strict=True))
    ]


@pytest.mark.parametrize("seed", range(40))
def test_choices_of_frozen_parameters_against_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(int(n),) for n in torch.randint(1, 4, (6,), generator=generator)]
    shapes = [None if n == 0 else (int(n),) for n in torch.randint(0, 4, (3,), generator=generator)]
    parameters = {f"p{k}": torch.zeros(size) for k, size in enumerate(sizes)}
    ways = reference_embeddings(shapes, sizes)
    if len(ways) == 1:
        match = match_parameters([{"params": [0, 1, 2]}], shapes, parameters, "x.pt")
        assert match.names == [[f"p{k}" for k in ways[0]]]
    else:
        with pytest.raises(InputError, match="Several choices fit" if ways else "No choice fits"):
            match_parameters([{"params": [0, 1, 2]}], shapes, parameters, "x.pt")


# --- what is refused --------------------------------------------------------------------------------------------------------------


def changed(path, value):
    """An Adam state with one thing changed."""
    _, optimizer = trained(OPTIMIZERS["adam"])
    state = optimizer.state_dict()
    target = state
    for key in path[:-1]:
        target = target[key]
    if value is None:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return state


def foreign_sgd():
    """An SGD that scales its steps by layer."""
    _, optimizer = trained(OPTIMIZERS["momentum"])
    state = optimizer.state_dict()
    state["state"][0]["trust_ratio"] = torch.ones(())
    return state


GROUP, ENTRY = ("param_groups", 0), ("state", 0)
BAD = {
    "none": (lambda: {"model": {}}, "holds no state of an optimizer. Save optimizer.state_dict()"),
    "another shape": (lambda: changed((*ENTRY, "exp_avg"), torch.ones(2)), r"moments of an entry have the shapes \[\(2,\), \(4, 3\)\]"),
    "another model": (
        lambda: changed(ENTRY, {"step": torch.tensor(1.0), "exp_avg": torch.ones(9), "exp_avg_sq": torch.ones(9)}),
        r"does not match the model by order and shape\. Its entry 0 has shape \[9\], the model's '0.weight' \[4, 3\]\. Give the model",
    ),
    "more": (lambda: changed((*GROUP, "params"), list(range(9))), "holds 9 parameters, the model only 6. The shapes that both have agree"),
    "unknown name": (lambda: changed((*GROUP, "param_names"), [*"abcde", "nowhere"]), "holds 'a', which the model lacks"),
    "missing moment": (lambda: changed((*ENTRY, "exp_avg_sq"), None), "an entry lacks exp_avg_sq. Save optimizer.state_dict"),
    "integers": (lambda: changed((*ENTRY, "exp_avg"), torch.ones(4, 3, dtype=torch.int)), "exp_avg is no dense tensor of real"),
    "eight bits": (
        lambda: changed((*ENTRY, "exp_avg"), torch.ones(4, 3).to(torch.float8_e4m3fn)),
        "exp_avg is no dense tensor of real numbers in 16 bits or more. Save",
    ),
    "sparse": (lambda: changed((*ENTRY, "exp_avg"), torch.ones(4, 3).to_sparse()), "exp_avg is no dense tensor of real"),
    "step 0": (lambda: changed((*ENTRY, "step"), torch.tensor(0.0)), "an entry is at step 0"),
    "step text": (lambda: changed((*ENTRY, "step"), "many"), "an entry is at step None"),
    "negative": (lambda: changed((*ENTRY, "exp_avg_sq"), -torch.ones(4, 3)), "M of '0.weight'.* must be finite, got 12 NaN"),
    "betas": (lambda: changed((*GROUP, "betas"), (0.9, 1.5)), "options that make no sense .*betas.*Save optimizer.state_dict"),
    "one beta": (lambda: changed((*GROUP, "betas"), (0.9,)), "options that make no sense .*two numbers"),
    "lr": (lambda: changed((*GROUP, "lr"), "fast"), "options that make no sense"),
    "maximize": (lambda: changed((*GROUP, "maximize"), True), "The optimizer maximizes.* Minimize the negated"),
    "foreign adam": (
        lambda: changed((*ENTRY, "qmap"), torch.ones(2)),
        "is not of SGD, Adam.*qmap.* may gate or scale.* Its M is unknown. Record the run",
    ),
    "foreign sgd": (foreign_sgd, "is not of SGD, Adam.*trust_ratio.* Its M is unknown"),
    "rmsprop": (lambda: trained(lambda m: torch.optim.RMSprop(m.parameters()))[1].state_dict(), "is not of SGD, Adam.*square_avg"),
    "adagrad": (lambda: trained(lambda m: torch.optim.Adagrad(m.parameters()))[1].state_dict(), "is not of SGD, Adam.*sum"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_states_are_explained(name):
    make, message = BAD[name]
    with pytest.raises((InputError, UnsupportedError), match=message):
        read_optimizer(make(), dict(small_model().named_parameters()), "x.pt")


def test_parameters_that_torch_only_stores_are_refused():
    model, optimizer = trained(OPTIMIZERS["sgd"])
    parameters = {name: value.detach().to(torch.float8_e5m2) for name, value in model.named_parameters()}
    with pytest.raises(UnsupportedError, match=r"holds '0\.weight', which is torch\.float8_e5m2\. Load the model in float32"):
        read_optimizer(optimizer.state_dict(), parameters, "x.pt")


def test_several_optimizers_are_told_by_what_they_hold():
    first, adam = trained(OPTIMIZERS["adam"])
    second = nn.Linear(7, 5)
    second(torch.ones(2, 7)).sum().backward()
    other = torch.optim.Adam(second.parameters(), lr=0.1)
    other.step()
    content = {"optimizer_states": [adam.state_dict(), other.state_dict()]}
    assert [key for key, _ in find_optimizers(content)] == ["optimizer_states.0", "optimizer_states.1"]
    found = read_optimizer(content, dict(second.named_parameters()), "x.pt")
    assert (found.key, found.others) == ("optimizer_states.1", ("optimizer_states.0",))
    twice = {"a": adam.state_dict(), "b": adam.state_dict()}
    with pytest.raises(InputError, match=r"several optimizers that match \(a, b\)\. Choose one with key='a'"):
        read_optimizer(twice, dict(first.named_parameters()), "x.pt")
    assert read_optimizer(twice, dict(first.named_parameters()), "x.pt", key="b").key == "b"
    with pytest.raises(InputError, match=re.escape("holds no state of an optimizer under 'c'")):
        read_optimizer(twice, dict(first.named_parameters()), "x.pt", key="c")


@pytest.mark.parametrize(
    ("value", "number"),
    [(3, 3), (0.5, 0.5), (torch.tensor(2.0), 2.0), (torch.tensor([2]), 2), (True, None), ("3", None), (float("inf"), None), (10**400, None),
     (torch.ones(2), None), (torch.ones(1).to_sparse(), None), (torch.tensor(1j), None), (torch.empty(1, device="meta"), None)],
)  # fmt: skip
def test_numbers_that_files_store(value, number):
    assert stored_number(value) == number
