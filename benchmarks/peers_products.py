"""Products with the kernel, without the matrix: ntkscope's NTKOperator and curvlinops' J (Jᵀ v), in one process.

python -m benchmarks.peers_products [threads]

curvlinops' GGN with the sum of squares as loss is 2 JᵀJ, whose nonzero eigenvalues are twice the kernel's: its vectors have one entry per
parameter instead of one per output.
"""

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from curvlinops import GGNLinearOperator, JacobianLinearOperator
from scipy.sparse.linalg import eigsh

import ntkscope
from benchmarks.kernel_models import NUM_CLASSES, MakeCase, make_cnn, make_mlp
from benchmarks.peers_worker import choose_clock

NUM_EXAMPLES = 64
NUM_EIGVALS = 5
TOLERANCE = 1e-4
ROUNDS = 15
NUM_THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else 1
CLOCK = choose_clock(NUM_THREADS)


def compare(name: str, make: MakeCase) -> None:
    """Print times of products with 1 and 16 vectors, and of the largest eigenvalues."""
    model, inputs = make(NUM_EXAMPLES)
    params = list(model.parameters())
    data = [(inputs, torch.zeros(NUM_EXAMPLES, NUM_CLASSES))]
    kernel = ntkscope.NTKOperator(model, inputs)
    jacobian = JacobianLinearOperator(model, params, data, check_deterministic=False)
    transposed = jacobian.adjoint()
    ggn = GGNLinearOperator(model, torch.nn.MSELoss(reduction="sum"), params, data, check_deterministic=False)
    generator = torch.Generator().manual_seed(0)
    for num_vectors in (1, 16):
        vectors = torch.randn(kernel.shape[0], num_vectors, generator=generator)
        directions = torch.randn(ggn.shape[0], num_vectors, generator=generator)
        ours, theirs = kernel(vectors), jacobian @ (transposed @ vectors)
        difference = float((ours - theirs).abs().max() / ours.abs().max())
        sides = {
            "NTKOperator": lambda v=vectors: kernel(v),
            "curvlinops J (J^T v)": lambda v=vectors: jacobian @ (transposed @ v),
            "curvlinops GGN": lambda v=directions: ggn @ v,
        }
        times = _time_in_turn(list(sides.values()))
        for side, mine in zip(sides, times, strict=True):
            ratio = statistics.median(taken / base for taken, base in zip(mine, times[0], strict=True))
            seconds = f"{statistics.median(mine) * 1e3:8.1f} ms ({min(mine) * 1e3:.1f}-{max(mine) * 1e3:.1f})"
            told = f"  difference {difference:.0e}" if side.startswith("curvlinops J") else ""
            print(f"{name}, {num_vectors:2d} vectors  {side:22s} {seconds:28s} {ratio:5.2f} times ours{told}", flush=True)
    composed = (jacobian @ transposed).to_scipy()
    solvers: dict[str, Callable[[], Any]] = {
        "NTKOperator.top": lambda: kernel.top(NUM_EIGVALS, tolerance=TOLERANCE).eigvals.numpy(),
        "curvlinops J J^T, eigsh": lambda: eigsh(composed, NUM_EIGVALS, tol=TOLERANCE)[0][::-1],
        "curvlinops GGN / 2, eigsh": lambda: eigsh(ggn.to_scipy(), NUM_EIGVALS, tol=TOLERANCE)[0][::-1] / 2,
    }
    for side, solve in solvers.items():
        start = CLOCK()
        found = solve()
        print(f"{name}, largest eigenvalues  {side:26s} {CLOCK() - start:6.2f} s  {' '.join(f'{value:.3f}' for value in found)}")


def _time_in_turn(functions: list[Callable[[], Any]]) -> list[list[float]]:
    """Measure the seconds of every call of each function, called in turn."""
    taken: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for times, function in zip(taken, functions, strict=True):
            start = CLOCK()
            function()
            times.append(CLOCK() - start)
    return taken


if __name__ == "__main__":
    torch.set_num_threads(NUM_THREADS)
    for model_name, make_model in (("mlp", make_mlp), ("cnn", make_cnn)):
        compare(model_name, make_model)
