"""From what the user points at to a trace."""

from collections.abc import Sequence
from pathlib import Path

from ntkscope._checks import InputError
from ntkscope.record.checkpoint import find_recorder_state, load_checkpoint
from ntkscope.record.trace import Trace, load_trace, trace_from_state


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
    (path,) = paths
    if path.is_dir():
        return load_trace(path)
    state = find_recorder_state(load_checkpoint(path))
    if state is None:
        raise InputError(
            f"{path} holds no recorder's state: a bare checkpoint does not say how training went. Either save "
            "recorder.state_dict() inside it (see `Recorder`), or give two or more checkpoints of the run with --model SPEC, "
            "--data SPEC and --loss NAME (SPEC: `file.py:function`)."
        )
    return trace_from_state(state, str(path))
