"""A trace: the snapshots of one run, in memory, in a folder, or inside a checkpoint.

A folder holds `manifest.json`, `probe.safetensors` and one `snapshot-<step>.safetensors` each, written to a temporary name and
renamed: a killed run loses at most the snapshot in flight. No pickle.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ntkscope._checks import InputError
from ntkscope._display import Displayed
from ntkscope.record.facts import SCHEMA, RunFacts, check_schema, facts_from
from ntkscope.record.fields import RESCUE
from ntkscope.record.files import read_numbers, read_snapshot, read_tensor
from ntkscope.record.pictures import COLOUR, GREY, MAX_SIDE
from ntkscope.record.retiming import Retiming
from ntkscope.record.snapshot import Snapshot


@dataclass
class Trace(Displayed):
    """The snapshots of one run, ordered by step; those in a folder are read when asked for.

    Attributes:
        facts: What does not change.
        probe: `targets` and, if known, `clean_targets`, `query_targets`, `inputs` (of an audited run) and `pictures` (of images).
        source: Where it came from.
        entries: Snapshots, or the files that hold them, by step.
        retimed: Other times by step, see `rescale.rescaled`; empty for times as recorded.
        is_from_checkpoints: Whether it was made of bare checkpoints, and not recorded; where it is saved, this is not.
    """

    facts: RunFacts
    probe: dict[str, Tensor]
    source: str
    entries: dict[int, Snapshot | Path] = field(default_factory=dict)
    retimed: dict[int, Retiming] = field(default_factory=dict)
    is_from_checkpoints: bool = False

    @property
    def steps(self) -> list[int]:
        """Steps of the snapshots, ascending."""
        return sorted(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, position: int) -> Snapshot:
        step = self.steps[position]
        entry = self.entries[step]
        snapshot = read_snapshot(entry) if isinstance(entry, Path) else entry
        self._check(snapshot)
        return self.retimed[step].of(snapshot) if step in self.retimed else snapshot

    def __iter__(self) -> Iterator[Snapshot]:
        before: tuple[int, float] | None = None
        for position in range(len(self)):
            snapshot = self[position]
            if before is not None:
                _check_order(before, (snapshot.step, snapshot.time))
            before = (snapshot.step, snapshot.time)
            yield snapshot

    @property
    def times(self) -> list[float]:
        """Optimizer times of the snapshots, ascending; of those in files only the numbers are read.

        Returns:
            One per step.

        Raises:
            InputError: If time runs backwards between two of them, or a file is damaged.
        """
        found: list[float] = []
        for step in self.steps:
            entry = self.entries[step]
            time = float(read_numbers(entry).get("time", 0.0)) if isinstance(entry, Path) else entry.time
            if step in self.retimed:
                time = self.retimed[step].offset + self.retimed[step].factor * time
            if found:
                _check_order((self.steps[len(found) - 1], found[-1]), (step, time))
            found.append(time)
        return found

    def gradient_audits(self) -> list[Tensor | None]:
        """Read what the audits of gradients found; of files nothing else is read.

        Returns:
            For each snapshot the rows since the one before, None where no step was audited.
        """
        entries = [self.entries[step] for step in self.steps]
        return [read_tensor(entry, "gradient_audit") if isinstance(entry, Path) else entry.gradient_audit for entry in entries]

    def _check(self, snapshot: Snapshot) -> None:
        """Check that a snapshot is of this trace."""
        facts, at = self.facts, f"The snapshot at step {snapshot.step}"
        if snapshot.probe_hash not in (None, facts.probe_hash):
            raise InputError(f"{at} is of another probe set than the trace (their hashes differ). Remove it, or record the run again.")
        shape = (facts.num_examples, facts.num_classes)
        if tuple(snapshot.outputs.shape) != shape:
            raise InputError(
                f"{at} has outputs {tuple(snapshot.outputs.shape)}, the trace {shape}: it is of another probe or model. "
                "Remove it, or record the run again."
            )
        size = facts.num_examples * (1 if facts.outputs == "trace" else facts.num_classes)
        if snapshot.kernel_upper.numel() != size * (size + 1) // 2:
            raise InputError(
                f"{at} has a kernel of {snapshot.kernel_upper.numel()} packed entries, but outputs={facts.outputs!r} with "
                f"{facts.num_examples} examples and {facts.num_classes} classes takes {size * (size + 1) // 2}. Record the run again."
            )
        if (snapshot.cross_kernel is None) == (facts.num_query > 0):
            raise InputError(f"{at} and the trace disagree on whether there is a query set. Remove it, or record the run again.")

    def append(self, snapshot: Snapshot) -> None:
        """Add a snapshot.

        Args:
            snapshot: The newest moment.
        """
        self.entries[snapshot.step] = snapshot

    def state_dict(self) -> dict[str, Any]:
        """Turn the trace into plain containers and tensors, which `torch.load(weights_only=True)` reads.

        Returns:
            The state.
        """
        snapshots = []
        for snapshot in self:
            numbers, tensors = snapshot.split()
            snapshots.append({"numbers": numbers, "tensors": tensors})
        return {"schema": SCHEMA, "facts": asdict(self.facts), "probe": dict(self.probe), "snapshots": snapshots}


def trace_from_state(state: Mapping[str, Any], source: str) -> Trace:
    """Rebuild a trace from its state.

    Args:
        state: From `Trace.state_dict`, or from a recorder's.
        source: Where it was found, for messages.

    Returns:
        The trace.

    Raises:
        InputError: If it is of another schema or damaged.
    """
    check_schema(state.get("schema"), source)
    try:
        facts = facts_from(state["facts"], source, state["schema"])
        trace = Trace(facts, _probe(state["probe"], facts, source), source)
        for part in state["snapshots"]:
            trace.append(Snapshot.join(dict(part["numbers"]), dict(part["tensors"])))
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(f"The recorder's state in {source} is damaged: {error!r}. {RESCUE}") from error
    return trace


def load_trace(folder: str | Path) -> Trace:
    """Open a trace folder.

    Args:
        folder: Written by a recorder.

    Returns:
        The trace; snapshots are read when asked for.

    Raises:
        InputError: If the folder is no trace, of another schema, or damaged.
    """
    folder = Path(folder)
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise InputError(
            f"{folder} is a folder without manifest.json, so it is no trace. "
            "Give the folder that Recorder(path=...) wrote, or a checkpoint file that holds the recorder's state."
        )
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        probe = load_file(folder / "probe.safetensors")
        schema, values = content.get("schema"), content["facts"]
    except (ValueError, KeyError, AttributeError, TypeError, OSError, safetensors.SafetensorError) as error:
        raise InputError(f"The trace in {folder} is damaged: {error}. {RESCUE}") from error
    check_schema(schema, str(manifest))
    facts = facts_from(values, str(manifest), schema)
    probe = _probe(probe, facts, str(folder))
    files = {int(path.stem.rpartition("-")[2]): path for path in folder.glob("snapshot-*.safetensors")}
    return Trace(facts, probe, str(folder), dict(files))


def _check_order(before: tuple[int, float], after: tuple[int, float]) -> None:
    """Check that time does not run backwards between two snapshots, each given as step and time."""
    if after[1] < before[1]:
        raise InputError(
            f"Time runs backwards between the snapshots at step {before[0]} (time {before[1]:g}) and step {after[0]} (time {after[1]:g}): "
            "they are not of one run. Remove those of the other run."
        )


def _probe(tensors: Mapping[str, Any], facts: RunFacts, source: str) -> dict[str, Tensor]:
    """Check that the probe's targets are there, one per example, and that its pictures can be drawn."""
    lengths = {"targets": facts.num_examples, "clean_targets": facts.num_examples, "query_targets": facts.num_query}
    lengths |= {"inputs": facts.num_examples, "pictures": facts.num_examples}
    probe = dict(tensors)
    is_sound = "targets" in probe and set(probe) <= set(lengths)
    if not (is_sound and all(isinstance(t, Tensor) and t.ndim and len(t) == lengths[name] for name, t in probe.items())):
        raise InputError(f"The probe in {source} is damaged: it must hold `targets`, one per example. Record the run again.")
    pictures = probe.get("pictures")
    if pictures is not None and not _is_drawable(pictures):
        raise InputError(
            f"The pictures of inputs in {source} are damaged: expected bytes of shape [{facts.num_examples}, height, width, 1 or 3] with "
            f"at most {MAX_SIDE} pixels a side, got {pictures.dtype} {list(pictures.shape)}. Record the run again."
        )
    return probe


def _is_drawable(pictures: Tensor) -> bool:
    """Say whether these can be pictures."""
    if pictures.dtype != torch.uint8 or pictures.ndim != 4:
        return False
    _, height, width, channels = pictures.shape
    return min(height, width) >= 1 and max(height, width) <= MAX_SIDE and channels in (GREY, COLOUR)
