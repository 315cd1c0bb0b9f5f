"""Adapters for three libraries, offline: what they kept is read back with the library itself."""

import json
import math
import struct

import pytest
import torch
from record_case import cross_entropy, problem

import ntkscope
from ntkscope.integrations.loggers import MLflowLogger, TensorBoardLogger, WandbLogger, log_analysis, log_recording, main_numbers

NUM_STEPS = 12
RECORDED = {"loss", "kernel_drift", "stability", "snapshot_seconds", "recording_share"}


class Kept:
    """A logger in memory."""

    def __init__(self):
        self.rows = []

    def log(self, metrics, step):
        self.rows.append((step, metrics))


def run(*loggers, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.2), steps=NUM_STEPS, state=None, offset=0, **options):
    model, inputs, targets = problem()
    standard = {"probe": (inputs, targets), "loss": "cross_entropy", "schedule": 4, "drift": None}
    recorder = ntkscope.Recorder(model, **standard | options)
    optimizer = make_optimizer(model.parameters())
    if state is not None:
        recorder.load_state_dict(state)
    recorder.attach(optimizer)
    log_recording(recorder, *loggers, offset=offset)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model, inputs, targets).backward()
        optimizer.step()
    return recorder


def test_what_is_logged_is_what_the_analysis_finds():
    kept = Kept()
    recorder = run(kept, schedule=1)
    analysis = ntkscope.analyze(recorder, window=(0, NUM_STEPS))
    assert [step for step, _ in kept.rows] == list(range(NUM_STEPS + 1))
    assert all(set(row) == {f"ntkscope/{name}" for name in RECORDED} - ({"ntkscope/recording_share"} if not i else set())
               or i == 0 for i, (_, row) in enumerate(kept.rows))  # fmt: skip
    drift = [row["ntkscope/kernel_drift"] for _, row in kept.rows]
    assert drift == pytest.approx(analysis.drift.relative.tolist(), abs=1e-9)
    assert [row["ntkscope/loss"] for _, row in kept.rows] == pytest.approx(analysis.history.loss.tolist())
    assert max(row["ntkscope/stability"] for _, row in kept.rows) == pytest.approx(analysis.stability, rel=0.05)  # there, of intervals


def test_gates_and_live_audits():
    kept = Kept()
    gated = run(kept, make_optimizer=lambda p: ntkscope.GatedAdamW(p, lr=1e-2), audit=True, live_audit=2, steps=30)
    trace = gated.trace
    audited = {step for step, row in kept.rows if "ntkscope/live/collateral" in row}
    stored = {int(row[0]) for snapshot in trace if snapshot.live_audit is not None for row in snapshot.live_audit}
    assert audited == stored != set()
    last = next(row for step, row in reversed(kept.rows) if "ntkscope/gate_open" in row)
    sizes = torch.tensor(gated.facts.parameter_sizes, dtype=torch.float64)
    assert last["ntkscope/gate_open"] == pytest.approx(float((trace[-1].gate_open * sizes).sum() / sizes.sum()))
    assert all(math.isfinite(value) for _, row in kept.rows for value in row.values())
    steps = [step for step, _ in kept.rows]
    assert steps == sorted(steps)


def test_drift_goes_on_from_the_first_kernel_when_resumed():
    whole, kept = Kept(), Kept()
    expected = run(whole)
    del expected
    recorder = run(steps=8)
    model, again = recorder.model, recorder.state_dict()
    second, inputs, targets = problem()
    second.load_state_dict(model.state_dict())
    resumed = ntkscope.Recorder(second, probe=(inputs, targets), loss="cross_entropy", schedule=4, drift=None)
    resumed.load_state_dict(again)
    optimizer = torch.optim.SGD(second.parameters(), lr=0.2)
    resumed.attach(optimizer)
    log_recording(resumed, kept, offset=100)
    for _ in range(4):
        optimizer.zero_grad()
        cross_entropy(second, inputs, targets).backward()
        optimizer.step()
    ((step, row),) = kept.rows
    assert step == 112
    assert row["ntkscope/kernel_drift"] == pytest.approx(whole.rows[-1][1]["ntkscope/kernel_drift"], rel=1e-6)


