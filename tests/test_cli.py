"""The command line: what it prints, what it writes, its exit codes."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from ntkscope_cli.app import app
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import ntkscope

RUNNER = CliRunner()


def run(*arguments):
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One small demo run, shared."""
    out = tmp_path_factory.mktemp("demo") / "out"
    result = run("demo", "--out", out, "--examples", 24, "--steps", 60)
    assert result.exit_code == 0, result.output
    return out, result


def test_demo_says_what_was_found_and_where(demo):
    out, result = demo
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "summary.json", "results.safetensors", "report.html"}
    assert str(out / "report.html") in result.stdout
    assert "AUROC" in result.stdout
    assert "Traceback" not in result.output


def test_summary_has_the_documented_fields(demo):
    summary = json.loads((demo[0] / "summary.json").read_text())
    expected = {
        *("schema", "source", "num_examples", "num_classes", "num_outputs", "num_params", "num_snapshots", "window", "loss"),
        *("energy_balance", "gradient_closure", "gradient_closure_initial", "trustworthy", "kernel_drift", "stability", "cutoff"),
        *("signal_rank", "effective_rank", "cutoffs", "regime", "gate", "gate_reason", "examples", "warnings"),
    }
    assert expected <= set(summary)
    assert set(summary["loss"]) == {"start", "end"}
    assert set(summary["energy_balance"]) == {"predicted", "observed", "relative_error"}
    assert set(summary["kernel_drift"]) >= {"max", "final"}
    assert {"id", "reservoir_energy"} <= set(summary["examples"][0])
    assert len(summary["examples"]) == 24


def test_analyze_gives_the_same_result_again(demo, tmp_path):
    result = run("analyze", demo[0] / "checkpoint.pt", "--out", tmp_path / "again", "--json")
    assert result.exit_code == 0
    again, first = json.loads(result.stdout), json.loads((demo[0] / "summary.json").read_text())
    assert again == first
    arrays, expected = (load_file(folder / "results.safetensors") for folder in (tmp_path / "again", demo[0]))
    assert all(torch.equal(arrays[name].nan_to_num(), expected[name].nan_to_num()) for name in expected)
    assert (tmp_path / "again" / "report.html").exists()


def test_standard_errors_and_rescaled_time_on_request(demo, tmp_path):
    common = ("analyze", demo[0] / "checkpoint.pt", "--out", tmp_path / "out", "--no-report", "--json")
    plain = json.loads((demo[0] / "summary.json").read_text())
    assert plain["uncertainty"] is None
    found = json.loads(run(*common, "--jackknife", "4").stdout)
    assert found["uncertainty"]["num_groups"] == 4
    assert found["uncertainty"]["effective_rank"] > 0
    rescaled = json.loads(run(*common, "--rescale-time").stdout)
    assert rescaled["gradient_agreement"]["factor"] == pytest.approx(1.0, abs=1e-3)  # full batches of the loss itself
    assert rescaled["signal_rank"] == plain["signal_rank"]
    refused = run(*common, "--jackknife", "2")
    assert refused.exit_code == 2
    assert "`jackknife` must lie between 3 and half the examples (12), got 2" in " ".join(refused.stderr.split())


def test_options_of_analyze(demo, tmp_path):
    common = ("analyze", demo[0] / "checkpoint.pt", "--out", tmp_path / "out", "--no-report")
    result = run(*common, "--cutoff", "rank:7", "--window", "1:40", "--quiet")
    assert (result.exit_code, result.stdout) == (0, "")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["signal_rank"] == 7
    assert summary["window"]["start_step"] == 1
    assert not (tmp_path / "out" / "report.html").exists()


