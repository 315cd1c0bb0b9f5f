"""What a snapshot holds beyond outputs and kernel, how it is kept, and how records of schema 1 are read."""

import copy
import json
from dataclasses import asdict, replace

import pytest
import torch
from oracles import gram as oracle_gram
from oracles import stacked_jacobian
from record_case import cross_entropy, problem, record, train
from safetensors.torch import load_file, save_file
from torch import nn

import ntkscope
from ntkscope.record import following
from ntkscope.record.facts import NEW_FACTS
from ntkscope.record.instrument import Instrument
from ntkscope.record.subset import stratified_subset
from ntkscope.record.trace import trace_from_state

SGD = torch.optim.SGD
NEW_TENSORS = ("query_forcing", "linearized", "query_linearized", "gradient_audit", "step_outputs", "step_times")


def full_record(path=None, **options):
    """A run that fills every field."""
    return record(
        lambda m: SGD(m.parameters(), lr=0.1, weight_decay=0.1), 12, query=True, every_step=True, path=path, schedule=4, **options
    )


def without_new(tensors):
    return {name: tensor for name, tensor in tensors.items() if name not in NEW_TENSORS}


def same(first, second):
    return all(
        (getattr(first, name) is None and getattr(second, name) is None)
        or (torch.equal(torch.nan_to_num(value), torch.nan_to_num(getattr(second, name))) if torch.is_tensor(value) else True)
        for name, value in vars(first).items()
    )


def test_every_field_survives_files_and_states(tmp_path):
    recorder = full_record(tmp_path / "trace", training_size=50, steps_per_epoch=7)
    torch.save(recorder.state_dict(), tmp_path / "state.pt")
    traces = [
        recorder.trace,
        ntkscope.load_trace(tmp_path / "trace"),
        trace_from_state(torch.load(tmp_path / "state.pt", weights_only=True), "it"),
    ]
    for trace in traces:
        assert (trace.facts.training_size, trace.facts.steps_per_epoch, trace.facts.outputs) == (50, 7, "full")
        assert all(same(a, b) for a, b in zip(trace, recorder.trace, strict=True))
        assert trace.times == [snapshot.time for snapshot in recorder.trace]
    last = traces[1][-1]
    assert all(getattr(last, name) is not None for name in NEW_TENSORS)
    assert last.probe_hash == traces[1].facts.probe_hash


def test_others_may_read_a_trace_as_any_new_file(tmp_path):
    full_record(tmp_path / "trace")
    plain = tmp_path / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in (tmp_path / "trace").iterdir()} == {plain.stat().st_mode}


def test_a_state_of_schema_1_still_loads():
    state = full_record().state_dict()
    old = copy.deepcopy(state) | {"schema": "ntkscope.trace/1"}
    for name in NEW_FACTS:
        del old["facts"][name]
    for part in old["snapshots"]:
        part["tensors"] = without_new(part["tensors"])
        del part["numbers"]["probe_hash"]
    for key in ("placement", "allowance", "following", "beginning"):
        del old[key]
    trace = trace_from_state(old, "an old state")
    assert {name: getattr(trace.facts, name) for name in NEW_FACTS} == NEW_FACTS
    assert all(getattr(snapshot, name) is None for snapshot in trace for name in (*NEW_TENSORS, "probe_hash"))
    # And it can be resumed; without the first weights nothing is linearized.
    model, inputs, targets = problem()
    resumed = ntkscope.Recorder(model, probe=(inputs, targets), query=(inputs[:2] + 0.5, targets[:2]), loss="cross_entropy")
    resumed.load_state_dict(old)
    optimizer = SGD(model.parameters(), lr=0.1)
    resumed.attach(optimizer)
    train(model, inputs, targets, optimizer, 3)
    assert resumed.trace.steps[-1] == 15
    assert resumed.trace[-1].query_linearized is None
    with pytest.raises(ntkscope.InputError, match=r"fields missing \[.*'notes'"):
        trace_from_state({**old, "schema": "ntkscope.trace/3"}, "a damaged state")


