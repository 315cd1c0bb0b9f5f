"""Checkpoints that were saved anyway become the trace that a recorder would have made: same kernels, same times, in any order of files."""

import itertools
import logging
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from record_case import problem, train
from torch import nn

import ntkscope
from ntkscope._checks import InputError
from ntkscope.gate.optimizer import GatedAdamW
from ntkscope.record.saved_moment import Pace
from ntkscope.record.trajectory import trace_from_checkpoints

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8, dampening=0.3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8, nesterov=True),
    "adam coupled": lambda p: torch.optim.Adam(p, lr=0.002, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.002, weight_decay=0.1, amsgrad=True),
    "gated": lambda p: GatedAdamW(p, lr=0.002, alpha="unbiased", decay="gated"),
}
STEPS = (4, 8, 12, 20)
FIELDS = ("outputs", "gradient", "hessian", "kernel_upper", "query_outputs", "cross_kernel", "forcing", "query_forcing", "gate_open")


def saved_run(folder, make_optimizer, *, steps=STEPS, save_optimizer=True, recorded=False, schedule=None, content=None):
    """Train, saving a checkpoint after each of `steps` (0: before the first), and recording the run where it is asked for."""
    model, inputs, targets = problem()
    recorder = None
    if recorded:
        options = {"query": (inputs[:2] + 0.5, targets[:2]), "schedule": list(steps), "drift": None}
        recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy", **options)
    optimizer = make_optimizer(model.parameters())
    scheduler = None if schedule is None else torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    if recorder is not None:
        recorder.attach(optimizer)
    paths, done = [], 0

    def save():
        state = {"model": model.state_dict(), "step": done}
        if save_optimizer:
            state["optimizer"] = optimizer.state_dict()
        paths.append(folder / f"run-{done:03d}.pt")
        torch.save(state if content is None else content(state), paths[-1])

    def after_step():
        nonlocal done
        done += 1
        if done in steps:
            save()
        if scheduler is not None:
            scheduler.step()

    if 0 in steps:
        save()
    train(model, inputs, targets, optimizer, max(steps), after_step=after_step)
    return paths, recorder


def read(paths, **options):
    """Make a trace of checkpoints with a model of other weights."""
    _, inputs, targets = problem()
    other = problem(seed=7)[0]
    before = {name: value.clone() for name, value in other.state_dict().items()}
    options = {"query": (inputs[:2] + 0.5, targets[:2]), "loss": "cross_entropy"} | options
    trace = trace_from_checkpoints(paths, other, (inputs, targets), **options)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    return trace


def assert_same(trace, other, *, times=True):
    assert trace.steps == other.steps
    if times:
        assert trace.times == pytest.approx(other.times, rel=1e-12)
    for found, expected in zip(trace, other, strict=True):
        for name in FIELDS:
            one, two = getattr(found, name), getattr(expected, name)
            assert (one is None) == (two is None), name
            if one is not None:
                torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


# --- the live recorder is the truth -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_trace_is_that_of_the_live_recorder(name, tmp_path):
    paths, recorder = saved_run(tmp_path, OPTIMIZERS[name], recorded=True)
    live = recorder.trace
    trace = read(paths)
    del live.entries[0]  # saved by the recorder only
    assert_same(trace, live)
    for found, expected in zip(trace, live, strict=True):
        assert found.learning_rates == expected.learning_rates
        assert found.loss == expected.loss
    found, expected = trace.facts, live.facts
    for fact in ("precond", "gate", "alpha", "beta1", "lambda_pop", "momentum_lag", "stability_edge", "parameters", "probe_hash", "kinked"):
        assert getattr(found, fact) == getattr(expected, fact), fact
    assert found.optimizer == f"{expected.optimizer}, as saved in 4 checkpoints"
    assert found.notes == []


def test_m_of_adam_is_not_the_identity(tmp_path):
    paths, _ = saved_run(tmp_path, OPTIMIZERS["adamw"])
    kernel = read(paths)[0].kernel()
    plain, _ = saved_run(tmp_path, OPTIMIZERS["adamw"], save_optimizer=False)
    assert not torch.allclose(kernel, read(plain, times=[0.0, 1.0, 2.0, 3.0])[0].kernel(), rtol=0.5)


