"""Options that say what is loaded: odd models, data in many forms, models of Transformers, and what a checkpoint may run."""

import collections
import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loading_case import Bomb
from ntkscope_cli.app import app
from ntkscope_cli.loading import parse_arguments
from PIL import Image
from safetensors.torch import save_file
from test_integrations_transformers import Texts, arguments, callback_of, model_of
from torch import nn
from transformers import Trainer
from typer.testing import CliRunner

import ntkscope

RUNNER = CliRunner()
SPEC_FILE = """
import torch
from torch import nn

class Odd(nn.Module):
    def __init__(self, hidden, names):
        super().__init__()
        self.first, self.names = nn.Linear(3, hidden), names
        self.last = nn.Linear(hidden, 2)

    def forward(self, batch, scale=1.0):
        x, shift = batch if isinstance(batch, tuple) else (batch, 0.0)
        u = self.last(torch.tanh(self.first(x + shift))) * scale
        return {"found": (None, u), "logits": u} if self.names else (None, u)

def make(hidden=4, names=False): return Odd(hidden, names)
def doubled(model, batch): return model(batch, scale=2.0)
def data(): return torch.arange(18.0).reshape(6, 3).sin(), torch.tensor([0, 1, 1, 0, 1, 0])
def pair(): x, y = data(); return (x, torch.ones(6, 1)), y
number = 3
"""


def run(*words):
    return RUNNER.invoke(app, [str(word) for word in words])


def said(result):
    return " ".join(result.stderr.split())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Weights of an odd model, a module with SPECs, and the folder as the working one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "specs.py").write_text(SPEC_FILE)
    names: dict[str, object] = {}
    exec(SPEC_FILE, names)
    torch.manual_seed(0)
    torch.save(names["make"]().state_dict(), "weights.pt")
    return tmp_path


ON = ("--loss", "cross_entropy", "--continue", 4, "--out", "out", "--no-report", "--json")


def summary_of(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# --- models -------------------------------------------------------------------------------------------------------------------


@given(
    st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]*", fullmatch=True), st.integers() | st.booleans() | st.none() | st.text(), max_size=4)
)
def test_arguments_come_back_as_they_were_written(arguments):
    assert parse_arguments([f"{name}={json.dumps(value)}" for name, value in arguments.items()]) == arguments


def test_arguments_read_as_python_json_or_text():
    texts = ["a=3", "b=1e-3", "c=true", "d=False", "e=(1, 2)", "f=relu", "g=", "h=a=b", "i=null", "j=[1]"]
    expected = {"a": 3, "b": 1e-3, "c": True, "d": False, "e": (1, 2), "f": "relu", "g": "", "h": "a=b", "i": None, "j": [1]}
    assert parse_arguments(texts) == expected


def test_model_arguments_reach_the_function(folder):
    right = run(
        "analyze", "weights.pt", "--model", "specs.py:make", "--model-arg", "hidden=4", "--output", "1", "--data", "specs.py:data", *ON
    )
    assert summary_of(right)["num_params"] == 26
    wrong = run(
        "analyze", "weights.pt", "--model", "specs.py:make", "--model-arg", "hidden=5", "--output", "1", "--data", "specs.py:data", *ON
    )
    assert wrong.exit_code == 2
    assert "first.weight" in said(wrong)
    assert "do not fit the model" in said(wrong)


@pytest.mark.parametrize(("is_named", "output"), [("false", "1"), ("true", "logits"), ("true", "found.1"), ("false", "-1")])
def test_the_output_is_chosen_from_what_the_model_returns(is_named, output, folder):
    common = ("analyze", "weights.pt", "--model", "specs.py:make", "--model-arg", f"names={is_named}", "--data")
    plain = summary_of(run(*common, "specs.py:data", "--output", output, *ON))
    pair = summary_of(run(*common, "specs.py:pair", "--output", output, *ON))
    assert plain["loss"] != pair["loss"]  # the pair's shift reached the model
    twice = summary_of(run(*common, "specs.py:data", "--output", output, "--forward", "specs.py:doubled", *ON))
    assert twice["loss"] != plain["loss"]


def test_check_takes_odd_models_too(folder):
    common = ("check", "weights.pt", "--model", "specs.py:make", "--data", "specs.py:pair")
    right = run(*common, "--output", "1")
    assert right.exit_code == 0, right.output
    assert "agrees with autograd" in right.stdout
    assert "--output" in said(run(*common))


