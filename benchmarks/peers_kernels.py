"""The exact NTK Gram matrix by ntkscope and by its peers: time, memory, and the difference of the results.

Every side is a process of its own (peers_worker.py): it prepares, is asked once in a fresh state for memory and result, and then all sides
are asked in turn. A side whose first call took longer than `SLOW` seconds of processor time is not asked again.
"""

import operator
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.peers_environments import BUILD, Peer
from benchmarks.peers_ours import write_case
from benchmarks.peers_worker import Call, PeerError, Worker

IMPLEMENTATIONS = ("STRUCTURED_DERIVATIVES", "NTK_VECTOR_PRODUCTS", "JACOBIAN_CONTRACTION", "AUTO")
CASES = (("mlp", "full", 64), ("mlp", "full", 128), ("cnn", "full", 64), ("mlp", "trace", 128), ("cnn", "trace", 64))
HEADER = ("side", "processor [s]", "wall [s]", "times ours", "growth [MiB]", "peak [MiB]", "compile [s]", "difference")
WIDTHS = (38, 24, 9, 11, 13, 11, 12, 11)
ROUNDS = 5
SLOW = 3.0  # seconds of processor time
MIB = 2**20


@dataclass
class Line:
    """One side of one case.

    Attributes:
        first: Its first call.
        compiling: Seconds it took to compile; None if it does not.
        difference: Of its result from ours, largest entry over ours' largest.
        calls: In turn, one a round; the first alone if it is too slow for them.
    """

    first: Call
    compiling: float | None
    difference: float
    calls: list[Call] = field(default_factory=list)


def list_commands(model: str, kind: str, num_examples: int, peers: Mapping[str, Peer]) -> dict[str, tuple[Peer | None, list[str]]]:
    """List the sides of a case: name, peer and arguments after the interpreter.

    Args:
        model: "mlp" or "cnn".
        kind: "full" or "trace".
        num_examples: n.
        peers: Those installed.

    Returns:
        The sides by name.
    """
    words = [model, kind, str(num_examples)]
    found: dict[str, tuple[Peer | None, list[str]]] = {"ntkscope ntk_gram": (None, ["-m", "benchmarks.peers_ours", *words, "ours"])}
    found["torch.func contraction"] = (None, ["-m", "benchmarks.peers_ours", *words, "contraction"])
    if "nngeometry" in peers and kind == "full":
        for method, title in (("gram", "nngeometry GramMatrix"), ("jacobian", "nngeometry Jacobian, times itself")):
            found[title] = (peers["nngeometry"], ["-m", "benchmarks.peers_nngeometry", *words, method])
    if "neural_tangents" in peers:
        path = BUILD / f"{model}-{num_examples}.npz"
        write_case(model, num_examples, path)
        for name in IMPLEMENTATIONS:
            command = ["-m", "benchmarks.peers_neural_tangents", *words, name, str(path)]
            found[f"neural-tangents {name}"] = (peers["neural_tangents"], command)
    return found


def compare(model: str, kind: str, num_examples: int, peers: Mapping[str, Peer], *, python: str, num_threads: int) -> None:
    """Measure one case and print its table.

    Args:
        model: "mlp" or "cnn".
        kind: "full" or "trace".
        num_examples: n.
        peers: Those installed.
        python: Our interpreter.
        num_threads: For every side.
    """
    print(f"\n{model}, {kind}, n = {num_examples}, {num_threads} thread{'s' * (num_threads > 1)} a side")
    print_row(HEADER)
    lines: dict[str, Line] = {}
    failed: dict[str, str] = {}
    workers: dict[str, Worker] = {}
    ours: np.ndarray | None = None
    try:
        for name, (peer, words) in list_commands(model, kind, num_examples, peers).items():
            try:
                worker = Worker([peer.python if peer else python, *words], peer.path if peer else (), num_threads=num_threads)
                workers[name] = worker
                first = worker.run()
            except PeerError as err:
                failed[name] = str(err)
                continue
            result = worker.result().astype(np.float64)
            ours = result if ours is None else ours
            difference = float(np.abs(result - ours).max() / np.abs(ours).max())
            lines[name] = Line(first, worker.warmed.get("compile"), difference)
        for _ in range(ROUNDS):
            for name, line in lines.items():
                if line.first.processor < SLOW:
                    line.calls.append(workers[name].run())
    finally:
        for worker in workers.values():
            worker.close()
    for name, line in lines.items():
        print_row(cells(name, line, next(iter(lines.values())), num_threads))
    for name, reason in failed.items():
        print(f"{name:<{WIDTHS[0]}} not measured: {reason}", flush=True)


def cells(name: str, line: Line, ours: Line, num_threads: int) -> tuple[str, ...]:
    """Format one line: median and range of seconds, median of the ratios of each round (of wall time with several threads)."""
    calls = line.calls or [line.first]
    clock = operator.attrgetter("processor" if num_threads == 1 else "wall")
    base = ours.calls if line.calls else [min(ours.calls, key=lambda call: abs(clock(call) - statistics.median(map(clock, ours.calls))))]
    ratio = statistics.median(clock(mine) / clock(theirs) for mine, theirs in zip(calls, base, strict=True))
    taken = [call.processor for call in calls]
    told = f"{min(taken):.3f}-{max(taken):.3f}" if line.calls else "one call"
    wall = statistics.median(call.wall for call in calls)
    compiling = "" if line.compiling is None else f"{line.compiling:.1f}"
    sizes = (f"{line.first.growth / MIB:.0f}", f"{line.first.peak / MIB:.0f}")
    return (name, f"{statistics.median(taken):.3f} ({told})", f"{wall:.3f}", f"{ratio:.2f}", *sizes, compiling, f"{line.difference:.0e}")


def print_row(row: Iterable[str], widths: Sequence[int] = WIDTHS) -> None:
    """Print one row at once, the first column to the left."""
    pairs = enumerate(zip(row, widths, strict=True))
    print(" ".join(f"{cell:<{width}}" if index == 0 else f"{cell:>{width}}" for index, (cell, width) in pairs).rstrip(), flush=True)
