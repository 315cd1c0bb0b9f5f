"""The audit of a recorded run: what the recorder keeps, and what the analysis makes of it."""

import copy
import itertools
import math

import pytest
import torch
from compare import assert_close
from record_case import problem, record, train
from torch import nn

import ntkscope
from ntkscope.auditing import AuditedModel, ChannelKeeper, Rule, _audit_snapshot, trained_parameters
from ntkscope.course import Course
from ntkscope.gate.compared import compare, mean_over
from ntkscope.gate.step import gate_values
from ntkscope.gate.verdict import SMALLEST_ADVANTAGE
from ntkscope.walk import walk_trajectory

MAKERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=5e-3),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=5e-3, betas=(0.8, 0.99)),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9),
    "gated": lambda model: ntkscope.GatedAdamW(model.parameters(), lr=5e-3, gate="hard", alpha="unbiased"),
}
BATCHES = [torch.randint(8, (4,), generator=torch.Generator().manual_seed(step)) for step in range(60)]


def recorded(name, **options):
    return record(MAKERS[name], steps=60, audit=True, batches=BATCHES, **options)


@pytest.fixture(scope="module", params=list(MAKERS))
def run(request):
    recorder = recorded(request.param, query=True)
    return request.param, recorder, ntkscope.analyze(recorder)


