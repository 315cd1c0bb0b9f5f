"""Checkpoints of every common kind are read, what was unwrapped is said, and whatever is refused says why and what to do next."""

import argparse
import collections
import gzip
import json
import pathlib
import re
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from loading_case import (
    Bomb,
    quietly,
    save_distributed,
    save_exported,
    save_legacy,
    save_old_exported,
    save_script,
    save_shards,
    small_model,
    tensor_pickle,
    torch_zip_of,
    trained,
    zip_of,
)
from safetensors.torch import save_file
from torch import nn

from ntkscope._checks import InputError, UnsupportedError
from ntkscope.record.checkpoint import (
    describe_content,
    find_recorder_state,
    find_weights,
    load_checkpoint,
    stored_learning_rate,
    stored_step,
)
from ntkscope.record.formats.guards import is_tame
from ntkscope.record.formats.kinds import KINDS, kind_of
from ntkscope.record.prefixes import best_prefix
from ntkscope.record.source import find_trace, open_source
from ntkscope.record.trace import load_trace
from ntkscope.record.weights import load_weights, unwrap

NEXT_STEP = re.compile(
    r"\b(Give|Save|Best save|Download|Copy|Unpack|Load|Convert|Fetch|Choose|Run|Put|Install|Turn|Check|Do not load|Open|Set|Remove)\b"
    r"|The download went wrong: open|use an earlier file|--allow-global|load it with its own library|load it where",
    re.IGNORECASE,
)


def same(found, expected):
    assert set(expected) <= set(found)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


# --- kinds ------------------------------------------------------------------------------------------------------------------------

MAKERS = {
    "torch": lambda model, path: torch.save(model.state_dict(), path),
    "legacy": lambda model, path: save_legacy(model.state_dict(), path),
    "safetensors": lambda model, path: save_file(model.state_dict(), path),
    "script": save_script,
    "exported": save_exported,
    "distributed": lambda model, path: save_distributed({"model": model.state_dict()}, path),
    "folder": lambda model, path: save_shards(model.state_dict(), path),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One file or folder of every kind, without any suffix."""
    folder = tmp_path_factory.mktemp("kinds")
    for key, make in MAKERS.items():
        make(small_model().eval(), folder / key)
    return folder


@pytest.mark.parametrize("key", MAKERS)
def test_every_kind_is_told_by_its_content_and_read_bit_for_bit(key, made):
    assert kind_of(made / key) == KINDS[key]
    content = load_checkpoint(made / key)
    same(find_weights(content, made / key), small_model().state_dict())
    assert describe_content(content)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".ckpt", ".bin", ""])
@pytest.mark.parametrize("key", ["torch", "legacy", "safetensors", "script"])
def test_names_do_not_matter(key, suffix, made, tmp_path):
    path = shutil.copy(made / key, tmp_path / f"any{suffix}")
    same(find_weights(load_checkpoint(path), path), small_model().state_dict())


def test_an_index_and_both_kinds_of_shards(tmp_path):
    weights = small_model().state_dict()
    for suffix in ("safetensors", "bin"):
        index = save_shards(weights, tmp_path / suffix, suffix)
        assert kind_of(index).key == "index"
        same(load_checkpoint(index), weights)
        same(find_weights(load_checkpoint(index.parent), index), weights)
        index.unlink()
        same(find_weights(load_checkpoint(index.parent), index), weights)  # shards without an index


def test_a_folder_of_a_trainer_gives_step_and_learning_rate(tmp_path):
    model, optimizer = trained(lambda model: torch.optim.AdamW(model.parameters(), lr=0.25))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    (tmp_path / "trainer_state.json").write_text('{"global_step": 700, "log_history": []}')
    content = load_checkpoint(tmp_path)
    assert (stored_step(content), stored_learning_rate(content)) == (700, 0.25)
    assert content["config"] == {"hidden_size": 4}
    same(find_weights(content, tmp_path), model.state_dict())


def test_links_of_the_hugging_face_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0f3", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(small_model().state_dict(), blobs / "1c9")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1c9")
    same(find_weights(load_checkpoint(snapshot), snapshot), small_model().state_dict())


def test_a_distributed_checkpoint_keeps_its_structure(tmp_path):
    model, optimizer = trained(lambda model: torch.optim.Adam(model.parameters(), lr=0.01))
    content = {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 41, "log": {"a": [1, torch.ones(2)], "b": "text"}}
    save_distributed(content, tmp_path / "dcp")
    found = load_checkpoint(tmp_path / "dcp")
    same(found["model"], model.state_dict())
    assert (stored_step(found), stored_learning_rate(found)) == (41, 0.01)
    assert found["log"]["b"] == "text"
    assert torch.equal(found["log"]["a"][1], torch.ones(2))
    assert set(found["optim"]["state"]["0"]) == {"step", "exp_avg", "exp_avg_sq"}


RANKS = """
import sys, warnings, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, Replicate, distribute_tensor
warnings.simplefilter("ignore")
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}.meet", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
whole = torch.arange(35.0).reshape(5, 7)
content = {"model": {"rows": distribute_tensor(whole, mesh, [Shard(0)]), "columns": distribute_tensor(whole, mesh, [Shard(1)]),
                     "all": distribute_tensor(whole, mesh, [Replicate()])}}
