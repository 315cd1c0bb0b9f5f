"""Every optimizer's time, M and forcing: a recorded run closes about as well as plain gradient descent does (theory.md section 2)."""

import pytest
import torch
from record_case import closure, cross_entropy, problem, record, train
from torch import nn

import ntkscope
from ntkscope.dynamics.agreement import GradientAgreement, gradient_agreement
from ntkscope.record.rescale import rescaled

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
NAdam, RAdam, Adamax = torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax
# Momentum lags by a second-order amount, a few steps of the whole run (theory.md section 2): four times as many steps, a quarter as long.
SLOW = {"steps": 800, "schedule": 40}
ADAPTIVE = {"schedule": "log", "tolerance": 0.002}  # M of the Adam family moves fast at first


def groups(model):
    return SGD([{"params": model[0].parameters(), "lr": 0.04}, {"params": [*model[2].parameters(), *model[4].parameters()], "lr": 0.01}])


def cosine(model, optimizer):
    return {"after_step": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200).step}


def halving(model, optimizer):
    return {"after_step": torch.optim.lr_scheduler.StepLR(optimizer, 50, gamma=0.5).step}


RUNS = {
    "momentum": (lambda m: SGD(m.parameters(), lr=5e-4, momentum=0.9), SLOW),
    "nesterov": (lambda m: SGD(m.parameters(), lr=5e-4, momentum=0.9, nesterov=True), SLOW),
    "dampening": (lambda m: SGD(m.parameters(), lr=1e-3, momentum=0.9, dampening=0.5), SLOW),
    "momentum_and_decay": (lambda m: SGD(m.parameters(), lr=5e-4, momentum=0.9, weight_decay=0.1), SLOW),
    "decay": (lambda m: SGD(m.parameters(), lr=0.02, weight_decay=0.1), {}),
    "adam": (lambda m: Adam(m.parameters(), lr=3e-4), ADAPTIVE),
    "adam_coupled": (lambda m: Adam(m.parameters(), lr=3e-4, weight_decay=0.05), ADAPTIVE),
    "adamw": (lambda m: AdamW(m.parameters(), lr=3e-4, weight_decay=0.5), ADAPTIVE),
    "adamw_fused": (lambda m: AdamW(m.parameters(), lr=3e-4, weight_decay=0.5, fused=True), ADAPTIVE),
    "nadam": (lambda m: NAdam(m.parameters(), lr=3e-4), ADAPTIVE),
    "nadam_decoupled": (lambda m: NAdam(m.parameters(), lr=3e-4, weight_decay=0.5, decoupled_weight_decay=True), ADAPTIVE),
    "radam": (lambda m: RAdam(m.parameters(), lr=3e-4, betas=(0.9, 0.98)), ADAPTIVE),
    "radam_coupled": (lambda m: RAdam(m.parameters(), lr=5e-4, betas=(0.9, 0.98), weight_decay=0.05), ADAPTIVE),
    "adamax": (lambda m: Adamax(m.parameters(), lr=3e-4, weight_decay=0.05), ADAPTIVE),
    "cosine": (lambda m: SGD(m.parameters(), lr=0.04), {"setup": cosine}),
    "step_schedule": (lambda m: SGD(m.parameters(), lr=0.04), {"setup": halving}),
    "groups": (groups, {}),
}


def audits(trace):
    return torch.cat([rows for rows in trace.gradient_audits() if rows is not None])


@pytest.fixture(scope="module")
def plain():
    """Closure errors of plain gradient descent: what the discretization alone leaves."""
    return closure(record(lambda m: SGD(m.parameters(), lr=0.02)).trace)


def is_as_good(errors, plain):
    """The bound of this file: three times plain and half a percent for the gradient, and one for the energy."""
    return errors[0] <= 3 * plain[0] + 0.005 and errors[1] <= 3 * plain[1] + 0.01


def test_plain_descent_closes(plain):
    assert plain[0] < 0.003
    assert plain[1] < 0.002


