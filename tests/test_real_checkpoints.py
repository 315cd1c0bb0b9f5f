"""Checkpoints that nobody here made: the commands of docs/checkpoints.md as they stand there, on packages that `make real` installs."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ntkscope.record.checkpoint import load_checkpoint
from ntkscope.record.spec import load_callable, load_model
from ntkscope.record.weights import load_weights, unwrap

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent
PACKAGES = ROOT / "build" / "real"
PAGE = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
DIGITS, THAI, BERT, MISLABELED = "A CNN", "A tokenizer", "A BERT", "Does it find wrong labels?"
CASES = (DIGITS, THAI, BERT)
TIMEOUT = 300  # seconds for a command, on a machine that is busy with other tests

WHAT_IT_IS = {
    DIGITS: ("a file of torch.save", "10 tensors with 390,410 numbers, found at the top"),
    THAI: ("a file of torch.save before torch 1.6", "27 tensors with 159,380 numbers, found at the top"),
    BERT: ("a safetensors file", "103 tensors with 22,713,216 numbers, found at the top"),
}
COVERAGE = {DIGITS: "10 parameters by rules", THAI: "18 parameters by rules", BERT: "16 parameters by rules"}
START_BELOW = {DIGITS: 0.5, THAI: 0.2, BERT: math.log(4) + 0.5}  # the first two know their task; BERT is read out at random
ODD_ONES = {  # a model that the weights are not of, and what is said
    DIGITS: (["--model", "examples/thai_words.py:make"], "missing ch_embeddings.weight"),
    THAI: (["--model-arg", "name=attacut-c"], "conv1.conv.weight (file [64, 48, 3], model [196, 48, 3])"),
    BERT: (["--model", "build/real/digit_recognizer/model.py:CNN"], "missing conv_layers.0.weight"),
}


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """The packages on the path, and the root of the repository as the working folder."""
    if not (PACKAGES / "ready").exists():
        pytest.skip(f"the packages with real checkpoints are not installed in {PACKAGES}: run `make real`, which installs them")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(PACKAGES), *sys.path])


def block(case, language):
    """Take a block from the page's section."""
    section = next(part for part in PAGE.split("\n## ") if part.startswith(case))
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    return found


def command(case, name):
    """Take a command, without the program's name."""
    lines = block(case, "sh").replace("\\\n", " ").splitlines()
    return shlex.split(next(line for line in lines if line.startswith(f"ntkscope {name} ")))[1:]


def snippet(case):
    return block(case, "python")


def run(*words):
    environment = os.environ | {"PYTHONPATH": str(PACKAGES), "COLUMNS": "160"}
    script = Path(sys.executable).parent / "ntkscope"
    return subprocess.run([script, *words], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=TIMEOUT, check=False)


def run_well(*words):
    result = run(*words)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "warning" not in result.stderr.lower(), result.stderr
    return result.stdout


def loaded(case):
    """Make the model of a case and give it the stored weights."""
    path, _, spec = command(case, "inspect")[1:]
    model = load_model(spec)
    load_weights(model, unwrap(load_checkpoint(path), path, model=model))
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_inspect_says_what_the_file_is(case):
    said = run_well(*command(case, "inspect"))
    for words in (*WHAT_IT_IS[case], "They fit the model.", "stores neither step nor learning rate"):
        assert words in said


@pytest.mark.parametrize("case", CASES)
def test_every_trained_parameter_is_covered(case):
    said = run_well(*command(case, "check"))
    assert f"Coverage: {COVERAGE[case]}, 0 by autograd" in said
    assert "agrees with autograd in every parameter" in said


