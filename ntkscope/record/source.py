"""From what the user points at to a trace."""

from collections.abc import Sequence
from pathlib import Path

from ntkscope._checks import InputError
from ntkscope.record.checkpoint import find_recorder_state, load_checkpoint
from ntkscope.record.trace import Trace, load_trace, trace_from_state

RECORD = "ntkscope.pt"  # where the callback for Transformers leaves its record in a checkpoint's folder


def find_trace(source: str | Path | Sequence[str | Path], *, allow_globals: Sequence[str] = (), unsafe: bool = False) -> Trace | None:
    """Open a source if it was recorded.

    Args:
        source: One path or several.
        allow_globals: What a checkpoint may use beyond tensors and plain containers, see `load_checkpoint`.
        unsafe: Let a checkpoint run any code.

    Returns:
        The trace; None for several paths, and for a checkpoint without a recorder's state.
    """
    paths = [Path(source)] if isinstance(source, str | Path) else [Path(path) for path in source]
    if len(paths) != 1:
        return None
    if is_trace(paths[0]):
        return load_trace(paths[0])
    if (paths[0] / RECORD).is_file():
        paths = [paths[0] / RECORD]
    state = find_recorder_state(load_checkpoint(paths[0], allow_globals=allow_globals, unsafe=unsafe))
    return None if state is None else trace_from_state(state, str(paths[0]))


def is_trace(path: Path) -> bool:
    """Say whether a path is a trace folder; other folders are checkpoints, or nothing that is read.

    Args:
        path: Any.

    Returns:
        Whether a recorder wrote it.
    """
    return path.is_dir() and (path / "manifest.json").is_file()


def open_source(source: str | Path | Sequence[str | Path], *, allow_globals: Sequence[str] = (), unsafe: bool = False) -> Trace:
    """Open a trace folder, or a checkpoint that holds a recorder's state.

    Args:
        source: One path.
        allow_globals: What a checkpoint may use beyond tensors and plain containers, see `load_checkpoint`.
        unsafe: Let a checkpoint run any code.

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
    trace = find_trace(paths, allow_globals=allow_globals, unsafe=unsafe)
    if trace is None:
        raise InputError(
            f"{paths[0]} holds no recorder's state: a bare checkpoint does not say how training went. Either save "
            "recorder.state_dict() inside it (see `Recorder`), or give two or more checkpoints of the run with --model SPEC, "
            "--data SPEC and --loss NAME (SPEC: `file.py:function`), or this one with --continue 100 besides, to analyze what training "
            "would learn next from here."
        )
    return trace
