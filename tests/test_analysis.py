"""Whole analyses of real runs: what is promised of the demo, and that every kind of failure is named."""

import dataclasses
import json
import random

import pytest
import torch
from compare import assert_close
from oracles import frozen_squared
from torch import nn

import ntkscope
from ntkscope.experiments.demo import train_demo
from ntkscope.record.trace import Trace


@pytest.fixture(scope="module")
def demo():
    """The default demo, seed 0."""
    run = train_demo()
    return run, ntkscope.analyze(run.recorder)


def test_the_default_demo_keeps_its_promises(demo):
    run, analysis = demo
    assert analysis.closure.energy_error < 0.02
    assert analysis.closure.gradient_error < 0.10
    assert analysis.closure.query_error < 0.10
    assert analysis.closure.trustworthy
    assert analysis.examples.auroc["reservoir_energy"] >= 0.88
    assert 15 <= analysis.run.num_snapshots <= 50  # what the default tolerance asks for
    assert analysis.stability < 0.5
    assert run.memorized > 0.8  # the run itself goes on to store the wrong labels
    assert analysis.regime == "feature learning"


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "gated"])
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_small_demos_are_accurate_or_say_why(optimizer, loss):
    analysis = ntkscope.analyze(train_demo(optimizer=optimizer, loss=loss, num_examples=40, num_steps=150, seed=3).recorder)
    closure = analysis.closure
    assert (closure.energy_error < 0.05 and closure.gradient_error < 0.25) or closure.causes
    assert closure.trustworthy == (closure.energy_error <= 0.05 and closure.gradient_error <= 0.25)


def test_the_analysis_is_consistent_with_itself(demo):
    _, analysis = demo
    state, spectrum, history, window = analysis.dissipation, analysis.spectrum, analysis.history, analysis.window
    stop = window.stop - window.start
    gradient = analysis.spectrum.residual  # squared loss: B = I/n, so h = √n g
    n = analysis.run.num_examples
    plain = gradient / n**0.5
    assert_close(torch.tensor(analysis.closure.energy_predicted, dtype=torch.float64), plain @ state.gramian @ plain, rtol=1e-9)
    assert_close(history.eigvals[stop], spectrum.eigvals)
    assert_close(history.predicted_loss[stop], history.loss[0] - analysis.closure.energy_predicted)
    assert_close(history.example_residual[0], torch.ones(n, dtype=torch.float64))
    # Squared loss: ω = 1 − e^{−2κ}, and a direction's share never comes back.
    assert_close(spectrum.eigvals, 1 - torch.exp(-2 * spectrum.log_dissipation), rtol=1e-7)
    assert bool((history.eigvals[1:] - history.eigvals[:-1] > -1e-9).all())
    assert_close(analysis.examples.reservoir_energy.sum(), analysis.channels.reservoir_part(gradient).square().sum())
    assert analysis.channels.signal_rank == int((spectrum.eigvals > 0.5).sum())
    assert analysis.examples.ranking("reservoir_energy")[0] == int(analysis.examples.reservoir_energy.argmax())
    # The places of examples in 3D: zero at the start, and their loss along an axis is what the axis removed.
    assert not history.leading[0].any()
    assert history.leading_modes[0] == int((spectrum.eigvals * (spectrum.eigvecs.T @ gradient).square()).argmax())


def test_the_default_window_ends_where_a_quarter_is_dissipated(demo):
    _, analysis = demo
    history, stop = analysis.history, analysis.window.stop
    share = (history.eigvals > 0.5).double().mean(dim=1)
    assert share[stop] <= 0.25 < share[stop + 1]
    assert "at most a quarter" in analysis.window.reason


@pytest.fixture(scope="module")
def small():
    """A run of 30 examples, where an analysis takes a second."""
    recorder = train_demo(num_examples=30, num_steps=200).recorder
    return recorder, ntkscope.analyze(recorder)


