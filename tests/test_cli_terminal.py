"""The command line as a stranger meets it: terminals, pipes, encodings, interrupts, help, shell completion, messages."""

import errno
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ntkscope_cli import options, terminal
from ntkscope_cli.app import app, main
from ntkscope_cli.progress import _clock, _time_words
from torch import nn
from typer.testing import CliRunner

import ntkscope
from ntkscope._checks import closest
from ntkscope._losses import NAMED_LOSSES
from ntkscope._types import GateKind
from ntkscope.experiments.demo import OPTIMIZERS
from ntkscope.record.forwards import TASKS
from ntkscope.results import Analysis
from ntkscope.spectrum.cutoffs import parse_rule

# A shell may start background jobs with SIGINT ignored, and children inherit that.
MAIN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from ntkscope_cli import main; main()"
COMMANDS = ("demo", "analyze", "check", "inspect")
PLAIN = {"NO_COLOR": None, "FORCE_COLOR": None, "TERM": "xterm", "COLUMNS": None}  # None: unset
SPEC_FILE = """
import warnings
import torch
from torch import nn

print("imported")

def make():
    print("making the model")
    warnings.warn("a warning of the user's code")
    return nn.Linear(3, 2)

def data():
    print("reading data")
    return torch.arange(12.0).reshape(4, 3).sin(), torch.tensor([0, 1, 1, 0])
"""


