"""The recorder against real training: it changes nothing, its time and M are the optimizer's, and its files survive a kill."""

import copy
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from compare import assert_close
from oracles import gram as oracle_gram
from oracles import stacked_jacobian
from torch import nn

import ntkscope
from ntkscope.record.optimizers import Clock, momentum_lag, stability_edge
from ntkscope.record.schedule import next_step
from ntkscope.record.trace import trace_from_state

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd_decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.5),
    "gated": lambda p: ntkscope.GatedAdamW(p, lr=1e-3),
    "gated_hard": lambda p: ntkscope.GatedAdamW(p, lr=1e-3, gate="hard", alpha="unbiased"),
}


def problem(dtype=torch.float64, num_examples=6):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_examples, 4, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randn(num_examples, 2, generator=generator, dtype=torch.float64).to(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 2)).to(dtype)
    return model, inputs, targets


def squared(outputs, targets):
    return 0.5 * (outputs - targets).square().sum(dim=1).mean()


def train(model, inputs, targets, optimizer, steps, batches=None):
    for step in range(steps):
        rows = slice(None) if batches is None else batches[step]
        optimizer.zero_grad()
        squared(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()


def record(name, steps=20, **options):
    model, inputs, targets = problem()
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), query=(inputs[:3] + 1, targets[:3]), loss="squared", **options)
    optimizer = OPTIMIZERS[name](model.parameters())
    recorder.attach(optimizer)
    train(model, inputs, targets, optimizer, steps)
    return recorder, model, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_recording_does_not_change_training(name):
    plain, inputs, targets = problem(torch.float32)
    recorded = copy.deepcopy(plain)
    train(plain, inputs, targets, OPTIMIZERS[name](plain.parameters()), 12)
    optimizer = OPTIMIZERS[name](recorded.parameters())
    recorder = ntkscope.Recorder(recorded, probe=(inputs, targets), loss="squared", schedule=1)
    recorder.attach(optimizer)
    pointers = [parameter.data_ptr() for parameter in recorded.parameters()]
    train(recorded, inputs, targets, optimizer, 12)
    assert len(recorder.trace) == 13
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), recorded.parameters(), strict=True))
    assert [parameter.data_ptr() for parameter in recorded.parameters()] == pointers
    assert recorded.training


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_snapshots_hold_the_realized_kernel(name):
    """K = J M Jᵀ with M written from each optimizer's update rule, at the weights of the snapshot."""
    recorder, model, optimizer = record(name, steps=7, schedule=[7], drift=None)
    snapshot = recorder.trace[-1]
    inputs = recorder.probe.inputs
    precond = {}
    for key, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        precond[key] = torch.ones_like(parameter)
        if "exp_avg_sq" in state:
            second = state.get("max_exp_avg_sq", state["exp_avg_sq"])
            precond[key] = 1 / ((second / (1 - 0.999**7)).sqrt() + 1e-8)
        if "gated" in name:
            m, s = state["exp_avg"] / (1 - 0.9**7), state["grad_var"] / (1 - 0.99**7)
            alpha = 1 / 19 if name == "gated_hard" else 1.0
            excess = (m**2 - alpha * s).clamp(min=0)
            precond[key] = precond[key] * (m**2 > alpha * s if name == "gated_hard" else excess / (excess + s))
    assert_close(snapshot.kernel(), oracle_gram(model, inputs, precond=precond))
    assert_close(snapshot.cross_kernel, oracle_gram(model, inputs[:3] + 1, inputs, precond=precond))
    decay = optimizer.param_groups[0]["weight_decay"]
    if not decay:
        assert snapshot.forcing is None
        return
    coupled = name in ("sgd_decay", "adam")
    direction = torch.cat([(decay * p * (precond[key] if coupled else 1)).detach().flatten() for key, p in model.named_parameters()])
    assert_close(snapshot.forcing.flatten(), stacked_jacobian(model, inputs) @ direction)


def test_the_first_snapshot_is_at_the_initial_weights_with_the_first_steps_preconditioner():
    model, inputs, targets = problem()
    initial = copy.deepcopy(model)
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss="squared")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    recorder.attach(optimizer)
    train(model, inputs, targets, optimizer, 1)
    squares = {key: (parameter.grad**2) for key, parameter in model.named_parameters()}  # v̂ of step 1 is g²
    precond = {key: 1 / (square.sqrt() + 1e-8) for key, square in squares.items()}
    first = recorder.trace[0]
    assert (first.step, first.time) == (0, 0.0)
    assert_close(first.outputs, initial(inputs).detach())
    assert_close(first.kernel(), oracle_gram(initial, inputs, precond=precond))


