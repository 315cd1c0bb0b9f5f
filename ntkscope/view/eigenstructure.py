"""Every example in the three leading directions, over training."""

import html
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from torch import Tensor

from ntkscope.view import palette
from ntkscope.view.drawing import fixed_range, frame_rows, hover_facts, median, values
from ntkscope.view.findings import stop_row
from ntkscope.view.words import AnalysisLike, percent

CLEAR_RATIO = 1.5  # of two medians, from which on a title compares them
# plotly draws 3D symbols as letters: these two are in every font.
SYMBOL_SIZES = {"circle": 5, "cross": 8}


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
    rows = frame_rows(history.eigvals)
    active = _position_at_most(rows, stop_row(analysis))
    groups = _noise_groups(analysis)
    figure = go.Figure()
    for name, symbol, members in groups:
        figure.add_trace(
            go.Scatter3d(
                **_points(history.leading[rows[active]], members),
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=False,
                marker={"symbol": symbol, "size": SYMBOL_SIZES[symbol], "opacity": 0.95, "coloraxis": "coloraxis"},
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
    colourings = _colourings(analysis, [members for _, _, members in groups])
    _, first_colours, first_axis = colourings[0]
    for k, colours in enumerate(first_colours):
        figure.update_traces(marker_color=colours, selector=k)
    axes = {
        f"{letter}axis": palette.scene_axis(_mode_title(analysis, k), range=fixed_range(history.leading[rows, :, k]), nticks=5)
        for k, letter in enumerate("xyz")
    }
    title = _eigenstructure_title(analysis, rows[active])
    figure.update_layout(
        **palette.base_layout(title, height=620),
        scene={**axes, "aspectmode": "cube", "uirevision": "keep", "camera": palette.CAMERA},
        coloraxis=first_axis,
    )
    figure.update_layout(legend={"y": 1.0, "yanchor": "bottom"}, margin={"l": 8, "r": 8, "b": 8})
    if len(rows) > 1:
        figure.frames = [
            go.Frame(
                name=str(history.steps[row]),
                data=[go.Scatter3d(**_points(history.leading[row], members)) for _, _, members in groups],
                traces=list(range(len(groups))),
            )
            for row in rows
        ]
        figure.update_layout(sliders=[_slider([history.steps[row] for row in rows], active)])
    menus = [_colour_menu(colourings)] if len(colourings) > 1 else []
    figure.update_layout(updatemenus=[*menus, *([_play_menu()] if len(rows) > 1 else [])])
    return figure


def _position_at_most(rows: Sequence[int], row: int) -> int:
    """Find the last drawn snapshot that is not after `row`."""
    return max([position for position, candidate in enumerate(rows) if candidate <= row], default=0)


def _points(leading: Tensor, members: Sequence[int]) -> dict[str, list[float | None]]:
    """Place some examples in one snapshot."""
    return {letter: values(leading[list(members), k]) for k, letter in enumerate("xyz")}


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


def _noise_groups(analysis: AnalysisLike) -> list[tuple[str, str, list[int]]]:
    """Group the examples by marker: (name, symbol, positions)."""
    noise, everyone = analysis.examples.is_noise, list(range(len(analysis.examples.ids)))
    if noise is None:
        return [("examples", "circle", everyone)]
    groups = [
        ("label is right", "circle", [i for i in everyone if not noise[i]]),
        ("label was planted wrong", "cross", [i for i in everyone if noise[i]]),
    ]
    return [group for group in groups if group[2]]


def _colourings(analysis: AnalysisLike, groups: Sequence[Sequence[int]]) -> list[tuple[str, list[list[float]], dict[str, Any]]]:
    """Offer colours: (name, colour values of every trace, colour axis), the default first."""
    examples = analysis.examples
    bar = {"orientation": "h", "thickness": 12, "len": 0.8, "y": -0.02, "yanchor": "top"}
    offers = []
    if examples.is_noise is not None:
        flags = [float(flag) for flag in examples.is_noise]
        scale = palette.discrete_scale([palette.BLUE, palette.VERMILION])
        ticks = {"tickvals": [0, 1], "ticktext": ["label is right", "planted wrong"], "title": {"text": ""}}
        offers.append(("planted wrong labels", flags, {"colorscale": scale, "cmin": -0.5, "cmax": 1.5, "colorbar": {**bar, **ticks}}))
    if examples.labels is not None:
        names = sorted(set(examples.labels))
        index = {name: float(k) for k, name in enumerate(names)}
        colours = [palette.LABEL_COLOURS[k % len(palette.LABEL_COLOURS)] for k in range(len(names))]
        every = math.ceil(len(names) / 20)
        ticks = {
            "tickvals": list(range(0, len(names), every)),
            "ticktext": [html.escape(str(name)) for name in names[::every]],
            "title": {"text": "given label"},
        }
        axis = {
            "colorscale": palette.discrete_scale(colours),
            "cmin": -0.5,
            "cmax": len(names) - 0.5,
            "colorbar": {**bar, **ticks},
        }
        offers.append(("given label", [index[label] for label in examples.labels], axis))
    energies = [value if value is not None else 0.0 for value in values(examples.reservoir_energy)]
    axis = {
        "colorscale": palette.CONTINUOUS,
        "cmin": 0.0,
        "cmax": max([*energies, 1e-12]),
        "colorbar": {**bar, "title": {"text": "reservoir energy"}, "tickvals": None, "ticktext": None},
    }
    offers.append(("reservoir energy", energies, axis))
    return [(name, [[values[i] for i in members] for members in groups], axis) for name, values, axis in offers]


def _colour_menu(colourings: Sequence[tuple[str, list[list[float]], dict[str, Any]]]) -> dict[str, Any]:
    """Describe the menu that changes colours."""
    buttons = []
    for name, colours, axis in colourings:
        # Single keys, not the whole axis: text colours set for a dark page must stay.
        changes = {f"coloraxis.{key}": value for key, value in axis.items() if key != "colorbar"}
        bar = axis["colorbar"]
        changes |= {f"coloraxis.colorbar.{key}": bar.get(key) for key in ("tickvals", "ticktext")}
        changes["coloraxis.colorbar.title.text"] = bar["title"]["text"]
        buttons.append({
            "label": f"colour: {name}",
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
    begin = (
        f"{percent(sum(shares))} of the loss that training removed went along {len(shares)} of {analysis.channels.num_modes:,} directions"
    )
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
