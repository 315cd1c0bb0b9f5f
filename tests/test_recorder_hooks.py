"""What a recorder does in other people's training loops: closures, wrappers, detaching, weights that something else changes."""

import copy

import pytest
import torch
from compare import assert_close
from record_case import cross_entropy, problem, train
from torch import nn

import ntkscope
from ntkscope.record.wrapped import plain_module, plain_optimizer

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8, nesterov=True, foreach=True),  # writes into p.grad
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "gated": lambda p: ntkscope.GatedAdamW(p, lr=1e-3),
}


def recorder_of(model, inputs, targets, **options):
    return ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy", schedule=2, drift=None, **options)


def train_by_closure(model, inputs, targets, optimizer, steps, by_name):
    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model, inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        return loss

    for _ in range(steps):
        loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert loss.ndim == 0


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_that_a_closure_computes_are_seen_as_the_optimizer_uses_them(name, by_name):
    """Lightning computes and clips gradients inside the step: the record must be that of a plain loop."""
    model, inputs, targets = problem()
    other = copy.deepcopy(model)
    plain, closed = (recorder_of(m, inputs, targets, audit=True) for m in (model, other))
    optimizer, second = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](other.parameters())
    plain.attach(optimizer)
    closed.attach(second)
    train(model, inputs, targets, optimizer, 9, before_step=lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.3))
    train_by_closure(other, inputs, targets, second, 9, by_name)
    for a, b in zip(plain.trace, closed.trace, strict=True):
        for field in ("kernel_upper", "gradient_audit", "audit_mean", "audit_variance"):
            first, again = getattr(a, field), getattr(b, field)
            assert (first is None) == (again is None)
            if first is not None:
                assert_close(torch.nan_to_num(again), torch.nan_to_num(first), 1e-12, name=field)  # the first audit has no cosine
    assert any(snapshot.gradient_audit is not None for snapshot in closed.trace)


def test_detach_takes_a_last_snapshot_and_sees_nothing_more():
    model, inputs, targets = problem()
    recorder = recorder_of(model, inputs, targets)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder.attach(optimizer)
    assert recorder.is_attached
    train(model, inputs, targets, optimizer, 5)
    recorder.detach()
    outputs = model(inputs).detach()
    train(model, inputs, targets, optimizer, 5)
    assert not recorder.is_attached
    assert recorder.num_steps == 5
    assert recorder.trace.steps == [0, 2, 4, 5]
    assert_close(recorder.trace[-1].outputs, outputs)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(ntkscope.InputError, match=r"is not attached. Call attach\(optimizer\) first"):
        recorder.detach()


def test_detach_without_a_last_snapshot():
    model, inputs, targets = problem()
    recorder = recorder_of(model, inputs, targets)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder.attach(optimizer)
    train(model, inputs, targets, optimizer, 5)
    recorder.detach(closing=False)
    assert recorder.trace.steps == [0, 2, 4]


@pytest.mark.parametrize("how", ["load_state_dict", "data"])
def test_weights_that_something_else_changed_are_not_recorded(how):
    """A loop that ends by restoring the best weights must not have them taken for the last step's."""
    model, inputs, targets = problem()
    best = copy.deepcopy(model.state_dict())
    recorder = recorder_of(model, inputs, targets)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder.attach(optimizer)
    train(model, inputs, targets, optimizer, 5)
    if how == "load_state_dict":
        model.load_state_dict(best)
    else:
        for name, parameter in model.named_parameters():
            parameter.data = best[name]
    with pytest.warns(UserWarning, match="weights were changed after step 5 by something else than the optimizer"):
        assert recorder.trace.steps == [0, 2, 4]
    assert recorder.trace.steps == [0, 2, 4]  # warned of once
    train(model, inputs, targets, optimizer, 3)
    assert recorder.trace.steps == [0, 2, 4, 6, 8]


def test_listeners_see_every_snapshot_once():
    model, inputs, targets = problem()
    recorder = recorder_of(model, inputs, targets)
    seen = []
    recorder.listen(lambda snapshot: seen.append((snapshot.step, recorder.seconds["snapshot"] > 0)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder.attach(optimizer)
    train(model, inputs, targets, optimizer, 5)
    assert seen == [(0, True), (2, True), (4, True)]
    _ = recorder.trace
    assert [step for step, _ in seen] == recorder.trace.steps == [0, 2, 4, 5]
    assert recorder.seconds["recording"] > 0
    assert recorder.seconds["training"] > 0


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch.compile imports it
def test_wrappers_are_looked_through():
    model, inputs, targets = problem()
    wrapped = nn.DataParallel(torch.compile(model))
    recorder = recorder_of(wrapped, inputs, targets)
    assert recorder.model is model
    assert plain_module(model) is model

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert plain_optimizer(Wrapper(Wrapper(optimizer))) is optimizer
    recorder.attach(Wrapper(optimizer))
    train(model, inputs, targets, optimizer, 2)
    assert recorder.trace.facts.parameters == [name for name, _ in model.named_parameters()]
    assert len(recorder.trace) == 2


class FullyShardedDataParallel(nn.Module):
    """Known by its name."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def sharded_parameter(attribute):
    model = nn.Linear(4, 3)
    setattr(model.weight, attribute, lambda: None)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FullyShardedDataParallel(nn.Linear(4, 3)), r"spread over processes \(FullyShardedDataParallel\)"),
        (lambda: sharded_parameter("to_local"), r"spread over processes \(DTensor, as of FSDP2"),
        (lambda: sharded_parameter("ds_id"), r"spread over processes \(DeepSpeed ZeRO\), and the kernel needs whole weights"),
    ],
)
def test_bad_models_whose_weights_are_elsewhere(make, message):
    with pytest.raises(ntkscope.UnsupportedError, match=message):
        ntkscope.Recorder(make(), probe=(torch.ones(4, 4), torch.zeros(4, dtype=torch.long)), loss="cross_entropy")