def test_inspect_names_what_is_inside(demo, tmp_path):
    result = run("inspect", demo[0] / "checkpoint.pt")
    assert result.exit_code == 0
    assert "model.0.weight" in result.stdout
    assert "snapshots" in result.stdout
    torch.save({"w": torch.ones(2)}, tmp_path / "bare.pt")
    assert "No recorder's state" in run("inspect", tmp_path / "bare.pt").stdout


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "gated"])
@pytest.mark.parametrize("loss", ["squared", "mse", "cross_entropy"])
def test_every_demo_runs(optimizer, loss, tmp_path):
    result = run("demo", "--out", tmp_path / "out", "--examples", 20, "--steps", 25, "--optimizer", optimizer, "--loss", loss, "--seed", 1)
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["trustworthy"] or summary["causes"]
    assert (summary["gate"] is None) == (optimizer == "sgd")


def test_an_audit_from_the_shell_says_its_price_first(tmp_path):
    out = tmp_path / "out"
    assert run("demo", "--out", out, "--examples", 20, "--steps", 25, "--optimizer", "adamw").exit_code == 0
    spec = tmp_path / "net.py"
    spec.write_text("from ntkscope.experiments.demo import make_model\n\ndef make():\n    return make_model(0)\n")
    common = ("analyze", out / "checkpoint.pt", "--out", tmp_path / "found", "--model", f"{spec}:make")
    result = run(*common, "--gate", "hard", "--alpha", "1")
    assert result.exit_code == 0, result.output
    assert "Auditing the gate: " in result.stderr
    assert " permutations, about " in result.stderr
    audit = json.loads((tmp_path / "found" / "summary.json").read_text())["gate"]["audit"]
    assert (audit["gate"], audit["alpha"]) == ("hard", 1.0)
    assert run(*common, "--no-audit", "--quiet").stderr == ""


def test_no_noise_no_score(tmp_path):
    assert run("demo", "--out", tmp_path / "out", "--examples", 20, "--steps", 20, "--label-noise", 0).exit_code == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["auroc"] is None


# --- bare checkpoints ---------------------------------------------------------------------------------------------------------

MODEL_FILE = """
import torch
from torch import nn

class Coupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
    def forward(self, x):
        u = self.fc(x)
        return u - u.mean(0)

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
    def forward(self, x):
        return self.fc(x), None

def make(): return nn.Linear(3, 2)
def coupled(): return Coupled()
def pair(): return Pair()
def no_model(): return 3
def broken(): raise RuntimeError("boom")
def data(): return torch.arange(12.0).reshape(4, 3).sin(), torch.tensor([0, 1, 1, 0])
def norm(): return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False))
def empty(): return torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
def single(): return torch.zeros(1, 3), torch.zeros(1, dtype=torch.long)
def mismatched(): return torch.zeros(4, 3), torch.zeros(5, dtype=torch.long)
def no_pair(): return torch.zeros(4, 3)
value = 3
def klass(): return nn.Linear
def needs(x): return nn.Linear(3, 2)
def bare_parameters(): return nn.Flatten()
def wide(): return torch.zeros(4, 5), torch.tensor([0, 1, 1, 0])
def words(): return torch.zeros(4, 3), ["a", "b", "b", "a"]
def arrays(): return data()[0].numpy(), data()[1]
def nan(): return torch.full((4, 3), torch.nan), torch.tensor([0, 1, 1, 0])
"""


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """Bare checkpoints of a short run of logistic regression, and a module with specs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "specs.py").write_text(MODEL_FILE)
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, targets = torch.arange(12.0).reshape(4, 3).sin(), torch.tensor([0, 1, 1, 0])
    for step in range(21):
        if step % 5 == 0:
            torch.save({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, f"step{step:02d}.pt")
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    torch.save(model.state_dict(), "weights.pt")
    return tmp_path


SPECS = ("--model", "specs.py:make", "--data", "specs.py:data", "--loss", "cross_entropy")


def test_bare_checkpoints_become_a_trajectory(bare):
    files = [f"step{step:02d}.pt" for step in (10, 0, 20, 5, 15)]  # any order
    result = run("analyze", *files, *SPECS, "--out", "out", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["num_snapshots"] == 5
    assert summary["trustworthy"]
    assert summary["energy_balance"]["relative_error"] < 0.05
    timed = run("analyze", *sorted(files), *SPECS, "--times", "0,0.5,1,1.5,2", "--out", "timed", "--json")
    assert json.loads(timed.stdout)["energy_balance"] == summary["energy_balance"]


class Bomb:
    """A pickle that would run code."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def torn(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bad_files(folder):
    """Make one file of every refused kind."""
    (folder / "notes.txt").write_text("not a checkpoint")
    (folder / "empty.pt").write_bytes(b"")
    (folder / "folder").mkdir()
    torch.save(nn.Linear(2, 2), folder / "module.pt")
    torch.save({"model": {}, "bomb": Bomb()}, folder / "bomb.pt")
    torch.save(nn.Linear(3, 2).state_dict() | {"weight": torch.full((2, 3), torch.nan)}, folder / "nan.pt")
    torch.save(nn.Linear(4, 2).state_dict(), folder / "other.pt")
    torch.save({"schema": "ntkscope.trace/9"}, folder / "newer.pt")
    torch.save([1, 2], folder / "list.pt")
    (folder / "broken.py").write_text("def make(:")
    (folder / "bad.npz").write_text("no archive")
    torch.save(torch.zeros(1000), folder / "torn.pt")
    torn(folder / "torn.pt")
    (folder / "torn.safetensors").write_bytes(b"\xff" * 30)