def test_averages_beside_an_optimizer_are_those_of_its_gradients():
    recorder = recorded("adam")
    model, inputs, targets = problem()
    optimizer = MAKERS["adam"](model)
    mean, noise = None, None

    def look():
        nonlocal mean, noise
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        mean = torch.zeros_like(gradient) if mean is None else mean
        noise = torch.zeros_like(gradient) if noise is None else noise
        noise = 0.99 * noise + 0.01 * (gradient - mean) ** 2
        mean = 0.8 * mean + 0.2 * gradient

    train(model, inputs, targets, optimizer, 60, batches=BATCHES, before_step=look)
    last = recorder.trace[-1]
    assert last.step == 60
    assert_close(last.audit_mean, (mean / (1 - 0.8**60)).float(), rtol=1e-5)
    assert_close(last.audit_variance, (noise / (1 - 0.99**60)).float(), rtol=1e-5)
    assert_close(last.audit_weights, torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    own = torch.cat([optimizer.state[parameter]["exp_avg"].flatten() for parameter in model.parameters()]) / (1 - 0.8**60)
    assert_close(last.audit_mean, own.float(), rtol=1e-5)
    second = torch.cat([optimizer.state[parameter]["exp_avg_sq"].flatten() for parameter in model.parameters()]) / (1 - 0.99**60)
    assert_close(last.audit_precond, (1 / (second.sqrt() + 1e-8)).float(), rtol=1e-5)


def test_recording_for_an_audit_changes_nothing():
    plain, audited = (record(MAKERS["adamw"], steps=30, audit=audit, batches=BATCHES) for audit in (False, True))
    for first, second in zip(plain.model.parameters(), audited.model.parameters(), strict=True):
        assert torch.equal(first, second)
    assert all(snapshot.audit_weights is None for snapshot in plain.trace)


def test_audits_come_later_and_later():
    steps = [snapshot.step for snapshot in recorded("gated", schedule=list(range(1, 61))).trace if snapshot.audit_weights is not None]
    assert steps[:4] == [1, 2, 3, 4]
    assert all(later >= round(1.5 * before) or later == before + 1 for before, later in itertools.pairwise(steps[:-1]))
    assert len(steps) < 12


def test_population_risk_is_that_of_the_probe(run):
    _, recorder, analysis = run
    model, inputs, targets = problem()
    snapshot = [snapshot for snapshot in recorder.trace if snapshot.audit_risk is not None][1]
    nn.utils.vector_to_parameters(snapshot.audit_weights, model.parameters())
    moments = ntkscope.gradient_moments(model, inputs, targets, loss="cross_entropy")
    parts = snapshot.audit_precond.double().split([parameter.numel() for parameter in model.parameters()])
    precond = {name: part.view(p.shape) for (name, p), part in zip(model.named_parameters(), parts, strict=True)}
    risk = ntkscope.population_risk(moments, precond)
    expected = torch.tensor([[rate.rate, rate.training_rate] for rate in risk.by_parameter.values()], dtype=torch.float64)
    assert_close(snapshot.audit_risk[:, :2], expected, rtol=1e-5)
    curve = analysis.gate.audit.risk
    assert float(curve.rate[1]) == pytest.approx(risk.total.rate, rel=1e-5)
    assert curve.heldout_loss is not None
    assert len(curve.steps) == len(curve.heldout_loss)
    last = recorder.trace[-1]
    held = nn.functional.cross_entropy(last.query_outputs, recorder.trace.probe["query_targets"])
    assert float(curve.heldout_loss[-1]) == pytest.approx(float(held))


def test_audit_uses_the_channel_of_the_window_that_ends_at_the_step(run):
    _, recorder, analysis = run
    for step in analysis.gate.audit.steps:
        window = (analysis.window.start_step, step.step)
        assert step.rank == ntkscope.analyze(recorder.trace, window=window).channels.signal_rank


def test_gates_are_those_of_the_step(run):
    name, recorder, analysis = run
    audit = analysis.gate.audit
    assert audit.is_counterfactual == (name != "gated")
    assert audit.strictness == pytest.approx(1.0)
    snapshots = {snapshot.step: snapshot for snapshot in recorder.trace}
    for step in audit.steps:
        snapshot = snapshots[step.step]
        gate = gate_values(
            snapshot.audit_mean.double(), snapshot.audit_variance.double(), kind=audit.kind, alpha=audit.alpha, lambda_pop=audit.lambda_pop
        )
        if name == "gated":
            assert_close(snapshot.audit_gate.double(), gate)
        assert step.num_dead == 0
        assert step.mean_gate == pytest.approx(float(gate.mean()), rel=1e-6)
    assert analysis.gate.kind == audit.kind


def test_verdict_and_summary_name_the_evidence(run):
    _, _, analysis = run
    audit, table = analysis.gate.audit, analysis.summary()["gate"]["audit"]
    assert audit.verdict.kind in ("helps", "harms", "no evidence")
    assert "of reservoir motion at the price of" in audit.verdict.sentence
    assert table["verdict"] == audit.verdict.kind
    assert table["overall"]["precision"]["value"] == pytest.approx(audit.overall["precision"].observed)
    assert len(table["steps"]) == len(audit.steps) > 3
    assert set(audit.layers) == set(analysis.gate.by_parameter)


def test_other_gates_can_be_asked_for(run):
    _, recorder, _ = run
    options = ntkscope.AuditOptions(gate="snr", lambda_pop=0.5, num_steps=2, num_permutations=7)
    audit = ntkscope.analyze(recorder, audit=options).gate.audit
    assert (audit.kind, audit.lambda_pop, audit.is_counterfactual, len(audit.steps)) == ("snr", 0.5, True, 2)
    assert audit.overall["recall"].num_draws == 7
    strict = ntkscope.analyze(recorder, audit=ntkscope.AuditOptions(gate="hard", alpha=1.0, num_steps=1)).gate.audit
    assert strict.strictness == pytest.approx(9 if "betas=(0.8" in recorder.trace.facts.optimizer else 19)


def test_exact_variance_can_be_asked_for(run):
    _, recorder, _ = run
    audit = ntkscope.analyze(recorder, audit=ntkscope.AuditOptions(gate="hard", variance="exact", batch_size=4, num_steps=3)).gate.audit
    assert audit.variance == "exact"
    assert all(0 < step.spectral_gate.batch_size == 4 for step in audit.steps)


@pytest.mark.parametrize("name", ["adamw", "gated"])
def test_files_give_the_same_audit(name, tmp_path):
    recorder = recorded(name, path=tmp_path / "trace")
    torch.save({"ntkscope": recorder.state_dict()}, tmp_path / "checkpoint.pt")
    model, inputs, targets = problem(seed=3)  # other weights: those of the record are put in
    before = copy.deepcopy(model.state_dict())
    live = ntkscope.analyze(recorder).gate.audit
    for source in (tmp_path / "trace", tmp_path / "checkpoint.pt", recorder.trace):
        for data in (None, problem()[1:]):
            found = ntkscope.analyze(source, model=model, data=data).gate.audit
            assert found.verdict == live.verdict
            for ours, theirs in zip(found.steps, live.steps, strict=True):
                assert ours.figures["precision"].observed == pytest.approx(theirs.figures["precision"].observed, rel=1e-12)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ntkscope.InputError, match="is not the probe of this record"):
        ntkscope.analyze(recorder.trace, model=model, data=(inputs, targets))
    with pytest.raises(ntkscope.InputError, match="does not fit the record"):
        ntkscope.analyze(recorder.trace, model=nn.Linear(4, 3).double())
    wrong = nn.Sequential(*[layer if not isinstance(layer, nn.GELU) else nn.ReLU() for layer in model])
    with pytest.raises(ntkscope.InputError, match="gives other outputs on the probe"):
        ntkscope.analyze(recorder.trace, model=wrong)