def test_momentum_that_builds_up_is_in_the_times():
    """The oracle: c_1 = 1, c_t = beta c_{t-1} + (1 - d), one step after another."""
    for beta, dampening, nesterov in ((0.9, 0.0, False), (0.5, 0.4, False), (0.9, 0.0, True), (1.0, 0.0, False), (1.0, 0.4, True)):
        c, sums = 1.0, [0.0]
        for _ in range(30):
            sums.append(sums[-1] + (1 + beta * c if nesterov else c))
            c = beta * c + (1 - dampening)
        pace = Pace(0.3, beta, dampening, nesterov)
        for start, stop in ((0, 1), (0, 3), (2, 30), (29, 30)):
            assert pace.time(start, stop) == pytest.approx(0.3 * (sums[stop] - sums[start]), rel=1e-12)


# --- order and time -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_order(tmp_path_factory):
    """Files of a run, and the trace of them in order."""
    paths, _ = saved_run(tmp_path_factory.mktemp("in_order"), OPTIMIZERS["adamw"])
    return paths, read(paths)


@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(4)))
def test_files_may_come_in_any_order(order, in_order):
    paths, straight = in_order
    shuffled = read([paths[k] for k in order])
    assert shuffled.times == straight.times
    assert shuffled.facts == straight.facts
    assert shuffled.source == straight.source
    assert f"({len(shuffled)} checkpoints)" in shuffled.source
    for found, expected in zip(shuffled, straight, strict=True):
        for name in (*FIELDS, "mean_hessian"):
            one, two = getattr(found, name), getattr(expected, name)
            assert one is two is None or torch.equal(one, two), name
    timed = read([paths[k] for k in order], times=[straight.times[k] for k in order])
    assert timed.times == straight.times
    assert timed.steps == straight.steps
    assert torch.equal(timed[1].kernel(), straight[1].kernel())


