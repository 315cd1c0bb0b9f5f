"""Arithmetic rates: of the engine's dominant contraction, and of a plain matrix product to hold it against."""

import statistics

import torch

from benchmarks.kernel_cases import Case
from benchmarks.measure import time_alternating, time_call
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.contract import ROW_BLOCKS, contract
from ntkscope.kernel.cost import contractions
from ntkscope.kernel.coverage import probe_routes
from ntkscope.kernel.jacobian import compute_jacobian
from ntkscope.kernel.tiles import LARGEST_CHUNK

LOWER_SHARE = (ROW_BLOCKS + 1) / (2 * ROW_BLOCKS)  # of a symmetric product that is computed


def matmul_rate(rows: int, columns_per_chunk: int, cols: int, *, repeats: int = 3) -> float:
    """Measure a plain float32 matrix product of torch.

    Args:
        rows: N.
        columns_per_chunk: k, the length that is summed over.
        cols: N'.
        repeats: Calls; the median counts.

    Returns:
        GFLOP/s of (N, k) times (k, N').
    """
    left, right = torch.randn(rows, columns_per_chunk), torch.randn(cols, columns_per_chunk)
    left @ right.T
    (seconds,) = time_alternating([lambda: left @ right.T], repeats)
    return achieved_rate(2 * rows * columns_per_chunk * cols, seconds)


def achieved_rate(flops: float, seconds: float) -> float:
    """Convert floating-point operations in some seconds to GFLOP/s."""
    return flops / seconds / 1e9


def time_dominant_contraction(case: Case, *, repeats: int = 3) -> tuple[str, float, float]:
    """Measure the contraction of the largest weight whose gradients are formed and multiplied.

    Args:
        case: A case of outputs="full" and M = I.
        repeats: Calls; the median counts.

    Returns:
        The parameter, the floating-point operations done, and the seconds.
    """
    model, inputs = case.make(case.num_examples)
    routes, coverage = probe_routes(model, inputs)
    ways = contractions(coverage, num_rows=case.num_examples, num_columns=case.num_examples, is_weighted=False, is_trace=False)
    _, name = max((operations, name) for name, way, operations in ways if way == "gradients")
    share = coverage.shares[name]
    rows = case.num_examples * coverage.num_classes
    flops = 2.0 * rows**2 * share.num_params * LOWER_SHARE
    flops += sum(2.0 * rows * shape.positions * share.num_params for shape in share.factors)
    with undisturbed(model):
        jacobian = compute_jacobian(model, inputs, routes)
    total = torch.zeros(rows, rows, dtype=torch.float64)

    def call() -> None:
        contract(jacobian, jacobian, total, precond=None, trace=False, chunk_bytes=LARGEST_CHUNK, names=frozenset((name,)))

    call()
    return name, flops, statistics.median(time_call(call) for _ in range(repeats))