def test_reasons_for_no_audit():
    recorder = recorded("adamw")
    assert ntkscope.analyze(recorder.trace).gate is None
    assert "an audit needs the model" in ntkscope.analyze(recorder.trace).gate_reason
    assert "no audit was asked for" in ntkscope.analyze(recorder, audit=False).gate_reason
    plain = record(MAKERS["gated"], steps=20)
    assert ntkscope.analyze(plain).gate.audit is None
    assert "Recorder(audit=True)" in ntkscope.analyze(plain).gate.audit_reason
    del recorder.trace.probe["inputs"]
    assert "an audit needs the probe" in ntkscope.analyze(recorder.trace, model=recorder.model).gate_reason


def test_resuming_goes_on_with_the_averages():
    whole = recorded("sgd").trace[-1]
    model, inputs, targets = problem()
    optimizer = MAKERS["sgd"](model)
    options = {"probe": (inputs, targets), "loss": "cross_entropy", "schedule": 5, "drift": None, "audit": True}
    first = ntkscope.Recorder(model, **options)
    first.attach(optimizer)
    train(model, inputs, targets, optimizer, 30, batches=BATCHES)
    state, weights, moments = copy.deepcopy(first.state_dict()), copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    other = problem()[0]
    other.load_state_dict(weights)
    again = MAKERS["sgd"](other)
    again.load_state_dict(moments)
    second = ntkscope.Recorder(other, **options)
    second.load_state_dict(state)
    second.attach(again)
    train(other, inputs, targets, again, 30, batches=BATCHES[30:])
    last = second.trace[-1]
    assert last.step == 60
    for name in ("audit_mean", "audit_variance", "audit_weights"):
        assert torch.equal(getattr(last, name), getattr(whole, name)), name


def test_buffers_are_put_back():
    torch.manual_seed(0)
    inputs, targets = torch.randn(8, 4), torch.randint(3, (8,))
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy", schedule=4, audit=True)
    recorder.attach(optimizer)
    train(model, inputs, targets, optimizer, 24)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    found = ntkscope.analyze(recorder, window=(0, 24))
    assert found.gate is not None, found.gate_reason
    assert len(found.gate.audit.steps) >= 3
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


def test_too_many_permutations_are_refused_with_numbers():
    recorder = recorded("gated")
    with pytest.raises(ntkscope.InputError, match="ask for fewer permutations"):
        ntkscope.analyze(recorder, audit=ntkscope.AuditOptions(num_permutations=10**9), max_memory=2**30)
    with pytest.raises(ntkscope.InputError, match=r"more than the 8 GiB allowed"):
        ntkscope.analyze(recorder, audit=ntkscope.AuditOptions(num_permutations=10**9))