def test_a_folder_of_schema_1_still_loads(tmp_path):
    recorder = full_record(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["schema"] = "ntkscope.trace/1"
    for name in NEW_FACTS:
        del manifest["facts"][name]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for path, snapshot in zip(sorted(tmp_path.glob("snapshot-*")), recorder.trace, strict=True):
        numbers = {"step": snapshot.step, "time": snapshot.time, "learning_rates": list(snapshot.learning_rates), "loss": snapshot.loss}
        save_file(without_new(load_file(path)), path, metadata={"numbers": json.dumps(numbers)})
    trace = ntkscope.load_trace(tmp_path)
    assert asdict(trace.facts) == asdict(recorder.trace.facts) | NEW_FACTS
    assert trace.steps == recorder.trace.steps
    assert all(torch.equal(a.kernel(), b.kernel()) for a, b in zip(trace, recorder.trace, strict=True))
    assert trace.gradient_audits() == [None] * len(trace)


def test_the_order_of_insertion_does_not_matter():
    trace = full_record().trace
    shuffled = ntkscope.Trace(trace.facts, trace.probe, trace.source)
    for position in (2, 0, 3, 1):
        shuffled.append(trace[position])
    assert list(shuffled.entries) != list(trace.entries)
    assert shuffled.steps == trace.steps
    assert all(a is b for a, b in zip(shuffled, trace, strict=True))
    assert shuffled.times == trace.times
    first, second = shuffled.state_dict(), trace.state_dict()
    assert [part["numbers"] for part in first["snapshots"]] == [part["numbers"] for part in second["snapshots"]]


def test_forcing_and_linearization_on_both_sets():
    model, inputs, targets = problem()
    query = inputs[:2] + 0.5
    model.insert(1, nn.BatchNorm1d(10).double())  # its buffers move too
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), query=(query, targets[:2]), loss="cross_entropy", schedule=[6], drift=None)
    initial = copy.deepcopy(model)
    initial(inputs)  # step 0 is just before the first step: after the first batch has gone through
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.3)
    recorder.attach(optimizer)
    train(model, inputs, targets, optimizer, 6)
    snapshot = recorder.trace[-1]
    initial.eval()
    model.eval()
    moved = torch.cat([(a - b).detach().flatten() for a, b in zip(model.parameters(), initial.parameters(), strict=True)])
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    for rows, linear, forcing in (
        (inputs, snapshot.linearized, snapshot.forcing),
        (query, snapshot.query_linearized, snapshot.query_forcing),
    ):
        expected = initial(rows).detach().flatten() + stacked_jacobian(initial, rows) @ moved
        assert torch.allclose(linear.flatten(), expected)
        assert torch.allclose(forcing.flatten(), stacked_jacobian(model, rows) @ (0.3 * weights))
    first = recorder.trace[0]
    assert torch.equal(first.linearized, first.outputs)
    assert torch.equal(first.query_linearized, first.query_outputs)


def test_without_query_set_or_decay_fields_are_absent():
    recorder = record(lambda m: SGD(m.parameters(), lr=0.1), 5)
    assert all(getattr(snapshot, name) is None for snapshot in recorder.trace for name in NEW_TENSORS if name != "gradient_audit")
    assert "beginning" not in recorder.state_dict()


def test_the_beginning_comes_back_on_resuming(tmp_path):
    straight = full_record()
    model, inputs, targets = problem()
    options = {
        "probe": (inputs, targets),
        "query": (inputs[:2] + 0.5, targets[:2]),
        "loss": "cross_entropy",
        "schedule": 4,
        "every_step": True,
    }
    first = ntkscope.Recorder(model, **options)
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    first.attach(optimizer)
    train(model, inputs, targets, optimizer, 6)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = ntkscope.Recorder(model, **options)
    second.load_state_dict(state)
    other = SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    second.attach(other)
    train(model, inputs, targets, other, 6)
    for name in ("linearized", "query_linearized", "outputs"):
        assert torch.equal(getattr(second.trace[-1], name), getattr(straight.trace[-1], name))
    assert second.trace.steps == [0, 4, 6, 8, 12]
    assert [0 if s.step_outputs is None else len(s.step_outputs) for s in second.trace] == [0, 4, 2, 2, 4]
    damaged = state | {"beginning": {name: torch.ones(1) for name in state["beginning"]}}
    with pytest.raises(ntkscope.InputError, match="at the beginning of the run do not fit the model"):
        ntkscope.Recorder(model, **options).load_state_dict(damaged)


