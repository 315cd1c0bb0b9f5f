"""From results to what can be drawn: finite numbers with few digits, axes for steps and shares."""

import html
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ntkscope.view.words import AnalysisLike, number

MAX_FRAMES = 60
DIGITS = 4  # significant, in what is drawn
MIN_DECADE_SPAN = 20  # a step axis that spans less is linear


def rounded(value: float) -> float | None:
    """Keep a few significant digits.

    Args:
        value: Any number.

    Returns:
        The number that is drawn; None where it is not finite.
    """
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def values(column: Tensor) -> list[float | None]:
    """Turn a vector into drawable numbers.

    Args:
        column: Any vector.

    Returns:
        Numbers with few digits; None where there is no finite one.
    """
    return [rounded(value) for value in column.tolist()]


def table(matrix: Tensor) -> list[list[float | None]]:
    """Turn a matrix into drawable numbers.

    Args:
        matrix: Any matrix.

    Returns:
        The same, row by row.
    """
    return [values(row) for row in matrix]


def fixed(column: Tensor, span: float) -> list[float | None]:
    """Turn a vector into drawable numbers as fine as can be seen on an axis: to about a thousandth of it.

    Args:
        column: Any vector.
        span: Length of the axis, positive.

    Returns:
        Numbers; None where there is no finite one.
    """
    decimals = 3 - round(math.log10(span))
    # Adding zero turns -0.0 into 0.0.
    return [round(value, decimals) + 0.0 if math.isfinite(value) else None for value in column.tolist()]


def fixed_range(values: Tensor) -> list[float]:
    """Find a range that holds all frames, and the centre.

    Args:
        values: What is drawn in all frames.

    Returns:
        Lower and upper end, with the centre inside.
    """
    finite = values[torch.isfinite(values)]
    low, high = (min(float(finite.min()), 0.0), max(float(finite.max()), 0.0)) if finite.numel() else (0.0, 0.0)
    pad = 0.06 * (high - low) or 1.0
    return [low - pad, high + pad]


def spread(total: int, limit: int) -> list[int]:
    """Choose at most `limit` of `total` positions: all of them if they fit, else denser at the start.

    Args:
        total: How many there are.
        limit: How many to draw.

    Returns:
        Positions, ascending.
    """
    if total <= limit:
        return list(range(total))
    dense = limit // 2
    rest = limit - dense
    growth = [dense + round((total - 1 - dense) * (j / (rest - 1)) ** 2) for j in range(rest)]
    return sorted({*range(dense), *growth})


def frame_rows(eigvals: Tensor) -> list[int]:
    """Choose the snapshots that can be drawn: those at which something was learned.

    Args:
        eigvals: ω at every snapshot.

    Returns:
        Rows of the history; the last if nothing was learned.
    """
    rows = [row for row in range(len(eigvals)) if bool((eigvals[row].nan_to_num(0.0) > 0).any())]
    return rows or [len(eigvals) - 1]


def thinned(rows: Sequence[int], limit: int = MAX_FRAMES, *, keep: int | None = None) -> list[int]:
    """Thin rows evenly to what a page can hold.

    Args:
        rows: Ascending.
        limit: How many to draw, at least 2.
        keep: A row that must stay if it is among them.

    Returns:
        At most `limit` of them, the first and the last among them.
    """
    if len(rows) <= limit:
        return list(rows)
    positions = [round(j * (len(rows) - 1) / (limit - 1)) for j in range(limit)]
    chosen = [rows[position] for position in positions]
    if keep is not None and keep in rows and keep not in chosen and limit > 2:
        nearest = min(range(1, limit - 1), key=lambda k: abs(positions[k] - rows.index(keep)))
        chosen[nearest] = keep
    return sorted(chosen)


def median(values: Tensor) -> float:
    """Take the median of what is finite.

    Args:
        values: Any vector.

    Returns:
        The median; NaN if nothing is finite.
    """
    finite = values[torch.isfinite(values)]
    return float(finite.median()) if finite.numel() else math.nan


def shortened(name: object, letters: int) -> str:
    """Shorten a name in its middle: long names of classes often begin alike.

    Args:
        name: Any name.
        letters: How many fit, at least 3.

    Returns:
        The name, or its beginning and end; not safe to put into HTML.
    """
    text = str(name)
    if len(text) <= letters:
        return text
    tail = (letters - 1) // 2
    return f"{text[: letters - 1 - tail]}…{text[len(text) - tail :]}"


def hover_facts(analysis: AnalysisLike, i: int) -> list[str]:
    """Collect what a hovering reader is told of an example.

    Args:
        analysis: The result.
        i: Position of the example.

    Returns:
        Id, given label, true label, reservoir energy; safe to put into HTML.
    """
    examples = analysis.examples
    label = "unknown" if examples.labels is None else html.escape(str(examples.labels[i]))
    truth = "unknown" if examples.true_labels is None else html.escape(str(examples.true_labels[i]))
    return [html.escape(str(examples.ids[i])), label, truth, number(float(examples.reservoir_energy[i]))]


def step_axis(steps: Sequence[int]) -> tuple[Callable[[int], float], dict[str, Any]]:
    """Choose an axis for training steps: logarithmic with a place for step 0, or linear where the span is small.

    Args:
        steps: All steps to show.

    Returns:
        Where a step is drawn, and the axis.
    """
    positive = sorted({step for step in steps if step > 0})
    if not positive or positive[-1] < MIN_DECADE_SPAN * positive[0]:
        return float, {}
    origin = positive[0] / 2

    def place(step: int) -> float:
        return float(step) if step > 0 else origin

    decades = range(math.ceil(math.log10(positive[0])), math.floor(math.log10(positive[-1])) + 1)
    ticks = [10**k for k in decades]
    has_zero = min(steps) == 0
    left, right = math.log10(origin if has_zero else positive[0]), math.log10(positive[-1])
    pad = 0.04 * (right - left)
    return place, {
        "type": "log",
        "range": [left - pad, right + pad],
        "tickvals": [*([origin] if has_zero else []), *ticks],
        "ticktext": [*(["0"] if has_zero else []), *(f"{tick:,}" for tick in ticks)],
    }


def percent_ticks(low: float, high: float) -> dict[str, Any]:
    """Describe a logarithmic axis of percentages.

    Args:
        low: Smallest share.
        high: Largest.

    Returns:
        Settings of an axis.
    """
    parts = (1, 2, 5) if high < 30 * low else (1,)
    ticks = [part * 10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for part in parts]
    texts = [f"{100 * tick:,.0f} %" if tick >= 0.00999 else f"{100 * tick:.12f}".rstrip("0") + " %" for tick in ticks]
    return {"type": "log", "range": [math.log10(low), math.log10(high)], "tickvals": ticks, "ticktext": texts}