def test_an_audit_is_priced_before_it_runs():
    recorder = recorded("gated")
    price = ntkscope.price_audit(recorder, audit=ntkscope.AuditOptions(num_steps=3, num_permutations=50))
    assert (price.num_steps, price.num_permutations) == (3, 50)
    facts = recorder.trace.facts
    outputs, params = facts.num_examples * facts.num_classes, facts.num_params
    # Per parameter and step: its column on the channel, the permuted gates' kernels, its motions by example and class; and one SVD.
    products = params * outputs * (outputs + 50 + facts.num_examples + facts.num_classes)
    assert price.multiply_adds == 3 * (products + 20 * outputs**3)
    twice = ntkscope.price_audit(recorder, audit=ntkscope.AuditOptions(num_steps=3, num_permutations=100))
    assert twice.peak_bytes - price.peak_bytes == 16 * 50 * max(facts.parameter_sizes)
    assert price.seconds > 0
    assert "Auditing the gate: 3 steps, 50 permutations, about" in price.describe()
    assert ntkscope.price_audit(recorder.trace) is None  # no model
    assert ntkscope.price_audit(record(MAKERS["sgd"], steps=4)) is None  # no audit data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "firm"}, "`gate` must be one of"),
        ({"alpha": -1.0}, "`alpha` must lie in"),
        ({"lambda_pop": -1.0}, "`lambda_pop` must lie in"),
        ({"variance": "exact"}, "`batch_size` must lie in"),
        ({"variance": "guessed"}, "`variance` must be one of"),
        ({"num_steps": 0}, "`num_steps` must lie in"),
        ({"num_permutations": 1}, "`num_permutations` must lie in"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ntkscope.InputError, match=message):
        ntkscope.AuditOptions(**options)


def test_average_of_figures_is_judged_by_the_average_of_their_nulls():
    draws = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    one, other = compare(1.0, draws), compare(3.0, draws + 1)
    assert mean_over([one, other]).observed == 2.0
    assert mean_over([one, other]).mean == pytest.approx(float(draws.mean()) + 0.5)
    undefined = compare(math.nan, draws)
    assert mean_over([one, undefined]).z == one.z
    assert mean_over([undefined]).reason == "it is not defined (0/0)"
    assert 0 < SMALLEST_ADVANTAGE < 0.1


@pytest.mark.parametrize("name", list(MAKERS))
def test_live_audits_come_at_their_interval(name):
    analysis = ntkscope.analyze(recorded(name, live_audit=20), window=(0, 60))
    assert analysis.gate.live[:, 0].tolist() == [20.0, 40.0, 60.0]


@pytest.mark.parametrize("name", list(MAKERS))
def test_live_figures_are_the_definition(name):
    """With a snapshot at every step the channel is that of the step before; the numbers are those of the dense audit with that channel."""
    recorder = recorded(name, schedule=1, live_audit=30)
    trace = recorder.trace
    keeper = ChannelKeeper([29], "half")
    walk_trajectory(Course(trace, 0, 30, loss=None), target_kernel=None, device=None, progress=None, visit=keeper.visit)
    model, inputs, targets = problem()
    optimizer = MAKERS[name](model)
    other = ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy", schedule=[30], drift=None, audit=True)
    other.attach(optimizer)
    train(model, inputs, targets, optimizer, 30, batches=BATCHES)
    snapshot = other.trace[-1]
    options = ntkscope.AuditOptions(num_permutations=2)
    audit, _ = _audit_snapshot(
        snapshot, keeper.channels[29], AuditedModel(model, inputs, None), trained_parameters(trace.facts, model),
        Rule.of(trace.facts, options), options, 2**30,
    )  # fmt: skip
    live = ntkscope.analyze(recorder, window=(0, 60)).gate.live[0]
    expected = [audit.figures[name].observed for name in ("precision", "recall", "collateral", "direction")] + [audit.ungated_direction]
    assert_close(live[1:], torch.tensor(expected, dtype=torch.float64), rtol=5e-3)


def test_live_audit_changes_nothing_and_survives_resuming():
    plain, live = recorded("gated"), recorded("gated", live_audit=10)
    for first, second in zip(plain.model.parameters(), live.model.parameters(), strict=True):
        assert torch.equal(first, second)
    state = copy.deepcopy(live.state_dict())
    model, inputs, targets = problem()
    model.load_state_dict(live.model.state_dict())
    optimizer = MAKERS["gated"](model)
    again = ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy", schedule=5, drift=None, audit=True, live_audit=10)
    again.load_state_dict(state)
    again.attach(optimizer)
    train(model, inputs, targets, optimizer, 20, batches=BATCHES)
    assert ntkscope.analyze(again, window=(0, 80)).gate.live[:, 0].tolist() == [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0]


def test_live_audit_needs_the_audit():
    model, inputs, targets = problem()
    with pytest.raises(ntkscope.InputError, match="`live_audit` needs audit=True"):
        ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy", live_audit=5)
    with pytest.raises(ntkscope.InputError, match="`live_audit` must lie in"):
        ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy", audit=True, live_audit=0)
