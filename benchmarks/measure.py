"""Time, memory and arithmetic rate of a call.

Times of two sides are taken in one process, alternating, so that both see the same machine. Memory is taken in a fresh process per
side, because an allocator keeps what it once had:

    python -m benchmarks.measure mlp ours           # one call; resident memory before it and its peak
    python -m benchmarks.measure cnn contraction 64

The peak is the kernel's VmHWM, reset just before the call: `ru_maxrss` is no use here, a child process inherits its parent's.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kernel_cases import BY_NAME, Case, first, prepare, read_kind

ROOT = Path(__file__).parent.parent
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TOLERANCE = 1e-4  # of the two sides' kernels, relative to the largest entry: both are float32
SIDES = ("ours", "contraction")

DISAGREE = "The two sides of {name!r} disagree: largest difference {gap:.1e} of the largest entry (tolerance {tol:.0e})."


@dataclass(frozen=True)
class Usage:
    """One call in a fresh process.

    Attributes:
        before: Resident memory just before the call, in bytes.
        peak: Highest resident memory until its end, in bytes.
        seconds: Its duration.
    """

    before: int
    peak: int
    seconds: float

    @property
    def growth(self) -> int:
        """Memory the call took, in bytes."""
        return self.peak - self.before


@dataclass(frozen=True)
class Times:
    """Both sides of a case.

    Attributes:
        ours: Median seconds of `ntk_gram`.
        contraction: Median seconds of the contraction.
        gap: Largest difference of the two kernels, relative to the largest entry.
    """

    ours: float
    contraction: float
    gap: float

    @property
    def ratio(self) -> float:
        """How many times faster we are."""
        return self.contraction / self.ours


def time_call(function: Callable[[], object]) -> float:
    """Measure the seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def time_alternating(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Measure the median seconds of each function, calling them in turn."""
    rounds = [[time_call(function) for function in functions] for _ in range(repeats)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def time_sides(case: Case, *, repeats: int = 3, num_warm_up: int | None = None) -> Times:
    """Measure both sides of a case and compare their kernels.

    Args:
        case: A case with a contraction.
        repeats: Calls of each side; the median counts.
        num_warm_up: Examples in the one call of each side before; all if not given.

    Returns:
        The times.

    Raises:
        ArithmeticError: If the kernels differ by more than `TOLERANCE`.
    """
    (ours, inputs), (contraction, _) = (prepare(case, side) for side in SIDES)
    batch = first(inputs, num_warm_up or case.num_examples)
    found, expected = ours(batch), read_kind(contraction(batch), case.outputs)
    gap = float((found - expected).abs().max() / expected.abs().max())
    if not gap <= TOLERANCE:  # also where it is NaN
        raise ArithmeticError(DISAGREE.format(name=case.name, gap=gap, tol=TOLERANCE))
    return Times(*time_alternating([lambda: ours(inputs), lambda: contraction(inputs)], repeats), gap)


def read_memory(field: str) -> int:
    """Read `VmRSS` (resident now) or `VmHWM` (highest so far) of this process, in bytes."""
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 2**10


def measure_call(function: Callable[[], object]) -> Usage:
    """Call once and measure; without permission to reset the peak, it is that of the process so far."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5", encoding="ascii")  # man 5 proc: resets VmHWM to the present VmRSS
    before = read_memory("VmRSS")
    seconds = time_call(function)
    return Usage(before, max(before, read_memory("VmHWM")), seconds)  # the two fields are not counted at the same instant


def measure_side(case: Case, side: str, num_examples: int | None = None) -> Usage:
    """Measure one side of a case in a fresh process.

    Args:
        case: The case.
        side: "ours" or "contraction".
        num_examples: n, if not the case's own.

    Returns:
        What the process printed.

    Raises:
        RuntimeError: If the process failed; its messages are included.
    """
    command = [sys.executable, "-m", "benchmarks.measure", case.name, side, str(num_examples or case.num_examples)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}: {done.stderr.strip()}")
    words = done.stdout.split()
    values = dict(zip(words[::2], words[1::2], strict=True))
    return Usage(int(values["before"]), int(values["peak"]), float(values["seconds"]))


def main() -> None:
    """Measure one call of one side in this process, after one with two examples, and print names and numbers in turn."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure", description=main.__doc__)
    parser.add_argument("case", choices=BY_NAME)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("examples", type=int, nargs="?", help="the case's own number if not given")
    arguments = parser.parse_args()
    function, inputs = prepare(BY_NAME[arguments.case], arguments.side, arguments.examples)
    function(first(inputs, 2))
    usage = measure_call(lambda: function(inputs))
    print(f"before {usage.before} peak {usage.peak} seconds {usage.seconds:.6f}")


if __name__ == "__main__":
    main()