def test_a_schedule_is_integrated_by_trapezoid(tmp_path):
    def linear(step):
        return 1 - step / 40

    paths, _ = saved_run(tmp_path, OPTIMIZERS["sgd"], schedule=linear)
    trace = read(paths)
    rates = [0.1 * linear(step - 1) for step in range(1, 21)]
    # Files are saved before scheduler.step(), so the stored rate is that of the step just taken.
    expected = [0.5 * (rates[start - 1] + rates[stop - 1]) * (stop - start) for start, stop in itertools.pairwise(STEPS)]
    exact = [sum(rates[start:stop]) for start, stop in itertools.pairwise(STEPS)]
    found = [stop - start for start, stop in itertools.pairwise(trace.times)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert found == pytest.approx(exact, rel=0.03)  # of a linear schedule the trapezoid is half a step early, no more
    (note,) = trace.facts.notes
    assert note.startswith("The learning rate changed from 0.0925 to 0.0525; time by trapezoid")


def test_given_times_win_and_steps_are_for_display(tmp_path):
    paths, _ = saved_run(tmp_path, OPTIMIZERS["sgd"])
    trace = read(paths, times=[0.0, 2.0, 5.0, 6.0])
    assert (trace.times, trace.steps, trace.facts.notes) == ([0.0, 2.0, 5.0, 6.0], list(STEPS), [])
    bare, _ = saved_run(tmp_path, OPTIMIZERS["sgd"], content=lambda state: state["model"])
    trace = read(bare[::-1], times=[6.0, 5.0, 2.0, 0.0])
    assert (trace.times, trace.steps) == ([0.0, 2.0, 5.0, 6.0], [0, 1, 2, 3])
    assert trace.facts.notes[0] == "Not every checkpoint says its step, so steps are the numbers of the checkpoints, from 0."
    assert [snapshot.learning_rates for snapshot in trace] == [()] * 4


def test_copies_count_once(tmp_path):
    paths, _ = saved_run(tmp_path, OPTIMIZERS["sgd"])
    copy = tmp_path / "last.pt"
    copy.write_bytes(paths[-1].read_bytes())
    trace = read([copy, *paths, paths[0]])
    assert trace.steps == list(STEPS)
    assert trace.facts.notes == [f"{paths[0]} repeats {paths[0]}, and counts once.", f"{paths[-1]} repeats {copy}, and counts once."]
    assert_same(trace, read(paths))


# --- M that is not known ------------------------------------------------------------------------------------------------------


def test_before_its_first_step_adam_borrows_the_next_m(tmp_path):
    paths, recorder = saved_run(tmp_path, OPTIMIZERS["adamw"], steps=(0, 1, 4), recorded=True)
    trace = read(paths)
    assert_same(trace, recorder.trace)  # where the next is step 1, that is what the recorder does
    (note,) = trace.facts.notes
    assert note == f"The optimizer in {paths[0]} had not stepped, so its M was not yet known: that of {paths[1]} is used at its weights."


def test_sgd_knows_its_m_before_the_first_step(tmp_path):
    paths, recorder = saved_run(tmp_path, OPTIMIZERS["momentum"], steps=(0, 4, 8), recorded=True)
    trace = read(paths)
    assert_same(trace, recorder.trace)
    assert trace.facts.notes == []


def without_optimizer(folder):
    return saved_run(folder, OPTIMIZERS["adamw"], save_optimizer=False)[0]


def one_without(folder):
    paths = saved_run(folder, OPTIMIZERS["adamw"])[0]
    state = torch.load(paths[2], weights_only=True)
    torch.save({"model": state["model"], "step": state["step"]}, paths[2])
    return paths


def of_another_kind(folder):
    return saved_run(folder, OPTIMIZERS["adamw"])[0][:2] + saved_run(folder / "more", OPTIMIZERS["sgd"])[0][2:]


def unknown_kind(folder):
    return saved_run(folder, lambda p: torch.optim.Adagrad(p, lr=0.1))[0]


def frozen_in_one(folder):
    def head_only(parameters):
        return torch.optim.SGD(list(parameters)[2:], lr=0.02, momentum=0.8)

    return saved_run(folder, OPTIMIZERS["momentum"])[0][:2] + saved_run(folder / "more", head_only)[0][2:]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (without_optimizer, "4 of 4 files have no optimizer that can be used. .*run-004.pt holds no state of an optimizer"),
        (one_without, "M = identity: .*run-012.pt holds no state of an optimizer"),
        (of_another_kind, "run-012.pt holds another kind of optimizer than .*run-004.pt"),
        (unknown_kind, "4 of 4 files have no optimizer that can be used. .*run-004.pt, the optimizer's state under .* is not of SGD"),
        (frozen_in_one, "run-012.pt holds an optimizer of other parameters than .*run-004.pt"),
    ],
)
def test_m_is_the_identity_unless_every_file_knows_it(make, reason, tmp_path):
    (tmp_path / "more").mkdir()
    trace = read(make(tmp_path), times=[1.0, 2.0, 3.0, 4.0])
    (note,) = trace.facts.notes
    assert re.search(reason, note)
    assert "of the Adam family" in note
    assert trace.facts.precond == "identity"
    assert trace.facts.stability_edge is None
    assert trace.facts.optimizer == "unknown (4 bare checkpoints; plain gradient descent assumed)"
    # The oracle: the kernel of plain gradient descent at the saved weights.
    model, inputs, _ = problem()
    model.load_state_dict(torch.load(tmp_path / "run-004.pt", weights_only=True)["model"])
    torch.testing.assert_close(trace[0].kernel(), ntkscope.ntk_gram(model, inputs).matrix)


def test_parameters_that_the_optimizer_lacks_are_frozen(tmp_path):
    def head_only(parameters):
        return torch.optim.SGD(list(parameters)[2:], lr=0.1, momentum=0.5)

    paths, recorder = saved_run(tmp_path, head_only, recorded=True)
    live = recorder.trace
    del live.entries[0]
    trace = read(paths)
    assert_same(trace, live)
    assert trace.facts.parameters == live.facts.parameters == ["2.weight", "2.bias", "4.weight", "4.bias"]


