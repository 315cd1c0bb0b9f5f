"""What a contraction costs, in multiply-adds."""

from collections.abc import Iterator
from typing import Literal

from ntkscope.kernel.coverage import Coverage

Way = Literal["grams", "modes", "positions", "gradients"]

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
    has_modes: bool,
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
        has_modes: As `OuterFactor.has_modes`, on both sides.
        is_weighted: Whether M is elementwise.
        is_trace: Whether classes are summed over.

    Returns:
        Multiply-adds by way, for the ways that are exact here.
    """
    pairs = num_rows * num_columns
    classes = num_classes if is_trace else num_classes**2
    forming = (num_rows + num_columns) * num_classes * positions * units * inputs
    found: dict[Way, float] = {"gradients": float(pairs * classes * units * inputs + forming)}
    if has_modes:
        entries = pairs * units * (1 if is_trace else num_classes)
        found["modes"] = float(pairs * units * (inputs + classes) + ELEMENTWISE * entries)
    if not is_weighted and positions == 1:
        found["grams"] = float(pairs * (inputs + classes * units))
    elif not is_weighted:
        entries = pairs * positions * units * num_classes
        found["positions"] = float(
            pairs * positions * (positions * (inputs + units * num_classes) + classes * units) + ELEMENTWISE * entries
        )
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


def contractions(
    coverage: Coverage, *, num_rows: int, num_columns: int, is_weighted: bool, is_trace: bool
) -> Iterator[tuple[str, Way, float]]:
    """Say how every parameter of a model is contracted, and what that costs.

    Args:
        coverage: From `probe_routes`.
        num_rows: n.
        num_columns: n'.
        is_weighted: Whether M is elementwise.
        is_trace: Whether classes are summed over.

    Yields:
        Parameter, way and multiply-adds, for each of its factors; parameters kept as rows are products of "gradients".
    """
    pairs = num_rows * num_columns * (coverage.num_classes if is_trace else coverage.num_classes**2)
    for name, share in coverage.shares.items():
        if not share.factors:
            yield name, "gradients", float(pairs * share.num_params)
        for shape in share.factors:
            shared = min(shape.inputs, (num_rows + num_columns) * shape.positions) if shape.is_token else shape.inputs
            found = costs(
                num_rows=num_rows,
                num_columns=num_columns,
                num_classes=coverage.num_classes,
                units=shape.units,
                inputs=shared,
                positions=shape.positions,
                has_modes=share.is_separated or (shape.positions == 1 and not shape.is_token),
                is_weighted=is_weighted,
                is_trace=is_trace,
            )
            way = min(found, key=found.__getitem__)
            yield name, way, found[way]
