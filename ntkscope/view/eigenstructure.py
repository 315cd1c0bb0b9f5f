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

NUM_AXES = 3
CLEAR_RATIO = 1.5  # of two medians, from which on a title compares them
NEARLY_ALL = 0.9995
# plotly draws 3D symbols as letters: these two are in every font.
SYMBOL_SIZES = {"circle": 5, "cross": 8}


def eigenstructure(analysis: AnalysisLike) -> go.Figure:
    """Draw every example in the three leading directions, over training.

    A point's coordinate in mode k is ⟨v_k[i], h_i / ‖h_i‖⟩: the component of the example's residual along the mode. The squared
    distance from the centre is therefore the share of the example's error direction that the three modes hold.

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
                "<br>reservoir energy %{customdata[3]}<br>component of its residual along<br>mode 1: %{x:.3f}, mode 2: %{y:.3f}, "
                "mode 3: %{z:.3f}<extra></extra>",
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
        f"{letter}axis": palette.scene_axis(
            _mode_title(history.eigvals[rows[active]], k), range=fixed_range(history.leading[rows, :, k]), nticks=5
        )
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
                layout={
                    "scene": {f"{letter}axis": {"title": {"text": _mode_title(history.eigvals[row], k)}} for k, letter in enumerate("xyz")}
                },
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


def _mode_title(eigvals: Tensor, k: int) -> str:
    """Name an axis by its mode and how much of its loss is gone."""
    return f"mode {k + 1}, ω {_omega(float(eigvals[k]))}" if k < len(eigvals) else f"mode {k + 1} (there is none)"


def _omega(value: float) -> str:
    """Write an ω, with its relation."""
    return "> 0.999" if 0.9995 <= value < 1 else f"= {value:.3f}" if math.isfinite(value) else "unknown"


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
    """Say how much was learned along the axes, and which share of the examples' errors they hold."""
    history, noise = analysis.history, analysis.examples.is_noise
    held = history.leading[row].square().sum(dim=1)  # share of each example's error direction that the axes hold
    omega = history.eigvals[row][:NUM_AXES]
    least = float(omega.min())
    removed = "nearly all" if least >= NEARLY_ALL else f"{percent(least)} or more"
    begin = f"By step {history.steps[row]:,} training removed {removed} of the loss along its three strongest directions"
    if noise is not None and 0 < int(noise.sum()) < len(noise):
        wrong, right = median(held[noise]), median(held[~noise])
        if max(wrong, right) >= CLEAR_RATIO * min(wrong, right):
            return f"{begin}; they hold {percent(right)} of the error of a right example and {percent(wrong)} of a wrongly labelled one"
    return f"{begin}; they hold {percent(median(held))} of a typical example's error"
