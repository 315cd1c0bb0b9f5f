"""`ntkscope check`: coverage, probe and price of a user's model, and one message where nothing can be done."""

import pytest
import torch
from ntkscope_cli.app import app
from ntkscope_cli.check import seconds
from torch import nn
from typer.testing import CliRunner

from ntkscope._checks import format_bytes

USER_FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.read = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 3)
        self.table = nn.Parameter(torch.ones(36, 36))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x):
        hidden = torch.einsum("ncp,pq->ncq", torch.tanh(self.conv(x)).flatten(2), self.table)
        return self.read(hidden.flatten(1))

def make():
    return Net()

def frozen():
    return Net().requires_grad_(False)

def coupled():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3, track_running_stats=False))

class Raising(Net):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error

def raising():
    return Raising(KeyError("logits"))

def leaving():
    return Raising(SystemExit(7))

def exiting():
    raise SystemExit(0)

def narrow():
    return torch.randn(20, 1, 2, 2), torch.zeros(20)

def uneven():
    return data()[0], torch.zeros(3)

def data():
    return torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(20, dtype=torch.long)
"""


@pytest.fixture
def user(tmp_path):
    path = tmp_path / "user.py"
    path.write_text(USER_FILE, encoding="utf-8")
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["check", *map(str, arguments)], env={"COLUMNS": "140"})


def test_check_prints_coverage_probe_and_price(user):
    result = run("--model", f"{user}:make", "--data", f"{user}:data")
    assert result.exit_code == 0, result.output
    assert "conv.weight" in result.stdout
    assert "conv2d" in result.stdout
    assert "torch.func: it is used by torch's `einsum`, for which there is no rule" in result.stdout
    assert "excluded: frozen (requires_grad is False)" in result.stdout
    assert "4 parameters by rules, 1 by autograd, 1 excluded" in result.stdout
    assert "agrees with autograd" in result.stdout
    assert "Price of the full kernel: 60 x 60 (28.1 KiB) from 20 examples and 1,771 parameters" in result.stdout
    assert "Cheaper: " in result.stdout


def test_check_of_other_kinds_and_a_checkpoint(user, tmp_path):
    options = ("--model", f"{user}:make", "--data", f"{user}:data")
    trace = run(*options, "--outputs", "trace", "--weighted", "--max-memory", "1G")
    assert "Price of the trace kernel: 20 x 20" in trace.stdout
    state = {name: torch.full(shape, 0.1) for name, shape in _shapes().items()}
    torch.save({"model": state}, tmp_path / "good.pt")
    assert run(tmp_path / "good.pt", *options).exit_code == 0
    torch.save({"model": {"other": torch.ones(2)}}, tmp_path / "bad.pt")
    result = run(tmp_path / "bad.pt", *options)
    assert result.exit_code == 2
    assert "do not fit the model" in result.output


def _shapes():
    model = nn.ModuleDict({"conv": nn.Conv2d(1, 4, 3), "read": nn.Linear(144, 3)})
    return {name: value.shape for name, value in model.state_dict().items()} | {"table": (36, 36), "frozen": (2,)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "USER:frozen", "--data", "USER:data"), "no parameter with requires_grad"),
        (("--model", "USER:coupled", "--data", "USER:data"), "BatchNorm without running statistics"),
        (("--model", "USER:make", "--data", "USER:data", "--outputs", "logits"), "`outputs` must be"),
        (("--model", "USER:make", "--data", "USER:data", "--outputs", "class=7"), "asks for class 7"),
        (("--model", "USER:make", "--data", "USER:data", "--max-memory", "1K"), "more than half of max_memory"),
        (("--model", "USER:nothing", "--data", "USER:data"), "has no 'nothing'"),
        (("--model", "USER:make", "--data", "USER:data", "--outputs", "loss"), "the loss kernel needs a loss"),
        (("--model", "USER:raising", "--data", "USER:data"), "failed on the first examples of the batch: KeyError"),
        (("--model", "USER:leaving", "--data", "USER:data"), "failed on the first examples of the batch: SystemExit"),
        (("--model", "USER:exiting", "--data", "USER:data"), "failed when called"),
        (("--model", "USER:make", "--data", "USER:narrow"), "failed on the first examples of the batch: RuntimeError"),
        (("--model", "USER:make", "--data", "USER:uneven"), "20 inputs, but 3 targets"),
        (("missing.pt", "--model", "USER:make", "--data", "USER:data"), "No such file: missing.pt"),
    ],
)
def test_nothing_usable_is_exit_code_2(user, options, message):
    result = run(*(option.replace("USER", str(user)) for option in options))
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_units():
    assert [format_bytes(num) for num in (12, 2048, 3 * 2**20, 2**31)] == ["12 B", "2 KiB", "3 MiB", "2 GiB"]
    assert [seconds(0.5), seconds(90), seconds(600), seconds(7200 * 2)] == ["0.5 s", "90 s", "10 min", "4 h"]
