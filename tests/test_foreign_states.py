"""M of Adams other than torch's Adam, read from what they save, against the optimizer itself."""

import copy

import pytest
import torch
from foreign_adams import AdaBelief, Algorithm1, CPUAdam, FusedAdam, TransformersAdamW
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ntkscope._checks import InputError, UnsupportedError
from ntkscope.record.checkpoint import load_checkpoint
from ntkscope.record.optimizer_state import read_optimizer
from ntkscope.record.optimizers import Clock, mechanics

SHAPES = {"weight": (3, 4), "bias": (4,)}
LR = 0.1
SMALL = 1e-9  # a gradient that no denominator notices

MAKERS = {
    "adam": torch.optim.Adam,
    "amsgrad": lambda p, **o: torch.optim.Adam(p, amsgrad=True, **o),
    "nadam": torch.optim.NAdam,
    "nadam, slow": lambda p, **o: torch.optim.NAdam(p, momentum_decay=0.5, **o),
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "fused adam": FusedAdam,
    "fused adam, uncorrected": lambda p, **o: FusedAdam(p, bias_correction=False, **o),
    "cpu adam": CPUAdam,
    "cpu adam, uncorrected": lambda p, **o: CPUAdam(p, bias_correction=False, **o),
    "transformers adamw": TransformersAdamW,
    "transformers adamw, uncorrected": lambda p, **o: TransformersAdamW(p, correct_bias=False, **o),
    "adabelief": AdaBelief,
    "adabelief, amsgrad": lambda p, **o: AdaBelief(p, amsgrad=True, rectify=False, **o),
    "adabelief, plain": lambda p, **o: AdaBelief(p, rectify=False, **o),
    "adabelief, still": lambda p, **o: AdaBelief(p, degenerated_to_sgd=False, **o),
}
KINDS = {"amsgrad": "adam", "nadam, slow": "nadam", "cpu adam": "fused adam", "cpu adam, uncorrected": "fused adam"}