def test_an_unknown_edge_of_stability_and_the_trace_form():
    kept = Kept()
    model, inputs, targets = problem()
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss="cross_entropy", schedule=1, outputs="trace")
    log_recording(recorder, kept)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    recorder.attach(optimizer, precond=lambda opt, p: 1 / (opt.state[p]["sum"].sqrt() + 1e-10))
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model, inputs, targets).backward()
        optimizer.step()
    assert all("ntkscope/stability" not in row for _, row in kept.rows)
    traced = Kept()
    run(traced, outputs="trace", steps=4)
    assert traced.rows[-1][1]["ntkscope/stability"] > 0


def test_main_numbers():
    recorder = run()
    analysis = ntkscope.analyze(recorder, window=(0, NUM_STEPS))
    kept = Kept()
    log_analysis(analysis, kept, offset=5)
    ((step, row),) = kept.rows
    assert step == NUM_STEPS + 5
    assert row["ntkscope/analysis/energy_error"] == analysis.closure.energy_error
    assert row["ntkscope/analysis/trustworthy"] == float(analysis.closure.trustworthy)
    assert row["ntkscope/analysis/signal_rank"] == analysis.channels.signal_rank
    assert "ntkscope/analysis/label_noise_auroc" not in row  # no noise was planted
    assert math.isnan(main_numbers(analysis)["ntkscope/analysis/label_noise_auroc"])


@pytest.fixture(scope="module")
def expected():
    """What a logger in memory keeps of the run, and of its analysis."""
    kept = Kept()
    recorder = run(kept)
    analysis = ntkscope.analyze(recorder, window=(0, NUM_STEPS))
    log_analysis(analysis, kept)
    return analysis, kept.rows


def curves(rows):
    """Values by name and step, of what does not depend on the clock."""
    found = {}
    for step, row in rows:
        for name, value in row.items():
            if name.rpartition("/")[2] not in ("snapshot_seconds", "recording_share"):
                found.setdefault(name, {})[step] = value
    return found


def test_tensorboard(tmp_path, expected):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    analysis, rows = expected
    with SummaryWriter(tmp_path) as writer:
        run(TensorBoardLogger(writer))
        log_analysis(analysis, TensorBoardLogger(writer))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    wanted = curves(rows)
    assert set(wanted) <= set(events.Tags()["scalars"])
    for name, values in wanted.items():
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(values, rel=1e-6)


def wandb_records(content):
    """Read W&B's offline file: LevelDB's log format after seven bytes, records cut into pieces at blocks of 32 KiB."""
    assert content.startswith(b":W&B")
    at, whole = 7, b""
    while at < len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def test_wandb(tmp_path, expected, monkeypatch):
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_SILENT", "true")
    analysis, rows = expected
    live = wandb.init(mode="offline", project="ntkscope", dir=str(tmp_path), settings=wandb.Settings(console="off"))
    logger = WandbLogger(live)
    live.log({"train/loss": 1.0})  # W&B's own step goes on
    run(logger)
    live.log({"train/loss": 0.5})
    log_analysis(analysis, logger)
    live.finish()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    history, metrics = [], {}
    for data in wandb_records(path.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        if record.WhichOneof("record_type") == "metric":
            metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    ours = [row for row in history if "ntkscope/step" in row]
    found = curves([
        (row["ntkscope/step"], {k: v for k, v in row.items() if k.startswith("ntkscope/") and k != "ntkscope/step"}) for row in ours
    ])
    wanted = curves(rows)
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values)
    assert metrics["ntkscope/*"] == "ntkscope/step"
    assert [row["train/loss"] for row in history if "train/loss" in row] == [1.0, 0.5]


def test_mlflow(tmp_path, expected, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    analysis, rows = expected
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "store").as_uri())
    identity = client.create_run(client.create_experiment("ntkscope")).info.run_id
    logger = MLflowLogger(client, identity)
    run(logger)
    log_analysis(analysis, logger)
    for name, values in curves(rows).items():
        assert {point.step: point.value for point in client.get_metric_history(identity, name)} == pytest.approx(values)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