# --- what is said -------------------------------------------------------------------------------------------------------------


def test_what_was_unwrapped_is_said_once(tmp_path, caplog):
    def wrapped(state):
        model = {f"module.{name}": value.float() if state["step"] == 12 else value for name, value in state["model"].items()}
        return {"net": model, "ema": state["model"], "step": state["step"], "opt": state["optimizer"]}

    paths, _ = saved_run(tmp_path, OPTIMIZERS["adamw"], content=wrapped)
    with caplog.at_level(logging.INFO, logger="ntkscope"):
        read(paths)
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(": ", 1)[1] for text in said if "run-004.pt" in text] == [
        "6 tensors with 193 numbers, found under `net`.",
        "There are other weights too: ema. To take some of these instead, save them alone in a file.",
        "Taken off the names: `module.`.",
        "They fit the model.",
        "Optimizer under `opt`: AdamW(lr=0.002, betas=(0.9, 0.999), weight_decay=0.1), matched to the parameters by order and shape.",
    ]
    (converted,) = [text for text in said if "run-004.pt" not in text]
    assert converted.startswith(f"{paths[2]}: Converted when loaded: 0.weight (float32 to float64)")


def test_counters_of_batches_may_be_missing(tmp_path, caplog):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    _, inputs, targets = problem()
    for step in range(2):
        state = {name: value * (1 + step) for name, value in model.state_dict().items() if "num_batches" not in name}
        torch.save(state, tmp_path / f"{step}.pt")
    paths = [tmp_path / "0.pt", tmp_path / "1.pt"]
    with caplog.at_level(logging.INFO, logger="ntkscope"):
        trace = trace_from_checkpoints(paths, model, (inputs, targets), loss="cross_entropy", times=[0.0, 1.0])
    assert len(trace) == 2
    assert "1 counters of batches (`num_batches_tracked`) are missing; they play no part in evaluation." in caplog.text


# --- refusals -----------------------------------------------------------------------------------------------------------------


def changed(folder, change):
    """Save a run, and change what one of its files holds."""
    paths, _ = saved_run(folder, OPTIMIZERS["sgd"])
    state = torch.load(paths[1], weights_only=True)
    torch.save(change(state), paths[1])
    return paths


def rescaled_weights(state):
    return state | {"model": {name: 2 * value for name, value in state["model"].items()}, "step": STEPS[0]}


def renamed_weights(state):
    return state | {"model": {name.replace("4.", "five."): value for name, value in state["model"].items()}}


def narrow_weights(state):
    return state | {"model": state["model"] | {"2.bias": torch.zeros(9)}}


def nan_weights(state):
    return state | {"model": state["model"] | {"2.bias": torch.full((10,), torch.nan, dtype=torch.float64)}}


def stepless(state):
    return {"model": state["model"], "optimizer": state["optimizer"]}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (rescaled_weights, {}, r"run-004.pt and .*run-008.pt were both saved at step 4, with other weights"),
        (renamed_weights, {}, r"run-008.pt do not fit the model: missing 4.weight, 4.bias; extra five.weight, five.bias"),
        (narrow_weights, {}, r"of another shape 2.bias \(file \[9\], model \[10\]\)"),
        (nan_weights, {}, r"run-008.pt: Parameter `2.bias` must be finite"),
        (
            stepless,
            {},
            r"run-008.pt does not say its step, so .* Leave it out, or give --times .* was 0.1, that is --times 0.4,0.8,1.2,2\.",
        ),
        (lambda state: state["model"], {}, r"does not say its step and learning rate, .* --times 0.4,0.8,1.2,2\."),
        (dict, {"times": [0.0, 1.0]}, r"needs one time per checkpoint: 4 files, 2 times"),
        (dict, {"times": [0.0, 1.0, 1.0, 2.0]}, r"There is no time between .*run-008.pt and .*run-012.pt \(both at 1\)"),
        (dict, {"times": [0.0, 2.0, 1.0, 3.0]}, r"--times puts .*run-012.pt before .*run-008.pt, but they were saved at steps 12 and 8"),
        (dict, {"times": [0.0, 2.0, float("nan"), 3.0]}, r"--times must be finite numbers, got 0, 2, nan, 3"),
        (dict, {"max_memory": 100}, r"more than"),
    ],
)
def test_refusals_say_what_to_do(change, options, message, tmp_path):
    paths = changed(tmp_path, change)
    with pytest.raises(InputError, match=message):
        read(paths, **options)