dcp.save(content, checkpoint_id=folder)
dist.destroy_process_group()
"""


def test_what_two_ranks_saved_in_pieces_is_put_together(tmp_path):
    folder = tmp_path / "dcp"
    ranks = [subprocess.Popen([sys.executable, "-c", RANKS, str(rank), str(folder)], stderr=subprocess.PIPE) for rank in range(2)]
    for rank in ranks:
        _, said = rank.communicate(timeout=120)
        assert rank.returncode == 0, said.decode()
    found = load_checkpoint(folder)["model"]
    for name in ("rows", "columns", "all"):
        assert torch.equal(found[name], torch.arange(35.0).reshape(5, 7)), name


def test_exported_programs_of_older_versions_are_read(tmp_path):
    save_old_exported(small_model().state_dict(), tmp_path / "old.pt2")
    assert kind_of(tmp_path / "old.pt2").key == "exported"
    same(find_weights(load_checkpoint(tmp_path / "old.pt2"), "old.pt2"), small_model().state_dict())


def test_tied_weights_of_a_script_share_memory(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save_script(model, tmp_path / "tied.pt")
    found = find_weights(load_checkpoint(tmp_path / "tied.pt"), "tied.pt")
    assert found["0.weight"].data_ptr() == found["1.weight"].data_ptr()


def test_packed_parameters_of_a_script_are_named(tmp_path):
    packed = b"c__torch__.torch.classes.quantized\nLinearPackedParamsBase\n)\x81(K\x01tb"
    state = b"X\x01\x00\x00\x00p" + packed + b"sX\x01\x00\x00\x00w" + tensor_pickle()[2:-1]
    members = {"data.pkl": b"\x80\x02c__torch__\nNet\n)\x81}" + state + b"sb.", "constants.pkl": b")."}
    content = load_checkpoint(zip_of(members | {"data/0": torch.arange(4.0).numpy().tobytes()}, tmp_path / "x.pt"))
    assert torch.equal(content["state_dict"]["w"], torch.arange(4.0))
    assert content["left_out"] == ["p"]


def test_reading_never_writes_into_the_file(made):
    for key in ("torch", "script", "exported"):
        before = (made / key).read_bytes()
        for value in find_weights(load_checkpoint(made / key), key).values():
            value.zero_()
        assert (made / key).read_bytes() == before


def quantized():
    return quietly(torch.quantize_per_tensor, torch.ones(3), 0.1, 0, torch.qint8)


def test_unusual_tensors_survive(tmp_path):
    content = {
        "view": torch.arange(12.0).reshape(3, 4).T[1:],
        "expanded": torch.ones(1).expand(5, 3),
        "sparse": torch.eye(3).to_sparse(),
        "conj": torch.ones(2, dtype=torch.complex64).conj(),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "small": torch.ones(2).to(torch.float8_e4m3fn),
        "parameter": nn.Parameter(torch.ones(2)),
        "none": torch.zeros(0, 3),
        "meta": torch.empty(3, device="meta"),
        "quantized": quantized(),
    }
    counts = {"set": {1, 2}, "counter": collections.Counter("aab"), "bytes": b"\xff\x00", "array": bytearray(b"ab"), "complex": 1j}
    for save in (torch.save, save_legacy):
        if save is save_legacy:
            del content["small"]  # torch does not read back what it writes there
        save(content | counts, tmp_path / "odd.pt")
        found = load_checkpoint(tmp_path / "odd.pt")
        for name in ("view", "expanded", "parameter", "none", "half"):
            assert torch.equal(found[name], content[name]), name
        assert {name: found[name] for name in counts} == counts
        assert torch.equal(found["sparse"].to_dense(), torch.eye(3))
        assert describe_content(found)


# --- unwrapping -------------------------------------------------------------------------------------------------------------------


def renamed(prefix):
    return {f"{prefix}{name}": value for name, value in small_model().state_dict().items()}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (lambda: renamed(""), ""),
        (lambda: {"model": renamed(""), "epoch": 3}, "model"),
        (lambda: {"state": {"net": renamed("")}, "loss": torch.tensor(0.3)}, "state.net"),
        (lambda: {"model_state_dict": renamed(""), "rng_state": torch.zeros(4, dtype=torch.uint8)}, "model_state_dict"),
        (lambda: {"params": renamed("")}, "params"),
        (lambda: {"encoder": renamed("")}, "encoder"),
        (lambda: {"ema_state_dict": renamed("")}, "ema_state_dict"),
        (lambda: {"checkpoint": {"model": {"state_dict": renamed("")}}}, "checkpoint.model.state_dict"),
        (lambda: collections.OrderedDict(renamed("") | {"0._extra_state": None}), ""),
    ],
    ids=lambda part: part if isinstance(part, str) else "content",  # an address in a name differs between processes
)
def test_weights_are_found_wherever_people_put_them(content, key):
    found = unwrap(content(), "x.pt")
    assert found.key == key
    same(found.weights, small_model().state_dict())


@pytest.mark.parametrize(
    ("prefix", "prefixes"),
    [
        ("module.", ("module.",)),
        ("_orig_mod.", ("_orig_mod.",)),
        ("module._orig_mod.", ("module.", "_orig_mod.")),
        ("_orig_mod.module.", ("_orig_mod.", "module.")),
        ("_forward_module.module.", ("_forward_module.", "module.")),
    ],
)
def test_prefixes_of_wrappers_are_taken_off_without_a_model(prefix, prefixes):
    found = unwrap({"model": renamed(prefix)}, "x.pt")
    assert found.prefixes == prefixes
    same(found.weights, small_model().state_dict())


@pytest.mark.parametrize("prefix", ["model.", "module.model.", "student.backbone.", "_orig_mod.net."])
def test_any_other_prefix_is_taken_off_if_the_model_lacks_it(prefix):
    found = unwrap({"state_dict": renamed(prefix)}, "x.ckpt", model=small_model())
    assert "".join(found.prefixes) == prefix
    assert found.fits
    assert "They fit the model." in str(found)
    assert f"`{prefix.split('.')[0]}.`" in str(found)


def test_wrappers_inside_of_names_are_taken_off():
    weights = {name.replace("0.", "0._orig_mod.").replace("3.", "3._fsdp_wrapped_module."): v for name, v in renamed("").items()}
    found = unwrap(weights, "x.pt", model=small_model())
    assert found.fits
    assert set(found.prefixes) == {"_orig_mod.", "_fsdp_wrapped_module."}


def test_a_prefix_that_the_model_has_stays_or_is_added():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = small_model()

    assert unwrap(renamed("module."), "x.pt", model=Holder()).prefixes == ()
    found = unwrap(renamed(""), "x.pt", model=Holder())
    assert (found.added, found.fits) == ("module.", True)
    assert "Put before the names: `module.`" in str(found)


def test_of_model_and_average_the_model_is_chosen_and_the_other_named():
    content = {"ema": {name: value + 1 for name, value in renamed("").items()}, "model": renamed("")}
    found = unwrap(content, "x.pt")
    assert (found.key, found.others) == ("model", ("ema",))
    assert "other weights too: ema. To take some of these instead, save them alone in a file" in str(found)
    same(unwrap(content, "x.pt", key="ema").weights, content["ema"])


def test_an_average_is_taken_only_if_there_is_nothing_else():
    content = {"ema": renamed(""), "encoder": renamed("")}
    assert unwrap(content, "x.pt").key == "encoder"
    assert unwrap({"swa_model": renamed(""), "epoch": 3}, "x.pt").key == "swa_model"


def test_of_equally_good_prefixes_the_shortest_is_taken_off():
    assert best_prefix(["a.w", "x.a.w", "x.y.a.w"], {"a.w"}) == ("", 1)
    assert best_prefix(["x.a.w", "x.a.b", "y.a.w"], {"a.w", "a.b"}) == ("x.", 2)
    assert best_prefix(["x"], {"y"}) == ("", 0)


def test_an_average_inside_the_same_state_dict_is_left_out():
    content = {"state_dict": renamed("ema.") | renamed("model.") | {"loss.weight": torch.ones(2)}}
    found = unwrap(content, "x.ckpt", model=small_model())
    assert found.fits
    assert "loss.weight" in found.left_out


def test_several_models_are_not_guessed_between():
    content = {"generator": renamed(""), "discriminator": renamed("")}
    with pytest.raises(InputError, match=r"several models: generator, discriminator\. Choose one with key='generator'"):
        unwrap(content, "gan.pt")
    assert unwrap(content, "gan.pt", key="discriminator").key == "discriminator"
    with pytest.raises(InputError, match=r"no weights under 'critic'; choose one of generator, discriminator"):
        unwrap(content, "gan.pt", key="critic")


def test_what_does_not_fit_is_said():
    weights = renamed("")
    weights["0.weight"] = torch.ones(5, 3)
    weights["0.bias"] = weights["0.bias"].half()
    weights["odd"] = weights.pop("codes")
    found = unwrap(weights, "x.pt", model=small_model())
    assert (found.missing, found.extra, found.fits) == (("codes",), ("odd",), False)
    assert found.reshaped == {"0.weight": "file [5, 3], model [4, 3]"}
    assert found.recast == {"0.bias": "float16 to float32"}
    for said in ("Missing in the file: codes.", "Not in the model: odd.", "0.weight (file [5, 3], model [4, 3])", "float16 to float32"):
        assert said in str(found)
    assert repr(found).startswith("Unwrapped(")
    assert "Converted" not in str(unwrap(renamed(""), "x.pt", model=small_model()))


def test_parameters_are_told_from_statistics_and_tied_doubles():
    model = small_model()
    weights = model.state_dict() | {"head.weight": model.state_dict()["3.weight"]}
    assert list(unwrap(weights, "x.pt").parameters()) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda: torch.eye(3).to_sparse(), "is sparse_coo"),
        (lambda: torch.empty(3, device="meta"), "is without data"),
        (quantized, "is quantized"),
    ],
    ids=["sparse", "meta", "quantized"],
)
def test_weights_that_are_not_dense_are_refused(weight, message):
    with pytest.raises(UnsupportedError, match=f"{message}.* Save a state_dict of plain dense tensors"):
        unwrap({"w": weight()}, "x.pt")


@pytest.mark.parametrize("content", [[], {}, {"a": 1}, None, torch.ones(2), {"optimizer": {"state": {}, "param_groups": []}}], ids=str)
def test_content_without_weights_is_refused(content):
    with pytest.raises(InputError, match=r"holds no state_dict.*Run `ntkscope inspect x\.pt`"):
        find_weights(content, "x.pt")


# --- steps, descriptions, traces --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "step"),
    [
        ({"step": 5}, 5),
        ({"global_step": torch.tensor(7)}, 7),
        ({"trainer_state": {"global_step": 9}}, 9),
        ({"step": True}, None),
        ({"step": torch.ones(3)}, None),
        ({"step": torch.tensor(float("nan"))}, None),
        ({"step": torch.empty((), device="meta")}, None),
        ({"epoch": 5}, None),
        ([1], None),
    ],
    ids=str,
)
def test_steps(content, step):
    assert stored_step(content) == step


def test_a_step_that_only_the_optimizer_counts():
    _, optimizer = trained(lambda model: torch.optim.Adam(model.parameters(), lr=0.5), steps=4)
    for content in ({"optimizer": optimizer.state_dict()}, {"optimizer_states": [optimizer.state_dict()]}, optimizer.state_dict()):
        assert (stored_step(content), stored_learning_rate(content)) == (4, 0.5)


def test_content_that_holds_itself_or_odd_names_is_described():
    content = {"a\x1b[31m": torch.ones(2), 3: "x" * 500, None: object(), "deep": {}}
    content["deep"]["again"] = content
    rows = dict(describe_content(content))
    assert rows["'a\\x1b[31m'"] == "tensor (2,) float32, 0.00 MiB"
    assert rows["3"].endswith("...")
    assert rows["None"] == "object of builtins.object"
    assert rows["deep.again"] == "the same dict as above"
    assert find_recorder_state(content) is None
    assert len(describe_content({str(n): n for n in range(20_000)})) == 10_001


def test_content_that_holds_itself_many_times_takes_no_time():
    content = {}
    content |= {str(n): content for n in range(500)}
    start = time.perf_counter()
    assert find_recorder_state(content) is None
    assert stored_learning_rate(content) is None
    assert len(describe_content(content)) == 500
    with pytest.raises(InputError, match=r"holds no state_dict"):
        unwrap(content, "x.pt")
    assert time.perf_counter() - start < 5


def test_folders_are_traces_or_checkpoints(tmp_path, made):
    assert find_trace(made / "folder") is None
    with pytest.raises(InputError, match="holds no recorder's state"):
        open_source(made / "distributed")
    with pytest.raises(InputError, match=r"a folder without manifest\.json, so it is no trace; and no checkpoint"):
        find_trace(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="is damaged"):
        find_trace(tmp_path)


# --- names that files ask for -----------------------------------------------------------------------------------------------------


@pytest.fixture
def lightning(tmp_path):
    """A checkpoint as Lightning writes it, with hyperparameters and a metric that are no plain values."""
    model, optimizer = trained(lambda model: torch.optim.Adam(model.parameters(), lr=0.01))
    content = {
        "epoch": 1, "global_step": 30, "pytorch-lightning_version": "2.4.0",
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "loops": {}, "callbacks": {"ModelCheckpoint": {"best_model_score": np.float64(0.25)}}, "lr_schedulers": [],
        "optimizer_states": [optimizer.state_dict()], "hyper_parameters": argparse.Namespace(width=4, where=pathlib.PurePosixPath("a/b")),
    }  # fmt: skip
    torch.save(content, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


NEEDED = ["numpy._core.multiarray.scalar", "numpy.dtype", "argparse.Namespace", "pathlib.PurePosixPath", "numpy.dtypes.Float64DType"]


def test_all_names_are_listed_at_once_with_the_flags(lightning):
    with pytest.raises(UnsupportedError, match="it asks for") as caught:
        load_checkpoint(lightning)
    for name in NEEDED:
        assert f"--allow-global {name}" in str(caught.value)
    assert "--unsafe-load (unsafe=True)" in str(caught.value)
    assert "OrderedDict" not in str(caught.value)


def test_what_was_allowed_is_read_and_what_is_missing_is_listed(lightning):
    with pytest.raises(UnsupportedError, match=r"it asks for pathlib\.PurePosixPath, numpy.dtypes.Float64DType") as caught:
        load_checkpoint(lightning, allow_globals=NEEDED[:3])
    assert "argparse" not in str(caught.value)
    before = set(torch.serialization.get_safe_globals())
    content = load_checkpoint(lightning, allow_globals=NEEDED)
    assert set(torch.serialization.get_safe_globals()) == before
    assert content["hyper_parameters"].width == 4
    assert content["callbacks"]["ModelCheckpoint"]["best_model_score"] == 0.25
    assert (stored_step(content), stored_learning_rate(content)) == (30, 0.01)
    assert unwrap(content, lightning, model=small_model()).prefixes == ("model.",)


def test_what_the_process_allows_stays_allowed(lightning):
    with torch.serialization.safe_globals([argparse.Namespace]):
        load_checkpoint(lightning, allow_globals=NEEDED)
        assert argparse.Namespace in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os.system", "never lets os through. Save the model's state_dict"),
        ("eval", "takes a full name such as argparse.Namespace"),
        ("a b.c", "takes a full name such as"),
        ("nowhere_at_all.Thing", "no module nowhere_at_all here. Install it, or run where"),
        ("argparse.SUPPRESS", "names a str. Give classes and functions"),
        ("numpy.random.mtrand", "names a module. Give classes and functions"),
        ("argparse.Nothing", "argparse has no Nothing. Run where it can be imported"),
    ],
)
def test_bad_names_to_allow(name, message, lightning):
    with pytest.raises((InputError, UnsupportedError), match=re.escape(f"--allow-global {name}").replace("eval", ".*eval") + "|" + message):
        load_checkpoint(lightning, allow_globals=[name])


def test_a_whole_model_is_refused_and_unsafe_loading_is_loud(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"model": small_model()}, path)
    with pytest.raises(UnsupportedError, match=r"container\.Sequential.*Best save model\.state_dict\(\) \(not the model\)"):
        load_checkpoint(path)
    with pytest.warns(UserWarning, match=r"model\.pt is loaded with --unsafe-load: code inside it runs"):
        content = load_checkpoint(path, unsafe=True)
    same(find_weights(content, path), small_model().state_dict())


def test_unsafe_loading_says_what_cannot_be_imported(tmp_path):
    path = torch_zip_of(b"\x80\x02cnowhere_at_all\nThing\n.", tmp_path / "x.pt")
    with (
        pytest.warns(UserWarning, match="--unsafe-load"),
        pytest.raises(InputError, match=r"could not be loaded: .*nowhere_at_all.* Run where what it needs can be imported"),
    ):
        load_checkpoint(path, unsafe=True)


def test_what_torch_cannot_build_even_if_it_is_allowed(tmp_path):
    torch.save({"a": collections.deque([1])}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"cannot be built without running code: Can only append to lists.* Save only tensors"):
        load_checkpoint(tmp_path / "x.pt", allow_globals=["collections.deque"])


def test_other_protocols_are_named(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt", pickle_protocol=4)
    with pytest.raises(UnsupportedError, match=r"pickle protocol 4.* save it again without pickle_protocol"):
        load_checkpoint(tmp_path / "x.pt")


# --- what is refused --------------------------------------------------------------------------------------------------------------


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def index_naming(folder, name):
    return write(folder / "model.safetensors.index.json", json.dumps({"weight_map": {"w": name}}).encode())


def linked_outside(folder):
    write(folder / "outside.safetensors", b"")
    (folder / "inner").mkdir()
    (folder / "inner" / "model.safetensors").symlink_to("../outside.safetensors")
    return folder / "inner"


def header_of(length, data):
    return length.to_bytes(8, "little") + data


def two_members(path):
    with zipfile.ZipFile(path, "w") as archive:
        for data in (b"1", b"2"):
            archive.writestr("a/data.pkl", data) if data == b"1" else archive.getinfo("a/data.pkl")
        archive.filelist.append(archive.filelist[0])
    return path


def one_shard(folder):
    weights = small_model().state_dict()
    save_shards(weights, folder).unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    return folder


def shard_lost(folder):
    index = save_shards(small_model().state_dict(), folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return index


def tensor_lost(folder):
    index = save_shards(small_model().state_dict(), folder)
    content = json.loads(index.read_text())
    content["weight_map"]["nothing"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    return index


def two_weights(folder):
    for name in ("unet.safetensors", "vae.safetensors"):
        save_file({"w": torch.ones(2)}, folder / name)
    return folder


def distributed_without_file(folder):
    save_distributed({"model": {"w": torch.ones(3)}}, folder / "dcp")
    (folder / "dcp" / "__0_0.distcp").unlink()
    return folder / "dcp"


REFUSED = {
    "no file": (lambda d: d / "nope.pt", r"No such file: .*nope\.pt\. Give a checkpoint file"),
    "empty": (lambda d: write(d / "x.pt", b""), "is empty. .* Use an earlier file"),
    "text": (lambda d: write(d / "x.txt", b"hello world"), "is no checkpoint of a kind that is read"),
    "gzip": (lambda d: write(d / "x.pt.gz", gzip.compress(b"x")), "is a gzip archive.* Unpack it"),
    "bzip2": (lambda d: write(d / "x.bz2", b"BZh91AY"), "is a bzip2 archive.* Unpack it"),
    "xz": (lambda d: write(d / "x.xz", b"\xfd7zXZ\0"), "is an xz archive.* Unpack it"),
    "zstd": (lambda d: write(d / "x.zst", b"(\xb5/\xfd"), "is a zstd archive.* Unpack it"),
    "tar": (lambda d: write(d / "x.tar", b"\0" * 257 + b"ustar\0" + b"\0" * 300), "is a tar archive. Unpack it"),
    "lfs": (lambda d: write(d / "x.pt", b"version https://git-lfs.github.com/spec/v1\noid x"), "pointer of git-lfs.* git lfs pull"),
    "page": (lambda d: write(d / "x.pt", b"<!DOCTYPE html><html>"), "is a web page.* download again"),
    "page in capitals": (lambda d: write(d / "x.pt", b"<html><body>"), "is a web page.* download again"),
    "hdf5": (lambda d: write(d / "x.h5", b"\x89HDF\r\n\x1a\n"), r"is an HDF5 file \(Keras\).* save the model's state_dict"),
    "gguf": (lambda d: write(d / "x.gguf", b"GGUF\3\0\0\0"), "is a GGUF file.* Give the safetensors"),
    "numpy": (lambda d: write(d / "x.npy", b"\x93NUMPY\1\0"), "is a NumPy array.* Give a file that torch.save"),
    "npz": (lambda d: zip_of({"a.npy": b""}, d / "x.npz", folder=""), r"is an \.npz file.* Give it with --data"),
    "onnx": (lambda d: write(d / "x.onnx", b"\x08\x07\x12"), "is an ONNX graph.* Give the checkpoint it was exported from"),
    "keras": (lambda d: zip_of({"config.json": b"", "model.weights.h5": b""}, d / "x.keras", folder=""), "is a Keras model"),
    "pickle": (lambda d: write(d / "x.pkl", b"\x80\x04}."), "is a plain pickle.* save the model's state_dict with torch.save"),
    "other zip": (lambda d: zip_of({"word.xml": b""}, d / "x.docx"), "a zip archive without data.pkl.* Copy or download it again"),
    "empty folder": (lambda d: d, "is a folder without manifest.json.* Give the folder that"),
    "deepspeed": (lambda d: write(d / "global_step9" / "mp_rank_00_model_states.pt", b"").parent.parent, "zero_to_fp32.py"),
    "tensorflow": (lambda d: write(d / "saved_model.pb", b"").parent, "a checkpoint of TensorFlow.* Convert it to PyTorch"),
    "orbax": (lambda d: write(d / "_CHECKPOINT_METADATA", b"").parent, "a checkpoint of Orbax.* Convert it to PyTorch"),
    "compressed": (
        lambda d: zip_of({"data.pkl": b"\0" * 999}, d / "x.pt", compression=zipfile.ZIP_DEFLATED),
        "'data.pkl' is compressed or encrypted, which torch.save never does",
    ),
    "dots": (lambda d: zip_of({"data.pkl": b"", "../../evil": b""}, d / "x.pt"), "would leave its folder"),
    "absolute": (lambda d: zip_of({"/etc/evil": b"", "data.pkl": b""}, d / "x.pt", folder=""), "would leave its folder"),
    "two of a name": (lambda d: two_members(d / "x.pt"), r"two members 'data\.pkl'|two members 'a/data\.pkl'"),
    "no pickle end": (lambda d: torch_zip_of(b"\x80\x02}", d / "x.pt"), "its pickle breaks off"),
    "header of safetensors": (lambda d: write(d / "x.safetensors", header_of(2**60, b"{}")), "truncated or no safetensors file"),
    "json of safetensors": (lambda d: write(d / "x", header_of(4, b"{]x}")), "truncated or no safetensors file"),
    "index no json": (lambda d: write(d / "x.index.json", b"{{{"), "truncated or no JSON"),
    "index nested": (lambda d: write(d / "x.index.json", b"[" * 100_000), "truncated or no JSON"),
    "index without map": (lambda d: write(d / "x.index.json", b"[1]"), "no index of shards"),
    "index with dots": (lambda d: index_naming(d, "../x.safetensors"), "which is not inside"),
    "index absolute": (lambda d: index_naming(d, "/etc/passwd"), "which is not inside"),
    "index of windows": (lambda d: index_naming(d, "C:\\x.safetensors"), "which is not inside"),
    "index of nothing": (lambda d: index_naming(d, "x.safetensors"), "there is no such file in .*download that file as well"),
    "link outside": (linked_outside, "which is not inside"),
    "one shard": (one_shard, "1 of the 2 shards of model are missing.* Download them as well"),
    "shard lost": (shard_lost, "there is no such file in .*download that file as well"),
    "tensor lost": (tensor_lost, "says that 'nothing' lies in .*Download that file again"),
    "two weights": (two_weights, r"several files that may be the weights \(unet.safetensors, vae.safetensors\)\. Give one"),
    "distributed without file": (distributed_without_file, "__0_0.distcp.*there is no such file"),
    "distributed no table": (lambda d: write(d / ".metadata", b"\x80\x04}.").parent, "no table of a distributed checkpoint"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_everything_refused_says_why_and_what_to_do(name, tmp_path):
    make, message = REFUSED[name]
    path = make(tmp_path)
    with pytest.raises((InputError, UnsupportedError), match=message) as caught:
        load_checkpoint(path)
    assert NEXT_STEP.search(str(caught.value))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_every_kind_torn_anywhere_is_refused_or_read(made, tmp_path):
    for key in ("torch", "legacy", "safetensors", "script", "exported"):
        data = (made / key).read_bytes()
        for share in (0.02, 0.3, 0.6, 0.9, 0.999):
            path = write(tmp_path / "torn", data[: int(share * len(data))])
            with pytest.raises((InputError, UnsupportedError), match="torn") as caught:
                load_checkpoint(path)
            assert NEXT_STEP.search(str(caught.value))


def test_unreadable_files_are_refused(tmp_path):
    path = write(tmp_path / "x.pt", b"x")
    path.chmod(0)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=r"No such file|cannot be read"):
        load_checkpoint(tmp_path / "loop")
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"is no file \(a device, pipe or socket\)\. Give a checkpoint file"):
        load_checkpoint(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("name", "tame"),
    [("a", True), ("a/b.pt", True), ("", False), ("/a", False), ("../a", False), ("a/../../b", False), ("C:\\a", False), ("\\a", False),
     ("a\\..\\b", False), ("a\0b", False), ("//host/a", False), (3, False)],
)  # fmt: skip
def test_tame_names(name, tame):
    assert is_tame(name) is tame


# --- time and memory --------------------------------------------------------------------------------------------------------------

INSPECT = """
import sys, time
from pathlib import Path
from ntkscope.record.checkpoint import describe_content, find_recorder_state, find_weights, load_checkpoint
def peak():  # not ru_maxrss, which a process inherits from the one that starts it
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before, start = peak(), time.perf_counter()
content = load_checkpoint(sys.argv[1])
rows, state, weights = describe_content(content), find_recorder_state(content), find_weights(content, sys.argv[1])
assert len(weights) == 4, len(weights)
print(time.perf_counter() - start, (peak() - before) / 1024)
"""


@pytest.mark.alone
@pytest.mark.parametrize("key", ["torch", "safetensors"])
def test_a_large_file_is_mapped_not_read(key, tmp_path):
    """400 MiB; 5 GiB, measured by hand, take no longer: neither time nor memory grows with the file."""
    weights = {f"layer{k}.weight": torch.zeros(25 * 2**20) for k in range(4)}
    path = tmp_path / "large"
    torch.save({"model": weights}, path) if key == "torch" else save_file(weights, path)
    del weights
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", INSPECT, str(path)], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, result.stdout.split())
    assert seconds < 2, time.perf_counter() - start
    assert megabytes < 100


def test_the_bomb_of_these_tests_goes_off_where_nothing_stops_it(tmp_path):
    """Else the tests that look for its trace would pass vacuously."""
    torch.save({"bomb": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pt")
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert (tmp_path / "exploded").exists()


def test_buffers_that_the_model_no_longer_saves_are_left_out():
    model = nn.Sequential(nn.Linear(3, 2), nn.Identity())
    model[1].register_buffer("position_ids", torch.arange(4), persistent=False)
    old = {**model.state_dict(), "1.position_ids": torch.arange(4)}
    found = unwrap(old, "old.pt", model=model)
    assert found.fits
    assert found.left_out == ("1.position_ids",)
    assert not unwrap(old | {"1.others": torch.ones(1)}, "old.pt", model=model).fits


class Tied(nn.Module):
    """A model of words: what reads them in reads them out."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.words.weight