def test_every_step_is_followed(monkeypatch):
    runs = []
    run = Instrument._run
    monkeypatch.setattr(Instrument, "_run", lambda self, inputs: runs.append(1) or run(self, inputs))
    model, inputs, targets = problem()
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy", schedule=[1, 4, 9], every_step=True, drift=None)
    optimizer = SGD(model.parameters(), lr=0.1)
    recorder.attach(optimizer)
    outputs = []
    for _ in range(11):
        train(model, inputs, targets, optimizer, 1)
        with torch.no_grad():
            outputs.append(model(inputs))
    trace = recorder.trace
    assert len(runs) == 12  # one a step and one at the start: snapshots make no further ones
    assert [0 if s.step_outputs is None else len(s.step_outputs) for s in trace] == [0, 1, 3, 5, 2]
    assert torch.equal(torch.cat([s.step_outputs for s in trace if s.step]), torch.stack(outputs))
    assert torch.cat([s.step_times for s in trace if s.step]).tolist() == pytest.approx([0.1 * (k + 1) for k in range(11)])
    for snapshot in trace:
        if snapshot.step:
            assert snapshot.step_outputs[-1].equal(snapshot.outputs)
            assert float(snapshot.step_times[-1]) == snapshot.time


def test_following_stops_at_its_bound(monkeypatch):
    size = 8 * 3 * 8  # bytes of the outputs of one step
    monkeypatch.setattr(following, "MAX_BYTES", 6 * size)
    trace = record(lambda m: SGD(m.parameters(), lr=0.1), 12, schedule=4, every_step=True).trace
    assert [0 if s.step_outputs is None else len(s.step_outputs) for s in trace] == [0, 4, 0, 0]
    (note,) = trace.facts.notes
    assert note.startswith("Outputs after every step are kept up to step 6 only: they reached the bound of 1.12 KiB.")


def test_the_trace_form_is_the_trace_over_classes(tmp_path):
    options = {"query": True, "schedule": [5], "drift": None}
    full, traced = (
        record(lambda m: SGD(m.parameters(), lr=0.1), 5, outputs=form, path=tmp_path / form, **options).trace for form in ("full", "trace")
    )
    assert (full.facts.outputs, traced.facts.outputs) == ("full", "trace")
    num_examples, num_classes = 8, 3
    for form in (traced, ntkscope.load_trace(tmp_path / "trace")):
        for a, b in zip(full, form, strict=True):
            whole = a.kernel().view(num_examples, num_classes, num_examples, num_classes)
            assert torch.allclose(b.kernel(), whole.diagonal(dim1=1, dim2=3).sum(dim=2) / num_classes)
            cross = a.cross_kernel.view(2, num_classes, num_examples, num_classes)
            assert torch.allclose(b.cross_kernel, cross.diagonal(dim1=1, dim2=3).sum(dim=2) / num_classes)
    model, inputs, _ = problem()
    assert torch.allclose(full[0].kernel(), oracle_gram(model, inputs))
    mixed = ntkscope.Trace(full.facts, full.probe, "mixed", dict(traced.entries))
    with pytest.raises(ntkscope.InputError, match="has a kernel of 36 packed entries, but outputs='full'"):
        mixed[0]


def changed(change):
    """A trace with one snapshot changed."""
    trace = full_record().trace
    trace.entries[8] = change(trace.entries[8])
    return trace


def test_snapshots_of_another_probe_are_refused():
    trace = changed(lambda s: replace(s, probe_hash="0" * 64))
    with pytest.raises(ntkscope.InputError, match="at step 8 is of another probe set"):
        trace[2]
    assert changed(lambda s: replace(s, probe_hash=None))[2].step == 8