def trained(make, steps, *, seed=0, **options):
    """Parameters after steps with random gradients, the optimizer, and its state before the last step."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: nn.Parameter(torch.ones(shape, dtype=torch.float64)) for name, shape in SHAPES.items()}
    optimizer = make(parameters.values(), lr=LR, **options)
    for _ in range(steps):
        before = copy.deepcopy(optimizer.state_dict())
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return parameters, optimizer, before


def measured(make, steps, optimizer, before, **options):
    """M by definition: the last step once more, on a small gradient that was always the same, with the denominator that it then had."""
    first, second = options["betas"]
    eps = options["eps"]
    after = copy.deepcopy(optimizer.state_dict())
    zeros = {name: nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for name, shape in SHAPES.items()}
    again = make(zeros.values(), lr=LR, **options)
    for index, entry in after["state"].items():
        old = before["state"].get(index)
        for key, value in entry.items():
            if key == "exp_avg":
                entry[key] = torch.full_like(value, SMALL * (1 - first ** (steps - 1)))
            elif key == "exp_avg_sq":
                entry[key] = (value - (1 - second) * SMALL**2) / second
            elif key == "exp_avg_var":
                entry[key] = (value - eps - (1 - second) * (SMALL * first**steps) ** 2) / second
            elif key == "exp_inf":
                entry[key] = value / second
            elif key in ("step", "mu_product"):
                entry[key] = old[key] if old else value * 0 + (key == "mu_product")
    again.load_state_dict({"state": after["state"], "param_groups": before["param_groups"]})
    for parameter in zeros.values():
        parameter.grad = torch.full_like(parameter, SMALL)
    again.step()
    return {name: parameter.detach() / (-LR * SMALL) for name, parameter in zeros.items()}


def compare(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(torch.as_tensor(found[name], dtype=torch.float64).expand(value.shape), value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=10, deadline=None)
@given(
    steps=st.sampled_from([1, 2, 5, 6, 7, 30]),
    betas=st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.7, 0.95, 0.999])),
    eps=st.sampled_from([1e-8, 1e-3]),
)
def test_m_is_what_a_step_does_to_a_constant_gradient(name, steps, betas, eps):
    options = {"betas": betas, "eps": eps}
    parameters, optimizer, before = trained(MAKERS[name], steps, **options)
    found = read_optimizer(optimizer.state_dict(), parameters, "x.pt")
    compare(found.precond, measured(MAKERS[name], steps, optimizer, before, **options))
    assert found.kind == KINDS.get(name, name.partition(",")[0])
    assert found.step == steps
    assert found.gates is None


@pytest.mark.parametrize("name", ["adam", "nadam", "radam", "adamax"])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_a_gradient_that_never_changes_moves_weights_by_m(name, steps):
    """Without any knowledge of the formulas: all gradients are one, so is v̂."""
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = MAKERS[name]([weight], lr=LR, betas=(0.9, 0.9))
    gradient = torch.tensor([-2.0, 0.5, 1e-3], dtype=torch.float64)
    for _ in range(steps):
        start = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
    clock = Clock(step=steps)
    clock.tick(optimizer)
    (m,) = mechanics(optimizer, {"w": weight}, clock, at={"w": weight}, precond=None).precond.values()
    torch.testing.assert_close(weight.detach() - start, -LR * m * gradient, rtol=1e-9, atol=0)


def test_the_two_regimes_of_radam():
    def m_after(steps):
        parameters, optimizer, _ = trained(torch.optim.RAdam, steps, betas=(0.9, 0.999))
        return read_optimizer(optimizer.state_dict(), parameters, "x.pt").precond["weight"]

    assert m_after(5) == 1.0
    assert isinstance(m_after(6), torch.Tensor)


def test_deepspeed_counts_steps_in_the_last_entry_only():
    parameters, optimizer, _ = trained(FusedAdam, 5)
    state, expected = optimizer.state_dict(), read_optimizer(optimizer.state_dict(), parameters, "x.pt").precond
    state["param_groups"][0]["step"] = 0
    for index, step in enumerate((0, 5)):
        state["state"][index]["step"] = step
    found = read_optimizer(state, parameters, "x.pt")
    compare(found.precond, expected)
    assert found.step == 5


def test_groups_keep_steps_of_their_own():
    parameters = {name: nn.Parameter(torch.ones(shape, dtype=torch.float64)) for name, shape in SHAPES.items()}
    optimizer = FusedAdam([{"params": [parameters["weight"]]}, {"params": [parameters["bias"]]}], lr=LR)
    for _ in range(3):
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
    optimizer.param_groups[1]["step"] = 7
    in_groups = optimizer.state_dict()
    in_entries = copy.deepcopy(in_groups)
    for index, group in enumerate(in_entries["param_groups"]):
        in_entries["state"][index]["step"], group["step"] = group["step"], 0
    v = (1 - 0.999**3) * 0.25
    expected = {"weight": 1 / (0.5 + 1e-8), "bias": 1 / ((v / (1 - 0.999**7)) ** 0.5 + 1e-8)}
    for state in (in_groups, in_entries):
        found = read_optimizer(state, parameters, "x.pt").precond
        compare(found, {name: torch.full(shape, expected[name], dtype=torch.float64) for name, shape in SHAPES.items()})


def test_parameters_without_gradient_have_not_moved():
    parameters, optimizer, _ = trained(FusedAdam, 2)
    state = optimizer.state_dict()
    del state["state"][1]
    assert read_optimizer(state, parameters, "x.pt").precond["bias"] == 0.0


@pytest.mark.parametrize(
    ("make", "options", "factor"),
    [
        (FusedAdam, {}, 1.0),
        (TransformersAdamW, {}, 1.0),
        (AdaBelief, {}, 1.0),
        (AdaBelief, {"fixed_decay": True}, 1 / LR),
        (AdaBelief, {"decoupled_decay": False}, None),
        (AdaBelief, {"decoupled_decay": False, "fixed_decay": True}, None),
        (torch.optim.NAdam, {}, None),
        (torch.optim.NAdam, {"decoupled_weight_decay": True}, 1.0),
        (torch.optim.RAdam, {}, None),
        (torch.optim.RAdam, {"decoupled_weight_decay": True}, 1.0),
        (torch.optim.Adamax, {}, None),
    ],
)
def test_decay_passes_through_m_or_beside_it(make, options, factor):
    """`factor` is decay over λ w where it does not; None where it does."""
    parameters, optimizer, _ = trained(make, 8, weight_decay=0.01, **options)
    found = read_optimizer(optimizer.state_dict(), parameters, "x.pt")
    for name, weight in parameters.items():
        torch.testing.assert_close(found.decay[name], 0.01 * weight.detach() * (found.precond[name] if factor is None else factor))


def test_what_a_state_leaves_open_is_said():
    parameters, optimizer, _ = trained(FusedAdam, 3, weight_decay=0.01)
    state = optimizer.state_dict()
    (note,) = read_optimizer(state, parameters, "x.pt").notes
    assert note.startswith("Whether weight decay passes through M is not stored; it is taken as decoupled (adam_w_mode, the default).")
    state["param_groups"][0]["decoupled_weight_decay"] = False
    found = read_optimizer(state, parameters, "x.pt")
    assert not found.notes
    torch.testing.assert_close(found.decay["bias"], 0.01 * parameters["bias"].detach() * found.precond["bias"])
    parameters, optimizer, _ = trained(torch.optim.AdamW, 3, weight_decay=0.01)
    state = optimizer.state_dict()
    assert not read_optimizer(state, parameters, "x.pt").notes
    del state["param_groups"][0]["decoupled_weight_decay"]
    (note,) = read_optimizer(state, parameters, "x.pt").notes
    assert 'torch before 2.7 saves AdamW alike). If that is wrong, set group["decoupled_weight_decay"] = True' in note


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_gated_adams_of_others_are_read_in_our_format(steps, tmp_path):
    parameters, optimizer, _ = trained(Algorithm1, steps)
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    found = read_optimizer(load_checkpoint(tmp_path / "x.pt"), parameters, "x.pt")
    state = optimizer.state[parameters["bias"]]
    ungated = 1 / ((state["exp_avg_sq"] / (1 - 0.999**steps)).sqrt() + 1e-8)
    assert found.kind == "gate"
    torch.testing.assert_close(found.gates["bias"], optimizer.gate, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.precond["bias"], optimizer.gate * ungated, rtol=1e-9, atol=1e-12)
    assert steps == 1 or 0 < float(optimizer.gate.mean()) < 1


def saved(make, *, group=None, entry=None, drop=()):
    """A state of which options and entries were changed."""
    _, optimizer, _ = trained(make, 3)
    state = optimizer.state_dict()
    state["param_groups"][0].update(group or {})
    for own in state["state"].values():
        own.update({name: torch.ones_like(own["exp_avg"]) if value is None else value for name, value in (entry or {}).items()})
        for name in drop:
            own.pop(name, None)
    for name in drop:
        state["param_groups"][0].pop(name, None)
    return state


Adam, NAdam = torch.optim.Adam, torch.optim.NAdam
REFUSED = {
    "cautious": (lambda: saved(Adam, group={"caution": True}), "a coordinate moves only where average and gradient agree.*Record the run"),
    "8 bits": (
        lambda: saved(Adam, entry={"state1": None, "state2": None, "absmax1": None}, drop=("exp_avg", "exp_avg_sq", "amsgrad")),
        "bitsandbytes wrote it.*Record the run",
    ),
    "adafactor": (
        lambda: saved(Adam, entry={"exp_avg_sq_row": None}, drop=("exp_avg_sq", "betas")),
        "It is Adafactor: its step is clipped",
    ),
    "torch adafactor": (lambda: trained(torch.optim.Adafactor, 2)[1].state_dict(), "It is Adafactor: its step is clipped"),
    "shampoo": (lambda: saved(Adam, entry={"precond_0": None}, drop=("exp_avg_sq",)), r"matrices \(Shampoo, SOAP\), so that M is no diag"),
    "soap": (lambda: saved(Adam, entry={"GG": None, "Q": None}), r"matrices \(Shampoo, SOAP\), so that M is no diag"),
    "muon": (lambda: torch.optim.Muon([nn.Parameter(torch.ones(3, 4))]).state_dict(), r"orthogonalizes its step \(Muon\)"),
    "lamb": (
        lambda: saved(FusedAdam, group={"max_grad_norm": 1.0, "grad_averaging": True}),
        r"every layer by a trust ratio \(LAMB, LARS\), which is not stored",
    ),
    "first fused": (lambda: saved(FusedAdam, group={"max_grad_norm": 0.0}), r"the place of ε \(`eps_inside_sqrt`\) is not stored"),
    "lion": (lambda: saved(Adam, drop=("exp_avg_sq", "step", "eps", "amsgrad")), "It is Lion: its step is the sign"),
    "first adabelief": (lambda: saved(AdaBelief, drop=("rectify", "decoupled_decay")), r"does not store whether its steps are rectified"),
    "other gate": (
        lambda: saved(Adam, entry={"noise": None}),
        "may gate or scale its steps, and how is not stored.*is read if it saves as that does: step, exp_avg, exp_avg_sq and grad_var",
    ),
    "other gate, named options": (lambda: saved(Algorithm1, entry={"noise": None}, drop=("grad_var",)), "may gate or scale its steps"),
    "half a gate": (lambda: saved(Algorithm1, drop=("lambda_pop",)), "its groups lack 'lambda_pop'. Save"),
    "unknown option": (
        lambda: saved(FusedAdam, group={"clip": 1.0}),
        "another Adam that is known: its groups have betas, bias_correction, clip",
    ),
    "galore": (lambda: saved(TransformersAdamW, group={"rank": 8}), "another Adam that is known.*rank"),
    "no momentum_decay": (lambda: saved(NAdam, drop=("momentum_decay",)), "another Adam that is known.*mu_product"),
    "no mu_product": (lambda: saved(NAdam, drop=("mu_product",)), "an entry lacks mu_product"),
    "mu_product": (lambda: saved(NAdam, entry={"mu_product": torch.tensor(1.0)}), r"mu_product is outside \[0, 1\)"),
    "momentum_decay": (lambda: saved(NAdam, group={"momentum_decay": -1.0}), "options that make no sense.*momentum_decay"),
    "amsgrad without its largest": (lambda: saved(AdaBelief, group={"amsgrad": True}), "an entry lacks max_exp_avg_var"),
    "step text": (lambda: saved(FusedAdam, group={"step": "many"}), "an entry is at step 0"),
    "integers": (lambda: saved(AdaBelief, entry={"exp_avg_var": torch.ones(3, 4, dtype=torch.int)}), "exp_avg_var is no dense tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_or_unknown_states_are_explained(name):
    make, message = REFUSED[name]
    parameters = {name: torch.ones(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    with pytest.raises((InputError, UnsupportedError), match=message):
        read_optimizer(make(), parameters, "x.pt")


def test_caution_in_any_group_is_seen():
    parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
    optimizer = Adam([{"params": [p], "caution": k == 1} for k, p in enumerate(parameters.values())])
    with pytest.raises(UnsupportedError, match=r"is not read\. It is a cautious optimizer"):
        read_optimizer(optimizer.state_dict(), parameters, "x.pt")


def test_names_and_schedules_in_groups_do_no_harm():
    parameters, optimizer, _ = trained(FusedAdam, 3)
    expected = read_optimizer(optimizer.state_dict(), parameters, "x.pt").precond
    optimizer.param_groups[0] |= {"name": "all", "initial_lr": 1.0, "lr_scale": 0.5}
    compare(read_optimizer(optimizer.state_dict(), parameters, "x.pt").precond, expected)