def test_a_recorded_run_of_an_odd_model_is_audited_with_its_call(folder):
    names: dict[str, object] = {}
    exec(SPEC_FILE, names)
    torch.manual_seed(0)
    model, (inputs, targets) = names["make"](), names["data"]()
    call = lambda module, batch: module(batch)[1]  # ruff: ignore[lambda-assignment]
    recorder = ntkscope.Recorder(model, (inputs, targets), loss="cross_entropy", audit=True, forward_fn=call)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    recorder.attach(optimizer)
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(call(model, inputs), targets).backward()
        optimizer.step()
    torch.save(recorder.state_dict(), "recorded.pt")
    result = run("analyze", "recorded.pt", "--model", "specs.py:make", "--output", "1", "--out", "out", "--json", "--no-report")
    assert summary_of(result)["gate"]["audit"] is not None


def test_files_import_their_neighbours_and_packages_lie_in_the_working_folder(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "code").mkdir()
    (folder / "code" / "neighbour_of_specs.py").write_text(SPEC_FILE)
    (folder / "code" / "using.py").write_text("from neighbour_of_specs import make, pair\n")
    (folder / "working_package").mkdir()
    (folder / "working_package" / "nets.py").write_text(SPEC_FILE)
    # What is installed comes first.
    (folder / "json.py").write_text("raise RuntimeError('hidden')")
    for module in ("code/using.py", "working_package.nets"):
        found = run("analyze", "weights.pt", "--model", f"{module}:make", "--output", "1", "--data", f"{module}:pair", *ON)
        assert summary_of(found)["num_params"] == 26


def test_a_file_that_several_options_name_runs_once(folder):
    (folder / "counted.py").write_text(f"print('running')\n{SPEC_FILE}")
    common = ("--model", "counted.py:make", "--output", "1", "--data", "counted.py:data", "--query", "counted.py:data")
    found = run("analyze", "weights.pt", *common, *ON)
    assert summary_of(found)["num_params"] == 26
    assert found.stderr.count("running") == 1
    (folder / "broken.py").write_text("raise RuntimeError('once')")
    for _ in range(2):  # a file that failed is not taken for loaded
        assert "RuntimeError: once" in said(run("analyze", "weights.pt", "--model", "broken.py:make", "--data", "specs.py:data", *ON))


def test_what_was_unwrapped_is_said(folder):
    torch.save({"net": {f"module.{name}": value for name, value in torch.load("weights.pt").items()}}, "wrapped.pt")
    common = ("wrapped.pt", "--model", "specs.py:make", "--output", "1", "--data", "specs.py:data")
    for result in (run("analyze", *common, *ON), run("check", *common)):
        assert result.exit_code == 0, result.output
        assert "note: wrapped.pt: 4 tensors with 26 numbers, found under `net`." in said(result)
        assert "note: Taken off the names: `module.`." in said(result)


def test_a_file_named_as_the_package_that_it_imports_does_not_stand_in_its_place(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "colorsys.py").write_text(f"import colorsys\nassert colorsys.rgb_to_hsv\n{SPEC_FILE}")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    found = run("analyze", "weights.pt", "--model", "colorsys.py:make", "--output", "1", "--data", "specs.py:data", *ON)
    assert summary_of(found)["num_params"] == 26


# --- data ---------------------------------------------------------------------------------------------------------------------


def write_forms(folder, inputs, targets):
    """The same examples in every form that --data takes; images hold them to 1 part in 255."""
    np.savez("data.npz", x=inputs.numpy(), labels=targets.numpy())
    torch.save((inputs, targets), "data.pt")
    save_file({"inputs": inputs, "targets": targets}, "data.safetensors")
    rows = [",".join([*(f"{float(v)!r}" for v in x), str(int(y))]) for x, y in zip(inputs, targets, strict=True)]
    (folder / "data.csv").write_text("\n".join(["a,b,c,label", *rows]))


@pytest.mark.parametrize("name", ["data.npz", "data.pt", "data.safetensors", "data.csv"])
def test_every_form_of_data_is_the_same(name, folder):
    names: dict[str, object] = {}
    exec(SPEC_FILE, names)
    write_forms(folder, *names["data"]())
    common = ("analyze", "weights.pt", "--model", "specs.py:make", "--output", "1", "--data")
    assert summary_of(run(*common, name, *ON))["loss"] == summary_of(run(*common, "specs.py:data", *ON))["loss"]


def test_inputs_take_the_precision_of_the_model(folder):
    names: dict[str, object] = {}
    exec(SPEC_FILE, names)
    inputs, targets = names["data"]()
    np.savez("double.npz", inputs=inputs.numpy().astype("float64"), targets=targets.numpy())
    common = ("analyze", "weights.pt", "--model", "specs.py:make", "--output", "1", "--data")
    found = run(*common, "double.npz", *ON)
    assert summary_of(found)["loss"] == summary_of(run(*common, "specs.py:data", *ON))["loss"]
    assert "note: Inputs are converted from float64 to float32, as the model is." in said(found)
    assert run("check", "weights.pt", "--model", "specs.py:make", "--output", "1", "--data", "double.npz").exit_code == 0