@pytest.mark.parametrize("name", RUNS)
def test_other_optimizers_close_as_well(name, plain):
    make, options = RUNS[name]
    trace = record(make, **options).trace
    assert is_as_good(closure(trace), plain), (closure(trace), plain)
    assert trace[-1].loss < 0.8 * trace[0].loss  # a run that goes nowhere closes with anything
    agreement = gradient_agreement(audits(trace))
    assert agreement.factor == pytest.approx(1, abs=1e-9)
    assert agreement.unexplained == pytest.approx(0, abs=1e-9)
    assert not agreement.warnings()


def scaled_training(optimizer, model, inputs, targets, steps, poisoned=()):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=30)
    for step in range(steps):
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model, inputs, targets)).backward()
        if step in poisoned:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_are_unscaled_and_skipped_steps_take_no_time(fused, plain):
    model, inputs, targets = problem()
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy", schedule="log", tolerance=0.002)
    optimizer = AdamW(model.parameters(), lr=3e-4, weight_decay=0.5, fused=fused)
    recorder.attach(optimizer)
    poisoned = (0, 1, 40, 41, 100)
    scaled_training(optimizer, model, inputs, targets, 200, poisoned)
    trace = recorder.trace
    assert trace.steps[-1] == 200 - len(poisoned)
    assert trace[-1].time == pytest.approx(3e-4 * (200 - len(poisoned)))
    rows = audits(trace)
    assert torch.allclose(rows[:, 0], rows[:, 1])
    assert torch.allclose(rows[:, 2], rows[:, 1])
    assert is_as_good(closure(trace), plain), (closure(trace), plain)


def clipping(model, optimizer):
    return {"before_step": lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.3)}


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_a_clipped_run_closes_in_rescaled_time(decay, plain, tmp_path):
    options = {"setup": clipping, "path": tmp_path / "trace"}
    trace = record(lambda m: SGD(m.parameters(), lr=0.05, weight_decay=decay), **options).trace
    (warning,) = gradient_agreement(audits(trace)).warnings()
    assert warning.startswith("Loss scale or clipping")
    assert not is_as_good(closure(trace), plain)
    assert is_as_good(closure(rescaled(trace)), plain), (closure(rescaled(trace)), plain)
    assert all(rescaled(trace).entries[step] is entry for step, entry in trace.entries.items())  # a view


def test_a_wrong_loss_scale_is_named_and_can_be_rescaled(plain):
    def summed(model, inputs, targets):
        return nn.functional.cross_entropy(model(inputs), targets, reduction="sum")

    trace = record(lambda m: SGD(m.parameters(), lr=0.0025), loss=summed, every_step=True).trace
    agreement = gradient_agreement(audits(trace))
    assert agreement.factor == pytest.approx(8)
    (warning,) = agreement.warnings()
    assert "received are 8.00 times those of the loss on the probe" in warning
    view = rescaled(trace)
    assert is_as_good(closure(view), plain)
    assert view.times == pytest.approx([8 * time for time in trace.times])
    for snapshot, own in zip(view, trace, strict=True):
        assert snapshot.learning_rates == pytest.approx((0.02,))
        assert snapshot.kernel_upper.data_ptr() == own.kernel_upper.data_ptr()
        if own.step_times is not None:
            assert torch.allclose(snapshot.step_times, 8 * own.step_times)
            assert float(snapshot.step_times[-1]) == pytest.approx(snapshot.time)


def test_a_penalty_in_the_loss_is_a_missing_term():
    def penalized(model, inputs, targets):
        return cross_entropy(model, inputs, targets) + 0.05 * sum(p.square().sum() for p in model.parameters())

    agreement = gradient_agreement(audits(record(lambda m: SGD(m.parameters(), lr=0.02), loss=penalized).trace))
    assert any(warning.startswith("Missing term: ") for warning in agreement.warnings())
    assert agreement.persistence > 0.9


def test_minibatch_noise_alone_is_neither():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(8, (2,), generator=generator) for _ in range(200)]
    agreement = gradient_agreement(audits(record(lambda m: SGD(m.parameters(), lr=0.02), batches=batches).trace))
    assert agreement.unexplained > 0.3  # noise there is
    assert not agreement.warnings()


