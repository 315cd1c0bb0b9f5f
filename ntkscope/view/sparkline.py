"""A vector as a line of text is unreadable; as a picture of that size it is not. SVG without scripts, in the colour of the text."""

import html
import math

import torch
from torch import Tensor

WIDTH, HEIGHT = 120, 24  # pixels
MAX_POINTS = 60  # of a longer vector the smallest and the largest value of so many stretches are drawn
NUM_BINS = 24
FEWEST = 3  # values: of fewer there is nothing to see
LOG_SPAN = 1e3  # largest over smallest value above which a linear axis shows only the largest


def sparkline(values: Tensor, name: str) -> str:
    """Draw a vector in its order; on a logarithmic axis, which is then said, where it spans more than three decades.

    Args:
        values: One axis.
        name: What it is, for those who do not see the picture.

    Returns:
        SVG, with gaps where values are not finite; empty where there is nothing to see.
    """
    shown = _thinned(values.detach().double().cpu())
    finite = shown[torch.isfinite(shown)]
    if len(finite) < FEWEST:
        return ""
    low, high = float(finite.min()), float(finite.max())
    is_log = low > 0 and high / low > LOG_SPAN
    if is_log:
        shown, low, high = shown.log(), math.log(low), math.log(high)
    span = high - low or 1.0
    if not math.isfinite(span):
        return ""
    places = [
        "" if not math.isfinite(value) else f"{_place(k, len(shown)):.1f},{HEIGHT - 2 - (HEIGHT - 4) * (value - low) / span:.1f}"
        for k, value in enumerate(shown.tolist())
    ]
    runs = [run.strip(";").split(";") for run in ";".join(place or "|" for place in places).split("|")]
    # A move alone draws nothing, so a value between two gaps is a line to itself.
    path = "".join("M" + "L".join(run if len(run) > 1 else [*run, *run]) for run in runs if run != [""])
    words = f"{name}, in order{', log scale' if is_log else ''}"
    return _svg(f'<path d="{path}" fill="none" stroke="currentColor" stroke-linecap="round"/>', words) + (" log scale" if is_log else "")


def histogram(values: Tensor, name: str) -> str:
    """Draw how the values of a vector without an order are spread.

    Args:
        values: One axis.
        name: What it is, for those who do not see the picture.

    Returns:
        SVG; empty where there is nothing to see.
    """
    finite = values.detach().double().cpu()
    finite = finite[torch.isfinite(finite)]
    if len(finite) < FEWEST or not math.isfinite(float(finite.max()) - float(finite.min())):
        return ""
    counts = torch.histc(finite, NUM_BINS)
    step = WIDTH / NUM_BINS
    bars = "".join(
        f"M{k * step:.1f},{HEIGHT}h{step - 1:.1f}v-{(HEIGHT - 2) * count:.1f}h-{step - 1:.1f}z"
        for k, count in enumerate((counts / counts.max()).tolist())
        if count
    )
    return _svg(f'<path d="{bars}" fill="currentColor"/>', f"{name}, histogram")


def _thinned(values: Tensor) -> Tensor:
    """Take the extremes of every stretch, in their order: evenly spaced values would miss peaks, or show a pattern that is not there."""
    if len(values) <= MAX_POINTS:
        return values
    kept = []
    for stretch in values.tensor_split(MAX_POINTS):
        finite = torch.isfinite(stretch)
        low = torch.where(finite, stretch, torch.inf).argmin()
        high = torch.where(finite, stretch, -torch.inf).argmax()
        kept += [stretch[torch.minimum(low, high)], stretch[torch.maximum(low, high)]]
    return torch.stack(kept)


def _place(k: int, count: int) -> float:
    """Place the k-th of so many values."""
    return 2 + (WIDTH - 4) * k / (count - 1)


def _svg(content: str, words: str) -> str:
    """Wrap shapes."""
    return (
        f'<svg role="img" aria-label="{html.escape(words)}" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'style="vertical-align:middle">{content}</svg>'
    )
