"""Filling the kernel block by block: examples are taken in blocks whose Jacobians fit the memory that is allowed.

The rows' block is as large as memory permits and is held; the columns stream past it in smaller blocks, so that every example is
differentiated (number of row blocks + 1)/2 times on average. One block for all where that fits.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntkscope._checks import InputError
from ntkscope._types import KernelOutputs
from ntkscope.kernel.batch import count_examples, take
from ntkscope.kernel.contract import contract
from ntkscope.kernel.coverage import Coverage
from ntkscope.kernel.factor import FactoredJacobian
from ntkscope.kernel.jacobian import compute_jacobian
from ntkscope.kernel.precond import Precond
from ntkscope.kernel.routes import Routes, UnlikeProbe
from ntkscope.kernel.tiles import Tiling, deal, plan_tiles

DEFAULT_MEMORY = 2 * 2**30  # bytes: leaves room on an 8 GiB laptop
PART_BYTES = 2**23  # of activations: more at once make no backward pass faster,
PART_EXAMPLES = 32  # unless they are few examples
MIRRORED_AT_ONCE = 512  # rows


def blockwise_gram(
    model: nn.Module,
    inputs: Any,
    other: Any,
    *,
    routes: Routes,
    coverage: Coverage,
    outputs: KernelOutputs,
    precond: Precond | None,
    budget: int,
    progress: Callable[[int, int], None] | None,
    accumulate: torch.dtype | None = None,
) -> Float[Tensor, "rows columns"]:
    """Compute the kernel tile by tile.

    Args:
        model: The model, inside `undisturbed`.
        inputs: Rows.
        other: Columns, or None for the symmetric kernel.
        routes: From `probe_routes`.
        coverage: From `probe_routes`.
        outputs: The kind; all but "trace" are full kernels of what the readout gives.
        precond: Checked M.
        budget: Bytes.
        progress: Called with (tiles done, tiles in all).
        accumulate: dtype in which chunks are added up; float64 if not given.

    Returns:
        The kernel, in the dtype of the factors.
    """
    groups = {"": None}
    found = blockwise_grams(
        model,
        inputs,
        other,
        routes=routes,
        coverage=coverage,
        outputs=outputs,
        precond=precond,
        budget=budget,
        progress=progress,
        accumulate=torch.float64 if accumulate is None else accumulate,
        groups=groups,
    )
    return complete(found[""], routes.dtype, is_symmetric=other is None)


def blockwise_grams(
    model: nn.Module,
    inputs: Any,
    other: Any,
    *,
    routes: Routes,
    coverage: Coverage,
    outputs: KernelOutputs,
    precond: Precond | None,
    budget: int,
    progress: Callable[[int, int], None] | None,
    accumulate: torch.dtype,
    groups: Mapping[str, frozenset[str] | None],
    part: tuple[int, int] = (0, 1),
) -> dict[str, Float[Tensor, "rows columns"]]:
    """Compute one kernel per group of parameters in one pass over the examples.

    Args:
        model: As for `blockwise_gram`.
        inputs: As there.
        other: As there.
        routes: As there.
        coverage: As there.
        outputs: As there.
        precond: As there.
        budget: As there.
        progress: As there.
        accumulate: dtype in which chunks are added up.
        groups: Parameter names by group; None takes all.
        part: Which part of how many: tiles are dealt out, and what is not ours stays zero.

    Returns:
        Sums by group, in `accumulate`; of a symmetric kernel the lower triangle. Parts are to be added up, then see `complete`.

    Raises:
        UnlikeProbe: If some examples take another way through the model even where autograd differentiates every output.
    """
    trace = outputs == "trace"
    width = 1 if trace else coverage.num_classes
    num_rows, num_columns = count_examples(inputs), None if other is None else count_examples(other)
    itemsize = torch.finfo(accumulate).bits // 8 * len(groups)
    columns = num_rows if num_columns is None else num_columns
    device = parameters_device(routes)
    while True:
        tiling = plan_tiles(num_rows, num_columns, coverage, trace=trace, budget=budget, itemsize=itemsize, num_parts=part[1])
        # Allocated anew after a failed try: it may have added up some tiles.
        totals = {name: torch.zeros(num_rows * width, columns * width, dtype=accumulate, device=device) for name in groups}
        try:
            _fill(
                totals,
                model,
                inputs,
                other,
                routes,
                tiling,
                part,
                trace,
                precond,
                progress,
                groups,
                width,
                coverage.working_bytes_per_example,
            )
            break
        except UnlikeProbe:
            # Data-dependent models: what the probe learned on two examples does not hold for all, so autograd takes over.
            if not routes.ruled:
                raise
            routes, coverage = routes.left_to_autograd(), as_rows(coverage, routes)
    return totals


def _fill(
    totals: Mapping[str, Tensor],
    model: nn.Module,
    inputs: Any,
    other: Any,
    routes: Routes,
    tiling: Tiling,
    part: tuple[int, int],
    trace: bool,
    precond: Precond | None,
    progress: Callable[[int, int], None] | None,
    groups: Mapping[str, frozenset[str] | None],
    width: int,
    working_bytes: int,
) -> None:
    """Compute the tiles of one part."""
    tiles = deal(tiling.tiles, part)
    source = inputs if other is None else other
    cache = _Jacobians(model, routes, working_bytes, keep_all=part[1] > 1 and tiling.is_whole)
    for done, tile in enumerate(tiles):
        left = cache.rows(inputs, tile.rows)
        right = left if tile.is_diagonal else cache.columns(source, tile.columns, is_same_batch=other is None)
        if right.num_classes != left.num_classes:
            raise InputError(
                f"The model has {left.num_classes} outputs on `inputs`, but {right.num_classes} on `other`. Give both the same shape."
            )
        where = (slice(tile.rows.start * width, tile.rows.stop * width), slice(tile.columns.start * width, tile.columns.stop * width))
        for name, names in groups.items():
            contract(left, right, totals[name][where], precond=precond, trace=trace, chunk_bytes=tiling.chunk_bytes, names=names)
        if progress is not None:
            progress(done + 1, len(tiles))


class _Jacobians:
    """Computes Jacobians of blocks, and holds the rows' block; all blocks where several processes share a kernel that fits."""

    def __init__(self, model: nn.Module, routes: Routes, working_bytes: int, *, keep_all: bool) -> None:
        self._model, self._routes, self._working_bytes, self._keep_all = model, routes, working_bytes, keep_all
        self._held: dict[tuple[int, int, bool], FactoredJacobian] = {}  # start, stop, whether of another batch

    def rows(self, batch: Any, examples: slice) -> FactoredJacobian:
        """Get a block of rows, and hold it.

        Args:
            batch: Rows.
            examples: Which.

        Returns:
            Its Jacobian.
        """
        key = (examples.start, examples.stop, False)
        if key not in self._held:
            if not self._keep_all:
                self._held.clear()
            self._held[key] = self._compute(batch, examples)
        return self._held[key]

    def columns(self, batch: Any, examples: slice, *, is_same_batch: bool) -> FactoredJacobian:
        """Get a block of columns.

        Args:
            batch: Columns.
            examples: Which.
            is_same_batch: Whether rows and columns are the same examples.

        Returns:
            Its Jacobian.
        """
        key = (examples.start, examples.stop, not is_same_batch)
        if key in self._held:
            return self._held[key]
        found = self._compute(batch, examples)
        if self._keep_all:
            self._held[key] = found
        return found

    def _compute(self, batch: Any, examples: slice) -> FactoredJacobian:
        num = examples.stop - examples.start
        num_parts = max(1, min(-(-num * self._working_bytes // PART_BYTES), num // PART_EXAMPLES))
        return compute_jacobian(self._model, take(batch, examples), self._routes, num_parts=num_parts)


def as_rows(coverage: Coverage, routes: Routes) -> Coverage:
    """Say what an example's Jacobian takes when autograd differentiates every output: a row of all parameters each.

    Args:
        coverage: From `probe_routes`.
        routes: From `probe_routes`.

    Returns:
        New coverage.
    """
    num_params = sum(parameter.numel() for parameter in routes.parameters.values())
    return replace(coverage, bytes_per_example=coverage.num_classes * num_params * torch.finfo(routes.dtype).bits // 8)


def push_forward(
    model: nn.Module, inputs: Any, tangents: Mapping[str, Tensor], *, routes: Routes, coverage: Coverage, budget: int
) -> Float[Tensor, "examples classes"]:
    """Compute J t in blocks of examples that fit.

    Args:
        model: The model, inside `undisturbed`.
        inputs: Rows.
        tangents: t by parameter name, shaped as the parameters.
        routes: From `probe_routes`.
        coverage: From `probe_routes`.
        budget: Bytes.

    Returns:
        Motion of every output.

    Raises:
        UnlikeProbe: If some examples take another way through the model even where autograd differentiates every output.
    """
    step = max(1, budget // 2 // max(1, coverage.bytes_per_example + coverage.working_bytes_per_example))
    starts = range(0, count_examples(inputs), step)
    try:
        return torch.cat([compute_jacobian(model, take(inputs, slice(i, i + step)), routes).push_forward(tangents) for i in starts])
    except UnlikeProbe:
        if not routes.ruled:
            raise
        alone, coverage = routes.left_to_autograd(), as_rows(coverage, routes)
        return push_forward(model, inputs, tangents, routes=alone, coverage=coverage, budget=budget)


def complete(total: Tensor, dtype: torch.dtype, *, is_symmetric: bool) -> Float[Tensor, "rows columns"]:
    """Round a sum to the kernel's precision, and copy its lower triangle to the upper one.

    Args:
        total: From `blockwise_grams`.
        dtype: Of the kernel.
        is_symmetric: Whether only the lower triangle was filled.

    Returns:
        The kernel.
    """
    matrix = total.to(dtype)
    for start in range(0, len(matrix) if is_symmetric else 0, MIRRORED_AT_ONCE):
        stop = min(start + MIRRORED_AT_ONCE, len(matrix))
        block = matrix[start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).T)
        matrix[:start, start:stop] = matrix[start:stop, :start].T
    return matrix


def parameters_device(routes: Routes) -> torch.device:
    """Find the device that the parameters are on.

    Args:
        routes: Routes.

    Returns:
        The device.
    """
    return next(iter(routes.parameters.values())).device