@pytest.mark.parametrize(
    ("settings", "edge"),
    [
        ({"lr": 0.1}, 2.0),
        ({"lr": 0.1, "momentum": 0.9}, 3.8),
        ({"lr": 0.1, "momentum": 0.9, "dampening": 0.5}, 7.6),
        ({"lr": 0.1, "momentum": 0.9, "nesterov": True}, 3.8 / 2.8),
    ],
)
def test_time_is_what_the_optimizer_did(settings, edge):
    """With a constant gradient of one, the distance travelled is the optimizer time."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], **settings)
    clock = Clock()
    for _ in range(9):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        clock.tick(optimizer)
        assert clock.time == pytest.approx(-weight.item())
    assert stability_edge(optimizer) == pytest.approx(edge)
    assert momentum_lag(optimizer) == pytest.approx(settings.get("momentum", 0) / (1 - settings.get("momentum", 0)))


def test_parameter_groups_scale_the_preconditioner():
    model, inputs, targets = problem()
    first, last = model[0], model[3]
    groups = [{"params": first.parameters(), "lr": 0.1}, {"params": last.parameters(), "lr": 0.025}]
    optimizer = torch.optim.SGD(groups)
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss="squared", schedule=[3])
    recorder.attach(optimizer)
    train(model, inputs, targets, optimizer, 3)
    snapshot = recorder.trace[-1]
    assert snapshot.time == pytest.approx(0.3)
    precond = {key: torch.full_like(p, 1.0 if key.startswith("0") else 0.25) for key, p in model.named_parameters()}
    assert_close(snapshot.kernel(), oracle_gram(model, inputs, precond=precond))


def test_parameters_the_optimizer_does_not_hold_stay_out():
    model, inputs, targets = problem()
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss="squared")
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.1)
    recorder.attach(optimizer)
    train(model, inputs, targets, optimizer, 2)
    model[0].requires_grad_(False)
    assert_close(recorder.trace[-1].kernel(), oracle_gram(model, inputs))


def test_learning_rate_schedules_are_followed():
    model, inputs, targets = problem()
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss="squared", schedule=1, drift=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    recorder.attach(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(3):
        train(model, inputs, targets, optimizer, 1)
        scheduler.step()
    assert [snapshot.time for snapshot in recorder.trace] == pytest.approx([0.0, 0.4, 0.6, 0.7])


def test_schedules():
    steps, step = [], 0
    while step < 2000:
        step = next_step("log", step)
        steps.append(step)
    assert 35 <= len(steps) <= 45  # about 40, as docs say
    assert next_step([5, 9], 5) == 9
    assert next_step([5, 9], 9) is None


def test_a_moving_kernel_brings_snapshots_forward():
    scheduled, *_ = record("sgd", steps=60, schedule=[60], drift=None)
    driven, *_ = record("sgd", steps=60, schedule=[60], drift=0.02)
    assert len(scheduled.trace) == 2
    assert len(driven.trace) > 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_live_and_reloaded_analyses_agree(name, tmp_path):
    recorder, *_ = record(name, path=tmp_path / "trace")
    live = ntkscope.analyze(recorder)
    torch.save({"model": {}, "nested": {"ntkscope": recorder.state_dict()}}, tmp_path / "checkpoint.pt")
    for source in (tmp_path / "checkpoint.pt", tmp_path / "trace"):
        again = ntkscope.analyze(source)
        for key, tensor in live.tensors().items():
            assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(again.tensors()[key])), key
        ignored = {"source": None}
        assert live.summary() | ignored == again.summary() | ignored


def test_resuming_continues_the_same_trace(tmp_path):
    whole, *_ = record("momentum", steps=30)
    model, inputs, targets = problem()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    options = {"probe": (inputs, targets), "query": (inputs[:3] + 1, targets[:3]), "loss": "squared"}
    first = ntkscope.Recorder(model, **options, path=tmp_path / "trace")
    first.attach(optimizer)
    train(model, inputs, targets, optimizer, 12)
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "recorder": first.state_dict()})
    train(model, inputs, targets, optimizer, 9)  # lost: the job is killed here
    assert first.trace.steps[-1] == 21  # a snapshot that no schedule takes again: resuming must drop it

    model, inputs, targets = problem()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    second = ntkscope.Recorder(model, **options, path=tmp_path / "trace")
    second.load_state_dict(saved["recorder"])
    second.attach(optimizer)
    train(model, inputs, targets, optimizer, 18)
    resumed, straight = second.trace, whole.trace
    assert set(straight.steps) <= set(resumed.steps) | {30}
    assert ntkscope.load_trace(tmp_path / "trace").steps == resumed.steps
    common = sorted(set(straight.steps) & set(resumed.steps))
    assert len(common) > 8
    for step in common:
        a, b = (trace[trace.steps.index(step)] for trace in (straight, resumed))
        assert a.time == b.time
        assert torch.equal(a.kernel_upper, b.kernel_upper)


KILLED = """
import sys, torch, ntkscope
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
x, y = torch.randn(40, 4), torch.randint(3, (40,))
recorder = ntkscope.Recorder(model, probe=(x, y), loss="cross_entropy", schedule=1, path=sys.argv[1])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
recorder.attach(optimizer)
print("ready", flush=True)
while True:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
"""


def test_a_killed_run_loses_at_most_the_snapshot_in_flight(tmp_path):
    trace = tmp_path / "trace"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(trace)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 60
    while len(list(trace.glob("snapshot-*.safetensors"))) < 12 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    loaded = ntkscope.load_trace(trace)
    assert len(loaded) >= 12
    assert loaded.steps == list(range(len(loaded)))  # no hole: every snapshot before the kill is there
    assert all(snapshot.step == step for step, snapshot in enumerate(loaded))  # and whole
    assert ntkscope.analyze(trace).closure.trustworthy


def test_a_truncated_snapshot_is_named(tmp_path):
    record("sgd", path=tmp_path / "trace")
    victim = sorted((tmp_path / "trace").glob("snapshot-*"))[3]
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(ntkscope.InputError, match=f"{victim.name} is truncated or no snapshot"):
        ntkscope.analyze(tmp_path / "trace")


def test_nan_in_a_stored_kernel_is_refused():
    recorder, *_ = record("sgd")
    state = recorder.state_dict()
    state["snapshots"][2]["tensors"]["kernel_upper"][0] = torch.nan
    with pytest.raises(ntkscope.InputError, match=r"`kernel_upper` of the snapshot at step 2 must be finite"):
        trace_from_state(state, "test")


def test_a_diverging_run_is_left_alone_with_a_warning():
    model, inputs, targets = problem()
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss="squared", schedule=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e200)
    recorder.attach(optimizer)
    with pytest.warns(UserWarning, match="Recording stopped at step"):
        train(model, inputs, targets, optimizer, 5)
    assert "diverged" in recorder.trace.facts.stopped or "finite" in recorder.trace.facts.stopped


def test_a_users_preconditioner_makes_any_optimizer_recordable():
    model, inputs, targets = problem()
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss="squared", schedule=1)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    recorder.attach(optimizer, precond=lambda opt, p: 1 / (opt.state[p]["sum"].sqrt() + 1e-10))
    train(model, inputs, targets, optimizer, 10)
    assert recorder.trace.facts.precond == "custom"
    assert ntkscope.analyze(recorder).closure.energy_error < 0.2


def make(**options):
    model, inputs, targets = problem()
    arguments = {"probe": (inputs, targets), "loss": "squared"} | options
    return ntkscope.Recorder(model, **arguments), model


def attach(make_optimizer, **options):
    recorder, model = make(**options)
    recorder.attach(make_optimizer(model))


def attach_twice():
    recorder, model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder.attach(optimizer)
    recorder.attach(optimizer)


def load_other_probe():
    state = record("sgd")[0].state_dict()
    _, inputs, targets = problem()
    make(probe=(inputs + 1, targets))[0].load_state_dict(state)


ONES, ROWS = torch.ones(3, 4, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make(probe=(ONES[:1], ROWS[:1])), ntkscope.InputError, "at least 2 examples, got n = 1"),
        (lambda: make(probe=(ONES[:0], ROWS[:0])), ntkscope.InputError, "n = 0"),
        (lambda: make(probe=(ONES, ROWS[:2])), ntkscope.InputError, "3 examples, targets of shape"),
        (lambda: make(probe=[ONES]), ntkscope.InputTypeError, r"must be a pair \(inputs, targets\)"),
        (lambda: make(probe=(ONES * torch.nan, ROWS)), ntkscope.InputError, "outputs on the probe are not finite"),
        (lambda: make(query=(ONES, ROWS[:2])), ntkscope.InputError, "3 inputs and 2 targets"),
        (lambda: make(loss="hinge"), ntkscope.InputError, "`loss` must be one of"),
        (lambda: make(schedule=0), ntkscope.InputError, "`schedule` must be"),
        (lambda: make(schedule="linear"), ntkscope.InputError, "`schedule` must be"),
        (lambda: make(drift=-1.0), ntkscope.InputError, "`drift` must lie in"),
        (lambda: make(clean_targets=ROWS), ntkscope.InputError, "`clean_targets` must have the targets' shape"),
        (attach_twice, ntkscope.InputError, "attached to an optimizer already"),
        (lambda: attach(lambda m: torch.optim.Adagrad(m.parameters())), ntkscope.UnsupportedError, "Adagrad is not among SGD, Adam"),
        (lambda: attach(lambda m: torch.optim.SGD(m.parameters(), maximize=True)), ntkscope.UnsupportedError, "maximizes"),
        (
            lambda: attach(lambda m: torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)),
            ntkscope.InputError,
            "holds no trained parameter of this model",
        ),
        (load_other_probe, ntkscope.InputError, "another probe set"),
        (lambda: make()[0].trace, ntkscope.InputError, "Nothing is recorded yet"),
        (lambda: make()[0].load_state_dict({"schema": "other/1"}), ntkscope.InputError, "has schema 'other/1'"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_trace_folder_is_never_overwritten(tmp_path):
    record("sgd", path=tmp_path / "trace")
    with pytest.raises(ntkscope.InputError, match="holds a trace already"):
        record("sgd", path=tmp_path / "trace")


def test_manifest_is_plain_json(tmp_path):
    record("sgd", path=tmp_path / "trace")
    manifest = json.loads((tmp_path / "trace" / "manifest.json").read_text())
    assert manifest["schema"] == "ntkscope.trace/3"
    assert manifest["facts"]["num_examples"] == 6