BARE = ("step00.pt", "step20.pt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nope.pt",), "No such file: nope.pt"),
        (("folder",), "folder is a folder without manifest.json"),
        (("notes.txt",), "notes.txt is no checkpoint"),
        (("empty.pt",), "empty.pt is empty"),
        (("torn.pt",), "torn.pt is truncated or no checkpoint"),
        (("torn.safetensors",), "torn.safetensors is truncated or no safetensors"),
        (("weights.pt",), "holds no recorder's state"),
        (("list.pt",), "holds no recorder's state"),
        (("module.pt",), "asks for torch.nn.modules.linear.Linear"),
        (("bomb.pt",), "asks for posix.system"),
        (("newer.pt",), "has schema 'ntkscope.trace/9'"),
        (("step00.pt", "step20.pt"), "Got 2 paths"),
        ((*BARE, "--model", "specs.py:make"), "need all of `model`, `data` and `loss`"),
        (("step00.pt", *SPECS), "a point, not a trajectory"),
        (("step00.pt", "nan.pt", *SPECS, "--times", "0,1"), "Parameter `weight` must be finite"),
        (("step00.pt", "other.pt", *SPECS, "--times", "0,1"), "do not fit the model: of another shape weight"),
        (("step00.pt", "weights.pt", *SPECS), "does not say its step and learning rate"),
        ((*BARE, *SPECS, "--times", "0"), "one time per checkpoint"),
        ((*BARE, *SPECS, "--times", "1,1"), "no time between"),
        ((*BARE, "--model", "specs.py:nope", *SPECS[2:]), "has no 'nope'. Name a function that it defines."),
        ((*BARE, "--model", "specs.py:mke", *SPECS[2:]), "has no 'mke'. Name a function that it defines. Did you mean 'make'?"),
        ((*BARE, "--model", "spcs.py:make", *SPECS[2:]), "No such file: spcs.py. Give the path of a Python file. Did you mean 'specs.py'?"),
        ((*BARE, "--model", "specs.py:value", *SPECS[2:]), "something of type int. Name a function to be called without arguments."),
        ((*BARE, "--model", "specs.py:klass", *SPECS[2:]), "got type. Return the model itself, not its class or state."),
        ((*BARE, "--model", "specs.py:needs", *SPECS[2:]), "failed when called without arguments: TypeError"),
        ((*BARE, "--model", "broken.py:make", *SPECS[2:]), "could not be imported: SyntaxError"),
        ((*BARE, "--model", "no_such_package.x:make", *SPECS[2:]), "could not be imported: ModuleNotFoundError"),
        ((*BARE, "--model", "specs.py:bare_parameters", *SPECS[2:]), "The model has no parameters"),
        ((*BARE, *SPECS[:2], "--data", "specs.py:wide", *SPECS[4:]), "The model failed on the probe: RuntimeError"),
        ((*BARE, *SPECS, "--query", "specs.py:wide"), "The model failed on the query set: RuntimeError"),
        ((*BARE, *SPECS[:2], "--data", "specs.py:words", *SPECS[4:]), "are no numbers"),
        ((*BARE, *SPECS[:2], "--data", "specs.py:arrays", *SPECS[4:]), "Convert the inputs with torch.as_tensor"),
        ((*BARE, *SPECS[:2], "--data", "specs.py:nan", *SPECS[4:]), "outputs on the probe are not finite"),
        ((*BARE, *SPECS[:2], "--data", "gone.npz", *SPECS[4:]), "No such file: gone.npz"),
        ((*BARE, *SPECS[:2], "--data", "bad.npz", *SPECS[4:]), "Write it with numpy.savez"),
        ((*BARE, *SPECS, "--times", "0,x"), "is no list of times"),
        ((*BARE, "--model", "gone.py:make", *SPECS[2:]), "No such file: gone.py"),
        ((*BARE, "--model", "specs", *SPECS[2:]), "must be `file.py:function` or `package.module:function`, for example net.py:make"),
        ((*BARE, "--model", "specs.py:no_model", *SPECS[2:]), "must return a torch.nn.Module, got int"),
        ((*BARE, "--model", "specs.py:broken", *SPECS[2:]), "boom"),
        ((*BARE, "--model", "specs.py:make", "--data", "specs.py:empty", "--loss", "cross_entropy"), "n = 0"),
        ((*BARE, "--model", "specs.py:make", "--data", "specs.py:single", "--loss", "cross_entropy"), "n = 1"),
        ((*BARE, "--model", "specs.py:make", "--data", "specs.py:mismatched", "--loss", "cross_entropy"), "4 inputs, but 5 targets"),
        ((*BARE, "--model", "specs.py:make", "--data", "specs.py:no_pair", "--loss", "cross_entropy"), "must give a pair"),
        ((*BARE, *SPECS[:4], "--loss", "hinge"), "'hinge' is none of squared, mse, cross_entropy"),
        ((*BARE, "--model", "specs.py:pair", *SPECS[2:]), "must return a tensor"),
        ((*BARE, *SPECS, "--max-memory", "100"), "more than"),
        (("trace.pt", "--cutoff", "third"), "Unknown cutoff rule 'third'"),
        (("trace.pt", "--window", "0:1000"), "outside the trace"),
        (("trace.pt", "--window", "5:5"), "outside the trace, or empty"),
        (("trace.pt", "--cutoff", "fixed:x"), "needs a number after the colon, got 'x'"),
        (("trace.pt", "--cutoff", "energy:2"), "needs a number in [0, 1]"),
        (("trace.pt", "--gate", "hrad"), "'hrad' is none of soft, hard, snr. Did you mean hard?"),
        (("trace.pt", "--alpha", "big"), "'big' is no multiple. Give a number, or unbiased."),
        (("trace.pt", "--alpha", "-1"), "`alpha` must lie in"),
        (("trace.pt", "--jackknife", "x"), "valid integer"),
        (("trace.pt", "--windw", "1:2"), "--window"),
        ((), "Missing argument 'PATH'"),
        (("trace.pt", "--window", "5"), "is no window"),
        (("trace.pt", "--loss", "cross_entrpy"), "Did you mean cross_entropy?"),
        (("trace.pt", "--device", "quantum"), "Device 'quantum' cannot be used here"),
        (("trace.pt", "--max-memory", "1K"), "GiB allowed"),
        (("trace.pt", "--max-memory", "lots"), "is no size"),
        (("nan_trace.pt",), "`kernel_upper` of the snapshot at step 1 must be finite"),
        (("short_trace.pt",), "holds 1 snapshot(s)"),
    ],
)
def test_bad_input_gets_one_message_and_writes_nothing(arguments, message, bare, demo):
    bad_files(bare)
    checkpoint = torch.load(demo[0] / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint, "trace.pt")
    snapshots = checkpoint["ntkscope"]["snapshots"]
    snapshots[1]["tensors"]["kernel_upper"][0] = torch.nan
    torch.save(checkpoint, "nan_trace.pt")
    checkpoint["ntkscope"]["snapshots"] = snapshots[:1]
    torch.save(checkpoint, "short_trace.pt")
    result = run("analyze", *arguments, "--out", "out")
    assert message in " ".join(result.stderr.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(re.findall(r"^error: ", result.stderr, flags=re.IGNORECASE | re.MULTILINE)) == 1
    assert "Traceback" not in result.output
    assert not (bare / "out").exists()
    assert not (bare / "exploded").exists()


@pytest.mark.parametrize("name", ["coupled", "norm"])
def test_bad_rows_that_depend_on_one_another(name, bare):
    import importlib.util

    specification = importlib.util.spec_from_file_location("specs_of_this_test", bare / "specs.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    for step in (0, 1):
        torch.save(getattr(module, name)().state_dict(), f"{name}{step}.pt")
    result = run("analyze", f"{name}0.pt", f"{name}1.pt", "--model", f"specs.py:{name}", *SPECS[2:], "--times", "0,1")
    assert result.exit_code == 2
    assert "their own input row only" in result.output
    assert name != "norm" or "BatchNorm without running statistics: 1" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--examples", 1), "`examples` must lie in [2, 1747], got 1"),
        (("--examples", 5000), "`examples` must lie in"),
        (("--label-noise", 1.5), "`label_noise` must lie in [0, 1]"),
        (("--optimizer", "lbfgs"), "'lbfgs' is none of sgd, adamw, gated"),
        (("--loss", "hinge"), "'hinge' is none of squared"),
        (("--steps", 0), "`steps` must be at least 1"),
    ],
)
def test_bad_demo(arguments, message, tmp_path):
    result = run("demo", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_bad_place_to_write(demo, tmp_path):
    (tmp_path / "taken").write_text("a file")
    result = run("analyze", demo[0] / "checkpoint.pt", "--out", tmp_path / "taken", "--no-report")
    assert result.exit_code == 2
    assert "is a file, and a folder is written. Give another name." in result.output
    assert (tmp_path / "taken").read_text() == "a file"


def test_our_own_bug_is_exit_1_and_keeps_its_traceback(demo, monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(ntkscope, "analyze", broken)
    result = run("analyze", demo[0] / "checkpoint.pt", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "This is a bug in ntkscope" in result.output


def test_a_failure_while_writing_leaves_what_was_there(demo, tmp_path, monkeypatch):
    analysis = ntkscope.analyze(demo[0] / "checkpoint.pt")
    analysis.save(tmp_path / "out", report=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("ntkscope.results.write_report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        analysis.save(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_is_130_and_leaves_nothing(tmp_path):
    command = [
        sys.executable,
        "-c",
        "from ntkscope_cli import main; main()",
        "demo",
        "--steps",
        "100000000",
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(8)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_command_is_installed_and_no_module_is_called_cli():
    code = "import importlib.util as u; print(u.find_spec('cli'), u.find_spec('ntkscope_cli') is not None)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert result.stdout.split() == ["None", "True"]


def test_json_goes_to_stdout_alone(demo, tmp_path):
    arguments = ["analyze", str(demo[0] / "checkpoint.pt"), "--out", str(tmp_path / "out"), "--json", "--no-report"]
    command = [sys.executable, "-c", "from ntkscope_cli import main; main()", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["schema"] == "ntkscope.summary/2"
    assert result.stderr == ""