@pytest.mark.parametrize("stored", ["words.weight", "head.weight"])
def test_what_the_model_ties_may_be_stored_once(stored):
    weight, model = torch.randn(5, 3), Tied()
    found = unwrap({f"module.{stored}": weight}, "x.pt", model=model)
    assert found.fits
    (other,) = found.tied
    assert {stored, other} == {"words.weight", "head.weight"}
    assert f"to which the model ties them: {other}." in str(found)
    assert "1 tensors with 15 numbers" in str(found)
    load_weights(model, found)
    assert torch.equal(model.head.weight, weight)


def test_what_the_model_ties_may_not_differ_in_the_file():
    with pytest.raises(InputError, match=r"words.weight and head.weight are one tensor in the model, and two different ones in the file"):
        unwrap({"words.weight": torch.zeros(5, 3), "head.weight": torch.ones(5, 3)}, "x.pt", model=Tied())


def test_a_folder_of_checkpoints_leads_on_to_what_is_in_it(tmp_path):
    (tmp_path / "logs").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "logs" / "epoch=1.ckpt")
    with pytest.raises(InputError, match=r"is a folder of checkpoints. Give one of them, as .*epoch=1.ckpt, or .* as .*logs/\*\.ckpt"):
        load_checkpoint(tmp_path / "logs")
    (tmp_path / "runs" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "runs" / "checkpoint-2" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"as .*checkpoint-2, or several of one run, as .*runs/\*/"):
        load_checkpoint(tmp_path / "runs")


def test_a_trace_may_be_named_by_text(tmp_path):
    with pytest.raises(InputError, match=r"is a folder without manifest.json, so it is no trace"):
        load_trace(str(tmp_path))