def test_windows_snap_and_recompose(small):
    trace = small[0].trace
    analysis = ntkscope.analyze(trace, window=(4, 99))
    assert analysis.window.start_step in trace.steps
    assert abs(analysis.window.stop_step - 99) <= 8
    assert "asked for 4:99" in analysis.window.reason
    assert analysis.history.steps[0] == analysis.window.start_step
    assert analysis.closure.energy_error < 0.02


def test_the_order_of_snapshots_does_not_matter(small):
    recorder, analysis = small
    trace = recorder.trace
    entries = list(trace.entries.items())
    random.Random(0).shuffle(entries)
    again = ntkscope.analyze(Trace(trace.facts, trace.probe, trace.source, dict(entries)))
    assert again.summary() == analysis.summary()


def test_summary_is_json_and_results_are_frozen_and_shown(demo):
    _, analysis = demo
    text = json.dumps(analysis.summary(), allow_nan=False)
    assert json.loads(text)["signal_rank"] == analysis.channels.signal_rank
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        analysis.stability = 0.0
    for part in (
        analysis,
        analysis.closure,
        analysis.spectrum,
        analysis.channels,
        analysis.examples,
        analysis.history,
        analysis.dissipation,
    ):
        assert "<table" in part._repr_html_()
    with pytest.raises(AttributeError, match="no figure 'pie'"):
        analysis.plot.pie  # ruff: ignore[useless-expression]
    assert "spectrum" in dir(analysis.plot)


def linear_run(steps=40, lr=0.05):
    torch.manual_seed(0)
    model = nn.Linear(4, 2, bias=False).double()
    inputs, targets = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    query = (torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64))
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), query=query, loss="squared")
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    recorder.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (model(inputs) - targets).square().sum(dim=1).mean()).backward()
        optimizer.step()
    return ntkscope.analyze(recorder, window=(0, steps)), inputs


def test_identity_8_on_a_recorded_linear_model():
    """Its kernel is x xᵀ ⊗ I and never moves, so the recorded W is the closed form, and a frozen kernel predicts everything."""
    analysis, inputs = linear_run()
    kernel = torch.kron(inputs @ inputs.T, torch.eye(2, dtype=torch.float64))
    assert_close(analysis.dissipation.gramian, frozen_squared(kernel, 5, 40 * 0.05))
    assert analysis.drift.max < 1e-12
    assert analysis.regime == "lazy"


