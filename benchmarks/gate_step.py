"""Time of a step of GatedAdamW against torch's AdamW on the same path, beside what is asked.

python -m benchmarks.gate_step          # ten matrices of 1000 x 1000 and ten biases, about a minute
"""

import argparse
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ntkscope import GatedAdamW

WIDTH, NUM_LAYERS, NUM_THREADS = 1000, 10, 2
HEADER = ("device", "path", "gate", "ours [ms]", "AdamW [ms]", "ratio", "asked", "", "first step [s]", "paid back after")
WIDTHS = (6, 9, 6, 10, 11, 6, 7, 3, 15, 16)
# Ratio asked of each path; None: shown only.
ASKED = {("cpu", "fused"): 1.5, ("cpu", "foreach"): 2.5, ("cuda", "fused"): 1.4, ("cuda", "foreach"): None}
GATES = ("soft", "hard", "open")


@dataclass
class Side:
    """An optimizer, its times, and the seconds of its first step, which compiles."""

    optimizer: Optimizer
    first: float
    times: list[float]


def make_parameters(device: str) -> list[nn.Parameter]:
    """Make parameters with gradients, the same for every side."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    shapes = [(WIDTH, WIDTH), (WIDTH,)] * NUM_LAYERS
    parameters = [nn.Parameter(draw(*shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = 1e-2 * draw(*parameter.shape)
    return parameters


def take_step(side: Side, device: str) -> float:
    """Time one step."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    side.optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_sides(optimizers: Sequence[Optimizer], device: str, repeats: int) -> list[Side]:
    """Time optimizers in turns, so that all see the same machine."""
    sides = [Side(optimizer, 0.0, []) for optimizer in optimizers]
    for side in sides:
        side.first = take_step(side, device)
        for _ in range(3):
            take_step(side, device)
    for _ in range(repeats):
        for side in sides:
            side.times.append(take_step(side, device))
    return sides


def print_row(cells: Sequence[str]) -> None:
    """Print one row at once."""
    print(" ".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)).rstrip(), flush=True)


def compare(device: str, repeats: int) -> None:
    """Print the rows of a device; compilation is paid back against our own foreach path."""
    slow: dict[str, float] = {}
    for path in ("single", "foreach", "fused"):
        options = {"foreach": path == "foreach", "fused": path == "fused"}
        ours = [GatedAdamW(make_parameters(device), gate=gate, gate_warmup=1, **options) for gate in GATES]
        theirs = AdamW(make_parameters(device), **options)
        *sides, baseline = time_sides([*ours, theirs], device, repeats)
        for gate, side in zip(GATES, sides, strict=True):
            mine, other = statistics.median(side.times), statistics.median(baseline.times)
            asked = ASKED.get((device, path)) if gate != "open" else None
            met = "" if asked is None else ("ok" if mine <= asked * other else "NO")
            payback = ""
            if path == "foreach":
                slow[gate] = mine
            elif path == "fused":
                saved = slow[gate] - mine
                payback = f"{side.first / saved:.0f} steps" if saved > 0 else "never"
            cells = (f"{1e3 * mine:.2f}", f"{1e3 * other:.2f}", f"{mine / other:.2f}", "" if asked is None else f"<={asked:g}", met)
            print_row((device, path, gate, *cells, f"{side.first:.2f}", payback))


def cpu_name() -> str:
    """Name the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Print the table of this machine's devices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="timed steps of each side")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(NUM_THREADS)
    size = NUM_LAYERS * (WIDTH * WIDTH + WIDTH)
    print(f"{size:,} float32 parameters, median of {repeats} steps in turns, {NUM_THREADS} threads, torch {torch.__version__}")
    print(f"cpu: {cpu_name()}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        print(f"cuda: {torch.cuda.get_device_name()}")
    print_row(HEADER)
    for device in devices:
        compare(device, repeats)


if __name__ == "__main__":
    main()
