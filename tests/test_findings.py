"""What an analysis says beside the spectrum, on small real runs."""

import csv
import dataclasses
import math
import sys

import pytest
import torch
from compare import assert_close
from torch import nn

import ntkscope
from ntkscope import findings
from ntkscope._losses import NAMED_LOSSES
from ntkscope.dynamics.diffusion import measure_diffusion
from ntkscope.dynamics.drift import centered_alignment
from ntkscope.experiments.demo import train_demo
from ntkscope.view.suspects import order_words


def trained(loss="squared", *, steps=120, lr=0.3, num_examples=24, clean=True, batch=None, weight_decay=0.0, **recording):
    """A smooth MLP on random clusters, some labels wrong; float64."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    labels = torch.arange(num_examples) % 3
    inputs = centers[labels] + 0.3 * torch.randn(num_examples, 5, generator=generator, dtype=torch.float64)
    given = labels.clone()
    given[:4] = (labels[:4] + 1) % 3
    query_labels = torch.arange(9) % 3
    query = centers[query_labels] + 0.3 * torch.randn(9, 5, generator=generator, dtype=torch.float64)
    encode = (lambda values: values) if loss == "cross_entropy" else (lambda values: nn.functional.one_hot(values, 3).double())
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    recorder = ntkscope.Recorder(
        model,
        probe=(inputs, encode(given)),
        query=(query, encode(query_labels)),
        loss=loss,
        clean_targets=encode(labels) if clean else None,
        **recording,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=weight_decay)
    recorder.attach(optimizer)
    for _ in range(steps):
        rows = slice(None) if batch is None else torch.randint(num_examples, (batch,), generator=generator)
        optimizer.zero_grad()
        NAMED_LOSSES[loss](model(inputs[rows]), encode(given)[rows]).backward()
        optimizer.step()
    return recorder


@pytest.fixture(scope="module", params=["squared", "mse", "cross_entropy"])
def found(request):
    return ntkscope.analyze(trained(request.param))


def test_test_motion_is_predicted_better_than_by_the_baselines(found):
    transfer = found.transfer
    assert transfer.fit.relative_error < (0.05 if found.run.loss == "cross_entropy" else 0.02)
    assert transfer.fit.correlation > 0.999
    assert set(transfer.baselines) == {"frozen_kernel", "linearized", "regression_start", "regression_end"}
    # The last kernel's regression is told how the training outputs moved; the others, like the operators, are not.
    told = {"regression_end"}
    assert transfer.fit.relative_error < min(fit.relative_error for name, fit in transfer.baselines.items() if name not in told)


def test_cells_add_up_to_the_predicted_motion(found):
    cells = found.cells
    total = cells.signal_clean + cells.reservoir_clean + cells.signal_noise + cells.reservoir_noise
    assert_close(total, found.transfer.predicted.flatten(), 1e-8)
    assert not cells.is_estimate
    assert cells.norms["signal_clean"] > cells.norms["reservoir_noise"]


def test_the_noise_cells_are_what_the_planted_labels_cause():
    trace = trained("squared").trace
    found = ntkscope.analyze(trace)
    wrong = (trace.probe["clean_targets"] - trace.probe["targets"]).flatten() / 24  # g_noise of ½‖u − y‖², mean over 24 examples
    assert_close(found.cells.signal_noise + found.cells.reservoir_noise, -found.dissipation.transfer @ wrong, 1e-8)


def test_unknown_noise_gives_estimates_that_add_up_too():
    found = ntkscope.analyze(trained(clean=False))
    cells = found.cells
    assert cells.is_estimate
    total = cells.signal_clean + cells.reservoir_clean + cells.signal_noise + cells.reservoir_noise
    assert_close(total, found.transfer.predicted.flatten(), 1e-8)


def test_the_real_residual_holds_more_signal_than_shuffled_labels():
    null = ntkscope.analyze(trained("squared")).null
    assert null.p == pytest.approx(1 / 201)
    assert null.z > 3


def test_weight_decay_is_in_the_predicted_test_motion():
    found = ntkscope.analyze(trained(weight_decay=0.02))
    assert abs(found.closure.forcing_share) > 0.01
    assert found.closure.query_error < 0.02
    assert found.transfer.fit.relative_error < 0.02
    # The four cells are those of the operators alone; what is missing from them is the decay's own part.
    cells = found.cells
    operators = cells.signal_clean + cells.reservoir_clean + cells.signal_noise + cells.reservoir_noise
    assert float(torch.linalg.vector_norm(operators - found.transfer.observed.flatten())) > 2 * float(
        torch.linalg.vector_norm(found.transfer.predicted - found.transfer.observed)
    )


def test_the_table_of_examples_goes_to_csv_and_pandas(found, tmp_path, monkeypatch):
    examples = found.examples
    table = examples.table()
    assert {"id", "label", "true_label", "is_noise", "rank", "reservoir_energy", "loss", "margin", "area_under_margin"} <= set(table)
    assert table["rank"][examples.ranking()[0]] == 1
    with examples.to_csv(tmp_path / "table.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["reservoir_energy"]) for row in rows] == table["reservoir_energy"]
    frame = pytest.importorskip("pandas").DataFrame(table).set_index("id")
    assert examples.to_pandas().equals(frame)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ntkscope.UnsupportedError, match="pandas is not installed"):
        examples.to_pandas()


def test_the_table_abstains_where_the_run_does_not_close():
    found = ntkscope.analyze(trained(lr=6.0, steps=40, drift=None, schedule=[1, 20, 40]), window=(0, 40))
    assert not found.closure.trustworthy
    examples = found.examples
    assert "closure errors are too large" in examples.abstains
    with pytest.raises(ntkscope.InputError, match="No ranking by half_time: the closure errors"):
        examples.ranking()
    assert len(examples.ranking("loss")) == 24
    assert examples.table()["rank"] == [None] * 24
    assert found.summary()["examples_abstain"] == examples.abstains
    assert "<table" in found._repr_html_()


def test_ranking_refuses_unknown_scores(found):
    with pytest.raises(ntkscope.InputError, match="`by` must be one of"):
        found.examples.ranking("beauty")


def test_examples_are_ranked_by_half_time(found):
    examples = found.examples
    assert examples.ranking() == examples.ranking("half_time")
    assert found.summary()["examples_ranked_by"] == "half_time"
    assert examples.auroc["half_time"] > 0.9  # wrong labels inside a cluster are learned late


def test_a_window_that_begins_late_is_ranked_by_loss():
    trace = trained(steps=200).trace
    late = ntkscope.analyze(trace, window=(60, 200))
    assert late.examples.ranked_by == "loss"
    assert late.examples.ranking() == late.examples.ranking("loss")
    assert late.summary()["examples_ranked_by"] == "loss"
    assert not late.examples.abstains
    assert "most labels were learned before the window began" in order_words(late)


def test_examples_that_never_got_there_come_first_the_least_learned_first():
    examples = ntkscope.analyze(trained(steps=60)).examples
    never = torch.isinf(examples.half_time)
    assert 1 < int(never.sum()) < 24
    order = examples.ranking("half_time")
    assert set(order[: int(never.sum())]) == set(never.nonzero().flatten().tolist())
    left = examples.residual_left[order[: int(never.sum())]]
    assert bool((left.diff() <= 0).all())


def test_drift_and_alignment(found):
    drift = found.drift
    assert float(drift.alignment_start[0]) == 1.0
    assert bool(((drift.alignment_start <= 1 + 1e-12) & (drift.alignment_start > 0)).all())
    assert float(drift.alignment_targets[-1]) > float(drift.alignment_targets[0])  # features learned
    assert torch.isnan(drift.velocity[0])
    assert bool((drift.velocity[1:] > 0).all())


def test_minibatch_noise_diffuses_and_full_batches_do_not():
    found = ntkscope.analyze(trained(batch=6, lr=0.05, steps=200, every_step=True, steps_per_epoch=4), window=(0, 200))
    diffusion = found.diffusion
    assert diffusion.sampler.name in ("independent batches", "unclear")
    assert float(diffusion.signal_to_noise_step[0]) < 20
    full = ntkscope.analyze(trained(lr=0.05, steps=200, every_step=True), window=(0, 200)).diffusion
    assert float(full.signal_to_noise_step[0]) > 10 * float(diffusion.signal_to_noise_step[0])
    assert found.summary()["diffusion"]["sampler"]["name"] == diffusion.sampler.name


def test_mean_and_centered_motion_are_the_whole_motion(monkeypatch):
    """Read in B^{+½} coordinates along the leading directions; nothing is lost or counted twice."""
    seen = {}

    def capture(mean, centered, elapsed, **options):
        seen.update(mean=mean, centered=centered, elapsed=elapsed)
        return measure_diffusion(mean, centered, elapsed, **options)

    monkeypatch.setattr(findings, "measure_diffusion", capture)
    trace = trained(lr=0.01, steps=100, every_step=True).trace
    found = ntkscope.analyze(trace, window=(0, 100))
    leading = (found.spectrum.eigvals * found.spectrum.residual_energy).argsort(descending=True)[:5]
    axes = found.spectrum.eigvecs[:, leading]
    axes = axes * (axes.T @ found.spectrum.residual).sign()  # each towards its residual
    motion = axes.T @ (trace[-1].outputs - trace[0].outputs).flatten() / 24**0.5  # B = I / n
    assert_close((seen["mean"] + seen["centered"]).sum(dim=0), motion, 1e-8)
    assert_close(seen["mean"].sum(dim=0), motion, 0.02)  # full batches, small steps: nearly all of it
    assert float(seen["elapsed"].sum()) == pytest.approx(1.0)


def test_alignment_is_that_of_centered_kernels():
    generator = torch.Generator().manual_seed(0)
    first, second = (half @ half.T for half in torch.randn(2, 6, 4, generator=generator, dtype=torch.float64))
    center = torch.eye(6, dtype=torch.float64) - 1 / 6
    a, b = center @ first @ center, center @ second @ center
    assert centered_alignment(first, second) == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())))
    assert centered_alignment(first, 3 * first + 2) == pytest.approx(1.0)
    assert math.isnan(centered_alignment(first, torch.ones(6, 6, dtype=torch.float64)))


def test_without_steps_or_query_the_reason_is_given():
    recorder = trained()
    found = ntkscope.analyze(recorder)
    assert found.diffusion is None
    assert "every_step=True" in found.diffusion_reason
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    x, y = torch.randn(6, 2), torch.randn(6, 2)
    bare = ntkscope.Recorder(model, probe=(x, y), loss="squared")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bare.attach(optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        NAMED_LOSSES["squared"](model(x), y).backward()
        optimizer.step()
    found = ntkscope.analyze(bare)
    assert found.transfer is None
    assert found.cells is None
    assert "query" in found.transfer_reason
    assert found.truncation.query_error is None


def test_sensitivity_lists_every_rule(found):
    rows = {row.rule: row for row in found.sensitivity.rows}
    assert {"fixed:0.1", "fixed:0.5", "half", "energy"} <= set(rows)
    assert rows["half"].rank_correlation == pytest.approx(1.0)
    assert rows["fixed:0.5"].signal_rank == rows["half"].signal_rank
    assert 0 <= rows["half"].reservoir_share <= 1
    assert found.sensitivity.smallest_rank_correlation <= 1 + 1e-12


def test_the_trace_form_is_flagged_and_close_where_classes_share_a_kernel():
    """With a frozen hidden layer and one output layer, K = k ⊗ I exactly: both forms must give the same numbers."""
    results = []
    for outputs in ("full", "trace"):
        torch.manual_seed(2)
        x, labels = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
        y = nn.functional.one_hot(labels, 3).double()
        model = nn.Linear(4, 3).double()
        recorder = ntkscope.Recorder(model, probe=(x, y), query=(x[:5] + 0.1, y[:5]), loss="squared", outputs=outputs, clean_targets=y)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        recorder.attach(optimizer)
        for _ in range(60):
            optimizer.zero_grad()
            NAMED_LOSSES["squared"](model(x), y).backward()
            optimizer.step()
        results.append(ntkscope.analyze(recorder, window=(0, 60)))
    full, trace = results
    assert any("Trace form" in warning for warning in trace.warnings)
    assert trace.channels.num_modes * 3 == full.channels.num_modes
    assert trace.channels.signal_rank * 3 == full.channels.signal_rank
    for name in ("energy_predicted", "gradient_error", "query_error"):
        assert getattr(trace.closure, name) == pytest.approx(getattr(full.closure, name), rel=1e-6, abs=1e-10)
    assert_close(trace.examples.reservoir_energy, full.examples.reservoir_energy, 1e-7)
    assert_close(trace.examples.half_time, full.examples.half_time, 1e-7)
    assert_close(trace.examples.self_influence, full.examples.self_influence, 1e-7)
    assert_close(trace.transfer.predicted, full.transfer.predicted, 1e-7)
    assert trace.null.z == pytest.approx(full.null.z, rel=1e-6)
    assert trace.transfer.baselines["frozen_kernel"].relative_error == pytest.approx(
        full.transfer.baselines["frozen_kernel"].relative_error, rel=1e-4
    )
    assert_close(trace.drift.alignment_targets, full.drift.alignment_targets, 1e-7)
    assert "<table" in trace._repr_html_()
    trace.plot.eigenstructure()


def test_a_window_does_not_depend_on_how_it_was_asked_for():
    trace = trained(steps=200).trace
    default = ntkscope.analyze(trace)
    assert default.window.stop_step < 200
    asked = ntkscope.analyze(trace, window=(default.window.start_step, default.window.stop_step))
    for name in ("gramian", "propagator", "displacement", "transfer", "gradient"):
        assert torch.equal(getattr(asked.dissipation, name), getattr(default.dissipation, name)), name
    assert asked.closure == default.closure
    assert asked.channels.signal_rank == default.channels.signal_rank
    assert asked.transfer.baselines == default.transfer.baselines


def test_the_first_steps_of_adam_are_left_out_of_the_default_window():
    """Units that the first batch did not reach get a preconditioner of 1/ε, and a kernel that predicts what never happened."""
    trace = train_demo(optimizer="adamw", loss="cross_entropy", num_examples=50, num_steps=300).recorder.trace
    whole, default = ntkscope.analyze(trace, window=(0, 300)), ntkscope.analyze(trace)
    assert 0 < default.window.start_step <= 5
    assert f"begins at step {default.window.start_step}" in default.window.reason
    assert default.closure.energy_error < 0.05 < whole.closure.energy_error
    assert ntkscope.analyze(trained(steps=30)).window.start_step == 0


def test_a_damaged_snapshot_after_the_window_is_not_needed():
    trace = trained(steps=60).trace
    steps = trace.steps
    whole = ntkscope.analyze(trace, window=(0, steps[-2]))
    last = trace.entries[steps[-1]]
    broken = {**trace.entries, steps[-1]: dataclasses.replace(last, probe_hash="another")}
    damaged = ntkscope.analyze(dataclasses.replace(trace, entries=broken), window=(0, steps[-2]))
    # The last interval goes without its neighbour beyond the window; nothing else changes.
    assert damaged.closure.gradient_error == pytest.approx(whole.closure.gradient_error, rel=0.2)
    with pytest.raises(ntkscope.InputError, match="another probe set"):
        ntkscope.analyze(dataclasses.replace(trace, entries=broken), window=(0, steps[-1]))


def test_an_old_record_without_the_decay_of_query_outputs_is_not_compared():
    trace = trained(steps=40, weight_decay=0.02).trace
    old = {step: dataclasses.replace(snapshot, query_forcing=None) for step, snapshot in trace.entries.items()}
    found = ntkscope.analyze(dataclasses.replace(trace, entries=old))
    assert found.transfer is None
    assert "weight decay acts" in found.transfer_reason
    assert found.closure.query_error is None


def test_a_sample_of_the_training_set_is_flagged():
    found = ntkscope.analyze(trained(training_size=1000))
    assert any("sample of 24 of 1000 training examples" in warning for warning in found.warnings)
    assert found.summary()["training_size"] == 1000
