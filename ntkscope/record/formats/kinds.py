"""Which kind of checkpoint something is, by its content; names only help where content is cut."""

from dataclasses import dataclass
from pathlib import Path

from ntkscope._checks import InputError, UnsupportedError
from ntkscope._display import Displayed
from ntkscope.record.formats.archive import Archive, opened, read_archive
from ntkscope.record.formats.distributed_table import TABLE
from ntkscope.record.formats.guards import DamagedError

HEAD = 1024  # bytes looked at
MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch wrote at the head of a file before 1.6
ZIP = b"PK\x03\x04"
INDEX = ".index.json"


@dataclass(frozen=True)
class FileKind(Displayed):
    """A kind of checkpoint.

    Attributes:
        key: Its short name.
        title: What it is called.
        note: What cannot be read from it; empty if all can.
    """

    key: str
    title: str
    note: str = ""


KINDS = {
    kind.key: kind
    for kind in (
        FileKind("torch", "file of torch.save"),
        FileKind("legacy", "file of torch.save before torch 1.6", "All of it is read into memory: this format cannot be mapped."),
        FileKind("safetensors", "safetensors file", "It holds tensors only, no optimizer state; step and learning rate are unknown."),
        FileKind("index", "index of shards", "The shards hold tensors only."),
        FileKind(
            "script",
            "TorchScript archive",
            "Parameters, buffers and other tensors are read by name. The model is code and is not run: give --model. Packed parameters of "
            "quantized layers and constants of a traced graph are not read, and parameters are not told from buffers.",
        ),
        FileKind(
            "exported",
            "torch.export archive",
            "Parameters and buffers are read by name. The program is not run: give --model. Its constants are not read.",
        ),
        FileKind(
            "distributed",
            "torch.distributed.checkpoint folder",
            "Its tensors are read into memory: they lie at odd places, and several ranks may have saved one in pieces. Pieces that an "
            "extension compressed are not read.",
        ),
        FileKind("folder", "folder of weights (Hugging Face)"),
    )
}
RESAVE = "Load it where it came from, and save the model's state_dict with torch.save or safetensors."
# What people take for a checkpoint of PyTorch: first bytes, what it is, and what to do.
FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "a gzip archive", "Unpack it (gunzip, tar -xzf) and give the file inside."),
    (b"BZh", "a bzip2 archive", "Unpack it (bunzip2, tar -xjf) and give the file inside."),
    (b"\xfd7zXZ", "an xz archive", "Unpack it (unxz, tar -xJf) and give the file inside."),
    (b"(\xb5/\xfd", "a zstd archive", "Unpack it (unzstd) and give the file inside."),
    (b"version https://git-lfs", "a pointer of git-lfs, not the file itself", "Fetch the file: git lfs pull."),
    (b"\x89HDF", "an HDF5 file (Keras)", RESAVE),
    (b"GGUF", "a GGUF file (llama.cpp), whose weights are mostly quantized", "Give the safetensors files it was made from."),
    (b"\x93NUMPY", "a NumPy array", "Give a file that torch.save or safetensors wrote; for data, an .npz file with --data."),
    (b"<!DOCTYPE", "a web page", "The download went wrong: open the address in a browser, sign in if it asks, and download again."),
    (b"<html", "a web page", "The download went wrong: open the address in a browser, sign in if it asks, and download again."),
)


