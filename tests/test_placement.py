"""Snapshots are as dense as the tolerance asks for and the budget allows, whatever noise there is."""

import itertools
from dataclasses import replace

import pytest
import torch
from record_case import closure, cross_entropy, problem, record, train

import ntkscope
from ntkscope.dynamics.dissipation import take_step
from ntkscope.dynamics.interval import factor_interval
from ntkscope.record.instrument import Instrument
from ntkscope.record.local_error import hessian_product, kernel_product, local_error
from ntkscope.record.propagate import propagate
from ntkscope.record.snapshot import Snapshot, pack_upper

SGD = torch.optim.SGD


def draw(num_examples, num_classes, rank, seed=0, width=None):
    """A kernel, softmax Hessian blocks and a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = num_examples * (num_classes if width is None else width)
    jacobian = random(rows, rank) * torch.logspace(0, -2, rank, dtype=torch.float64)
    shares = random(num_examples, num_classes).softmax(dim=1)
    blocks = (torch.diag_embed(shares) - shares[:, :, None] * shares[:, None, :]) / num_examples
    targets = torch.eye(num_classes, dtype=torch.float64)[torch.randint(num_classes, (num_examples,), generator=generator)]
    return jacobian @ jacobian.T, blocks, (shares - targets) / num_examples


@pytest.mark.parametrize("elapsed", [0.0, 1e-3, 1.0, 300.0])
@pytest.mark.parametrize("rank", [4, 40])
@pytest.mark.parametrize("kind", ["softmax", "identity", "one_output"])
def test_propagation_is_the_factored_intervals(kind, rank, elapsed):
    gram, blocks, gradient = draw(6, 3, rank)
    if kind == "identity":
        blocks = torch.eye(3, dtype=torch.float64).expand(6, 3, 3) / 6
    if kind == "one_output":
        gram, blocks, gradient = gram[:6, :6], torch.rand(6, 1, 1, dtype=torch.float64), gradient[:, :1]
    expected = take_step(factor_interval(gram, blocks, elapsed), gradient.flatten())
    found = propagate(gradient, kernel_product(gram, gradient), hessian_product(blocks, False), elapsed)
    assert torch.allclose(found.gradient.flatten(), expected.gradient, rtol=1e-5, atol=1e-7 * float(gradient.norm()))
    assert found.energy == pytest.approx(expected.energy, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("is_softmax", [True, False])
def test_the_trace_form_is_a_kronecker_product(is_softmax):
    """K_tr/C ⊗ 1 with B_i replaced by a number times the matrix that the classes share."""
    gram, blocks, gradient = draw(6, 3, 20, width=1)
    eye, traces = torch.eye(3, dtype=torch.float64), blocks.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
    if is_softmax:
        shared = traces / 2 * (eye - 1 / 3)
    else:
        blocks = blocks + 0.1 * eye
        shared = (traces + 0.3) / 3 * eye
    expected = take_step(factor_interval(torch.kron(gram, eye), shared, 5.0), gradient.flatten())
    found = propagate(gradient, kernel_product(gram, gradient), hessian_product(blocks, True), 5.0)
    assert torch.allclose(found.gradient.flatten(), expected.gradient, atol=1e-10)
    assert found.energy == pytest.approx(expected.energy)


def moments(length, *, uneven=1.0, bend=1.0):
    """Three snapshots of a kernel that moves along a curve."""
    start, blocks, gradient = draw(5, 3, 12)
    away, *_ = draw(5, 3, 12, seed=1)
    found = []
    times = (0.0, length, length * (1 + uneven))
    for step, time in enumerate(times):
        kernel = start + bend * (time + time**2) * away
        found.append(
            Snapshot(
                step=step,
                time=time,
                learning_rates=(1.0,),
                loss=1.0,
                outputs=gradient,
                gradient=gradient,
                hessian=blocks,
                mean_hessian=(1 + 0.5 * (times[step - 1] + time)) * blocks if step else None,  # B = (1 + τ) B_0
                kernel_upper=pack_upper(kernel),
            )
        )
    return found


def exact_error(before, middle, after):
    """What the two intervals miss: the same flow integrated in many short ones along the same curve."""
    num = 400
    gradient = exact = before.gradient.flatten()
    energy = exact_energy = 0.0
    for start, stop in ((before, middle), (middle, after)):
        step = take_step(factor_interval(0.5 * (start.kernel() + stop.kernel()), stop.mean_hessian, stop.time - start.time), gradient)
        gradient, energy = step.gradient, energy + step.energy
    first, last = before.kernel(), after.kernel()
    slope = middle.time, after.time
    # The parabola through the three kernels.
    quadratic = (last - first) / (slope[1] * (slope[1] - slope[0])) - (middle.kernel() - first) / (slope[0] * (slope[1] - slope[0]))
    linear = (middle.kernel() - first) / slope[0] - quadratic * slope[0]
    width = after.time / num
    for k in range(num):
        time = (k + 0.5) * width
        step = take_step(factor_interval(first + time * linear + time**2 * quadratic, (1 + time) * before.hessian, width), exact)
        exact, exact_energy = step.gradient, exact_energy + step.energy
    return max(abs(energy - exact_energy) / exact_energy, float((gradient - exact).norm() / exact.norm()) / 5)


@pytest.mark.parametrize("uneven", [0.5, 1.0, 2.0])
def test_the_estimate_is_the_error_of_short_intervals(uneven):
    snapshots = moments(0.01, uneven=uneven)
    assert local_error(*snapshots, initial_loss=1e-9) == pytest.approx(exact_error(*snapshots), rel=0.03)


def test_the_estimate_is_of_third_order_and_zero_for_a_constant_kernel():
    # Energy is of first order in the length, so its relative error is of second.
    coarse, fine = (local_error(*moments(length), initial_loss=1e-9) for length in (0.02, 0.01))
    assert coarse / fine == pytest.approx(4, rel=0.2)
    snapshots = [replace(snapshot, mean_hessian=snapshot.hessian) for snapshot in moments(0.1, bend=0.0)]
    assert local_error(*snapshots, initial_loss=1.0) < 1e-8


def test_noise_in_what_the_run_did_is_no_error_of_placement():
    before, middle, after = moments(0.1)
    noisy = [replace(s, gradient=s.gradient + torch.randn_like(s.gradient), loss=s.loss * 3) for s in (middle, after)]
    assert local_error(before, *noisy, initial_loss=1.0) == local_error(before, middle, after, initial_loss=1.0)


def test_a_smaller_tolerance_takes_more_snapshots_and_closes_better():
    traces = [record(lambda m: SGD(m.parameters(), lr=0.02), 500, schedule="log", tolerance=t).trace for t in (0.05, 0.002)]
    coarse, fine = traces
    assert len(fine) > 1.5 * len(coarse)
    assert closure(fine)[0] < 0.3 * closure(coarse)[0]
    assert closure(fine)[1] < 0.5 * closure(coarse)[1]
    assert not fine.facts.notes
    for trace in traces:  # the last was asked for by `trace`
        assert all(b <= max(a + 1, 1.5 * a) for a, b in zip(trace.steps[:-1], trace.steps[1:], strict=True))


def test_without_tolerance_spacing_is_by_step_count():
    trace = record(lambda m: SGD(m.parameters(), lr=0.1), 20, schedule="log", tolerance=None).trace
    assert trace.steps == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 19, 20]
    assert not trace.facts.notes


def test_a_run_too_fast_for_any_placement_says_so():
    trace = record(lambda m: SGD(m.parameters(), lr=1.5), 8, schedule="log", tolerance=1e-5).trace
    (note,) = trace.facts.notes
    assert note.startswith("Tolerance 0.001 % cannot be met by the densest snapshots that are taken ")
    assert note.endswith("lower the learning rate, or raise tolerance.")
    assert trace.steps == list(range(9))


def test_a_record_grows_with_the_logarithm_of_the_run():
    """A tolerance that nothing can meet asks for every step; spacing is a twentieth of the steps so far all the same."""
    steps = record(lambda m: SGD(m.parameters(), lr=1.5), 150, schedule="log", tolerance=1e-6, drift=1e-6).trace.steps
    planned = steps[:-1]  # the last was asked for by `trace`
    assert all(b - a >= a // 20 for a, b in itertools.pairwise(planned))
    assert planned[:21] == list(range(21))
    assert len(steps) < 75  # of 150


class FakeClock:
    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


@pytest.fixture
def clock(monkeypatch):
    """A snapshot takes 3 seconds, all else nothing; steps are made to take 1 second by the tests."""
    found = FakeClock()
    measure = Instrument.snapshot

    def slow(self, *args, **kwargs):
        found.time += 3.0
        return measure(self, *args, **kwargs)

    monkeypatch.setattr(Instrument, "snapshot", slow)
    return found


def timed(clock, steps, **options):
    """Record with a step a second."""

    def setup(model, optimizer):
        def second():
            clock.time += 1.0

        return {"before_step": second}

    def attach(recorder):
        recorder._allowance._now = clock

    return record(lambda m: SGD(m.parameters(), lr=0.1), steps, setup=setup, attach=attach, **options)


def test_recording_stays_within_its_budget_and_says_what_that_cost(clock):
    recorder = timed(clock, 99, schedule="log", tolerance=1e-4, max_overhead=0.25)
    assert recorder._allowance.training == pytest.approx(98)  # the first second is before the first hook
    assert recorder._allowance.spent <= 0.25 * 98
    # 3 s each of 0.25 s a step, the first for nothing: one every 12 steps once the first is paid for.
    assert recorder._trace.steps == [0, 26, 38, 50, 62, 74, 86, 98]
    (note,) = recorder._trace.facts.notes
    assert note.startswith(
        "Tolerance 0.01 % asks for denser snapshots than the budget of 25 % of training time allows: 7 snapshots were put"
    )
    assert note.endswith("; raise max_overhead or tolerance.")
    assert recorder.trace.steps[-1] == 99  # asked for: always taken


def test_a_budget_that_is_enough_is_not_mentioned(clock):
    # By default 60 seconds are free: 20 snapshots of 3 seconds.
    recorder = timed(clock, 15, schedule="log", tolerance=1e-2)
    assert not recorder.trace.facts.notes
    recorder = timed(clock, 40, schedule="log", tolerance=1e-4)
    assert "the budget of 25 % of training time (at least 60 s) allows" in recorder.trace.facts.notes[0]


def test_a_schedule_that_is_written_down_is_bounded_only_on_request(clock):
    assert timed(clock, 40, schedule=1).trace.steps == list(range(41))
    bounded = timed(clock, 40, schedule=1, max_overhead=0.25).trace
    assert len(bounded) < 6
    assert bounded.facts.notes[0].startswith("The schedule asks for denser snapshots")


def test_audits_drift_checks_and_followed_steps_count_too(clock, monkeypatch):
    calls = dict.fromkeys(("gradient", "few_kernel", "outputs"), 0)
    for name in calls:
        measure = getattr(Instrument, name)

        def slow(self, *args, name=name, measure=measure):
            calls[name] += 1
            clock.time += 0.5
            return measure(self, *args)

        monkeypatch.setattr(Instrument, name, slow)
    recorder = timed(clock, 100, schedule="log", tolerance=1e-4, max_overhead=0.25, every_step=True, drift=0.3)
    assert recorder._allowance.spent <= 0.25 * 99
    assert all(0 < count < 60 for count in calls.values()), calls
    assert "were not followed step by step: the budget of 25 % of training time" in recorder.trace.facts.notes[-1]


def test_audits_that_cost_much_are_left_out(clock, monkeypatch):
    look = Instrument.gradient

    def slow(self):
        clock.time += 30.0
        return look(self)

    monkeypatch.setattr(Instrument, "gradient", slow)
    recorder = timed(clock, 120, schedule="log", tolerance=1e-4, max_overhead=0.5)
    assert recorder._allowance.spent <= 0.5 * 119
    assert sum(rows is not None for rows in recorder._trace.gradient_audits()) == 1  # the first, when the price was not known
    assert len(recorder._trace) > 3


def test_intervals_are_followed_whole_or_not_at_all(clock, monkeypatch):
    run, runs = Instrument.outputs, []

    def slow(self):
        clock.time += 0.5
        runs.append(1)
        return run(self)

    monkeypatch.setattr(Instrument, "outputs", slow)
    recorder = timed(clock, 90, schedule=10, max_overhead=0.7, every_step=True)
    assert recorder._allowance.spent <= 0.7 * 89
    found = [0 if s.step_outputs is None else len(s.step_outputs) for s in recorder.trace][1:]
    lengths = [b - a for a, b in itertools.pairwise(recorder.trace.steps)]
    assert all(count in (0, length) for count, length in zip(found, lengths, strict=True))
    assert any(found)
    assert not all(found)
    # The first step is tried before its price is known; no other is followed in vain, what is left are the snapshots' own.
    assert len(runs) == 1 + sum(found) + found.count(0) + 1
    assert recorder.trace.steps == [0, 12, *range(20, 91, 10)]  # and none at the cost of a snapshot but the first, not yet paid for


def test_time_spent_survives_a_restart(clock):
    recorder = timed(clock, 60, schedule="log", tolerance=1e-4, max_overhead=0.25)
    state = recorder.state_dict()
    model, inputs, targets = problem()
    resumed = ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy", tolerance=1e-4, max_overhead=0.25)
    resumed.load_state_dict(state)
    resumed._allowance._now = clock
    optimizer = SGD(model.parameters(), lr=0.1)
    resumed.attach(optimizer)
    train(model, inputs, targets, optimizer, 1)
    assert resumed._allowance.spent == recorder._allowance.spent
    assert resumed._trace.facts.notes == recorder._trace.facts.notes
    assert resumed._trace.steps[-1] == 60  # not yet paid for


def test_snapshots_asked_for_by_hand_leave_the_plan_alone():
    def peeking(recorder):
        def look():
            if recorder._clock.step in asked:
                _ = recorder.trace  # takes one

        return look

    asked = {5, 17, 18, 40, *range(60, 80, 3)}
    found, hessians = [], []
    for is_peeking in (False, True):
        model, inputs, targets = problem()
        recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy", tolerance=0.002)
        optimizer = SGD(model.parameters(), lr=0.1)
        recorder.attach(optimizer)
        train(model, inputs, targets, optimizer, 80, after_step=peeking(recorder) if is_peeking else None)
        found.append(recorder._trace.steps)
        hessians.append(recorder._placement._recent[-1].mean_hessian)
    assert set(found[1]) == set(found[0]) | asked
    assert torch.equal(*hessians)  # averaged between planned snapshots, whatever lies between


def test_a_resumed_run_follows_the_same_plan():
    straight = record(lambda m: SGD(m.parameters(), lr=0.1), 80, schedule="log", tolerance=0.002)
    model, inputs, targets = problem()
    optimizer = SGD(model.parameters(), lr=0.1)
    options = {"probe": (inputs, targets), "loss": "cross_entropy", "tolerance": 0.002, "drift": None}
    first = ntkscope.Recorder(model, **options)
    first.attach(optimizer)
    train(model, inputs, targets, optimizer, 23)
    state = first.state_dict()
    second = ntkscope.Recorder(model, **options)
    second.load_state_dict(state)
    other = SGD(model.parameters(), lr=0.1)
    second.attach(other)
    train(model, inputs, targets, other, 57)
    assert set(second._trace.steps) == set(straight._trace.steps) | {23}


def test_the_trace_form_places_snapshots_too():
    options = {"schedule": "log", "tolerance": 0.002, "drift": None}
    full, trace = (record(lambda m: SGD(m.parameters(), lr=0.1), 100, outputs=form, **options).trace for form in ("full", "trace"))
    assert 0.6 * len(full) <= len(trace) <= 1.5 * len(full)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "`tolerance` must lie in"),
        ({"tolerance": 2.0}, "`tolerance` must lie in"),
        ({"max_overhead": -0.1}, "`max_overhead` must lie in"),
        ({"outputs": "sum"}, "`outputs` must be one of 'full', 'trace'"),
        ({"training_size": 3}, "`training_size` must lie in"),
        ({"steps_per_epoch": 0}, "`steps_per_epoch` must lie in"),
    ],
)
def test_bad_options(options, message):
    model, inputs, targets = problem()
    with pytest.raises(ntkscope.InputError, match=message):
        ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy", **options)


def test_the_loss_of_this_file_is_the_recorded_one():
    model, inputs, targets = problem()
    recorder = record(lambda m: SGD(m.parameters(), lr=0.1), 1)
    assert recorder.trace[0].loss == pytest.approx(cross_entropy(model, inputs, targets).item())