def environment(changes):
    merged = {**os.environ, "OMP_NUM_THREADS": "1", **PLAIN, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def command(*arguments):
    return [sys.executable, "-c", MAIN, *map(str, arguments)]


def piped(*arguments, **changes):
    """Run with stdout and stderr in pipes."""
    result = subprocess.run(command(*arguments), capture_output=True, env=environment(changes), check=False, timeout=300)
    return SimpleNamespace(code=result.returncode, stdout=result.stdout, stderr=result.stderr.decode(errors="replace"))


def in_terminal(*arguments, interrupt_at=None, **changes):
    """Run in a pseudo-terminal of 60 columns; press Ctrl-C when some text appears."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command(*arguments), stdin=follower, stdout=follower, stderr=follower, env=environment({"COLUMNS": "60", **changes})
    )
    os.close(follower)
    shown, is_sent, end = b"", False, time.monotonic() + 300
    while time.monotonic() < end:
        if select.select([leader], [], [], 0.1)[0]:
            try:
                part = os.read(leader, 65536)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            shown += part
        if interrupt_at is not None and not is_sent and interrupt_at.encode() in shown:
            process.send_signal(signal.SIGINT)
            is_sent = True
    os.close(leader)
    return SimpleNamespace(code=process.wait(timeout=60), shown=shown.decode(errors="replace"), is_interrupted=is_sent)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A checkpoint of a small recorded run."""
    out = tmp_path_factory.mktemp("recorded") / "out"
    assert CliRunner().invoke(app, ["demo", "--out", str(out), "--examples", "20", "--steps", "30"]).exit_code == 0
    return out / "checkpoint.pt"


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """Two bare checkpoints, and a module whose functions print and warn."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "specs.py").write_text(SPEC_FILE)
    torch.manual_seed(0)
    for step in (0, 1):
        torch.save(nn.Linear(3, 2).state_dict(), f"step{step}.pt")
    return ("step0.pt", "step1.pt", "--times", "0,1", "--model", "specs.py:make", "--data", "specs.py:data", "--loss", "cross_entropy")


# --- terminals ----------------------------------------------------------------------------------------------------------------


def test_a_terminal_shows_every_stage_with_its_time(recorded, tmp_path):
    result = in_terminal("analyze", recorded, "--out", tmp_path / "out", "--jackknife", 4, "--no-report")
    assert result.code == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", result.shown)
    for stage in ("loading PyTorch", "analyzing", "leaving out examples", "drawing conclusions", "writing the results"):
        assert re.search(rf"[-\\|/] {re.escape(stage)}", plain), stage
    assert re.search(r"\d+/\d+", plain)
    assert re.search(r"\d:\d\d so far", plain)
    assert "\x1b[?25h" in result.shown, "the cursor is shown again"
    assert plain.index("Training learned") > plain.index("writing the results")


@pytest.mark.parametrize("changes", [{"NO_COLOR": "1"}, {"TERM": "dumb", "PYTHONIOENCODING": "ascii"}], ids=str)
def test_without_colors_a_terminal_gets_no_escape_codes(changes, recorded, tmp_path):
    result = in_terminal("analyze", recorded, "--out", tmp_path / "out", "--no-report", **changes)
    assert result.code == 0
    assert "\x1b" not in result.shown
    assert "analyzing ..." in result.shown
    assert "Training learned" in result.shown
    assert "\x1b" not in in_terminal("analyze", "--help", **changes).shown
    assert "\x1b" not in in_terminal("inspect", recorded, **changes).shown


def test_times_are_written_as_a_clock_does():
    assert [_clock(seconds) for seconds in (0.4, 75, 3725)] == ["0:00", "1:15", "1:02:05"]
    assert _time_words(SimpleNamespace(total=None, elapsed=12.0)) == "0:12 so far"
    assert _time_words(SimpleNamespace(total=9, time_remaining=None)) == ""
    assert _time_words(SimpleNamespace(total=9, time_remaining=61.0)) == "1:01 left"


@pytest.mark.parametrize(("stage", "files"), [("training", []), ("analyzing", ["checkpoint.pt"])])
def test_ctrl_c_in_a_terminal_leaves_nothing_half_written(stage, files, tmp_path):
    steps = 10**7 if stage == "training" else 200
    result = in_terminal("demo", "--out", tmp_path / "out", "--examples", 60, "--steps", steps, interrupt_at=f" {stage}")
    assert result.is_interrupted
    assert result.code == 130
    assert result.shown.count("interrupted; nothing half-written was left behind") == 1
    assert "Traceback" not in result.shown
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == files


# --- pipes and encodings ------------------------------------------------------------------------------------------------------


def test_a_pipe_gets_rows_on_one_line_and_no_progress(recorded):
    result = piped("inspect", recorded)
    assert (result.code, result.stderr) == (0, "")
    lines = result.stdout.decode().splitlines()
    assert any(re.fullmatch(r"model\.0\.weight +tensor \(48, 64\) float32.*", line.rstrip()) for line in lines)
    assert any(re.fullmatch(r"snapshots +\d+, steps 0 to 30", line.rstrip()) for line in lines)
    assert not [line for line in lines if line.startswith(" ")]


@pytest.mark.parametrize("arguments", [("inspect",), ("analyze", "--no-report"), ("analyze", "--no-report", "--json")], ids=str)
def test_a_reader_that_goes_away_is_no_bug(arguments, recorded, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    name, *options = arguments
    out = ["--out", tmp_path / "out"] if name == "analyze" else []
    process = subprocess.run(
        command(name, recorded, *options, *out), stdout=writing, stderr=subprocess.PIPE, env=environment({}), check=False, timeout=300
    )
    os.close(writing)
    assert process.returncode == 141
    assert process.stderr == b""
    assert not out or (tmp_path / "out" / "summary.json").exists(), "the work was done"


HOSTILE_KEY = "läufe/Ω \x1b[31mred [bold]b[/] :smile: 例"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_any_encoding_can_take_what_is_printed(encoding, tmp_path):
    folder = tmp_path / "Ergebnis-ü"
    folder.mkdir()
    torch.save({HOSTILE_KEY: torch.ones(2)}, folder / "odd.pt")
    result = piped("inspect", folder / "odd.pt", PYTHONIOENCODING=encoding)
    assert result.code == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert b"\x1b" not in result.stdout
    shown = result.stdout.decode(encoding)
    assert "[31mred [bold]b[/] :smile:" in shown
    assert ("läufe/Ω" in shown) == (encoding in ("utf-8", "cp437"))
    missing = piped("inspect", folder / os.fsdecode(b"\xff.pt"), PYTHONIOENCODING=encoding)  # no valid UTF-8
    assert missing.code == 2
    assert "No such file" in missing.stderr


def test_the_c_locale_is_enough(recorded, tmp_path):
    result = piped(
        "analyze", recorded, "--out", tmp_path / "ü", "--no-report", LANG="C", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"
    )
    assert result.code == 0, result.stderr
    assert b"omega > 1/2" in result.stdout


def test_json_is_alone_on_stdout_whatever_the_users_code_prints(bare, tmp_path):
    result = piped("analyze", *bare, "--out", "out", "--json", "--no-report")
    assert result.code == 0, result.stderr
    assert json.loads(result.stdout, parse_constant=pytest.fail)["num_snapshots"] == 2
    for line in ("imported", "making the model", "reading data", "a warning of the user's code"):
        assert line in result.stderr


def test_json_of_a_failure_is_nothing(bare):
    for arguments in (("nope.pt",), ("step0.pt", "--window", "x"), (*bare[:-1], "cross_entropy", "--cutoff", "third")):
        result = piped("analyze", *arguments, "--json")
        assert (result.code, result.stdout) == (2, b"")
        assert result.stderr.lower().count("error: ") == 1


# --- help and completion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_fits_and_has_examples(name, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "argv", ["ntkscope", *([name] if name else []), "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    text, _, examples = capsys.readouterr().out.partition("Examples:")
    assert max(map(len, text.splitlines())) <= min(width, 100)
    assert max(map(len, examples.splitlines()), default=0) <= 60
    assert (f"ntkscope {name} " in examples or examples.strip() == f"ntkscope {name}") == (name is not None)
    assert not re.search(r"<\w+>|\w\.\.\.$", text, flags=re.MULTILINE) or width < 60, "no bare types, no cut sentences"


def test_no_arguments_show_help_and_the_version_is_known(tmp_path):
    assert "Commands:" in CliRunner().invoke(app, []).output
    assert re.fullmatch(r"ntkscope \d+\.\d+\.\d+\n", CliRunner().invoke(app, ["--version"]).output)


QUICK = [
    ({}, ["--help"]),
    ({}, ["analyze", "--help"]),
    ({}, ["--version"]),
    ({}, ["analyze", "trace.pt", "--window", "x"]),
    ({"_NTKSCOPE_COMPLETE": "complete_bash", "COMP_WORDS": "ntkscope analyze --cutoff ", "COMP_CWORD": "3"}, []),
    ({"_NTKSCOPE_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "ntkscope analyze --"}, []),
]


@pytest.mark.parametrize(("changes", "arguments"), QUICK, ids=str)
def test_help_and_completion_do_not_wait_for_torch(changes, arguments):
    code = (
        "import atexit, sys; sys.argv[0] = 'ntkscope'; "
        "atexit.register(lambda: print('HEAVY', sorted({'torch', 'numpy', 'ntkscope', 'plotly'} & set(sys.modules)), file=sys.stderr)); "
        "from ntkscope_cli import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment(changes), check=False, timeout=60
    )
    assert "HEAVY []" in result.stderr
    assert result.stdout or result.stderr.count("\n") > 1


def completed(shell, line):
    """Ask as the shell would for the words that may follow."""
    words = line.split(" ")
    changes = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    return CliRunner().invoke(app, [], prog_name="ntkscope", env={"_NTKSCOPE_COMPLETE": f"complete_{shell}", **changes}).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ntkscope ", COMMANDS),
        ("ntkscope analyze --cut", ["--cutoff"]),
        ("ntkscope analyze --cutoff ", ["half", "gap", "risk", "rank:10"]),
        ("ntkscope analyze --cutoff ga", ["gap"]),
        ("ntkscope analyze --loss ", NAMED_LOSSES),
        ("ntkscope analyze --gate h", ["hard"]),
        ("ntkscope analyze --alpha ", ["unbiased"]),
        ("ntkscope analyze --device ", ["auto", "cpu", "cuda"]),
        ("ntkscope demo --optimizer ", OPTIMIZERS),
        ("ntkscope demo --loss m", ["mse"]),
        ("ntkscope check --outputs ", ["full", "trace", "class=0"]),
    ],
)
def test_shells_complete_options_and_their_values(shell, line, words):
    shown = completed(shell, line).replace("\\\\:", ":")
    for word in words:
        assert word in shown
    prefix = line.rpartition(" ")[2]
    if shell == "bash":
        assert all(word.startswith(prefix) for word in shown.split())


def test_shells_complete_paths_themselves():
    for line in ("ntkscope analyze ", "ntkscope analyze --out ", "ntkscope inspect ch", "ntkscope check --model "):
        assert completed("bash", line).strip() == "", "bash falls back to file names (-o default)"
        assert completed("zsh", line).strip() == "_files"


@pytest.mark.parametrize(("shell", "place"), [("bash", ".bash_completions/ntkscope.sh"), ("zsh", ".zfunc/_ntkscope")])
def test_completion_is_shown_and_installed(shell, place, tmp_path):
    code = "import sys; sys.argv[0] = 'ntkscope'; from ntkscope_cli import main; main()"
    changes = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    for option in ("--show-completion", "--install-completion"):
        result = subprocess.run(
            [sys.executable, "-c", code, option, shell], capture_output=True, text=True, env=environment(changes), check=False, timeout=60
        )
        assert result.returncode == 0
        if option == "--show-completion":
            assert f"complete_{shell}" in result.stdout
    assert f"complete_{shell}" in (tmp_path / place).read_text()


def test_choices_are_those_of_the_library():
    assert tuple(NAMED_LOSSES) == options.LOSSES
    assert OPTIMIZERS == options.OPTIMIZERS
    assert set(options.GATES) == set(get_args(GateKind)) - {"open"}
    assert tuple(TASKS) == options.TASKS
    for rule in options.CUTOFFS:
        parse_rule(rule)


# --- tables -------------------------------------------------------------------------------------------------------------------

NAMES = [f"encoder_layers.{k}.attention_output_dense_projection.weight" for k in range(3)]


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120])
def test_no_name_is_cut_at_any_width(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [(name, "1024 x 1024", "torch.func: it is used by torch's `einsum`, for which there is no rule") for name in NAMES]
    terminal.print_rows(terminal.result_console(unfolded=True), ("parameter", "shape", "route"), rows)
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    joined = re.sub(r"\n\s*", "", shown)
    for name in NAMES:
        assert name in joined
    for word in ("1024", "x", "torch.func", "used", "einsum", "which", "there", "is", "no", "rule"):
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", shown), "words stay whole"


@given(st.text(alphabet="abc._/0", min_size=1, max_size=60), st.integers(20, 60))
def test_a_folded_name_keeps_every_letter(name, width):
    lines = terminal.fold_name(name, width)
    assert "".join(line.strip() for line in lines) == name
    longest = max((len(part) for part in re.findall(r"[^._/]*[._/]?", name)), default=0)
    assert all(len(line) <= max(width, longest + 2) for line in lines)


# --- messages -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("/dev/null/x", "/dev/null is a file, and a folder is written. Give another name."),
        ("/proc/x/y", "/proc cannot be written to. Give another place"),
        ("x" * 300, "cannot be a folder: File name too long"),
    ],
)
@pytest.mark.parametrize("name", ["analyze", "demo"])
def test_a_place_that_cannot_be_written_is_said_before_any_work(name, place, message, recorded, monkeypatch):
    def never(*args, **kwargs):
        pytest.fail("work was begun")

    monkeypatch.setattr(ntkscope, "analyze", never)
    monkeypatch.setattr("ntkscope.experiments.demo.train_demo", never)
    result = CliRunner().invoke(app, [name, *([str(recorded)] if name == "analyze" else []), "--out", place])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full. Make room, or give another place with --out."),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "is full. Make room"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/somewhere/x"),
            "cannot use /somewhere/x: Permission denied. Give another place",
        ),
        (MemoryError("cannot allocate 3 TiB"), "out of memory: cannot allocate 3 TiB. Record a smaller probe, or bound the job"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: DefaultCPUAllocator"),
    ],
    ids=str,
)
def test_a_disk_or_memory_that_is_full_is_no_bug(error, message, recorded, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Analysis, "save", fail)
    result = CliRunner().invoke(app, ["analyze", str(recorded), "--out", str(tmp_path / "out"), "--no-report"])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr


def test_what_was_asked_for_and_not_done_is_said(recorded, tmp_path):
    common = ["analyze", str(recorded), "--out", str(tmp_path / "out"), "--no-report"]
    result = CliRunner().invoke(app, [*common, "--gate", "hard", "--times", "1,2"])
    assert result.exit_code == 0
    assert "note: --times not used; the record has its own." in result.stderr
    assert "note: the gate was not audited: SGD has no gate" in result.stderr
    assert CliRunner().invoke(app, common).stderr == ""


def test_a_near_word_is_suggested_and_a_far_one_is_not():
    assert closest("trian.pt", ["train.pt", "other.pt"]) == " Did you mean 'train.pt'?"
    assert closest("nope.py", ["specs.py"]) == ""
    result = CliRunner().invoke(app, ["demo", "--optimizer", "adamww"])
    assert result.exit_code == 2
    assert "'adamww' is none of sgd, adamw, gated. Did you mean adamw?" in result.stderr
