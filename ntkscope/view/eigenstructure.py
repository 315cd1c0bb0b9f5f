"""Every example in the three leading directions, over training."""

import html
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from torch import Tensor

from ntkscope.view import palette
from ntkscope.view.colourings import Colouring, colourings
from ntkscope.view.drawing import MAX_FRAMES, fixed, fixed_range, frame_rows, hover_facts, median, thinned
from ntkscope.view.findings import stop_row
from ntkscope.view.suspects import ranked
from ntkscope.view.words import AnalysisLike, percent

MAX_EXAMPLES = 2000
MAX_PLACES = 20_000  # examples times snapshots: what a page can hold
CLEAR_RATIO = 1.5  # of two medians, from which on a title compares them
# plotly draws 3D symbols as letters: these two are in every font.
SYMBOL_SIZES = {"circle": 5, "cross": 8}
OUTLINE = {"color": palette.NEUTRAL, "width": 1}  # the brightest and the darkest colours would be lost on one page or the other


def eigenstructure(analysis: AnalysisLike) -> go.Figure:
    """Draw every example in the three leading directions, over training.

    The axes are the three directions along which training removed the most loss, the same in every frame. A point's coordinate is
    the part of the example's residual that is gone along the axis, relative to the whole of it: the squared distance from the centre
    is the share of the example's squared error that was removed along the three.

    Args:
        analysis: The result.

    Returns:
        3D scatter with a slider over snapshots and a choice of colours.
    """
    history = analysis.history
    drawn = _drawn_examples(analysis)
    learned = frame_rows(history.eigvals)
    rows = thinned(learned, max(2, min(MAX_FRAMES, MAX_PLACES // max(1, len(drawn)))), keep=stop_row(analysis))
    active = _position_at_most(rows, stop_row(analysis))
    groups = _noise_groups(analysis, drawn)
    ranges = [fixed_range(history.leading[learned, :, k]) for k in range(3)]
    figure = go.Figure()
    for name, symbol, members in groups:
        figure.add_trace(
            go.Scatter3d(
                **_points(history.leading[rows[active]], members, ranges),
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=False,
                marker={"symbol": symbol, "size": SYMBOL_SIZES[symbol], "line": OUTLINE, "opacity": 0.95, "coloraxis": "coloraxis"},
                customdata=[hover_facts(analysis, i) for i in members],
                hovertemplate="example %{customdata[0]}<br>given label %{customdata[1]}, true label %{customdata[2]}"
                f"<br>reservoir energy %{{customdata[3]}}<br>part of its error removed along<br>{_hover_modes(analysis)}<extra></extra>",
            )
        )
    if len(groups) > 1:
        # In a legend, points that are coloured by value are black, which is lost on a dark page: grey ones stand for them.
        for name, symbol, _ in groups:
            legend_mark = {"symbol": symbol, "size": SYMBOL_SIZES[symbol], "color": palette.NEUTRAL}
            figure.add_trace(go.Scatter3d(x=[None], y=[None], z=[None], mode="markers", name=name, legendgroup=name, marker=legend_mark))
    offers = colourings(analysis)
    for k, colours in enumerate(_by_group(offers[0], groups)):
        figure.update_traces(marker_color=colours, selector=k)
    axes = {f"{letter}axis": palette.scene_axis(_mode_title(analysis, k), range=ranges[k], nticks=5) for k, letter in enumerate("xyz")}
    title = _eigenstructure_title(analysis, rows[active]) + _thinning(len(drawn), len(analysis.examples.ids), len(rows), len(learned))
    figure.update_layout(
        **palette.base_layout(title, height=620),
        scene={**axes, "aspectmode": "cube", "uirevision": "keep", "camera": palette.CAMERA},
        coloraxis=offers[0].axis,
    )
    figure.update_layout(legend={"y": 1.0, "yanchor": "bottom"}, margin={"l": 8, "r": 8, "b": 8})
    if len(rows) > 1:
        figure.frames = [
            go.Frame(
                name=str(history.steps[row]),
                data=[go.Scatter3d(**_points(history.leading[row], members, ranges)) for _, _, members in groups],
                traces=list(range(len(groups))),
            )
            for row in rows
        ]
        figure.update_layout(sliders=[_slider([history.steps[row] for row in rows], active)])
    figure.update_layout(updatemenus=[_colour_menu(offers, groups), *([_play_menu()] if len(rows) > 1 else [])])
    return figure


def _position_at_most(rows: Sequence[int], row: int) -> int:
    """Find the last drawn snapshot that is not after `row`."""
    return max([position for position, candidate in enumerate(rows) if candidate <= row], default=0)


def _drawn_examples(analysis: AnalysisLike) -> list[int]:
    """Choose the examples to draw: all of them if they fit, else the most suspicious and an even choice of the others."""
    total = len(analysis.examples.ids)
    if total <= MAX_EXAMPLES:
        return list(range(total))
    first = ranked(analysis)[: MAX_EXAMPLES // 2]
    others = sorted(set(range(total)) - set(first))
    return sorted([*first, *thinned(others, MAX_EXAMPLES - len(first))])


def _thinning(num_drawn: int, num_examples: int, num_frames: int, num_learned: int) -> str:
    """Say what was left out."""
    parts = []
    if num_drawn < num_examples:
        parts.append(f"{num_drawn:,} of {num_examples:,} examples drawn, the most suspicious among them")
    if num_frames < num_learned:
        parts.append(f"{num_frames} of {num_learned} snapshots drawn")
    return f" ({'; '.join(parts)})" if parts else ""


def _points(leading: Tensor, members: Sequence[int], ranges: Sequence[Sequence[float]]) -> dict[str, list[float | None]]:
    """Place some examples in one snapshot."""
    return {letter: fixed(leading[list(members), k], ranges[k][1] - ranges[k][0]) for k, letter in enumerate("xyz")}


def _by_group(colouring: Colouring, groups: Sequence[tuple[str, str, list[int]]]) -> list[list[float]]:
    """Share the colours out to the traces."""
    return [[colouring.values[i] for i in members] for _, _, members in groups]


def _mode_title(analysis: AnalysisLike, k: int) -> str:
    """Name an axis by its mode, and how much of the loss that training removed lies along it."""
    modes = analysis.history.leading_modes
    if k >= len(modes):
        return "(no such mode)"
    return f"mode {modes[k] + 1}: {percent(_removed_shares(analysis)[k])} of the removed loss"


def _hover_modes(analysis: AnalysisLike) -> str:
    """Name the coordinates of a hovered point."""
    modes = analysis.history.leading_modes
    return ", ".join(f"mode {mode + 1}: %{{{letter}:.3f}}" for mode, letter in zip(modes, "xyz", strict=False))


def _removed_shares(analysis: AnalysisLike) -> list[float]:
    """Compute which share of the loss that training removed lies along each axis."""
    spectrum = analysis.spectrum
    removed = spectrum.eigvals * spectrum.residual_energy
    total = float(removed.sum())
    return [float(removed[mode]) / total if total > 0 else math.nan for mode in analysis.history.leading_modes]


def _noise_groups(analysis: AnalysisLike, everyone: list[int]) -> list[tuple[str, str, list[int]]]:
    """Group the examples by marker: (name, symbol, positions)."""
    noise = analysis.examples.is_noise
    if noise is None:
        return [("examples", "circle", everyone)]
    groups = [
        ("label is right", "circle", [i for i in everyone if not noise[i]]),
        ("label was planted wrong", "cross", [i for i in everyone if noise[i]]),
    ]
    return [group for group in groups if group[2]]


def _colour_menu(offers: Sequence[Colouring], groups: Sequence[tuple[str, str, list[int]]]) -> dict[str, Any]:
    """Describe the menu that changes colours."""
    buttons = []
    for offer in offers:
        axis, colours = offer.axis, _by_group(offer, groups)
        # Single keys, not the whole axis: text colours set for a dark page must stay.
        changes = {f"coloraxis.{key}": value for key, value in axis.items() if key != "colorbar"}
        bar = axis["colorbar"]
        changes |= {f"coloraxis.colorbar.{key}": bar.get(key) for key in ("tickvals", "ticktext")}
        changes["coloraxis.colorbar.title.text"] = bar["title"]["text"]
        buttons.append({
            "label": f"colour: {offer.name}",
            "method": "update",
            "args": [{"marker.color": colours}, changes, list(range(len(colours)))],
        })
    return {"name": "colour", "type": "dropdown", "x": 1, "xanchor": "right", "y": 1.06, "yanchor": "bottom", "buttons": buttons}


def _play_menu() -> dict[str, Any]:
    """Describe the buttons that run through the snapshots."""
    move = {"frame": {"duration": 450, "redraw": True}, "transition": {"duration": 0}, "fromcurrent": True, "mode": "immediate"}
    stop = {"frame": {"duration": 0, "redraw": True}, "mode": "immediate"}
    return {
        "name": "play",
        "type": "buttons",
        "direction": "left",
        "x": 0,
        "y": -0.24,
        "yanchor": "top",
        "buttons": [
            {"label": "play", "method": "animate", "args": [None, move]},
            {"label": "pause", "method": "animate", "args": [[None], stop]},
        ],
    }


def _slider(steps: Sequence[int], active: int) -> dict[str, Any]:
    """Describe the slider over snapshots."""
    jump = {"frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}, "mode": "immediate"}
    return {
        "active": active,
        "x": 0.2,
        "len": 0.8,
        "y": -0.18,
        "yanchor": "top",
        "currentvalue": {"prefix": "training step "},
        "steps": [{"label": str(step), "method": "animate", "args": [[str(step)], jump]} for step in steps],
    }


def _eigenstructure_title(analysis: AnalysisLike, row: int) -> str:
    """Say how much of the learning the axes hold, which labels they speak for, and where wrong labels are."""
    history, noise = analysis.history, analysis.examples.is_noise
    shares = _removed_shares(analysis)
    along = f"of the loss that training removed went along {len(shares)} of {analysis.channels.num_modes:,} directions"
    if math.isnan(sum(shares)):
        return f"How much {along} is unknown"
    begin = f"{percent(sum(shares))} {along}"
    labels = _labels_of_axes(analysis, history.leading[row])
    if labels:
        begin += f", which speak mostly for {'label' if len(labels) == 1 else 'labels'} {', '.join(labels)}"
    if noise is not None and 0 < int(noise.sum()) < len(noise):
        distances = history.leading[row].norm(dim=1)
        wrong, right = median(distances[noise]), median(distances[~noise])
        if right >= CLEAR_RATIO * wrong > 0:
            return f"{begin}; a wrongly labelled example typically stays {right / wrong:.1f} times nearer to the centre than a right one"
    return begin


def _labels_of_axes(analysis: AnalysisLike, placed: Tensor) -> list[str]:
    """Name, for each axis, the label whose examples move furthest along it together."""
    labels = analysis.examples.labels
    if labels is None or not bool(placed.nan_to_num(0.0).any()):
        return []
    found = []
    for k in range(len(analysis.history.leading_modes)):
        totals = dict.fromkeys(labels, 0.0)
        for name, value in zip(labels, placed[:, k].nan_to_num(0.0).tolist(), strict=True):
            totals[name] += value
        found.append(html.escape(str(max(totals, key=lambda name: abs(totals[name])))))
    return list(dict.fromkeys(found))
