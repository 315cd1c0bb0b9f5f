"""From what the user points at to a trace."""

from collections.abc import Sequence
from pathlib import Path

from ntkscope._checks import InputError
from ntkscope.record.checkpoint import find_recorder_state, load_checkpoint
from ntkscope.record.trace import Trace, load_trace, trace_from_state


def find_trace(source: str | Path | Sequence[str | Path]) -> Trace | None:
    """Open a source if it was recorded.

    Args:
        source: One path or several.

    Returns:
        The trace; None for several paths, and for a checkpoint without a recorder's state.
    """
    paths = [Path(source)] if isinstance(source, str | Path) else [Path(path) for path in source]
    if len(paths) != 1:
        return None
    if paths[0].is_dir():
        return load_trace(paths[0])
    state = find_recorder_state(load_checkpoint(paths[0]))
    return None if state is None else trace_from_state(state, str(paths[0]))


def open_source(source: str | Path | Sequence[str | Path]) -> Trace:
    """Open a trace folder, or a checkpoint that holds a recorder's state.

    Args:
        source: One path.

    Returns:
        The trace.

    Raises:
        InputError: If there is nothing there, it is damaged, or it holds no recorder's state.
    """
    paths = [Path(source)] if isinstance(source, str | Path) else [Path(path) for path in source]
    if len(paths) != 1:
        raise InputError(
            f"Got {len(paths)} paths. One recorded checkpoint or trace is analyzed at a time; several bare checkpoints of one run "
            "need --model, --data and --loss."
        )
    trace = find_trace(paths)
    if trace is None:
        raise InputError(
            f"{paths[0]} holds no recorder's state: a bare checkpoint does not say how training went. Either save "
            "recorder.state_dict() inside it (see `Recorder`), or give two or more checkpoints of the run with --model SPEC, "
            "--data SPEC and --loss NAME (SPEC: `file.py:function`)."
        )
    return trace