def test_whole_numbers_are_values_where_there_is_one_output(folder):
    (folder / "table.csv").write_text("a,b,target\n" + "\n".join(f"{k},{k * k % 5},{k % 3}" for k in range(8)))
    (folder / "net.py").write_text("from torch import nn\ndef make(): return nn.Linear(2, 1)\n")
    torch.save(nn.Linear(2, 1).state_dict(), "line.pt")
    found = run("analyze", "line.pt", "--model", "net.py:make", "--data", "table.csv", "--loss", "squared", *ON[2:])
    assert summary_of(found)["num_outputs"] == 8


def test_a_folder_of_images(folder):
    values = torch.randint(256, (6, 4, 4), generator=torch.Generator().manual_seed(0))
    for index, value in enumerate(values):
        place = folder / "images" / ("cat" if index % 2 else "ant")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(value.numpy().astype("uint8")).save(place / f"{index}.png")
    (folder / "net.py").write_text("from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))\n")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    torch.save(model.state_dict(), "image.pt")
    found = summary_of(run("analyze", "image.pt", "--model", "net.py:make", "--data", "images", *ON))
    inputs = values[[0, 2, 4, 1, 3, 5]].float() / 255
    expected = nn.functional.cross_entropy(model(inputs), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert found["loss"]["start"] == pytest.approx(expected.item(), rel=1e-6)


# --- Transformers -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fine_tuned(tmp_path, monkeypatch):
    """Checkpoint folders that Trainer wrote, one beside a record, and their data."""
    monkeypatch.chdir(tmp_path)
    texts = Texts()
    callback = callback_of(texts)
    trainer = Trainer(
        model=model_of(), args=arguments(tmp_path / "runs", save_strategy="steps", save_steps=2), train_dataset=texts, eval_dataset=texts
    )
    trainer.add_callback(callback)
    trainer.train()
    np.savez("tokens.npz", input_ids=texts.ids.numpy(), attention_mask=texts.mask.numpy(), labels=texts.labels.numpy())
    return tmp_path


TASK = ("--task", "sequence-classification", "--data", "tokens.npz", "--loss", "cross_entropy", "--out", "out", "--no-report", "--json")


def test_folders_of_a_trainer_become_a_trajectory_without_any_code(fine_tuned):
    for record in fine_tuned.glob("runs/*/ntkscope.pt"):
        record.unlink()
    folders = [f"runs/checkpoint-{step}" for step in (4, 2, 8, 6)]
    summary = summary_of(run("analyze", *folders, *TASK))
    assert summary["num_snapshots"] == 4
    assert summary["window"]["stop_step"] <= 8
    one = summary_of(run("analyze", folders[0], *TASK, "--continue", 4))
    assert one["num_examples"] == 12
    assert summary_of(run("analyze", f"{folders[0]}/model.safetensors", *TASK, "--continue", 4))["loss"] == one["loss"]
    right = run("inspect", folders[0], "--task", "sequence-classification")
    assert right.exit_code == 0, right.output
    assert "They fit the model." in right.stdout
    assert "matched to parameters" in right.stdout
    assert "Stored: step 4, learning rate 0.01." in right.stdout


def test_the_record_in_a_trainers_folder_is_found(fine_tuned):
    found = run("inspect", "runs/checkpoint-8")
    assert "Next: ntkscope analyze runs/checkpoint-8" in found.stdout
    direct = summary_of(run("analyze", "runs/checkpoint-8/ntkscope.pt", "--out", "out", "--json", "--no-report"))
    assert summary_of(run("analyze", "runs/checkpoint-8", "--out", "out", "--json", "--no-report")) == direct


def test_bad_configurations_get_one_message(fine_tuned):
    place = fine_tuned / "runs" / "checkpoint-2" / "config.json"
    config = json.loads(place.read_text())
    place.write_text(json.dumps(config | {"model_type": "no-such-model", "architectures": ["Nothing"]}))
    result = run("analyze", "runs/checkpoint-2", *TASK, "--continue", 2)
    assert result.exit_code == 2
    assert "transformers makes no model for sequence-classification" in said(result)
    # A configuration that brings its own code: it is not run.
    (fine_tuned / "runs" / "checkpoint-2" / "evil.py").write_text("open('exploded', 'w')\n")
    place.write_text(
        json.dumps(
            config | {"model_type": "own", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}}
        )
    )
    result = run("analyze", "runs/checkpoint-2", *TASK, "--continue", 2)
    assert result.exit_code == 2
    assert not (fine_tuned / "exploded").exists()


