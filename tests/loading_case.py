"""Files of every kind that checkpoints come in, and hostile ones."""

import json
import os
import pickle
import struct
import warnings
import zipfile

import torch
from safetensors.torch import save_file
from torch import nn


class Bomb:
    """A pickle that would run code: it touches a file, which must never appear."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def small_model():
    """A model with parameters, statistics and a buffer of whole numbers."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    model.register_buffer("codes", torch.arange(3))
    return model


def trained(make_optimizer, steps=3):
    """A small model after a few steps, and its optimizer."""
    model = small_model()
    optimizer = make_optimizer(model)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 15).reshape(5, 3).sin() * (step + 1)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def quietly(function, *args, **options):
    """Call what warns of its own deprecation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_script(model, path):
    quietly(lambda: torch.jit.save(torch.jit.script(model.eval()), path))


def save_exported(model, path):
    quietly(lambda: torch.export.save(torch.export.export(model.eval(), (torch.ones(2, 3),)), path))


def save_old_exported(weights, path):
    """As torch up to 2.7 wrote it."""
    torch.save(dict(weights), path.with_suffix(".inner"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
        archive.write(path.with_suffix(".inner"), "serialized_state_dict.pt")
        archive.writestr("version", "5.3")
    path.with_suffix(".inner").unlink()


def save_distributed(content, folder):
    import torch.distributed.checkpoint as dcp

    quietly(dcp.save, content, checkpoint_id=folder)


def save_shards(weights, folder, suffix="safetensors"):
    """Two shards and their index, as Hugging Face writes them."""
    folder.mkdir(exist_ok=True)
    names = list(weights)
    parts = {1: names[: len(names) // 2], 2: names[len(names) // 2 :]}
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    places = {}
    for part, held in parts.items():
        file = f"{stem}-0000{part}-of-00002.{suffix}"
        tensors = {name: weights[name].clone() for name in held}
        save_file(tensors, folder / file) if suffix == "safetensors" else torch.save(tensors, folder / file)
        places |= dict.fromkeys(held, file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def zip_of(members, path, folder="archive/", compression=zipfile.ZIP_STORED):
    """A zip archive with given members."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{folder}{name}", data)
    return path


def torch_zip_of(pickled, path, memory=None):
    """An archive as torch.save writes it, around any pickle."""
    members = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", ".data/serialization_id": b"1"}
    return zip_of(members | {f"data/{key}": data for key, data in (memory or {}).items()}, path)


def tensor_pickle(*, count=4, size=(4,), stride=(1,), offset=0, kind="FloatStorage", key="0", hooks=b"ccollections\nOrderedDict\n)R"):
    """The pickle of a tensor that claims what one likes."""
    numbers = {name: b"(" + b"".join(_number(n) for n in values) + b"t" for name, values in (("size", size), ("stride", stride))}
    storage = b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX" + struct.pack("<I", len(key)) + key.encode()
    storage += b"X\x03\x00\x00\x00cpu" + _number(count) + b"tQ"
    view = storage + _number(offset) + numbers["size"] + numbers["stride"]
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + view + b"\x89" + hooks + b"tR."


def legacy_file(pickled, path, memory=((b"0", b"\0" * 16),)):
    """A file as torch before 1.6 wrote it, around any pickle."""
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    head += pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
    keys = pickle.dumps([key.decode() for key, _ in memory], 2)
    data = b"".join(struct.pack("<q", len(part) // 4) + part for _, part in memory)
    path.write_bytes(head + pickled + keys + data)
    return path


def _number(value):
    """A whole number in a pickle of protocol 2."""
    data = value.to_bytes(max(1, (value.bit_length() + 8) // 8), "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data
