"""Both ends of a process that computes one side of a comparison when it is told to.

Sides that need different Python environments cannot share a process, so every side has its own: a worker that prepares, says so, and then
waits for a word on its standard input. The parent lets several workers compute in turn and looks at their memory from outside, through
/proc. Nothing but the standard library and numpy is imported here: neither end's environment has to fit the other's.
"""

import contextlib
import ctypes
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

ROOT = Path(__file__).parent.parent
PAUSE = 0.3  # seconds before a call: threads of the worker before spin for a while
LONGEST = 900  # seconds a worker may take to answer


class Side(Protocol):
    """What a worker needs of its side."""

    def warm(self) -> dict[str, float]:
        """Do what comes once before the first call (imports are done), and tell how long its parts took."""
        ...

    def call(self) -> Any:
        """Compute, and wait until it is done."""
        ...

    def export(self, result: Any) -> np.ndarray:
        """Bring a result into the common form: (N, N) with output (i, c) at i C + c, or (n, n)."""
        ...


class PeerError(RuntimeError):
    """A side that could not be prepared or did not answer; the text says why."""


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        processor: Seconds of processor time of the worker, all its threads together.
        wall: Seconds that passed.
        growth: Highest resident memory during the call above that before it, in bytes.
        peak: Highest resident memory during the call, in bytes.
    """

    processor: float
    wall: float
    growth: int
    peak: int


def choose_clock(num_threads: int) -> Callable[[], float]:
    """Choose seconds of processor time for one thread, which other work on the machine leaves nearly as they are, else of wall time."""
    return time.process_time if num_threads == 1 else time.perf_counter


def serve(side: Side) -> None:
    """Answer the parent: "warm", "run", or "save PATH" for the result of the last run."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries that print must not disturb the answers
    result = None
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        told: dict[str, float] = {}
        if word == "warm":
            told = side.warm()
            ctypes.CDLL(None).malloc_trim(0)  # what preparing freed must not hide what the call takes
        elif word == "run":
            result = None
            start, start_of_processor = time.perf_counter(), time.process_time()
            result = side.call()
            told = {"processor": time.process_time() - start_of_processor, "wall": time.perf_counter() - start}
        else:
            np.save(rest, side.export(result))
        print(json.dumps(told), file=answers)


class Worker:
    """The parent's end of one worker.

    Args:
        command: Starts it.
        path: Folders to find packages in, besides the interpreter's own.
        num_threads: Cores it may use; torch and XLA take as many threads.

    Attributes:
        warmed: What its preparation told.
    """

    def __init__(self, command: Sequence[str], path: Sequence[Path] = (), *, num_threads: int) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "PYTHONWARNINGS": "ignore",
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": str(num_threads),
        }
        self._errors = (ROOT / "build" / "peers" / "worker.log").open("a+", encoding="utf-8")
        self._start_of_errors = self._errors.seek(0, os.SEEK_END)
        allowed = ",".join(map(str, sorted(os.sched_getaffinity(0))[:num_threads]))
        self._process = subprocess.Popen(
            ["taskset", "-c", allowed, *command],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        try:
            self.warmed: Mapping[str, float] = self._ask("warm")
        except PeerError:
            self.close()
            raise

    def run(self) -> Call:
        """Let it compute once; another call of it takes the memory of this one anew."""
        folder = Path("/proc") / str(self._process.pid)
        time.sleep(PAUSE)
        with contextlib.suppress(OSError):
            (folder / "clear_refs").write_text("5", encoding="ascii")  # man 5 proc: resets VmHWM to the present VmRSS
        before = _read_memory(folder, "VmRSS")
        told = self._ask("run")
        peak = max(before, _read_memory(folder, "VmHWM"))
        return Call(told["processor"], told["wall"], peak - before, peak)

    def result(self) -> np.ndarray:
        """Fetch the result of the last run."""
        target = ROOT / "build" / "peers" / f"result-{self._process.pid}.npy"
        self._ask(f"save {target}")
        found = np.load(target)
        target.unlink()
        return found

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _ask(self, words: str) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(words + "\n")
            self._process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(LONGEST):
                raise PeerError(f"took more than {LONGEST} s")
        answer = self._process.stdout.readline()
        if not answer:
            raise PeerError(self._last_words())
        return json.loads(answer)

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(self._start_of_errors)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1] if lines else f"ended with status {self._process.returncode}"


def _read_memory(folder: Path, field: str) -> int:
    """Read `VmRSS` (resident now) or `VmHWM` (highest so far) of a process, in bytes."""
    text = (folder / "status").read_text(encoding="ascii")
    return int(next(line for line in text.splitlines() if line.startswith(f"{field}:")).split()[1]) * 2**10
