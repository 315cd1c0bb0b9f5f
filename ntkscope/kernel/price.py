"""What a kernel costs, before it is computed: memory from the tiling, multiply-adds from the contractions, seconds from a small block."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ntkscope._checks import check_memory
from ntkscope._display import Displayed
from ntkscope._types import ForwardFn, KernelOutputs
from ntkscope.kernel.batch import count_examples, take
from ntkscope.kernel.blocks import DEFAULT_MEMORY
from ntkscope.kernel.capture import full_precision, undisturbed
from ntkscope.kernel.contract import contract
from ntkscope.kernel.cost import contractions
from ntkscope.kernel.coverage import Coverage, probe_routes
from ntkscope.kernel.jacobian import compute_jacobian
from ntkscope.kernel.readout import make_readout
from ntkscope.kernel.routes import UnlikeProbe
from ntkscope.kernel.tiles import Tile, Tiling, plan_tiles

BLOCK_EXAMPLES = 16  # measured; fewer tell little of a job of hundreds
BOUND_SHARE = 0.5  # of the multiply-adds: above it the job is called bound by N² p
ITEMSIZE = 8  # sums are taken in float64
NUM_PAIRS, NUM_PRODUCTS = 10, 60  # a matrix-free job to compare with: eigenpairs, and products that Lanczos took for them
FASTER = 0.7  # a cheaper job is named when it takes less than this share of the time


@dataclass(frozen=True)
class Alternative:
    """A cheaper job."""

    name: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Price(Displayed):
    """The price of one kernel.

    Attributes:
        outputs: The kind.
        num_examples: n.
        num_outputs: Rows of the kernel: N = n C for "full", else n.
        num_params: Parameters in the kernel.
        result_bytes: Of the kernel, in float64 while it is summed.
        peak_bytes: Estimate of all that is held at once; at most about `max_memory`.
        num_blocks: Tiles in which it is computed.
        multiply_adds: Of all contractions.
        product_share: Share of them in products of weight gradients, N² p, which no rule makes cheaper.
        num_passes: Backward passes of one example, repeated ones included.
        seconds: Estimate from a measured block.
        alternatives: Jobs that take less, where this one is bound by N² p.
    """

    outputs: KernelOutputs
    num_examples: int
    num_outputs: int
    num_params: int
    result_bytes: int
    peak_bytes: int
    num_blocks: int
    multiply_adds: float
    product_share: float
    num_passes: int
    seconds: float
    alternatives: tuple[Alternative, ...]

    @property
    def is_bound_by_products(self) -> bool:
        """Whether most of the work are N² p multiply-adds."""
        return self.product_share > BOUND_SHARE


@dataclass(frozen=True)
class _Work:
    """Multiply-adds of a job."""

    total: float
    products: float


def price_gram(
    model: nn.Module,
    inputs: Any,
    *,
    outputs: KernelOutputs = "full",
    weighted: bool = False,
    params: Iterable[str] | None = None,
    forward_fn: ForwardFn | None = None,
    max_memory: int | None = None,
) -> tuple[Price, Coverage]:
    """Price `ntk_gram(model, inputs, ...)`: probe the model, measure a block of at most 16 examples, and extrapolate.

    Args:
        model: As for `ntk_gram`.
        inputs: As for `ntk_gram`.
        outputs: "full", "trace", "sum" or "class=k".
        weighted: Whether `precond` will hold tensors (Adam, a gate).
        params: As for `ntk_gram`.
        forward_fn: As for `ntk_gram`.
        max_memory: As for `ntk_gram`.

    Returns:
        The price, and the coverage that the probe found.

    Raises:
        InputError: As for `ntk_gram`; also where the result does not fit in `max_memory`.
        UnsupportedError: If no trained parameter reaches the output.

    Source:
        theory.md section 1 (costs); `ntkscope.kernel.contract` has the table of contractions.
    """
    budget = check_memory(max_memory, DEFAULT_MEMORY)
    num_examples = count_examples(inputs)
    trace = outputs == "trace"
    readout = make_readout(outputs, forward_fn=forward_fn)
    with full_precision():
        routes, coverage = probe_routes(model, inputs, params=params, forward_fn=readout, budget=budget)
        tiling = plan_tiles(num_examples, None, coverage, trace=trace, budget=budget, itemsize=ITEMSIZE)
        block = take(inputs, slice(0, BLOCK_EXAMPLES))
        precond = {name: torch.ones_like(parameter) for name, parameter in routes.parameters.items()} if weighted else None
        width = 1 if trace else coverage.num_classes
        with undisturbed(model):
            try:
                compute_jacobian(model, block, routes)  # the first pass also allocates and plans; the second is typical
                start = time.perf_counter()
                jacobian = compute_jacobian(model, block, routes)
            except UnlikeProbe:
                routes = routes.left_to_autograd()
                start = time.perf_counter()
                jacobian = compute_jacobian(model, block, routes)
        per_example = (time.perf_counter() - start) / count_examples(block)
        rows = count_examples(block) * width
        total = torch.zeros(rows, rows, dtype=torch.float64, device=jacobian.outputs.device)
        for _ in range(2):  # the first call also allocates
            start = time.perf_counter()
            contract(jacobian, jacobian, total, precond=precond, trace=trace, chunk_bytes=tiling.chunk_bytes)
        contracted = time.perf_counter() - start
    num_block = count_examples(block)
    small = _work(coverage, [Tile(slice(0, num_block), slice(0, num_block), is_diagonal=True)], trace, weighted)
    per_operation = contracted / max(1.0, small.total)
    work = _work(coverage, tiling.tiles, trace, weighted)
    examples = _examples_differentiated(tiling)
    price = Price(
        outputs=outputs,
        num_examples=num_examples,
        num_outputs=num_examples * width,
        num_params=sum(share.num_params for share in coverage.shares.values()),
        result_bytes=(num_examples * width) ** 2 * ITEMSIZE,
        peak_bytes=tiling.peak_bytes,
        num_blocks=len(tiling.tiles),
        multiply_adds=work.total,
        product_share=work.products / max(1.0, work.total),
        num_passes=examples * coverage.num_classes,
        seconds=examples * per_example + work.total * per_operation,
        alternatives=(),
    )
    if not price.is_bound_by_products or outputs != "full" or coverage.num_classes == 1:
        return price, coverage
    found = _alternatives(coverage, tiling, num_examples, weighted, per_example, per_operation)
    cheaper = tuple(other for other in found if other.seconds < FASTER * price.seconds)
    return Price(**{**vars(price), "alternatives": cheaper}), coverage


def _work(coverage: Coverage, tiles: Iterable[Tile], trace: bool, weighted: bool) -> _Work:
    """Add up the contractions of all tiles."""
    total = products = 0.0
    for tile in tiles:
        rows, columns = tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start
        half = 0.5 if tile.is_diagonal else 1.0
        for _, way, operations in contractions(coverage, num_rows=rows, num_columns=columns, is_weighted=weighted, is_trace=trace):
            total += half * operations
            products += half * operations if way == "gradients" else 0.0
    return _Work(total, products)


def _examples_differentiated(tiling: Tiling) -> int:
    """Count the examples whose Jacobian is computed, repeated ones included."""
    held = {(tile.rows.start, tile.rows.stop) for tile in tiling.tiles}
    streamed = sum(tile.columns.stop - tile.columns.start for tile in tiling.tiles if not tile.is_diagonal)
    return sum(stop - start for start, stop in held) + streamed


def _alternatives(
    coverage: Coverage, tiling: Tiling, num_examples: int, weighted: bool, per_example: float, per_operation: float
) -> list[Alternative]:
    """Price the kinds that take less work than the full kernel, from the same measurement."""
    per_pass = per_example / (coverage.num_classes + 1)  # one forward pass counts as one backward pass
    kernel_bytes = num_examples**2 * ITEMSIZE
    held = num_examples * (coverage.bytes_per_example + coverage.working_bytes_per_example)
    trace = _work(coverage, tiling.tiles, trace=True, weighted=weighted).total * per_operation + num_examples * per_example
    one = _work(_with_one_class(coverage), tiling.tiles, trace=False, weighted=weighted).total * per_operation
    return [
        Alternative("outputs='trace'", trace, kernel_bytes + held),
        Alternative("outputs='class=k'", one + 2 * num_examples * per_pass, kernel_bytes + held // coverage.num_classes),
        Alternative(
            f"NTKOperator(...).top({NUM_PAIRS})",
            NUM_PRODUCTS * 4 * num_examples * per_pass,  # a product: one backward pass, one forward pass with tangents
            num_examples * (coverage.working_bytes_per_example + coverage.num_classes * NUM_PAIRS * 2 * ITEMSIZE),
        ),
    ]


def _with_one_class(coverage: Coverage) -> Coverage:
    return Coverage(**{**vars(coverage), "num_classes": 1})
