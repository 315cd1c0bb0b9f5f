"""Training on from one bare checkpoint: the steps that are recorded, and what is left as it was."""

import copy

import pytest
import torch
from compare import assert_close
from torch import nn

import ntkscope
from ntkscope import InputError
from ntkscope.record.continuation import STEP_SIZE

NUM_STEPS = 12


def made(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).to(dtype)


def examples(num, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 4, generator=generator, dtype=dtype), torch.randint(3, (num,), generator=generator)


@pytest.fixture
def saved(tmp_path):
    torch.save({"model": {f"module.{name}": value for name, value in made(5).state_dict().items()}}, tmp_path / "bare.pt")
    return tmp_path / "bare.pt"


def plain_descent(model, inputs, targets, rate, num_steps):
    """Gradient descent from the definition; layers act as in evaluation."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        outputs = [model(inputs)]
    for _ in range(num_steps):
        gradients = torch.autograd.grad(nn.functional.cross_entropy(model(inputs), targets), list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= rate * gradient
            outputs.append(model(inputs))
    return outputs


def sharpness_of(model, inputs, targets):
    """Largest eigenvalue of B K, row by row from autograd."""
    model = copy.deepcopy(model).eval()
    outputs = model(inputs)
    rows = []
    for value in outputs.flatten():
        rows.append(torch.cat([part.flatten() for part in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)]))
    jacobian = torch.stack(rows)
    hessian = torch.autograd.functional.hessian(
        lambda u: nn.functional.cross_entropy(u.reshape(outputs.shape), targets), outputs.detach().flatten()
    )
    return float(torch.linalg.eigvals(hessian @ jacobian @ jacobian.T).real.max())


def test_steps_are_those_of_plain_gradient_descent(saved):
    inputs, targets = examples(8, 1)
    trace = ntkscope.continue_training(saved, made(), (inputs, targets), loss="cross_entropy", num_steps=NUM_STEPS)
    rate = STEP_SIZE / sharpness_of(made(5), inputs, targets)
    expected = plain_descent(made(5), inputs, targets, rate, NUM_STEPS)
    assert trace.steps[0] == 0
    assert trace.steps[-1] == NUM_STEPS
    for k, step in enumerate(trace.steps):
        assert_close(trace[k].outputs, expected[step], 1e-10)
        assert trace[k].time == pytest.approx(rate * step, rel=1e-10)
    assert_close(trace[0].kernel(), ntkscope.ntk_gram(made(5), inputs).matrix, 1e-10)


def test_the_note_says_whose_run_it_is_and_the_errors_are_measured(saved):
    trace = ntkscope.continue_training(saved, made(), examples(8, 1), query=examples(3, 2), loss="cross_entropy", num_steps=40)
    analysis = ntkscope.analyze(trace)
    assert any("made by ntkscope" in warning and "not how the checkpoint was trained" in warning for warning in analysis.warnings)
    assert analysis.run.source == str(saved)
    assert analysis.closure.trustworthy
    assert analysis.stability < 1
    assert analysis.transfer is not None


def test_the_model_is_left_as_it_was(saved):
    model = made()
    model.train()
    model[3].bias.requires_grad_(False)
    model[0].bias.grad = torch.ones_like(model[0].bias)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    trace = ntkscope.continue_training(
        saved, model, examples(8, 1), loss="cross_entropy", num_steps=3, progress=lambda done, total: seen.append((done, total))
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model[2].training
    assert torch.equal(model[0].bias.grad, torch.ones_like(model[0].bias))
    assert model[0].weight.grad is None
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert "3.bias" not in trace.facts.parameters


class Counting(nn.Linear):
    """A model with a state that is no tensor."""

    def get_extra_state(self):
        return {"count": 3}

    def set_extra_state(self, state):
        raise AssertionError("it was not changed, so it is not put back")


def test_states_that_are_no_tensors_are_left_alone(tmp_path):
    model = Counting(4, 3).double()
    before = model.weight.detach().clone()
    torch.save({name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}, tmp_path / "bare.pt")
    assert len(ntkscope.continue_training(tmp_path / "bare.pt", model, examples(8, 1), loss="cross_entropy", num_steps=3)) > 1
    assert torch.equal(model.weight, before)


def test_an_interrupt_leaves_the_model_as_it_was(saved):
    model = made()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ntkscope.continue_training(saved, model, examples(8, 1), loss="cross_entropy", num_steps=3, progress=interrupt)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, r"at least one step, got 0\. 100 is usual"),
        ({"loss": None}, r"needs all of `model`, `data` and `loss`"),
        ({"data": None}, r"needs all of `model`, `data` and `loss`"),
        ({"model": nn.Linear(4, 3)}, r"do not fit the model"),
        ({"data": (torch.ones(4, 5, dtype=torch.float64), torch.zeros(4, dtype=torch.long))}, r"failed on the probe"),
        (
            {"data": (torch.ones(4, 4, dtype=torch.float64), torch.zeros(4))},
            r"class labels are whole numbers. Convert them with \.long\(\)",
        ),
        ({"forward_fn": lambda model, batch: model(batch[:, None] * torch.ones(2, 1))}, r"shape \(8, 2, 3\), of which .* one row of class"),
    ],
)
def test_bad_requests(options, message, saved):
    standard = {"model": made(), "data": examples(8, 1), "loss": "cross_entropy", "num_steps": 2}
    with pytest.raises(InputError, match=message):
        ntkscope.continue_training(saved, **(standard | options))


def test_bad_checkpoint_from_which_nothing_can_be_learned(tmp_path):
    model = nn.Linear(4, 3, bias=False).double()
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(InputError, match="Nothing can be learned from these examples"):
        ntkscope.continue_training(
            tmp_path / "bare.pt",
            model,
            (torch.zeros(5, 4, dtype=torch.float64), torch.zeros(5, dtype=torch.long)),
            loss="cross_entropy",
            num_steps=2,
        )
