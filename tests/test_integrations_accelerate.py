"""A plain loop under Accelerate: the recorder takes what `accelerator.prepare` gives back."""

import pytest
import torch
from accelerate import Accelerator
from compare import assert_close
from record_case import cross_entropy, problem
from torch.utils.data import DataLoader, TensorDataset

import ntkscope
from ntkscope.integrations.accelerate import without_autocast

NUM_STEPS = 6


@pytest.fixture
def fresh():
    """Accelerate keeps its state in one place for the whole process."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def recorded(accelerator, *, accumulate=1, dtype=torch.float64, **options):
    model, inputs, targets = problem()
    model, inputs = model.to(dtype), inputs.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=2)
    if accelerator is not None:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy", schedule=2, drift=None, **options)
    recorder.attach(optimizer)
    count = 0
    while recorder.num_steps < NUM_STEPS:
        for rows, labels in loader:
            count += 1
            if accelerator is None:
                (cross_entropy(model, rows, labels) / accumulate).backward()
                if count % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                continue
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model, rows, labels))
                optimizer.step()
                optimizer.zero_grad()
            if recorder.num_steps == NUM_STEPS:
                break
    return recorder, model


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_record_is_that_of_a_plain_loop(fresh, accumulate):
    found, _ = recorded(Accelerator(cpu=True, gradient_accumulation_steps=accumulate), accumulate=accumulate)
    expected, _ = recorded(None, accumulate=accumulate)
    for step in range(0, NUM_STEPS + 1, 2):
        mine, theirs = (recorder.trace[recorder.trace.steps.index(step)] for recorder in (found, expected))
        assert mine.time == theirs.time
        assert_close(mine.kernel_upper, theirs.kernel_upper)
        assert_close(mine.outputs, theirs.outputs)


def test_autocast_is_looked_through(fresh):
    recorder, model = recorded(Accelerator(cpu=True, mixed_precision="bf16"), dtype=torch.float32, forward_fn=without_autocast)
    plain, inputs, _ = problem()
    plain = plain.float()
    plain.load_state_dict(model.state_dict())
    outputs = recorder.trace[-1].outputs
    assert_close(outputs, plain(inputs.float()).detach(), 1e-6)
    assert not torch.allclose(model(inputs.float()), outputs, rtol=1e-5)  # training itself goes on in bfloat16
