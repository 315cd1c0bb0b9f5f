"""Figures of the examples that two results have in common."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import scipy
import torch
from torch import Tensor

from ntkscope.view import palette
from ntkscope.view.drawing import fixed_range, median, values
from ntkscope.view.findings import stop_row
from ntkscope.view.matching import Matching, common_rankings, half_steps
from ntkscope.view.suspects import title as score_title
from ntkscope.view.words import AnalysisLike, counted, number, percent

MAX_NAMED = 6  # examples named in a figure
NAMED_FROM = math.log(1.5)  # distance from the common line, as a ratio of half-times, from which an example is named
SAME_SPEED = 0.05  # distance from ratio 1, likewise, up to which two runs are equally fast
EARLIEST = 1e-3  # steps; what is earlier is drawn there
NUM_SHUFFLES = 200
TOP = 10  # suspicious examples that a title speaks of
MAX_TOP = 50
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Style:
    """How one of the two runs is drawn.

    Attributes:
        name: "A" or "B".
        colour: Of lines and marks.
        dash: Of lines.
        symbol: Of marks.
    """

    name: str
    colour: str
    dash: str
    symbol: str


STYLES = (Style("A", palette.BLUE, "solid", "circle"), Style("B", palette.VERMILION, "dash", "diamond-open"))


def half_times(first: AnalysisLike, second: AnalysisLike, matching: Matching) -> go.Figure:
    """Draw after how many steps half of each common example's error was gone, A against B.

    An example that had not got there by the last snapshot is drawn beyond all others; it counts as far from the common line only as far
    as the last snapshot proves it.

    Args:
        first: Result A.
        second: Result B.
        matching: Their common examples; at least one.

    Returns:
        Scatter with the line of equal steps and the line of the typical ratio; who is far from it is named.
    """
    columns = torch.stack([half_steps(first)[matching.first], half_steps(second)[matching.second]])
    known = ~torch.isnan(columns).any(dim=0)
    columns = columns.clamp(min=EARLIEST)  # an axis of logarithms has no zero
    reached = torch.isfinite(columns)
    both, finite = reached.all(dim=0) & known, columns[reached]
    low, high = (float(finite.min()) / 1.5, float(finite.max()) * 1.5) if len(finite) else (1.0, 10.0)
    beyond = high * (high / low) ** 0.12
    placed = torch.where(torch.isinf(columns), beyond, columns)
    typical = median((columns[1] / columns[0]).log()[both])
    distance = _distances(columns, [analysis.history.steps[-1] - analysis.history.steps[0] for analysis in (first, second)], typical)
    distance = torch.where(known, distance, 0.0)
    named = [k for k in distance.argsort(descending=True, stable=True).tolist() if distance[k] > NAMED_FROM][:MAX_NAMED]

    figure = go.Figure()
    ids = [html.escape(str(first.examples.ids[i])) for i in matching.first]
    for name, colour, symbol, members in _noise_groups(first, matching, known.tolist()):
        figure.add_scatter(
            x=values(placed[0, members]),
            y=values(placed[1, members]),
            name=name,
            mode="markers+text",
            text=[f"#{ids[k]}" if k in named else "" for k in members],
            textposition=["top center" if reached[0, k] else "middle left" for k in members],
            marker={"color": colour, "symbol": symbol, "size": 9, "line": {"width": 1.5, "color": colour}, "opacity": 0.85},
            customdata=[[ids[k], _steps(float(columns[0, k])), _steps(float(columns[1, k]))] for k in members],
            hovertemplate="example %{customdata[0]}<br>A: %{customdata[1]}<br>B: %{customdata[2]}<extra></extra>",
        )
    lines = [("as fast in both", 0.0, "dot", palette.GREY)]
    if abs(typical) > SAME_SPEED:
        lines.append(("typical ratio", typical, "dashdot", palette.GREEN))
    for name, shift, dash, colour in lines:
        begin, end = max(low, low * math.exp(-shift)), min(high, high * math.exp(-shift))
        line = {"color": colour, "dash": dash, "width": 2}
        y = [begin * math.exp(shift), end * math.exp(shift)]
        figure.add_scatter(x=[begin, end], y=y, name=name, mode="lines", line=line, hoverinfo="skip")
    scale = _time_scale(low, high, beyond if bool((~reached & known).any()) else None)
    figure.update_xaxes(**palette.axis("A: training steps to half of the error", **scale))
    figure.update_yaxes(**palette.axis("B: training steps to half of the error", **scale))
    title = _ratio_words(typical, int(both.sum()), [int((reached[k] & ~reached[1 - k] & known).sum()) for k in (0, 1)])
    order = _rank_correlation(placed[0, known], placed[1, known])
    title += "" if math.isnan(order) else f". The order of the examples has rank correlation {order:.2f}"
    if named:
        title += f"; furthest from the common line: {', '.join(f'#{ids[k]}' for k in named)}"
    return titled(figure, title, height=560)


def eigenstructures(first: AnalysisLike, second: AnalysisLike, matching: Matching) -> go.Figure:
    """Draw the common examples in three leading directions, those of B rotated onto those of A.

    Each run has axes of its own. The rotation (or reflection) is the one that brings the examples of B nearest to themselves in A.

    Args:
        first: Result A.
        second: Result B.
        matching: Their common examples; at least one.

    Returns:
        3D scatter with a line between the two places of each example.
    """
    places = [_placed(analysis, positions) for analysis, positions in ((first, matching.first), (second, matching.second))]
    known = torch.isfinite(torch.cat(places, dim=1)).all(dim=1)
    fixed, turned, residual = _rotated(places[0][known], places[1][known])
    ids = [html.escape(str(first.examples.ids[i])) for i, is_known in zip(matching.first, known.tolist(), strict=True) if is_known]
    figure = go.Figure()
    links = torch.stack([fixed, turned, torch.full_like(fixed, torch.nan)], dim=1).reshape(-1, 3)
    figure.add_scatter3d(
        **_letters(links), mode="lines", name="the same example", line={"color": palette.GREY, "width": 1.5}, hoverinfo="skip"
    )
    for style, points, symbol, size in zip(STYLES, (fixed, turned), ("circle", "cross"), (5, 6), strict=True):
        figure.add_scatter3d(
            **_letters(points),
            mode="markers",
            name="A" if style.name == "A" else "B, rotated",
            marker={"color": style.colour, "symbol": symbol, "size": size},
            customdata=ids,
            hovertemplate="example %{customdata}<br>%{x:.3f}, %{y:.3f}, %{z:.3f}<extra>" + style.name + "</extra>",
        )
    modes = first.history.leading_modes
    axes = {
        f"{letter}axis": palette.scene_axis(
            f"A's mode {modes[k] + 1}, part removed" if k < len(modes) else "(no such mode)",
            range=fixed_range(torch.cat([fixed[:, k], turned[:, k]])),
            nticks=5,
        )
        for k, letter in enumerate("xyz")
    }
    figure.update_layout(scene={**axes, "aspectmode": "cube", "uirevision": "keep", "camera": palette.CAMERA})
    chance = _residual_by_chance(places[0][known], places[1][known])
    title = f"Rotated onto A, the leading directions of B place {len(ids):,} examples with a residual of {percent(residual)}"
    titled(figure, title + ("" if math.isnan(chance) else f"; with examples shuffled it would be {percent(chance)}"), height=620)
    figure.update_layout(legend={"y": 1.0, "yanchor": "bottom"}, margin={"l": 8, "r": 8, "b": 8})
    return figure


def suspects_in_common(first: AnalysisLike, second: AnalysisLike, matching: Matching) -> go.Figure:
    """Draw how many of the k most suspicious examples are the same in both runs, for every k.

    Args:
        first: Result A.
        second: Result B.
        matching: Their common examples; at least one.

    Returns:
        A line, and what chance would give.
    """
    ours, theirs, by = common_rankings(first, second, matching)
    total = len(ours)
    counts = list(range(1, min(MAX_TOP, total) + 1))
    shared = [len({*ours[:k]} & {*theirs[:k]}) for k in counts]
    lows, highs = (
        [float(scipy.stats.hypergeom.ppf(level, total, k, k)) for k in counts] for level in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    )
    figure = go.Figure()
    band = f"chance, {CONFIDENCE:.0%} of cases"
    figure.add_scatter(x=counts, y=lows, mode="lines", line={"width": 0}, showlegend=False, hoverinfo="skip")
    figure.add_scatter(
        x=counts, y=highs, mode="lines", line={"width": 0}, fill="tonexty", fillcolor=palette.SHADE, name=band, hoverinfo="skip"
    )
    for name, counted_up, colour, dash in (("all the same", counts, palette.GREY, "dot"), ("found", shared, palette.GREEN, "solid")):
        figure.add_scatter(
            x=counts,
            y=counted_up,
            name=name,
            mode="lines+markers" if name == "found" else "lines",
            line={"color": colour, "dash": dash, "width": 2},
            marker={"size": 6},
            hovertemplate="of the %{x} most suspicious in each run<br>%{y} are the same<extra>" + name + "</extra>",
        )
    top = min(TOP, total)
    figure.update_xaxes(**palette.axis("k, most suspicious in each run", rangemode="tozero"))
    figure.update_yaxes(**palette.axis("examples in both", rangemode="tozero"))
    same = shared[top - 1] if top else 0
    title = (
        f"{same} of the {top} most suspicious examples are the same in A and B (by {score_title(by)}, of {total:,} compared); "
        f"chance would give {number(top**2 / total, 2) if total else 0}"
    )
    return titled(figure, title, height=440)


def titled(figure: go.Figure, title: str, *, height: int = 480) -> go.Figure:
    """Give a figure its title and the common look.

    Args:
        figure: The figure; changed.
        title: The finding.
        height: Pixels.

    Returns:
        The figure.
    """
    return figure.update_layout(**palette.base_layout(title, height=height), showlegend=True)


def _noise_groups(analysis: AnalysisLike, matching: Matching, known: Sequence[bool]) -> list[tuple[str, str, str, list[int]]]:
    """Group the matched examples by marker: (name, colour, symbol, positions in the matching)."""
    everyone = [k for k in range(len(matching)) if known[k]]
    noise = analysis.examples.is_noise
    if noise is None:
        return [("example", palette.BLUE, "circle-open", everyone)]
    flags = noise[matching.first].tolist()
    groups = [
        ("label is right", palette.BLUE, "circle-open", [k for k in everyone if not flags[k]]),
        ("label was planted wrong", palette.VERMILION, "x-thin", [k for k in everyone if flags[k]]),
    ]
    return [group for group in groups if group[3]]


def _distances(columns: Tensor, last: Sequence[int], typical: float) -> Tensor:
    """Compute how far each example is from the line of the typical ratio, as a logarithm; at least, where a time is not reached."""
    bounds = torch.tensor(last, dtype=columns.dtype).clamp(min=EARLIEST)[:, None].expand_as(columns)
    reached = torch.isfinite(columns)
    logs = torch.where(reached, columns, bounds).log()
    gaps = logs[1] - logs[0] - (0.0 if math.isnan(typical) else typical)
    # What is not reached in B alone lies above: a gap below zero proves nothing. In A alone the reverse; in both, nothing is known.
    gaps = torch.where(reached[0] & ~reached[1], gaps.clamp(min=0.0), gaps)
    gaps = torch.where(~reached[0] & reached[1], gaps.clamp(max=0.0), gaps)
    return torch.where(~reached[0] & ~reached[1], 0.0, gaps).abs()


def _time_scale(low: float, high: float, beyond: float | None) -> dict[str, Any]:
    """Describe a logarithmic axis of steps, with a place for what is not reached."""
    parts = (1, 2, 5) if high < 300 * low else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [part * 10.0**k for k in decades for part in parts if low <= part * 10.0**k <= high]
    return {
        "type": "log",
        "range": [math.log10(low), math.log10(high if beyond is None else beyond * (beyond / high))],
        "tickvals": [*ticks, *([] if beyond is None else [beyond])],
        "ticktext": [*(f"{tick:,g}" for tick in ticks), *([] if beyond is None else ["later"])],
    }


def _steps(value: float) -> str:
    """Write a number of steps."""
    return "not by the last snapshot" if math.isinf(value) else f"{number(value)} steps"


def _ratio_words(typical: float, num_both: int, num_alone: Sequence[int]) -> str:
    """Say how much slower B is where both runs get there, and how many examples get there in one run alone."""
    alone = f"{num_alone[0]:,} in A alone, {num_alone[1]:,} in B alone"
    if num_both == 0:
        return f"No example lost half of its error in both runs ({alone})"
    others = f" ({alone})" if any(num_alone) else ""
    ratio = math.exp(typical)
    speed = "as many" if abs(typical) <= SAME_SPEED else f"{number(ratio)} times as many"
    whose = "its" if num_both == 1 else "their"
    return f"{counted(num_both, 'example')} lost half of {whose} error in both runs{others}, typically in {speed} steps in B as in A"


def _rank_correlation(first: Tensor, second: Tensor) -> float:
    """Compute Spearman's; NaN where a side is constant."""
    if len(first) < 2 or float(first.min()) == float(first.max()) or float(second.min()) == float(second.max()):
        return math.nan
    return float(scipy.stats.spearmanr(first.numpy(), second.numpy()).statistic)


