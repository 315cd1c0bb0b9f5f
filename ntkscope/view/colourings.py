"""What points of examples can be coloured by: planted noise, label, reservoir energy, half-time."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plotly.colors import sample_colorscale

from ntkscope.view import palette
from ntkscope.view.drawing import shortened, values
from ntkscope.view.words import AnalysisLike, number

MAX_TICKS = 20
MAX_TICK_LETTERS = 90  # of all tick texts together, for a bar of 900 pixels
MAX_NAME = 14  # letters of a tick text
BAND = 0.12  # width of a colour beside the scale, for what has no number, over that of the scale
# Early is bright and late is dark, and the colours beside the scale are darker still: the order holds in black and white.
LATE = 0.45  # of Cividis, counted from its dark end
NEVER = palette.WINE
UNKNOWN = "#4d4d4d"
BAR = {"orientation": "h", "thickness": 12, "len": 0.8, "y": -0.02, "yanchor": "top"}


@dataclass(frozen=True)
class Colouring:
    """One way to colour points.

    Attributes:
        name: For the menu.
        values: One number for each example.
        axis: Plotly's colour axis.
    """

    name: str
    values: list[float]
    axis: dict[str, Any]


def colourings(analysis: AnalysisLike) -> list[Colouring]:
    """List what is known of the examples.

    Args:
        analysis: The result.

    Returns:
        Colourings, the default first.
    """
    examples = analysis.examples
    offers = []
    if examples.is_noise is not None:
        scale = palette.discrete_scale([palette.BLUE, palette.VERMILION])
        bar = _bar("", [0, 1], ["label is right", "planted wrong"])
        axis = {"colorscale": scale, "cmin": -0.5, "cmax": 1.5, "colorbar": bar}
        offers.append(Colouring("planted wrong labels", [float(flag) for flag in examples.is_noise], axis))
    if examples.labels is not None:
        offers.append(_by_label(examples.labels))
    energies = [0.0 if value is None else value for value in values(examples.reservoir_energy)]
    axis = {"colorscale": palette.CONTINUOUS, "cmin": 0.0, "cmax": max([*energies, 1e-12]), "colorbar": _bar("reservoir energy")}
    offers.append(Colouring("reservoir energy", energies, axis))
    offers.append(_by_half_time(examples.half_time.tolist()))
    return offers


def _by_label(labels: Sequence[Any]) -> Colouring:
    """Colour by given label: a colour each, or if there are too many a scale in the labels' order."""
    names = sorted(set(labels))
    index = {name: float(k) for k, name in enumerate(names)}
    is_few = len(names) <= len(palette.LABEL_COLOURS)
    scale = palette.discrete_scale(list(palette.LABEL_COLOURS[: len(names)])) if is_few else palette.CONTINUOUS
    texts = [shortened(name, MAX_NAME) for name in names]
    longest = max(map(len, texts)) + 1
    every = math.ceil(len(names) / max(2, min(MAX_TICKS, MAX_TICK_LETTERS // longest)))
    ticks = list(range(0, len(names), every))
    axis = {
        "colorscale": scale,
        "cmin": -0.5,
        "cmax": len(names) - 0.5,
        "colorbar": _bar("given label", ticks, [html.escape(texts[k]) for k in ticks]),
    }
    return Colouring("given label", [index[label] for label in labels], axis)


def _by_half_time(times: Sequence[float]) -> Colouring:
    """Colour by half-time on a logarithmic scale; "never" and "unknown" have colours of their own beside it."""
    finite = [time for time in times if math.isfinite(time) and time > 0]
    smallest = min(finite, default=1.0)
    logs = [math.log10(max(time, smallest)) for time in times if math.isfinite(time)]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)
    if high - low < 1e-3:
        low, high = low - 0.5, high + 0.5
    beside = [(name, colour) for name, colour, is_there in (
        ("never", NEVER, any(math.isinf(time) for time in times)),
        ("unknown", UNKNOWN, any(math.isnan(time) for time in times)),
    ) if is_there]  # fmt: skip
    width = BAND * (high - low)
    top = high + width * len(beside)
    place = {name: high + width * (k + 0.5) for k, (name, _) in enumerate(beside)}
    stops = [(j / 10 * (high - low) / (top - low), colour) for j, colour in enumerate(_half_time_colours())]
    for k, (_, colour) in enumerate(beside):
        stops.extend(((high + width * j - low) / (top - low), colour) for j in (k, k + 1))
    ticks = _log_ticks(low, high) if logs else []
    bar = _bar("half-time, optimizer time", [*ticks, *place.values()], [*(number(10**tick, 2) for tick in ticks), *place])
    axis = {"colorscale": [[min(stop, 1.0), colour] for stop, colour in stops], "cmin": low, "cmax": top, "colorbar": bar}
    drawn = [
        place["unknown"] if math.isnan(time) else place["never"] if math.isinf(time) else math.log10(max(time, smallest)) for time in times
    ]
    return Colouring("half-time", [round(value, 3) for value in drawn], axis)


def _half_time_colours() -> list[str]:
    """Sample the scale from early to late."""
    return [str(colour) for colour in sample_colorscale(palette.CONTINUOUS, [1 - (1 - LATE) * j / 10 for j in range(11)])]


def _log_ticks(low: float, high: float) -> list[float]:
    """Choose ticks between two logarithms: round numbers, or where none of them lie between, the ends."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for parts in ((1,), (1, 3), (1, 2, 5)):
        ticks = [power + math.log10(part) for power in powers for part in parts]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 8)]
    return [low, (low + high) / 2, high]


def _bar(title: str, ticks: Sequence[float | int] | None = None, texts: Sequence[str] | None = None) -> dict[str, Any]:
    """Describe a colour bar."""
    return {
        **BAR,
        "title": {"text": title},
        "tickvals": None if ticks is None else list(ticks),
        "ticktext": None if texts is None else list(texts),
    }