def record(make_optimizer, *, steps=200, scale=1.0, dtype=torch.float64, **options):
    """Train a small tanh network on a smooth target; `scale` is a factor that the recorder is not told."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 3, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.stack([inputs[:, 0].sin(), inputs[:, 1] * 0.5], dim=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype)
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), query=(inputs + 0.1, targets), loss="mse", **options)
    optimizer = make_optimizer(model.parameters())
    recorder.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        (scale * nn.functional.mse_loss(model(inputs), targets)).backward()
        optimizer.step()
    return ntkscope.analyze(recorder, window=(0, steps))


@pytest.mark.parametrize(
    ("make_optimizer", "energy", "gradient"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.02), 0.01, 0.03),
        (lambda p: torch.optim.SGD(p, lr=0.02, weight_decay=0.05), 0.01, 0.03),
        (lambda p: torch.optim.SGD(p, lr=0.004, momentum=0.8), 0.02, 0.05),
        (lambda p: torch.optim.SGD(p, lr=0.004, momentum=0.8, nesterov=True), 0.02, 0.05),
        (lambda p: torch.optim.Adam(p, lr=2e-4, betas=(0.5, 0.999), weight_decay=0.02), 0.05, 0.1),
        (lambda p: torch.optim.AdamW(p, lr=2e-4, betas=(0.5, 0.999), weight_decay=0.2), 0.05, 0.1),
    ],
    ids=["sgd", "sgd decay", "momentum", "nesterov", "adam decay", "adamw"],
)
def test_real_optimizers_close(make_optimizer, energy, gradient):
    analysis = record(make_optimizer)
    assert analysis.closure.energy_error < energy
    assert analysis.closure.gradient_error < gradient


def test_weight_decay_is_told_apart():
    """Without its forcing the same run would not close."""
    analysis = record(lambda p: torch.optim.SGD(p, lr=0.02, weight_decay=0.05))
    assert abs(analysis.closure.forcing_share) > 0.005
    homogeneous = analysis.dissipation.propagator @ (analysis.spectrum.residual * (2 / 24) ** 0.5)
    assert float((homogeneous - analysis.dissipation.gradient).norm()) > 0.2 * float(analysis.dissipation.gradient.norm())
    assert analysis.closure.query_error < 0.01  # decay's motion of the query outputs is recorded too


def test_a_wrong_loss_scale_is_named():
    analysis = record(lambda p: torch.optim.SGD(p, lr=0.02), scale=2.0)
    assert any("Loss scale" in cause and "2.00 times" in cause for cause in analysis.closure.causes)
    assert any("Loss scale" in warning for warning in analysis.warnings)  # also where the run converged, and closes all the same
    assert not record(lambda p: torch.optim.SGD(p, lr=0.02)).closure.causes


def test_the_edge_of_stability_is_flagged():
    analysis = record(lambda p: torch.optim.SGD(p, lr=0.8), steps=300)
    assert analysis.stability > 1
    assert any("edge of stability" in warning for warning in analysis.warnings)


def test_too_few_snapshots_are_named():
    torch.manual_seed(0)
    inputs, targets = torch.randn(20, 5), torch.randint(3, (20,))
    model = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 3))
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy", schedule=[1500, 3000], drift=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder.attach(optimizer)
    for _ in range(3000):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    analysis = ntkscope.analyze(recorder)
    assert not analysis.closure.trustworthy
    assert any("Too few snapshots" in cause for cause in analysis.closure.causes)
    assert any("Not trustworthy" in warning for warning in analysis.warnings)


def test_layers_that_act_differently_in_training_are_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    inputs, targets = torch.randn(10, 5), torch.randint(3, (10,))
    targets[0] = -100  # an ignored example has no margin
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss=nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    recorder.attach(optimizer)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    analysis = ntkscope.analyze(recorder)
    assert any("BatchNorm1d, Dropout act differently in training" in warning for warning in analysis.warnings)
    assert analysis.closure.trustworthy or any("Training mode" in cause for cause in analysis.closure.causes)
    assert analysis.examples.margin.isnan().tolist() == [True] + [False] * 9


def test_a_zero_learning_rate_has_no_time():
    with pytest.raises(ntkscope.InputError, match="There is no time between"):
        record(lambda p: torch.optim.SGD(p, lr=0.0), steps=5)


def test_custom_losses_need_no_code_at_analysis_time(tmp_path):
    def log_cosh(outputs, targets):
        return (outputs - targets).cosh().log().mean()

    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    inputs, targets = torch.randn(6, 3), torch.randn(6, 1)
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), query=(inputs, targets), loss=log_cosh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder.attach(optimizer)
    for _ in range(30):
        optimizer.zero_grad()
        log_cosh(model(inputs), targets).backward()
        optimizer.step()
    torch.save(recorder.state_dict(), tmp_path / "state.pt")
    analysis = ntkscope.analyze(tmp_path / "state.pt")
    assert analysis.closure.trustworthy
    assert analysis.regime == "not judged"
    assert ntkscope.analyze(tmp_path / "state.pt", loss=log_cosh).regime == "lazy"
    assert analysis.examples.labels is None
    assert analysis.examples.margin.isnan().all()


def test_the_analysis_is_priced_before_it_runs(small):
    with pytest.raises(ntkscope.InputError, match="more than the"):
        ntkscope.analyze(small[0], max_memory=10_000)
