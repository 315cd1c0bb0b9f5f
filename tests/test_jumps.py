"""The study of analytic jumps on real runs."""

import numpy as np
import pytest
import torch
from test_course import synthetic_trace
from test_findings import trained

import ntkscope


def test_a_study_of_a_real_run():
    study = ntkscope.jump_study(trained(steps=300, lr=0.01), num_starts=3)
    first, *_, last = study.jumps
    assert first.start_step == 0
    assert len({jump.start_step for jump in study.jumps}) == 3
    assert bool(torch.isnan(first.extrapolated).all())  # no drift yet
    assert float(first.frozen[0]) < 0.05  # a short way ahead the kernel is as good as frozen
    assert float(first.frozen[-1]) > float(first.frozen[0])
    assert len(last.steps) == len(last.frozen_query) >= 1
    reach = study.reach(0.1)
    assert reach[0] > 0
    assert study.reach(0.0)[0] == 0


def test_a_kernel_that_goes_on_as_it_went_is_extrapolated():
    trace, _ = synthetic_trace(np.linspace(0.0, 1.0, 17))  # a kernel that turns steadily
    for jump in ntkscope.jump_study(trace, num_starts=4).jumps[1:]:
        assert float(jump.extrapolated[0]) < 0.3 * float(jump.frozen[0])
        assert float(jump.extrapolated_query[0]) < 0.3 * float(jump.frozen_query[0])


def test_a_linear_model_can_be_skipped():
    """Its kernel never moves: from any snapshot the rest of the run is known, but for the size of its steps."""
    torch.manual_seed(0)
    x, y = torch.randn(10, 3, dtype=torch.float64), torch.randn(10, 2, dtype=torch.float64)
    model = torch.nn.Linear(3, 2).double()
    recorder = ntkscope.Recorder(model, probe=(x, y), query=(x[:4] + 1, y[:4]), loss="squared")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder.attach(optimizer)
    for _ in range(200):
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().sum(dim=1).mean()).backward()
        optimizer.step()
    for jump in ntkscope.jump_study(recorder).jumps:
        assert float(jump.frozen.max()) < 0.02
        assert float(jump.frozen_query.max()) < 0.02


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ntkscope.jump_study(trained(steps=1)), "at least three snapshots"),
        (lambda: ntkscope.jump_study(trained(steps=5), num_starts=0), "`num_starts` must lie in"),
        (lambda: ntkscope.jump_study(trained(steps=20, outputs="trace")), "needs the full kernel"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ntkscope.InputError, match=message):
        call()
