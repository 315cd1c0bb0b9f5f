"""Damaged and hostile files: one clear error that names the file and the next step; no hang, no crash, no code, no memory."""

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loading_case import (
    Bomb,
    legacy_file,
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
from test_loading import NEXT_STEP, header_of, write
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from ntkscope._checks import InputError, UnsupportedError
from ntkscope.record.checkpoint import describe_content, find_recorder_state, load_checkpoint, stored_learning_rate, stored_step
from ntkscope.record.formats import archive, pickles
from ntkscope.record.formats.mapped import MappedFile
from ntkscope.record.formats.pickles import read_pickle
from ntkscope.record.formats.views import Memory, View
from ntkscope.record.optimizer_state import read_optimizer
from ntkscope.record.weights import unwrap

SECONDS = 5  # that any one file may take
FUZZ = settings(
    max_examples=int(os.environ.get("NTKSCOPE_FUZZ_EXAMPLES", "60")),
    deadline=1000 * SECONDS,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def use(path, **trust):
    """Load a file and look at all of it, as the commands do."""
    content = load_checkpoint(path, **trust)
    find_recorder_state(content)
    describe_content(content)
    stored_step(content)
    stored_learning_rate(content)
    weights = unwrap(content, path, model=small_model()).parameters()
    for value in weights.values():
        torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).sum()  # every byte that a tensor claims can be read
    read_optimizer(content, weights, path)
    return content


def survives(path, place, **trust):
    """Use a file; if it is refused, then with one clear message."""
    try:
        use(path, **trust)
    except (InputError, UnsupportedError) as error:
        message = str(error)
        assert str(place) in message, message
        assert NEXT_STEP.search(message), message
        assert "\n" not in message
        assert len(message) < 3000


class Sound(dict[str, bytes]):
    """Files by kind; hypothesis writes out what a failing test was given."""

    def __repr__(self):
        return "Sound()"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of sound files of every kind."""
    folder = tmp_path_factory.mktemp("sound")
    model, optimizer = trained(lambda model: torch.optim.Adam(model.parameters(), lr=0.1, amsgrad=True))
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
    torch.save(content, folder / "torch")
    save_legacy(content, folder / "legacy")
    save_file(model.state_dict(), folder / "safetensors")
    save_script(model, folder / "script")
    save_exported(model, folder / "exported")
    save_old_exported(model.state_dict(), folder / "old_exported")
    return Sound((path.name, path.read_bytes()) for path in folder.iterdir())


KINDS = ("torch", "legacy", "safetensors", "script", "exported", "old_exported")
EDITS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6)


def edited(data, edits):
    """Change single bytes."""
    changed = bytearray(data)
    for where, value in edits:
        changed[int(where * len(data))] = value
    return bytes(changed)


def test_the_sound_files_are_used_to_the_end(sound, tmp_path):
    for kind in ("torch", "legacy"):
        assert use(write(tmp_path / "x", sound[kind]))["step"] == 3


@pytest.mark.parametrize("kind", KINDS)
@FUZZ
@given(edits=EDITS)
def test_changed_bytes(kind, edits, sound, tmp_path):
    survives(write(tmp_path / "x", edited(sound[kind], edits)), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@FUZZ
@given(share=st.floats(0, 1))
def test_files_that_are_cut(kind, share, sound, tmp_path):
    survives(write(tmp_path / "x", sound[kind][: int(share * len(sound[kind]))]), tmp_path)


@FUZZ
@given(kinds=st.tuples(*[st.sampled_from(KINDS)] * 2), cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_spliced_files(kinds, cuts, sound, tmp_path):
    parts = [sound[kind] for kind in kinds]
    data = parts[0][: int(cuts[0] * len(parts[0]))] + parts[1][int(cuts[1] * len(parts[1])) :]
    survives(write(tmp_path / "x", data), tmp_path)


@FUZZ
@given(
    data=st.binary(max_size=2000),
    head=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"GGUF"]),
)
def test_any_bytes(data, head, tmp_path):
    survives(write(tmp_path / "x", head + data), tmp_path)


@FUZZ
@given(edits=EDITS)
def test_changed_bytes_inside_of_the_pickle(edits, sound, tmp_path):
    """Edits of a whole archive mostly hit memory; these hit what is parsed."""
    with zipfile.ZipFile(io.BytesIO(sound["torch"])) as whole:
        members = {info.filename: whole.read(info) for info in whole.infolist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    members[name] = edited(members[name], edits)
    survives(zip_of(members, tmp_path / "x", folder=""), tmp_path)


@FUZZ
@given(edits=EDITS)
def test_changed_tables_of_exported_programs(edits, sound, tmp_path):
    with zipfile.ZipFile(io.BytesIO(sound["exported"])) as whole:
        members = {info.filename: whole.read(info) for info in whole.infolist()}
    name = next(name for name in members if name.endswith("weights_config.json"))
    members[name] = edited(members[name], edits)
    survives(zip_of(members, tmp_path / "x", folder=""), tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@FUZZ
@given(value=JSON, where=st.sampled_from(["path_name", "use_pickle", "tensor_meta", "dtype", "sizes", "strides", "storage_offset"]))
def test_any_values_in_tables_of_exported_programs(value, where, sound, tmp_path):
    with zipfile.ZipFile(io.BytesIO(sound["exported"])) as whole:
        members = {info.filename: whole.read(info) for info in whole.infolist()}
    name = next(name for name in members if name.endswith("weights_config.json"))
    content = json.loads(members[name])
    row = content["config"]["0.weight"]
    (row if where in row else row["tensor_meta"])[where] = value
    members[name] = json.dumps(content).encode()
    survives(zip_of(members, tmp_path / "x", folder=""), tmp_path)


@FUZZ
@given(header=JSON, names=st.dictionaries(st.sampled_from(["w", "__metadata__"]), JSON, max_size=2), extra=st.binary(max_size=40))
def test_any_header_of_safetensors(header, names, extra, tmp_path):
    for content in (header, {"w": header}, names):
        text = json.dumps(content).encode()
        survives(write(tmp_path / "x.safetensors", header_of(len(text), text + extra)), tmp_path)


@FUZZ
@given(value=JSON)
def test_any_index(value, tmp_path):
    for content in (value, {"weight_map": value}, {"weight_map": {"w": value}}):
        survives(write(tmp_path / "x.index.json", json.dumps(content).encode()), tmp_path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Sound folders: distributed, and shards."""
    folder = tmp_path_factory.mktemp("folders")
    model, optimizer = trained(lambda model: torch.optim.Adam(model.parameters(), lr=0.1))
    save_distributed({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}, folder / "distributed")
    save_shards(model.state_dict(), folder / "shards")
    return folder


@pytest.mark.parametrize(
    ("kind", "file"),
    [("distributed", ".metadata"), ("distributed", "__0_0.distcp"), ("shards", "model.safetensors.index.json"),
     ("shards", "model-00001-of-00002.safetensors")],
)  # fmt: skip
@settings(FUZZ, max_examples=FUZZ.max_examples // 3)
@given(edits=EDITS, share=st.just(1.0) | st.floats(0, 1))
def test_changed_folders(kind, file, edits, share, folders):
    path = folders / kind / file
    data = path.read_bytes()
    try:
        path.write_bytes(edited(data, edits)[: int(share * len(data))])
        survives(folders / kind, folders)
    finally:
        path.write_bytes(data)


OPCODES = [bytes([code]) for code in range(256)]
PIECES: list[bytes] = [
    *(b"]", b"}", b"(", b")", b"0", b"2", b"N", b"\x88", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u", b"R", b"\x81", b"b"),
    *(b"Q", b"l", b"d", b"o", b"\x8f", b"\x90", b"\x91", b"\x94", b"\x93", b"K\x01", b"K\x00", b"J\xff\xff\xff\xff", b"q\x00", b"h\x00"),
    *(b"h\x01", b"r\xff\xff\xff\x7f", b"X\x01\x00\x00\x00a", b"X\xff\xff\xff\xff", b"U\x01a", b"\x8a\x01\x05", b"\x8a\xff"),
    *(b"\x8b\xff\xff\xff\x7f", b"I1\n"),
    *(b"ccollections\nOrderedDict\n", b"cbuiltins\neval\n", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"P1\n"),
    *(b"ctorch\nTensor\n", b"ctorch.storage\nUntypedStorage\n", b"cbuiltins\nbytearray\n", b"ctorch\nSize\n", b"ibuiltins\neval\n"),
    *(b"c_codecs\nencode\n", b"cbuiltins\nset\n", b"\x82\x01", b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f"),
    *(b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",),
    *(b"I99999999999\n", b"L5L\n", b"F1e400\n", b"S'a'\n", b"Vx\n", b"\x8d\x00\x00\x00\x00\x00\x00\x00\x80"),
]  # fmt: skip
assert all(isinstance(piece, bytes) for piece in PIECES)


@FUZZ
@given(pieces=st.lists(st.sampled_from([*PIECES, *OPCODES]), max_size=40))
def test_any_instructions(pieces, tmp_path):
    pickled = b"\x80\x02" + b"".join(pieces) + b"."
    survives(torch_zip_of(pickled, tmp_path / "x", {"0": bytes(16)}), tmp_path)
    survives(legacy_file(pickled, tmp_path / "y"), tmp_path)
    with contextlib.suppress(InputError, UnsupportedError):
        read_pickle(io.BytesIO(pickled), "x")


@FUZZ
@given(
    count=st.integers(-1, 2**70),
    size=st.lists(st.integers(-2, 2**40), max_size=4),
    stride=st.lists(st.integers(-2, 2**40), max_size=4),
    offset=st.integers(-5, 2**40),
)
def test_any_shape(count, size, stride, offset, tmp_path):
    for number in (4, count):
        pickled = tensor_pickle(count=number, size=size, stride=stride, offset=offset)
        survives(torch_zip_of(pickled, tmp_path / "x", {"0": bytes(16)}), tmp_path)
        survives(legacy_file(pickled, tmp_path / "y"), tmp_path)


# --- bombs ------------------------------------------------------------------------------------------------------------------------


def pickled(value):
    return pickle.dumps(value, 2)


def call(module, name, *arguments):
    """A pickle that calls something."""
    body = b"".join(pickled(each)[2:-1] for each in arguments)
    return b"\x80\x02c" + module.encode() + b"\n" + name.encode() + b"\n(" + body + b"tR."


def nested(depth, step=b"\x85"):
    """Tuples in tuples."""
    return b"\x80\x02)" + step * depth + b"."


def laughs(depth=60):
    """A tuple of twice the tuple of twice ..., as a key: hashing it would take 2^60 steps."""
    return b"\x80\x02}N\x85" + b"q\x00h\x00\x86" * depth + b"K\x01s."


def evil(path):
    """What attacks on pickles call, with the name that must be listed."""
    touch = f"touch {path}"
    return {
        "os.system": (call("os", "system", touch), "os.system"),
        "posix.system": (pickled(Bomb(path)), "posix.system"),
        "eval": (call("builtins", "eval", f"__import__('os').system({touch!r})"), "builtins.eval"),
        "eval of python 2": (call("__builtin__", "eval", f"__import__('os').system({touch!r})"), "builtins.eval"),
        "exec": (call("builtins", "exec", f"open({str(path)!r}, 'w')"), "builtins.exec"),
        "subprocess": (call("subprocess", "check_output", ["touch", str(path)]), "subprocess.check_output"),
        "runpy": (call("runpy", "run_path", str(path)), "runpy.run_path"),
        "hub": (call("torch.hub", "load", "evil/repo", "model"), "torch.hub.load"),
        "torch.load": (call("torch", "load", str(path)), "torch.load"),
        "torch inside of torch": (call("torch.serialization", "os.system", touch), "torch.serialization.os.system"),
        "getattr": (call("builtins", "getattr", 1, "__class__"), "builtins.getattr"),
        "pty": (call("pty", "spawn", "/bin/sh"), "pty.spawn"),
        "by position": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04" + b"true" + b"\x85R.", "os.system"),
        "instance": (b"\x80\x02(X\x04\x00\x00\x00trueios\nsystem\n.", "os.system"),
        "old object": (b"\x80\x02(cos\nsystem\nX\x04\x00\x00\x00trueo.", "os.system"),
        "nested": (
            b"\x80\x02}X\x01\x00\x00\x00a"
            + call("os", "system", touch)[2:-1]
            + b"sX\x01\x00\x00\x00b"
            + call("builtins", "eval", "1")[2:-1]
            + b"s.",
            "builtins.eval",
        ),
        "as an argument": (
            b"\x80\x02ccollections\nOrderedDict\n(" + call("os", "system", touch)[2:-1] + b"tR.",
            "",
        ),
        "build": (b"\x80\x02cos\nPathLike\n)\x81}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb.", "os.system"),
        "dotted": (b"\x80\x04\x8c\x08builtins\x8c\x0eeval.__class__\xe2\x80\xa6"[:-3] + b"\x93)R.", "eval"),
    }


@pytest.mark.parametrize("name", evil("x"))
@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_no_code_runs(kind, name, tmp_path):
    sentinel = tmp_path / "exploded"
    bomb, asked = evil(sentinel)[name]
    path = tmp_path / "bomb.pt"
    {"zip": torch_zip_of, "legacy": legacy_file, "plain": lambda data, place: place.write_bytes(data)}[kind](bomb, path)
    start, before = time.perf_counter(), set(sys.modules)
    with pytest.raises((InputError, UnsupportedError), match=r"bomb\.pt") as caught:
        load_checkpoint(path)
    assert time.perf_counter() - start < SECONDS
    assert not sentinel.exists()
    assert not {"pty", "runpy", "torch.hub.evil"} & (set(sys.modules) - before), "nothing that a file names is imported"
    assert NEXT_STEP.search(str(caught.value))
    if kind != "plain" and asked and bomb[1] == 2:
        assert asked in str(caught.value)


def test_code_inside_of_every_other_kind_does_not_run(tmp_path, folders):
    sentinel = tmp_path / "exploded"
    bomb = pickled(Bomb(sentinel))
    script = zip_of({"data.pkl": bomb, "constants.pkl": bomb, "code/__torch__.py": b"import os"}, tmp_path / "script.pt")
    inner = torch_zip_of(bomb, tmp_path / "inner.pt").read_bytes()
    members = {"serialized_exported_program.json": b"{}", "serialized_state_dict.pt": inner}
    exported = zip_of(members, tmp_path / "program.pt2", folder="")
    sharded = write(tmp_path / "x.bin.index.json", b'{"weight_map": {"w": "inner.pt"}}')
    table = tmp_path / "table"
    table.mkdir()
    (table / ".metadata").write_bytes(pickle.dumps(Bomb(sentinel), 4))
    piece = tmp_path / "piece"
    save_distributed({"a": [1, "x" * 5000]}, piece)
    data, large = (piece / "__0_0.distcp").read_bytes(), torch_zip_of(bomb, tmp_path / "large.pt").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as whole:
        assert any(info.filename.endswith("data.pkl") for info in whole.infolist())
    (piece / "__0_0.distcp").write_bytes(large + data[len(large) :] if len(large) < len(data) else large)
    for path in (script, exported, sharded, table, piece):
        with pytest.raises((InputError, UnsupportedError), match=str(tmp_path)):
            load_checkpoint(path)
    assert not sentinel.exists()


EXHAUSTING = {
    "tuples in tuples": (nested(100_000), "nests more than 200 tuples"),
    "tuples as keys": (b"\x80\x02}" + nested(5000)[2:-1] + b"Ns.", "nests more than 200 tuples"),
    "billion laughs": (laughs(), "a key of more than 10,000 entries"),
    "billion laughs in a set": (
        b"\x80\x02cbuiltins\nset\n]N\x85" + b"q\x00h\x00\x86" * 60 + b"a\x85R.",
        "calls builtins.set in a way that torch.save never does",
    ),
    "memory by bytes": (call("builtins", "bytearray", 2**40), "calls builtins.bytearray in a way"),
    "memory by storage": (call("torch.storage", "UntypedStorage", 2**40), "makes memory by itself"),
    "memory by tensor": (call("torch", "FloatTensor", 2**20, 2**20), "makes memory by itself"),
    "memory by new object": (call("torch", "Tensor", 2**20, 2**20).replace(b"R.", b"\x81."), "makes memory by itself"),
    "slow encoding": (call("_codecs", "encode", "a" * 100_000, "punycode"), "calls _codecs.encode in a way"),
    "tensor beyond memory": (tensor_pickle(size=(2**40,)), "claims more than the 16 B that its memory has"),
    "memory beyond the file": (tensor_pickle(count=2**40), "claims 4.1e+03 GiB of memory|claim 4.1e+03 GiB of memory|of memory, where the"),
    "negative memory": (tensor_pickle(count=-4), "numbers of memory"),
    "tensor repeated": (tensor_pickle(size=(2**20, 2**20), stride=(0, 0)), r"repeats 16 B of memory to 4\.1e\+03 GiB"),
    "tensor with hooks": (tensor_pickle(hooks=b"]"), "has a tensor with hooks, which are code"),
    "methods replaced": (
        b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb.",
        "would replace what collections.OrderedDict does",
    ),
    "memo": (b"\x80\x02Nr\xff\xff\xff\x7f.", ""),
    "length of a text": (b"\x80\x02X\xff\xff\xff\xff.", "its pickle breaks off"),
    "length of bytes": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "its pickle breaks off"),
    "extension": (b"\x80\x02\x82\x01.", r"instruction EXT1"),
    "nested tensor": (call("torch._utils", "_rebuild_nested_tensor", 1), "has a nested tensor"),
    "no end": (b"\x80\x02" + b"N" * 1000, "its pickle breaks off"),
}


def peak_memory():
    """Most memory that this process had so far, in KiB."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("name", EXHAUSTING)
def test_files_built_to_exhaust_time_or_memory(name, kind, tmp_path):
    bomb, message = EXHAUSTING[name]
    path = tmp_path / "bomb.pt"
    memory = () if name == "memo" else ((b"0", bytes(16)),)
    torch_zip_of(bomb, path, {"0": bytes(16)}) if kind == "zip" else legacy_file(bomb, path, memory)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts afresh
    before, start = peak_memory(), time.perf_counter()
    if name == "memo":
        load_checkpoint(path)  # harmless: the memo is a dict
    else:
        with pytest.raises((InputError, UnsupportedError), match=message) as caught:
            load_checkpoint(path)
        assert NEXT_STEP.search(str(caught.value))
    assert time.perf_counter() - start < SECONDS
    assert peak_memory() - before < 100 * 1024


def test_legacy_files_cannot_claim_the_same_bytes_many_times(tmp_path):
    parts = b"".join(tensor_pickle(key=str(n))[2:-1] + b"0" for n in range(50))
    with pytest.raises(UnsupportedError, match="its tensors claim 800 B of memory, where the file has 24 B"):
        load_checkpoint(legacy_file(b"\x80\x02" + parts + tensor_pickle()[2:], tmp_path / "x.pt"))


def test_an_exhausting_number_of_instructions_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_INSTRUCTIONS", 1000)
    with pytest.raises(UnsupportedError, match="has more than 1,000 instructions"):
        load_checkpoint(torch_zip_of(b"\x80\x02" + b"N0" * 1000 + b"N.", tmp_path / "x.pt"))


def test_zip_bombs_and_long_tables_are_refused(tmp_path, monkeypatch):
    bomb = zip_of({"data.pkl": bytes(50 * 2**20)}, tmp_path / "x.pt", compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 2**17
    with pytest.raises(UnsupportedError, match="compressed or encrypted"):
        load_checkpoint(bomb)
    script = zip_of({"data.pkl": b"N.", "constants.pkl": b"N."}, tmp_path / "y.pt")
    with zipfile.ZipFile(script, "a", zipfile.ZIP_DEFLATED) as whole:
        whole.writestr("archive/code/__torch__.py", bytes(50 * 2**20))
    with pytest.raises(InputError, match="without parameters"):
        load_checkpoint(script)  # the source is left alone
    monkeypatch.setattr(archive, "MAX_DIRECTORY", 2**16)
    with pytest.raises(UnsupportedError, match="in one piece, where at most 64 KiB is read"):
        load_checkpoint(zip_of({f"data/{n}": b"" for n in range(2000)}, tmp_path / "z.pt"))


def test_members_that_claim_more_than_the_file_are_refused(tmp_path):
    path = torch_zip_of(tensor_pickle(), tmp_path / "x.pt", {"0": bytes(16)})
    data = path.read_bytes()
    at = data.rindex(b"archive/data/0") - 46
    huge = (2**31).to_bytes(4, "little")
    path.write_bytes(data[: at + 20] + huge * 2 + data[at + 28 :])
    with pytest.raises(UnsupportedError, match=r"claims 2 GiB, and the file ends before"):
        load_checkpoint(path)


def test_large_json_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="of JSON, where at most 64 MiB is read"):
        load_checkpoint(write(tmp_path / "x.index.json", b" " * (64 * 2**20 + 1)))


def distributed_with(folder, chunks, *, size=(4, 4), places=None, dtype=torch.float32):
    """A folder whose table says what one likes of one tensor; every chunk is a piece of 2 x 4 ones."""
    save_distributed({"w": torch.ones(2, 4)}, folder)
    table = pickle.loads((folder / ".metadata").read_bytes())
    properties = table.state_dict_metadata["w"].properties
    properties.dtype = dtype
    made = [metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]
    table.state_dict_metadata["w"] = metadata.TensorStorageMetadata(properties, torch.Size(size), made)
    info = next(iter(table.storage_data.values()))
    table.storage_data = {metadata.MetadataIndex("w", chunk.offsets): places or info for chunk in made}
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    return folder


HALVES = [((0, 0), (2, 4)), ((2, 0), (2, 4))]
TABLES = {
    "whole": ({"chunks": HALVES}, None),
    "too large": (
        {"chunks": [((k * 2**19, 0), (2**19, 2**20)) for k in range(2)], "size": (2**20, 2**20)},
        "its tensors claim more than the",
    ),
    "outside": ({"chunks": HALVES, "places": _StorageInfo("../outside", 0, 4)}, r"names '\.\./outside', which is not inside"),
    "beyond": ({"chunks": HALVES, "places": _StorageInfo("__0_0.distcp", 10**9, 4)}, "it ends before the piece at byte 1,000,000,000"),
    "extension": (
        {"chunks": HALVES, "places": _StorageInfo("__0_0.distcp", 0, 4, transform_descriptors=["zstd"])},
        "compressed by an extension",
    ),
    "gaps": ({"chunks": [((0, 0), (2, 4)), ((1, 0), (2, 4))]}, "its parts overlap and leave gaps"),
    "too few": ({"chunks": HALVES[:1]}, "its parts do not add up to the whole"),
    "outside of the tensor": ({"chunks": [((3, 0), (2, 4))]}, "a part of 'w' lies outside of it"),
    "other shape": ({"chunks": [((0, 0), (4, 2)), ((0, 2), (4, 2))]}, r"is not the float32 tensor of shape \(4, 2\) of the table"),
    "other kind": ({"chunks": HALVES, "dtype": torch.int32}, r"is not the int32 tensor of shape \(2, 4\) of the table"),
    "other format": ({"chunks": HALVES, "places": _StorageInfo("__0_0.distcp", 1, 40)}, "in a form that is not read here. Turn the folder"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_distributed_checkpoints(name, tmp_path):
    options, message = TABLES[name]
    folder = distributed_with(tmp_path / "dcp", **options)
    (tmp_path / "outside").write_bytes(b"PK\x03\x04")
    if message is None:
        assert torch.equal(load_checkpoint(folder)["w"], torch.ones(4, 4))
        return
    with pytest.raises((InputError, UnsupportedError), match=message) as caught:
        load_checkpoint(folder)
    assert NEXT_STEP.search(str(caught.value))


def test_numbers_lie_at_multiples_of_their_size_and_copies_are_bounded(tmp_path):
    path = write(tmp_path / "x", bytes(100))
    file = MappedFile(path)
    view = View(Memory("w", torch.float32, 40), torch.float32, 0, (10,), (1,))
    for start in range(2):
        assert file.tensor(view, start, 40, path).data_ptr() % 4 == 0
    assert file.tensor(view, 1, 40, path).data_ptr() == file.tensor(view, 1, 40, path).data_ptr()
    file.tensor(view, 3, 40, path)
    with pytest.raises(UnsupportedError, match="its parts overlap, and together are larger than the file"):
        file.tensor(view, 5, 40, path)


def test_calls_around_the_content_of_legacy_files_are_refused(tmp_path):
    path = legacy_file(tensor_pickle(), tmp_path / "x.pt")
    path.write_bytes(path.read_bytes().replace(pickle.dumps(["0"], 2), call("collections", "OrderedDict")))
    with pytest.raises(UnsupportedError, match="the pickles around its content hold calls"):
        load_checkpoint(path)


def test_what_the_command_says_of_a_bomb(tmp_path):
    path = tmp_path / "bomb.pt"
    torch.save({"bomb": Bomb(tmp_path / "exploded")}, path)
    result = subprocess.run(
        [sys.executable, "-c", "import ntkscope_cli; ntkscope_cli.main()", "inspect", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "cannot be allowed at all" in " ".join(result.stderr.split())
    assert not (tmp_path / "exploded").exists()