@pytest.mark.parametrize("read", [list, lambda trace: trace.times], ids=["iterate", "times"])
def test_time_never_runs_backwards(read):
    trace = changed(lambda s: replace(s, time=0.1))
    with pytest.raises(ntkscope.InputError, match=r"backwards between the snapshots at step 4 \(time 0.4\) and step 8 \(time 0.1\)"):
        read(trace)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query_forcing", torch.ones(3, 3)),
        ("linearized", torch.ones(8, 2)),
        ("query_linearized", torch.ones(2)),
        ("gradient_audit", torch.ones(2, 3)),
        ("gradient_audit", torch.tensor(1.0)),
        ("step_outputs", torch.ones(3, 8, 3)),
        ("step_times", torch.ones(4, 1)),
        ("step_times", None),
        ("cross_kernel", torch.ones(2, 8)),
        ("kernel_upper", torch.ones(36)),  # the trace form, but beside a cross kernel of the other
    ],
)
def test_bad_tensors_are_named(name, value):
    state = full_record().state_dict()
    tensors = state["snapshots"][2]["tensors"]
    tensors.pop(name)
    if value is not None:
        tensors[name] = value
    with pytest.raises(ntkscope.InputError, match=r"The snapshot at step 8 is damaged: .*do not fit its outputs"):
        trace_from_state(state, "it")


def test_bad_numbers_in_audits():
    state = full_record().state_dict()
    state["snapshots"][1]["tensors"]["gradient_audit"][0, 1] = torch.nan
    with pytest.raises(ntkscope.InputError, match="`gradient_audit` of the snapshot at step 4 must be finite"):
        trace_from_state(state, "it")


def test_bad_parts_of_a_state_are_refused_when_resuming():
    state = full_record().state_dict()
    for key in ("placement", "allowance", "following", "beginning", "clock"):
        for value in ("x", 3, {}, [1]):
            model, inputs, targets = problem()
            recorder = ntkscope.Recorder(model, probe=(inputs, targets), query=(inputs[:2], targets[:2]), loss="cross_entropy")
            with pytest.raises(ntkscope.InputError):
                recorder.load_state_dict(state | {key: value})
    model, inputs, targets = problem()
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), query=(inputs[:2], targets[:2]), loss="cross_entropy", outputs="trace")
    with pytest.raises(ntkscope.InputError, match="recorded with outputs='full', not 'trace'"):
        recorder.load_state_dict(state)


def test_subsets_keep_class_shares():
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.full((count,), label) for label, count in ((0, 50), (3, 30), (7, 13), (9, 7))])
    labels = labels[torch.randperm(100, generator=generator)]
    one_hot = nn.functional.one_hot(labels).float()
    rows = stratified_subset(labels, 20)
    assert torch.equal(rows, rows.unique())  # ascending, none twice
    assert labels[rows].bincount(minlength=10)[[0, 3, 7, 9]].tolist() == [10, 6, 3, 1]
    assert torch.equal(stratified_subset(one_hot, 20), rows)
    assert torch.equal(stratified_subset(labels[:, None], 20), rows)
    assert not torch.equal(stratified_subset(labels, 20, seed=1), rows)
    assert torch.equal(stratified_subset(labels, 100), torch.arange(100))
    for size in range(1, 101):
        assert len(stratified_subset(labels, size)) == size


def test_subsets_of_regression_targets_are_random():
    targets = torch.arange(40.0)
    rows = stratified_subset(targets, 7)
    assert torch.equal(rows, rows.unique())
    assert len(rows) == 7
    assert torch.equal(stratified_subset(torch.stack([targets, targets], dim=1), 7), rows)


@pytest.mark.parametrize(
    ("targets", "size", "message"),
    [
        (torch.arange(5), 6, r"`size` must lie in \[1, 5\]"),
        (torch.arange(5), 0, r"`size` must lie in \[1, 5\]"),
        (torch.arange(5), 2.0, "`size` must be a whole number"),
        ([0, 1], 1, "`targets` must be a tensor"),
    ],
)
def test_bad_subsets(targets, size, message):
    with pytest.raises(ntkscope.UserError, match=message):
        stratified_subset(targets, size)


def test_the_loss_is_what_is_trained():
    model, inputs, targets = problem()
    assert full_record().trace[0].loss == pytest.approx(cross_entropy(model, inputs, targets).item())