def test_the_audit_is_the_gradient_of_the_loss_on_the_probe():
    """Against plain autograd, at the weights before the step right after a snapshot, with the received gradient replaced."""
    model, inputs, targets = problem()
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy", schedule=[4, 6], drift=None)
    optimizer = SGD(model.parameters(), lr=0.1)
    recorder.attach(optimizer)
    expected = []
    for step in range(6):
        loss = cross_entropy(model, inputs, targets)
        flat = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))])
        received = torch.randn(flat.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        if step in (0, 4):
            rest = received - received @ flat / flat.square().sum() * flat
            cosine = torch.nan if not expected else float(torch.cosine_similarity(rest, before, dim=0))  # ruff: ignore[undefined-name]
            expected.append([float(received @ flat), float(flat @ flat), float(received @ received), cosine])
            before = rest  # ruff: ignore[unused-variable]
        start = 0
        for parameter in model.parameters():
            parameter.grad = received[start : start + parameter.numel()].view_as(parameter).clone()
            start += parameter.numel()
        optimizer.step()
    rows = recorder.trace.gradient_audits()
    assert recorder.trace.steps == [0, 4, 6]
    assert rows[0] is None
    found = torch.cat(rows[1:])
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), equal_nan=True)


def test_gradients_that_a_closure_computes_are_audited():
    model, inputs, targets = problem()
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy", schedule=1)
    optimizer = SGD(model.parameters(), lr=0.1)
    recorder.attach(optimizer)

    def evaluate():
        optimizer.zero_grad()
        loss = cross_entropy(model, inputs, targets)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(evaluate)
    agreement = ntkscope.analyze(recorder).agreement
    assert agreement is not None
    assert agreement.factor == pytest.approx(1.0, abs=1e-5), "the closure's gradients are those of the loss on the probe"


def test_auditing_leaves_gradients_and_random_state_alone():
    model, inputs, targets = problem()
    model.insert(1, nn.Dropout(0.5))
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy", schedule=1, drift=None)
    optimizer = SGD(model.parameters(), lr=0.0)
    recorder.attach(optimizer)
    train(model, inputs, targets, optimizer, 1)
    before = [parameter.grad.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(model.parameters(), before, strict=True))
    assert model.training
    assert recorder.trace.gradient_audits()[-1] is not None


def test_standard_errors_are_those_of_a_ratio():
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(300):
        square = 1 + torch.rand(40, generator=generator, dtype=torch.float64)
        product = 1.5 * square + 0.6 * torch.randn(40, generator=generator, dtype=torch.float64)
        rows = torch.stack([product, square, 4 * square, torch.zeros_like(square)], dim=1)
        estimates.append(gradient_agreement(rows))
    spread = float(torch.tensor([found.factor for found in estimates]).std())
    claimed = sum(found.factor_error for found in estimates) / len(estimates)
    assert claimed == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize(
    ("found", "starts"),
    [
        (GradientAgreement(1.5, 0.3, 0.5, 0.4, 0.01, 9), []),  # within two standard errors; direction not kept
        (GradientAgreement(1.5, 0.2, 0.5, 0.9, 0.1, 9), ["Loss scale", "Missing term"]),
        (GradientAgreement(1.09, 0.0, 0.04, 0.9, 0.1, 9), []),
        (GradientAgreement(2.0, float("nan"), 0.5, 0.9, float("nan"), 1), []),  # one audit says nothing
    ],
)
def test_warnings_need_size_and_certainty(found, starts):
    warnings = found.warnings()
    assert len(warnings) == len(starts)
    assert all(warning.startswith(start) for warning, start in zip(warnings, starts, strict=True))


def test_bad_input_to_agreement_and_rescaling():
    with pytest.raises(ntkscope.InputError, match="at least one audit"):
        gradient_agreement(torch.ones(0, 4, dtype=torch.float64))
    with pytest.raises(ntkscope.InputError, match="is zero at every audited step"):
        gradient_agreement(torch.zeros(2, 4, dtype=torch.float64))
    trace = record(lambda m: SGD(m.parameters(), lr=0.02), steps=2, max_overhead=0.0).trace
    with pytest.raises(ntkscope.InputError, match="Time cannot be rescaled"):
        rescaled(trace)