def kind_of(path: str | Path) -> FileKind:
    """Say which kind of checkpoint something is; nothing in it is loaded.

    Args:
        path: A file or folder.

    Returns:
        The kind, with what cannot be read from it.

    Raises:
        InputError: If there is nothing, or nothing that is a checkpoint.
        UnsupportedError: If it is of a kind that is not read.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"No such file: {path}. Give a checkpoint file or a trace folder.")
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise InputError(f"{path} is no file (a device, pipe or socket). Give a checkpoint file.")
    with opened(path) as handle:
        size = path.stat().st_size
        head = handle.read(HEAD)
    if not head:
        raise InputError(f"{path} is empty. Was the run stopped while it was saving? Use an earlier file.")
    if head.startswith(ZIP):
        return _zip(read_archive(path))
    if MAGIC in head[:64]:
        return KINDS["legacy"]
    if path.name.endswith(INDEX):
        return KINDS["index"]
    is_header = size > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8
    if is_header or path.suffix == ".safetensors":
        return KINDS["safetensors"]
    _refuse_foreign(path, head)
    raise InputError(
        f"{path} is no checkpoint of a kind that is read: neither a file of torch.save nor safetensors, TorchScript or torch.export. "
        "Give one of these, or copy it again if it should be one."
    )


def _folder(path: Path) -> FileKind:
    """Recognize a folder."""
    if (path / TABLE).is_file():
        return KINDS["distributed"]
    if any(path.glob("global_step*/mp_rank_*_model_states.pt")) or any(path.glob("mp_rank_*_model_states.pt")):
        raise UnsupportedError(
            f"{path} is a checkpoint of DeepSpeed, split over ranks. Put it together with the script it holds: "
            "python zero_to_fp32.py . weights.pt; then give weights.pt."
        )
    if any(path.glob("*.safetensors")) or any(path.glob("*.bin")) or any(path.glob(f"*{INDEX}")):
        return KINDS["folder"]
    for name, made in (("saved_model.pb", "TensorFlow"), ("checkpoint", "TensorFlow or Flax"), ("_CHECKPOINT_METADATA", "Orbax (JAX)")):
        if (path / name).is_file():
            raise UnsupportedError(f"{path} is a checkpoint of {made}, which is not read. Convert it to PyTorch, and give its state_dict.")
    inside = sorted(part for part in path.iterdir() if part.suffix in (".pt", ".pth", ".ckpt") or _holds_model(part))
    if inside:
        several = f"{path / '*'}{inside[0].suffix}{'/' * inside[0].is_dir()}"
        raise InputError(f"{path} is a folder of checkpoints. Give one of them, as {inside[0]}, or several of one run, as {several}")
    raise InputError(
        f"{path} is a folder without manifest.json, so it is no trace; and no checkpoint: it has neither .metadata nor *.safetensors, "
        "*.bin or *.index.json. Give the folder that Recorder(path=...) wrote, a checkpoint file, or a folder of weights."
    )


def _holds_model(path: Path) -> bool:
    """Say whether a folder in a folder looks like a checkpoint."""
    return path.is_dir() and any((path / name).is_file() for name in (TABLE, "config.json", "model.safetensors", "pytorch_model.bin"))


def _zip(archive: Archive) -> FileKind:
    """Recognize a zip archive by its members."""
    if "data.pkl" in archive:
        return KINDS["script" if "constants.pkl" in archive else "torch"]
    if "archive_format" in archive or "serialized_exported_program.json" in archive:
        return KINDS["exported"]
    if any(name.endswith(".npy") for name in archive.members):
        raise UnsupportedError(
            f"{archive.path} is an .npz file of NumPy arrays, no checkpoint. Give it with --data, or save a state_dict with torch.save."
        )
    if "config.json" in archive and "model.weights.h5" in archive:
        raise UnsupportedError(f"{archive.path} is a Keras model, which is not read. {RESAVE}")
    raise DamagedError(archive.place, "it is a zip archive without data.pkl, which torch.save writes")


def _refuse_foreign(path: Path, head: bytes) -> None:
    """Say what something is that is no checkpoint."""
    for start, what, advice in FOREIGN:
        if head.startswith(start):
            raise UnsupportedError(f"{path} is {what}, no checkpoint of PyTorch. {advice}")
    if head[257:262] == b"ustar" or path.suffix == ".tar":
        raise UnsupportedError(
            f"{path} is a tar archive. Unpack it (tar -xf) and give the file inside; if torch before 0.1.10 wrote it, load it where you "
            "trust it and torch.save it again."
        )
    if path.suffix == ".onnx":
        raise UnsupportedError(f"{path} is an ONNX graph, whose weights have no module names. Give the checkpoint it was exported from.")
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        raise UnsupportedError(
            f"{path} is a plain pickle, not a file of torch.save; reading it could run code. Load it where you trust it, and save the "
            "model's state_dict with torch.save."
        )
