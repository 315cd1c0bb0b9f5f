"""Safetensors files that others may read where they may read any other file of ours."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions that new files have.

    `save_file` (0.8) leaves files that only their owner may read: nobody else could analyze a trace or load a result on a shared disk.

    Args:
        tensors: By name.
        path: The file; replaced if it exists.
        metadata: Texts by name.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(mode)
