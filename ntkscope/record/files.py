"""The files of a trace folder: written to a temporary name and renamed, read whole or in part."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from ntkscope._atomic import replace_when_done
from ntkscope._checks import InputError
from ntkscope._tensor_file import write_tensors
from ntkscope.record.facts import SCHEMA, RunFacts
from ntkscope.record.snapshot import Snapshot

UNREADABLE = "{path} is truncated or no snapshot: {error}. Delete the file to go on without it."


def read_snapshot(path: Path) -> Snapshot:
    """Read one snapshot file.

    Args:
        path: The file.

    Returns:
        The snapshot.

    Raises:
        InputError: If it is truncated, foreign or damaged.
    """
    try:
        # Copied to memory of torch's own alignment, on which the rounding of matrix products depends: read or live, results are the same.
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        with safetensors.safe_open(path, framework="pt") as handle:
            numbers = json.loads(handle.metadata()["numbers"])
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(UNREADABLE.format(path=path, error=error)) from error
    return Snapshot.join(numbers, tensors)


def read_numbers(path: Path) -> dict[str, Any]:
    """Read the numbers of a snapshot file, but none of its tensors.

    Args:
        path: The file.

    Returns:
        By field name, not checked further.

    Raises:
        InputError: If it is truncated or foreign.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as handle:
            numbers = json.loads(handle.metadata()["numbers"])
            return numbers | {"time": float(numbers["time"])}
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(UNREADABLE.format(path=path, error=error)) from error


def read_tensor(path: Path, name: str) -> Tensor | None:
    """Read one tensor of a snapshot file.

    Args:
        path: The file.
        name: The field.

    Returns:
        The tensor; None if the snapshot has none of that name.

    Raises:
        InputError: If the file is truncated or foreign.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as handle:
            return handle.get_tensor(name) if name in handle.keys() else None  # ruff: ignore[in-dict-keys]
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(UNREADABLE.format(path=path, error=error)) from error


class TraceWriter:
    """Writes a trace folder as the run goes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, facts: RunFacts, probe: Mapping[str, Tensor]) -> None:
        """Write the manifest and the probe.

        Args:
            facts: What does not change.
            probe: Targets.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with replace_when_done(self.folder / "probe.safetensors") as temporary:
            write_tensors(probe, temporary)
        self.write_facts(facts)

    def write_facts(self, facts: RunFacts) -> None:
        """Write the manifest alone.

        Args:
            facts: What does not change.
        """
        with replace_when_done(self.folder / "manifest.json") as temporary:
            temporary.write_text(json.dumps({"schema": SCHEMA, "facts": asdict(facts)}, indent=1), encoding="utf-8")

    def write(self, snapshot: Snapshot) -> Path:
        """Write one snapshot.

        Args:
            snapshot: The newest moment.

        Returns:
            Its file.
        """
        numbers, tensors = snapshot.split()
        path = self.folder / f"snapshot-{snapshot.step:09d}.safetensors"
        with replace_when_done(path) as temporary:
            write_tensors(tensors, temporary, metadata={"numbers": json.dumps(numbers)})
        return path

    def forget_after(self, step: int) -> None:
        """Remove snapshots later than a step: a resumed run will write them anew.

        Args:
            step: The last step to keep.
        """
        for path in self.folder.glob("snapshot-*.safetensors"):
            if int(path.stem.rpartition("-")[2]) > step:
                path.unlink()