@pytest.mark.parametrize("case", CASES)
def test_what_training_would_learn_next(case, tmp_path):
    said = run_well(*command(case, "analyze"), "--out", str(tmp_path))
    assert "This run was made by ntkscope from" in said
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["trustworthy"] is True, summary["causes"]
    assert 0 <= summary["energy_balance"]["relative_error"] < 0.05
    assert 0 <= summary["gradient_closure"] < 0.25
    assert f"an error of {summary['energy_balance']['relative_error']:.1%}".replace("%", " %") in said
    assert 0 < summary["signal_rank"] < summary["num_modes"]
    assert summary["loss"]["end"] < summary["loss"]["start"] < START_BELOW[case]
    assert summary["transfer"]["operators"]["correlation"] > 0.99
    assert (tmp_path / "report.html").stat().st_size > 100_000


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_does_not_fit(case, tmp_path):
    other, message = ODD_ONES[case]
    result = run(*command(case, "analyze"), *other, "--out", str(tmp_path / "out"))
    assert result.returncode == 2
    assert message in result.stderr
    assert "Is --model the model that was trained?" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_cnn_reads_scans():
    x, y = load_callable("examples/digits.py:scans")()
    with torch.no_grad():
        right = (loaded(DIGITS)(x).argmax(dim=1) == y).double().mean()
    assert 0.85 < right < 0.95


def test_attacut_finds_word_beginnings():
    model, word_begins = loaded(THAI), load_callable("examples/thai_words.py:word_begins")
    batch, targets = load_callable("examples/thai_words.py:characters")(0, 500)
    with torch.no_grad():
        right = (word_begins(model, batch).argmax(dim=1) == targets).double().mean()
    assert right > 0.92
    assert 0.6 < (targets == 0).double().mean() < 0.85, "guessing does worse"


def test_a_window_is_all_that_attacut_sees():
    model, dataset = loaded(THAI), load_callable("examples/thai_words.py:models").get_model("seq_sy_ch_conv_concat").dataset()
    dataset.setup_featurizer("build/real/attacut/artifacts/attacut-sc")
    sentence = "".join(next(load_callable("examples/thai_words.py:read_sentences")()))
    _, (codes, lengths) = dataset.make_feature(sentence)
    padded = torch.nn.functional.pad(codes, (8, 8))
    windows = torch.cat([padded[..., start : start + 17] for start in range(len(sentence))])
    with torch.no_grad():
        scores = load_callable("examples/thai_words.py:word_begins")(model, (windows, lengths.expand(len(windows))))
        whole = model((codes, lengths))
    assert torch.allclose(scores[:, 1], whole, atol=1e-4)


def test_the_bert_embeds_as_published():
    embed, tokenize = (load_callable(f"examples/sentences.py:{name}") for name in ("embed", "tokenize"))
    with torch.no_grad():
        first, second, third = embed(
            loaded(BERT), tokenize(["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."])
        )
    assert float(first @ second) == pytest.approx(0.7553, abs=1e-3)  # measured once: other weights or tokens would change it
    assert float(first @ third) < 0.1


def test_what_training_teaches_of_held_out_examples(capsys):
    exec(snippet(THAI), {})
    (first, *_), (last, *_) = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (first, last) == ("0", "100")


def test_wrong_labels_are_found_by_loss_and_not_by_half_time(tmp_path, capsys):
    run_well(*command(MISLABELED, "analyze"), "--out", str(tmp_path), "--no-report")
    exec(snippet(MISLABELED).replace("build/mislabeled", str(tmp_path)), {})
    aurocs = {name: float(value) for name, value in (line.split() for line in capsys.readouterr().out.splitlines())}
    assert min(aurocs["loss"], aurocs["reservoir_energy"]) > 0.95
    assert aurocs["half_time"] < 0.2, "what the network knew before has nothing left to lose half of"


def test_checkpoints_of_one_run(tmp_path):
    model, word_begins = loaded(THAI), load_callable("examples/thai_words.py:word_begins")
    (batch, targets), rate = load_callable("examples/thai_words.py:train")(), 0.02
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    files = []
    for step in range(41):
        if step % 10 == 0:
            files.append(tmp_path / f"step{step}.pt")
            torch.save({"model": {f"module.{name}": value for name, value in model.state_dict().items()}}, files[-1])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(word_begins(model, batch), targets).backward()
        optimizer.step()
    model_words = command(THAI, "analyze")[2:]
    words = [word for k, word in enumerate(model_words) if "--continue" not in model_words[max(k - 1, 0) : k + 1]]
    times = ",".join(f"{rate * 10 * k:g}" for k in range(5))
    said = run_well("analyze", *map(str, files), *words, "--times", times, "--out", str(tmp_path / "out"), "--no-report")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["num_snapshots"] == 5
    assert summary["energy_balance"]["relative_error"] < 0.05
    assert "made by ntkscope" not in said
