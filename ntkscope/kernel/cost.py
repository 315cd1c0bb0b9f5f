"""What a contraction costs, in multiply-adds."""

from typing import Literal

Way = Literal["grams", "modes", "gradients"]

# What an elementwise pass over one entry costs in multiply-adds of a large matrix product: measured on 2 cores, see benchmarks/RESULTS.md.
ELEMENTWISE = 16


def costs(
    *,
    num_rows: int,
    num_columns: int,
    num_classes: int,
    units: int,
    inputs: int,
    positions: int,
    is_weighted: bool,
    is_trace: bool,
) -> dict[Way, float]:
    """Estimate every way to contract two factors of one weight (table in `contract`).

    Args:
        num_rows: n.
        num_columns: n'.
        num_classes: C.
        units: u.
        inputs: k.
        positions: T.
        is_weighted: Whether M is elementwise.
        is_trace: Whether classes are summed over.

    Returns:
        Multiply-adds by way, for the ways that are exact here.
    """
    pairs = num_rows * num_columns
    outputs = pairs * (num_classes if is_trace else num_classes**2)
    forming = (num_rows + num_columns) * num_classes * positions * units * inputs
    found: dict[Way, float] = {"gradients": float(outputs * units * inputs + forming)}
    if not is_weighted:
        entries = pairs * positions**2 * (1 if is_trace else num_classes**2)
        found["grams"] = float(positions**2 * (pairs * inputs + outputs * units) + ELEMENTWISE * entries)
    elif positions == 1:
        entries = pairs * units * (1 if is_trace else num_classes)
        found["modes"] = float(pairs * units * inputs + outputs * units + ELEMENTWISE * entries)
    return found


def cheapest(**sizes: int | bool) -> Way:
    """Choose the way with the least multiply-adds.

    Args:
        **sizes: As for `costs`.

    Returns:
        The way.
    """
    found = costs(**sizes)  # pyright: ignore[reportArgumentType]
    return min(found, key=found.__getitem__)