def _letters(points: Tensor) -> dict[str, list[float | None]]:
    """Name the three coordinates."""
    return {letter: values(points[:, k]) for k, letter in enumerate("xyz")}


def _placed(analysis: AnalysisLike, positions: Sequence[int]) -> Tensor:
    """Take the places of some examples at the window's end; axes that do not exist are zero."""
    placed: Tensor = analysis.history.leading[stop_row(analysis)][list(positions)].double()
    return torch.nn.functional.pad(placed, (0, 3 - placed.shape[1]))


def _rotated(fixed: Tensor, moved: Tensor) -> tuple[Tensor, Tensor, float]:
    """Rotate the second onto the first; with √(‖fixed − rotated‖² / (‖fixed‖² + ‖moved‖²)), from 0 for equal ones to 1."""
    if not len(fixed):
        return fixed, moved, math.nan
    rotation = torch.from_numpy(scipy.linalg.orthogonal_procrustes(moved.numpy(), fixed.numpy())[0])
    turned = moved @ rotation
    size = float(fixed.square().sum() + moved.square().sum())
    return fixed, turned, math.sqrt(float((fixed - turned).square().sum()) / size) if size > 0 else 0.0


def _residual_by_chance(fixed: Tensor, moved: Tensor) -> float:
    """Compute the mean residual when examples are shuffled."""
    if len(fixed) < 2:
        return math.nan
    generator = np.random.default_rng(0)
    orders = [torch.from_numpy(generator.permutation(len(moved))) for _ in range(NUM_SHUFFLES)]
    return float(np.mean([_rotated(fixed, moved[order])[2] for order in orders]))
