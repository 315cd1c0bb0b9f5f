"""A recorder's state that was damaged or edited by hand gets a message, whatever is wrong with it."""

import copy
import re

import pytest
import torch
from torch import nn

import ntkscope
from ntkscope.record.trace import trace_from_state


def make_state():
    torch.manual_seed(0)
    model, inputs, targets = nn.Linear(3, 2), torch.randn(4, 3), torch.randint(2, (4,))
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), query=(inputs[:2], targets[:2]), loss="cross_entropy")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder.attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return recorder.state_dict()


def paths(part, path=()):
    """Every place in nested containers."""
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


STATE = make_state()
NEXT_STEP = re.compile(r"\b(Copy|[Rr]ecord|Remove|Resume|Give|Check|Use|Choose|Raise|Train|update)\b")
WRONG = (None, -1, "x", [], {}, float("nan"), torch.ones(2), torch.ones(3, 3))


def edited(path, change):
    state = copy.deepcopy(STATE)
    holder = state
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return state


def outcome(state):
    """Analyze; any exception but ours is a failure of the test."""
    try:
        ntkscope.analyze(trace_from_state(state, "the file")).summary()
    except ntkscope.UserError as error:
        message = str(error)
    else:
        return None
    assert NEXT_STEP.search(message), message
    return message


@pytest.mark.parametrize("path", list(paths(STATE)), ids=str)
def test_bad_or_missing_value_gets_a_message_or_does_not_matter(path):
    def remove(holder, key):
        del holder[key]

    outcome(edited(path, remove))
    for value in WRONG:
        outcome(edited(path, lambda holder, key, value=value: holder.__setitem__(key, value)))


def test_bad_values_are_named():
    assert "`time` must be" in outcome(edited(("snapshots", 1, "numbers", "time"), lambda holder, key: holder.update({key: "x"})))
    assert "fields missing ['precond']" in outcome(edited(("facts", "precond"), lambda holder, key: holder.pop(key)))
    message = outcome(edited(("snapshots", 1, "tensors", "hessian"), lambda holder, key: holder.update({key: torch.ones(2)})))
    assert "hessian do not fit its outputs" in message
    assert "`targets`, one per example" in outcome(edited(("probe", "targets"), lambda holder, key: holder.pop(key)))


def test_the_sound_state_is_accepted():
    assert outcome(STATE) is None