def test_all_files_are_looked_at_before_a_kernel_is_computed(tmp_path):
    paths, done = changed(tmp_path, narrow_weights), []
    with pytest.raises(InputError, match=r"of another shape 2.bias"):
        read(paths, progress=lambda *parts: done.append(parts))
    assert done == []


def test_without_any_learning_rate_numbers_in_names_are_steps_to_multiply(tmp_path):
    paths, _ = saved_run(tmp_path, OPTIMIZERS["sgd"], content=lambda state: state["model"])
    hint = r"\(nor do 3 more of 4 files\).* If the numbers in the names are steps, that is the learning rate times 4,8,12,20"
    with pytest.raises(InputError, match=hint):
        read(paths)
    for path, name in zip(paths, "abcd", strict=True):
        path.rename(tmp_path / f"{name}.pt")
    with pytest.raises(InputError, match=r"learning rate summed over the steps before it\.$"):
        read([tmp_path / f"{name}.pt" for name in "abcd"])


def test_one_moment_is_no_trajectory(tmp_path):
    paths, _ = saved_run(tmp_path, OPTIMIZERS["sgd"])
    with pytest.raises(InputError, match=r"a point, not a trajectory"):
        read(paths[:1])
    with pytest.raises(InputError, match=r"All files hold the same moment as .*run-004.pt; .* Give checkpoints of other steps"):
        read([paths[0], paths[0]])
    with pytest.raises(InputError, match=r"run-004.pt is given twice, with two times"):
        read([paths[0], paths[0]], times=[0.0, 1.0])


def test_a_learning_rate_of_zero_is_no_time(tmp_path):
    paths, _ = saved_run(tmp_path, OPTIMIZERS["sgd"], schedule=lambda step: float(step < 5))
    with pytest.raises(InputError, match=r"no time between .*run-008.pt and .*run-012.pt .*was the learning rate zero"):
        read(paths)


@pytest.mark.parametrize(("name", "slope"), [("sgd", 0.1), ("momentum", 0.02 * 0.7 / 0.2)])
def test_numbers_of_epochs_are_not_taken_for_steps(name, slope, tmp_path):
    paths, _ = saved_run(tmp_path, OPTIMIZERS[name], content=lambda state: {key: state[key] for key in ("model", "optimizer")})
    epochs = [path.rename(tmp_path / f"epoch_{k}.pt") for k, path in enumerate(paths)]
    times = ",".join(f"{slope * k:g}" for k in range(4))
    with pytest.raises(InputError, match=rf"are epochs, and the learning rate was .*, that is {re.escape(times)}, each times the steps"):
        read(epochs)


def test_one_checkpoint_leads_on_to_training_on(tmp_path):
    paths, _ = saved_run(tmp_path, OPTIMIZERS["sgd"], steps=(4,))
    with pytest.raises(InputError, match=r"a point, not a trajectory.* this one with --continue 100"):
        read(paths)


def test_of_two_optimizers_that_share_the_parameters_none_is_taken(tmp_path):
    def shared(state):
        other = torch.optim.SGD([nn.Parameter(torch.zeros(10))], lr=0.3)
        return state | {"optimizer_of_last": other.state_dict()}

    paths, _ = saved_run(tmp_path, lambda parameters: torch.optim.Adam(list(parameters)[:-2], lr=0.002), content=shared)
    trace = read(paths)
    assert trace.facts.precond == "identity"
    assert any("holds several optimizers (optimizer, optimizer_of_last)" in note for note in trace.facts.notes)
    alone, _ = saved_run(tmp_path, lambda parameters: torch.optim.Adam(list(parameters)[:-2], lr=0.002))
    assert read(alone).facts.precond != "identity"
