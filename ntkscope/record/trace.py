"""A trace: the snapshots of one run, in memory, in a folder, or inside a checkpoint.

A folder holds `manifest.json`, `probe.safetensors` and one `snapshot-<step>.safetensors` each, written to a temporary name and
renamed: a killed run loses at most the snapshot in flight. No pickle.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from ntkscope._atomic import replace_when_done
from ntkscope._checks import InputError
from ntkscope._display import Displayed
from ntkscope.record.fields import check_fields
from ntkscope.record.snapshot import Snapshot

SCHEMA = "ntkscope.trace/1"


@dataclass(frozen=True)
class RunFacts:
    """What does not change along a run.

    Attributes:
        num_examples: n of the probe.
        num_classes: C.
        num_params: p, parameters that the optimizer trains.
        num_query: q, 0 without a query set.
        loss: Name of the loss.
        optimizer: Class and settings, for people.
        precond: Kind of M: "identity", "adam", "gate" or "custom".
        stability_edge: θ of theory.md section 2: training is stable while lr * λ_max < θ; None if unknown.
        momentum_lag: Steps by which momentum makes the flow lag, β/(1 − β).
        parameters: Names of the trained parameter tensors.
        parameter_sizes: Their numbers of entries.
        gate: Kind of the gate, None without.
        probe_hash: SHA-256 of probe inputs and targets.
        train_only: Kinds of modules that act differently in training (Dropout, BatchNorm); the probe is followed in evaluation mode.
        stopped: Why recording ended early; empty if it did not.
    """

    num_examples: int
    num_classes: int
    num_params: int
    num_query: int
    loss: str
    optimizer: str
    precond: str
    stability_edge: float | None
    momentum_lag: float
    parameters: list[str]
    parameter_sizes: list[int]
    gate: str | None
    probe_hash: str
    train_only: list[str]
    stopped: str = ""


@dataclass
class Trace(Displayed):
    """The snapshots of one run, ordered by step; those in a folder are read when asked for.

    Attributes:
        facts: What does not change.
        probe: `targets` of the probe, and if known `clean_targets` and `query_targets`.
        source: Where it came from.
        entries: Snapshots, or the files that hold them, by step.
    """

    facts: RunFacts
    probe: dict[str, Tensor]
    source: str
    entries: dict[int, Snapshot | Path] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        """Steps of the snapshots, ascending."""
        return sorted(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, position: int) -> Snapshot:
        entry = self.entries[self.steps[position]]
        snapshot = read_snapshot(entry) if isinstance(entry, Path) else entry
        shape = (self.facts.num_examples, self.facts.num_classes)
        if tuple(snapshot.outputs.shape) != shape:
            raise InputError(
                f"The snapshot at step {snapshot.step} has outputs {tuple(snapshot.outputs.shape)}, the trace {shape}: "
                "it is of another probe or model."
            )
        if (snapshot.cross_kernel is None) == (self.facts.num_query > 0):
            raise InputError(f"The snapshot at step {snapshot.step} and the trace disagree on whether there is a query set.")
        return snapshot

    def __iter__(self) -> Iterator[Snapshot]:
        return (self[position] for position in range(len(self)))

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
    _check_schema(state.get("schema"), source)
    try:
        facts = _facts(state["facts"], source)
        trace = Trace(facts, _probe(state["probe"], facts, source), source)
        for part in state["snapshots"]:
            trace.append(Snapshot.join(dict(part["numbers"]), dict(part["tensors"])))
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(f"The recorder's state in {source} is damaged: {error!r}.") from error
    return trace


def load_trace(folder: Path) -> Trace:
    """Open a trace folder.

    Args:
        folder: Written by a recorder.

    Returns:
        The trace; snapshots are read when asked for.

    Raises:
        InputError: If the folder is no trace, of another schema, or damaged.
    """
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
        raise InputError(f"The trace in {folder} is damaged: {error}.") from error
    _check_schema(schema, str(manifest))
    facts = _facts(values, str(manifest))
    probe = _probe(probe, facts, str(folder))
    files = {int(path.stem.rpartition("-")[2]): path for path in folder.glob("snapshot-*.safetensors")}
    return Trace(facts, probe, str(folder), dict(files))


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
        tensors = load_file(path)
        with safetensors.safe_open(path, framework="pt") as handle:
            numbers = json.loads(handle.metadata()["numbers"])
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is truncated or no snapshot: {error}. Delete the file to go on without it.") from error
    return Snapshot.join(numbers, tensors)


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
            save_file(dict(probe), temporary)
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
            save_file(tensors, temporary, metadata={"numbers": json.dumps(numbers)})
        return path

    def forget_after(self, step: int) -> None:
        """Remove snapshots later than a step: a resumed run will write them anew.

        Args:
            step: The last step to keep.
        """
        for path in self.folder.glob("snapshot-*.safetensors"):
            if int(path.stem.rpartition("-")[2]) > step:
                path.unlink()


def stop_early(facts: RunFacts, reason: str) -> RunFacts:
    """Note why recording ended.

    Args:
        facts: The facts so far.
        reason: One sentence.

    Returns:
        New facts.
    """
    return replace(facts, stopped=reason)


def _check_schema(schema: object, source: str) -> None:
    """Check that a schema is ours and known."""
    if schema != SCHEMA:
        raise InputError(
            f"{source} has schema {schema!r}; this version reads {SCHEMA!r}. "
            "If it was written by a newer ntkscope, update this one; else it is no trace."
        )


def _probe(tensors: Mapping[str, Any], facts: RunFacts, source: str) -> dict[str, Tensor]:
    """Check that the probe's targets are there, one per example."""
    lengths = {"targets": facts.num_examples, "clean_targets": facts.num_examples, "query_targets": facts.num_query}
    probe = dict(tensors)
    is_sound = "targets" in probe and set(probe) <= set(lengths)
    if not (is_sound and all(isinstance(t, Tensor) and t.ndim and len(t) == lengths[name] for name, t in probe.items())):
        raise InputError(f"The probe in {source} is damaged: it must hold `targets`, one per example. Record the run again.")
    return probe


def _facts(values: Mapping[str, Any], source: str) -> RunFacts:
    """Rebuild facts, naming what is missing or of the wrong type."""
    if not isinstance(values, Mapping):
        raise InputError(f"{source} is damaged: its facts are {type(values).__name__}, not a table.")
    check_fields(RunFacts, values, source)
    return RunFacts(**values)
