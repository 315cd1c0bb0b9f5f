"""Cutting the kernel into tiles whose Jacobians fit the memory that is allowed, and dealing them out to processes."""

from dataclasses import dataclass

from ntkscope._checks import InputError, format_bytes
from ntkscope.kernel.coverage import Coverage

LARGEST_CHUNK = 2**25  # bytes: longer chunks make no product faster, see benchmarks/RESULTS.md


@dataclass(frozen=True)
class Tile:
    """Rows' and columns' examples of one block of the kernel."""

    rows: slice
    columns: slice
    is_diagonal: bool  # the same examples, of which only the lower triangle is computed


@dataclass(frozen=True)
class Tiling:
    """How a kernel is cut.

    Attributes:
        tiles: In the order in which they are computed; together they cover the kernel, or its lower triangle.
        chunk_bytes: Bound on what a contraction forms at a time.
        peak_bytes: Estimate of all memory in use at once, result included.
        is_whole: Whether the Jacobian of all examples fits.
    """

    tiles: tuple[Tile, ...]
    chunk_bytes: int
    peak_bytes: int
    is_whole: bool


def plan_tiles(
    num_rows: int, num_columns: int | None, coverage: Coverage, *, trace: bool, budget: int, itemsize: int, num_parts: int = 1
) -> Tiling:
    """Cut a kernel into tiles.

    Args:
        num_rows: n.
        num_columns: n', or None for the symmetric kernel.
        coverage: From `probe_routes`.
        trace: Whether classes are summed over.
        budget: Bytes in all.
        itemsize: Bytes of one entry while it is summed.
        num_parts: Processes that share the tiles.

    Returns:
        The tiling.

    Raises:
        InputError: If the result alone takes more than half of the budget.
    """
    width = 1 if trace else coverage.num_classes
    columns = num_rows if num_columns is None else num_columns
    result = num_rows * columns * width**2 * itemsize
    if result > budget // 2:
        raise InputError(
            f"The kernel of {num_rows} x {columns} examples and {width} outputs each takes {format_bytes(result)}, more than half of "
            f"max_memory ({format_bytes(budget)}). Take fewer examples, outputs='trace' or 'class=k', NTKOperator, or raise max_memory."
        )
    remaining = budget - result
    chunk = max(1, min(LARGEST_CHUNK, remaining // 4))
    hold = remaining - chunk
    held, working = coverage.bytes_per_example, coverage.working_bytes_per_example
    both = max(1, held + working)
    is_whole = (num_rows * both if num_columns is None else (num_rows + columns) * both) <= hold
    left = min(num_rows, max(1, hold * 4 // 5 // both))
    right = max(1, min(columns, (hold - left * held) // both))
    if is_whole:
        left = num_rows if num_parts == 1 else -(-num_rows // (2 * num_parts))
        right = columns if num_columns is not None else left
    tiles: list[Tile] = []
    for start in range(0, num_rows, left):
        rows = slice(start, min(start + left, num_rows))
        if num_columns is None:
            tiles.append(Tile(rows, rows, is_diagonal=True))
        limit = start if num_columns is None else num_columns
        tiles += [Tile(rows, slice(j, min(j + right, limit)), is_diagonal=False) for j in range(0, limit, right)]
    streamed = (columns if num_columns is not None else 0) if is_whole else right
    peak = result + chunk + max(left * both, left * held + streamed * both)
    return Tiling(tuple(tiles), chunk, peak, is_whole)


def deal(tiles: tuple[Tile, ...], part: tuple[int, int]) -> list[Tile]:
    """Deal tiles out to processes so that all have about the same work.

    Args:
        tiles: All of them.
        part: Which part of how many.

    Returns:
        The tiles of this part, in order.
    """
    index, num_parts = part
    loads = [0.0] * num_parts
    own = []
    for tile in sorted(tiles, key=_work, reverse=True):
        lightest = loads.index(min(loads))
        loads[lightest] += _work(tile)
        if lightest == index:
            own.append(tile)
    return sorted(own, key=lambda tile: (tile.rows.start, not tile.is_diagonal, tile.columns.start))


def _work(tile: Tile) -> float:
    """Count the entries that are computed."""
    size = (tile.rows.stop - tile.rows.start) * (tile.columns.stop - tile.columns.start)
    return 0.5 * size if tile.is_diagonal else float(size)