# --- what a checkpoint may run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["analyze", "inspect", "check"])
def test_globals_are_allowed_one_by_one(command, folder):
    state = torch.load("weights.pt", weights_only=True)
    torch.save({"model": state, "count": collections.Counter(a=1), "kind": type(nn.Linear(1, 1))}, "rich.pt")
    specs = ("--model", "specs.py:make")
    more = {
        "analyze": (*specs, "--data", "specs.py:data", "--output", "1", *ON),
        "check": (*specs, "--data", "specs.py:data", "--output", "1"),
        "inspect": specs,
    }[command]
    refused = run(command, "rich.pt", *more)
    assert refused.exit_code == 2
    assert "torch.nn.modules.linear.Linear" in said(refused)
    assert "--allow-global torch.nn.modules.linear.Linear" in said(refused)
    allowed = run(command, "rich.pt", *more, "--allow-global", "torch.nn.modules.linear.Linear", "--allow-global", "collections.Counter")
    assert allowed.exit_code == 0, allowed.output


@pytest.mark.filterwarnings("default:.*--unsafe-load:UserWarning")
@pytest.mark.parametrize("command", ["analyze", "inspect", "check"])
def test_unsafe_loading_is_loud(command, folder):
    torch.save({"model": torch.load("weights.pt", weights_only=True), "bomb": Bomb(folder / "exploded")}, "bomb.pt")
    specs = ("--model", "specs.py:make")
    more = {
        "analyze": (*specs, "--data", "specs.py:data", "--output", "1", *ON, "--quiet"),
        "check": (*specs, "--data", "specs.py:data", "--output", "1"),
        "inspect": specs,
    }[command]
    assert run(command, "bomb.pt", *more).exit_code == 2
    assert not (folder / "exploded").exists()
    result = run(command, "bomb.pt", *more, "--unsafe-load")
    assert result.exit_code == 0, result.output
    assert "warning: bomb.pt is loaded with --unsafe-load: code inside it runs with your permissions" in said(result)
    assert (folder / "exploded").exists()


# --- bad input ----------------------------------------------------------------------------------------------------------------

MODEL = ("--model", "specs.py:make")
DATA = ("--data", "specs.py:data")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*MODEL, "--model-arg", "hidden", *DATA, *ON), "'hidden' is no argument. Give NAME=VALUE, for example hidden=64."),
        ((*MODEL, "--model-arg", "a b=3", *DATA, *ON), "'a b=3' is no argument"),
        ((*MODEL, "--model-arg", "hidden=3", "--model-arg", "hidden=4", *DATA, *ON), "'hidden' is given twice. Give it once."),
        ((*MODEL, "--model-arg", "hiden=3", *DATA, *ON), "failed when called with hiden=3: TypeError"),
        (("--model-arg", "hidden=3", *DATA, *ON), "there is no --model to give it to"),
        ((*MODEL, *DATA, "--forward", "specs.py:number", *ON), "something of type int. Name a function of (model, batch)."),
        ((*MODEL, *DATA, "--forward", "specs.py:doubld", *ON), "Did you mean 'doubled'?"),
        ((*MODEL, *DATA, *ON), "must return a tensor"),
        ((*MODEL, *DATA, "--output", "2", *ON), "has no part '2': it is a tuple with positions 0 to 1"),
        ((*MODEL, *DATA, "--output", "0", *ON), "Output '0' of the model is a NoneType, not a tensor"),
        ((*MODEL, *DATA, "--task", "translation", *ON), "'translation' is none of sequence-classification"),
        ((*MODEL, *DATA, "--task", "regression", "--output", "0", *ON), "A task already says how the model is called"),
        ((*MODEL, *DATA, "--task", "regression", *ON), "A task passes inputs by name, got a batch of type Tensor"),
        ((*MODEL, "--data", "gone.csv", *ON), "gone.csv cannot be read as a table"),
        ((*MODEL, "--data", "none", *ON), "none holds no images"),
        ((*MODEL, "--data", "specs.py", *ON), "specs.py is no form of data that is read. Give .npz, .safetensors"),
        ((*MODEL, "--data", "gaps.csv", *ON), "gaps.csv, row 3, column 'b': 'nan' is no finite number"),
        (("--task", "regression", *DATA, *ON), "there is no config.json beside the weights. Give --model SPEC."),
        ((*MODEL, "--data", "targetless.npz", *ON), "with the entries `inputs` and `targets`; it has x, z."),
        ((*MODEL, *DATA, "--loss", "cross_entropy", "--continue", 0), "'--continue'"),
        ((*MODEL, "--loss", "cross_entropy", "--continue", 3), "needs all of `model`, `data` and `loss`"),
        (("weights.pt", *MODEL, *DATA, *ON), "it goes on from one checkpoint, got 2"),
    ],
)
def test_bad_options_get_one_message(words, message, folder):
    (folder / "none").mkdir()
    (folder / "gaps.csv").write_text("a,b,c,label\n1,2,3,0\n1,nan,3,1\n")
    np.savez("targetless.npz", x=np.ones(3), z=np.ones(3))
    result = run("analyze", "weights.pt", *words)
    assert message in said(result)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert not (folder / "out").exists()


