"""Calls of models whose output is a part of what they return."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ntkscope._checks import InputError, InputTypeError
from ntkscope.kernel.model import forward_rows
from ntkscope.record.forwards import TASKS, make_forward

X = torch.arange(6.0).view(3, 2)


class Odd(nn.Module):
    """Returns what it is told to."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, batch):
        return self.answer(batch)


class Named(nn.Module):
    """Takes named inputs, as the models of transformers do."""

    def forward(self, input_ids, attention_mask):
        return {"loss": None, "logits": input_ids * attention_mask}


PARTS = {
    "position": (lambda x: (x.sum(), 2 * x), "1"),
    "position from the end": (lambda x: [x.sum(), 2 * x], "-1"),
    "key": (lambda x: {"features": x, "logits": 2 * x}, "logits"),
    "attribute": (lambda x: SimpleNamespace(logits=2 * x), "logits"),
    "part of a part": (lambda x: {"heads": [x, SimpleNamespace(main=2 * x)]}, "heads.1.main"),
}


@pytest.mark.parametrize(("answer", "part"), PARTS.values(), ids=PARTS.keys())
def test_a_part_is_taken(answer, part):
    assert torch.equal(forward_rows(Odd(answer), X, make_forward(output=part)), 2 * X)


def test_a_part_of_ones_own_call_is_taken():
    forward = make_forward(forward=lambda model, batch: {"out": model(batch + 1)}, output="out")
    assert torch.equal(forward_rows(Odd(lambda x: x), X, forward), X + 1)


def test_nothing_said_is_nothing_done():
    assert make_forward() is None
    own = lambda model, batch: model(batch)  # ruff: ignore[lambda-assignment]
    assert make_forward(forward=own) is own


@pytest.mark.parametrize("task", TASKS)
def test_a_task_passes_inputs_by_name(task):
    batch = {"input_ids": X, "attention_mask": torch.full((3, 2), 2.0)}
    assert torch.equal(forward_rows(Named(), batch, make_forward(task=task)), 2 * X)


BAD_PARTS = {
    "no such position": (lambda x: (x, x), "2", "no part '2': it is a tuple with positions 0 to 1. Choose"),
    "no such key": (lambda x: {"logits": x}, "logit", "no part 'logit': it is a dict with 'logits'. Choose"),
    "no such attribute": (lambda x: SimpleNamespace(logits=x), "loss", "no part 'loss': it is a SimpleNamespace with logits. Choose"),
    "a tensor has no parts": (lambda x: x, "T", r"no part 'T': it is a Tensor with no parts \(a tensor of shape \(3, 2\)\)"),
    "private names stay private": (lambda x: SimpleNamespace(logits=x), "__class__", "no part '__class__'"),
}


@pytest.mark.parametrize(("answer", "part", "message"), BAD_PARTS.values(), ids=BAD_PARTS.keys())
def test_bad_part_names_what_there_is(answer, part, message):
    with pytest.raises(InputError, match=message):
        forward_rows(Odd(answer), X, make_forward(output=part))


def test_bad_part_that_is_no_tensor():
    with pytest.raises(InputTypeError, match=r"Output 'a' of the model is a dict, not a tensor. It holds: 'b'"):
        forward_rows(Odd(lambda x: {"a": {"b": x}}), X, make_forward(output="a"))


def test_bad_batch_of_a_task():
    with pytest.raises(InputTypeError, match=r"passes inputs by name, got a batch of type Tensor. Give a dict"):
        forward_rows(Named(), X, make_forward(task="sequence-classification"))


def test_bad_task():
    with pytest.raises(InputError, match=r"Unknown task 'sequence-clasification'; there are .* Did you mean 'sequence-classification'?"):
        make_forward(task="sequence-clasification")


def test_bad_task_beside_an_output():
    with pytest.raises(InputError, match="Give --task, or --forward and --output"):
        make_forward(task="regression", output="0")
