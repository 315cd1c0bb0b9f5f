"""Folders of weights, as Hugging Face libraries write them: config, weights in one file or in shards, and what a trainer leaves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ntkscope._checks import InputError
from ntkscope.record.formats.guards import inside, read_json
from ntkscope.record.formats.kinds import INDEX
from ntkscope.record.formats.safetensor_files import find_shards, read_index

NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "random_states", "sampler", "scaler")
OPTIMIZERS = ("optimizer.pt", "optimizer.bin")  # of Transformers and Accelerate


def read_folder(path: Path, read_file: Callable[[Path], Any]) -> dict[str, Any]:
    """Read a folder; safetensors come before files of torch.save, which may hold the same.

    Args:
        path: The folder.
        read_file: Reads one checkpoint file.

    Returns:
        Weights under `state_dict`; if they are there, `config`, the `optimizer` and the `trainer_state` of a run.

    Raises:
        InputError: If files are missing or damaged, or it is not clear which are the weights.
        UnsupportedError: If a file asks for more than the caller allows, or leaves the folder.
    """
    content: dict[str, Any] = {"state_dict": _weights(path, read_file)}
    for key, name in (("config", "config.json"), ("trainer_state", "trainer_state.json")):
        if (path / name).is_file():
            content[key] = read_json(inside(path, name, path), path / name)
    found = next((name for name in OPTIMIZERS if (path / name).is_file()), None)
    if found is not None:
        content["optimizer"] = read_file(inside(path, found, path))
    return content


def _weights(path: Path, read_file: Callable[[Path], Any]) -> Any:
    """Read the weights."""
    for pattern in ("*.safetensors", "*.bin"):
        files = sorted(file for file in path.glob(pattern) if not file.name.startswith(NOT_WEIGHTS))
        indices = sorted(path.glob(f"{pattern}{INDEX}"))
        if len(indices) == 1:
            return read_index(indices[0], read_file)
        shards = find_shards(files)
        if shards is not None and not indices:
            return _merged(path, [read_file(inside(path, shard.name, path)) for shard in shards])
        if len(files) == 1:
            return read_file(inside(path, files[0].name, path))
        if files or indices:
            names = ", ".join(file.name for file in [*indices, *files][:6])
            raise InputError(f"{path} has several files that may be the weights ({names}). Give one of them.")
    raise InputError(f"{path} has no weights: neither *.safetensors nor *.bin. Download them as well.")


def _merged(path: Path, parts: list[Any]) -> dict[str, Any]:
    """Put shards together."""
    whole: dict[str, Any] = {}
    for part in parts:
        if not isinstance(part, dict) or whole.keys() & part.keys():
            raise InputError(f"The shards in {path} do not belong together: they hold the same tensors. Download them again.")
        whole |= part
    return whole