def test_bad_check_without_a_model(folder):
    result = run("check", "--data", "specs.py:data")
    assert result.exit_code == 2
    assert "Give --model SPEC, or --task NAME and a folder with config.json." in said(result)


def test_many_rows_per_example_are_no_classes(folder):
    """Flattened, the scores of all positions would be taken for the classes of one."""
    (folder / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Language(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.words, self.head = nn.Embedding(9, 3), nn.Linear(3, 9)\n"
        "    def forward(self, x): return self.head(self.words(x))\n"
        "def make(): return Language()\n"
        "def last(model, batch): return model(batch)[:, -1]\n"
        "def data(): return torch.arange(24).reshape(6, 4) % 9, torch.arange(6)\n"
    )
    torch.save({"words.weight": torch.rand(9, 3), "head.weight": torch.rand(9, 3), "head.bias": torch.zeros(9)}, "language.pt")
    common = ("analyze", "language.pt", "--model", "net.py:make", "--data", "net.py:data", *ON)
    result = run(*common)
    assert result.exit_code == 2
    assert "outputs of shape (6, 4, 9), of which cross-entropy takes one row of class scores per example" in said(result)
    assert "--forward SPEC" in said(result)
    assert summary_of(run(*common, "--forward", "net.py:last"))["num_classes"] == 9


# --- scripts as people have them ----------------------------------------------------------------------------------------------


def test_a_script_that_reads_the_command_line_does_not_read_ours(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ntkscope", "inspect", "weights.pt", "--model", "train.py:make"])
    (folder / "train.py").write_text(
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--lr', default=0.1)\nprint(parser.parse_args())\n"
        "from specs import make\n"
    )
    before = list(sys.argv)
    result = run("inspect", "weights.pt", "--model", "train.py:make")
    assert result.exit_code == 0, result.output
    assert "They fit the model." in result.stdout
    assert sys.argv == before


@pytest.mark.parametrize("text", ["import sys\nsys.exit(0)\n", "import argparse\nargparse.ArgumentParser().error('--lr is missing')\n"])
def test_a_script_that_ends_python_is_at_fault(text, folder):
    (folder / "train.py").write_text(text)
    result = run("inspect", "weights.pt", "--model", "train.py:make")
    assert result.exit_code == 2
    assert "train.py ended Python as it was read" in said(result)
    assert "under `if __name__ == '__main__':`" in said(result)


def test_a_file_of_a_package_is_named_as_a_module(folder):
    (folder / "src" / "nets").mkdir(parents=True)
    (folder / "src" / "nets" / "__init__.py").write_text("")
    (folder / "src" / "nets" / "model.py").write_text("from .parts import core\n")
    result = run("inspect", "weights.pt", "--model", "src/nets/model.py:make")
    assert f"with PYTHONPATH={folder / 'src'}, nets.model:FUNCTION" in said(result)
    assert "put the folder that holds it on PYTHONPATH" in said(run("inspect", "weights.pt", "--model", "nets.model:make"))


def test_times_beside_continue_are_said_to_be_unused(folder):
    words = ("analyze", "weights.pt", "--model", "specs.py:make", "--output", "1", "--data", "specs.py:data", "--times", "0", *ON)
    assert "note: --times not used" in said(run(*words))
    assert "note: the gate was not audited" in said(run(*words, "--gate", "hard"))


def test_an_output_of_one_tensor_has_no_parts(folder):
    (folder / "plain.py").write_text("import torch\ndef make(): return torch.nn.Linear(3, 2)\n")
    torch.save(torch.nn.Linear(3, 2).state_dict(), "plain.pt")
    result = run("analyze", "plain.pt", "--model", "plain.py:make", "--output", "logits", "--data", "specs.py:data", *ON)
    assert "Leave out the output (--output)" in said(result)
