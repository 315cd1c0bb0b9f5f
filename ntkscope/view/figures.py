"""Figures of an analysis. Each title states the finding; each function reads the result object and nothing else."""

import html
import math
from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from ntkscope._checks import InputError
from ntkscope.dynamics.closure import GRADIENT_LIMIT
from ntkscope.view import palette
from ntkscope.view.findings import AnalysisLike, counted, found_among, number, percent, ranked, signal_modes, stop_row

MAX_MODES = 200
MAX_FRAMES = 60
MAX_BARS = 20
MAX_PARAMETERS = 8
NEARLY_ALL = 0.9995
CAMERA = {"eye": {"x": 1.45, "y": 1.45, "z": 0.85}, "center": {"x": 0, "y": 0, "z": -0.16}}  # room for the titles of the lower axes
CLEAR_RATIO = 1.5  # of two medians, from which on a title compares them
DIGITS = 4  # significant, in what is drawn
NUM_AXES = 3
# plotly draws 3D symbols as letters: these two are in every font.
SYMBOL_SIZES = {"circle": 5, "cross": 8}
MIN_DECADE_SPAN = 20  # a step axis that spans less is linear


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
    rows = _frame_rows(history.eigvals)
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
                customdata=[_hover_facts(analysis, i) for i in members],
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
            _mode_title(history.eigvals[rows[active]], k), range=_fixed_range(history.leading[rows, :, k]), nticks=5
        )
        for k, letter in enumerate("xyz")
    }
    title = _eigenstructure_title(analysis, rows[active])
    figure.update_layout(
        **palette.base_layout(title, height=620),
        scene={**axes, "aspectmode": "cube", "uirevision": "keep", "camera": CAMERA},
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


def omega_surface(analysis: AnalysisLike) -> go.Figure:
    """Draw ω of every direction over training.

    Args:
        analysis: The result.

    Returns:
        3D surface; a line when only one snapshot has anything to show.
    """
    history = analysis.history
    total = history.eigvals.shape[1]
    modes = _spread(total, MAX_MODES)
    drawn = [row for row in _frame_rows(history.eigvals) if history.steps[row] > 0]
    rows = drawn or [len(history.steps) - 1]
    row = stop_row(analysis)
    above = int((history.eigvals[row] > 0.5).sum())
    title = (
        f"By step {history.steps[row]:,}, {above:,} of {counted(total, 'direction')} "
        f"{'has' if above == 1 else 'have'} lost more than half of {'its' if above == 1 else 'their'} loss"
    )
    if len(modes) < total:
        title += f" ({len(modes)} of {total:,} drawn, denser at the start)"
    omega = history.eigvals[rows][:, modes]
    x = [k + 1 for k in modes]
    steps = [history.steps[row] for row in rows]
    if len(rows) > 1 and len(modes) > 1:
        trace = go.Surface(
            x=x,
            y=steps,
            z=_table(omega),
            customdata=[[number(float(history.times[row]))] * len(modes) for row in rows],
            colorscale=palette.CONTINUOUS,
            cmin=0,
            cmax=1,
            colorbar={"title": {"text": "ω"}, "orientation": "h", "thickness": 12, "len": 0.7, "y": -0.02, "yanchor": "top"},
            contours={"z": {"show": True, "start": 0.5, "end": 0.6, "size": 1, "color": palette.VERMILION, "width": 4}},
            hovertemplate="mode %{x}<br>step %{y}, optimizer time %{customdata}<br>ω = %{z:.3f}<extra></extra>",
        )
    else:
        trace = go.Scatter3d(
            x=x,
            y=[steps[-1]] * len(modes),
            z=_values(omega[-1]),
            mode="lines+markers",
            line={"color": palette.SIGNAL, "width": 4},
            marker={"size": 3, "color": palette.SIGNAL},
            hovertemplate="mode %{x}<br>step %{y}<br>ω = %{z:.3f}<extra></extra>",
        )
    figure = go.Figure(trace)
    is_log = len(steps) > 1 and steps[-1] >= MIN_DECADE_SPAN * steps[0]
    time_axis = {"type": "log", "dtick": 1, "tickformat": ",d"} if is_log else {}
    figure.update_layout(
        **palette.base_layout(title, height=560),
        scene={
            "xaxis": palette.scene_axis("mode, strongest first"),
            "yaxis": palette.scene_axis(f"training step{' (log)' if is_log else ''}", **time_axis),
            "zaxis": palette.scene_axis("share removed, ω", rangemode="tozero"),
            "aspectmode": "manual",
            "aspectratio": {"x": 1.1, "y": 1.1, "z": 0.7},
            "uirevision": "keep",
            "camera": {**CAMERA, "eye": {"x": 1.2, "y": -1.45, "z": 0.75}},
        },
    )
    figure.update_layout(margin={"l": 8, "r": 8, "b": 8})
    return figure


def loss_and_closure(analysis: AnalysisLike) -> go.Figure:
    """Draw observed and predicted loss, and below it how well the gradient is predicted.

    Args:
        analysis: The result.

    Returns:
        Two panels over training steps, the window shaded.
    """
    history, window, closure = analysis.history, analysis.window, analysis.closure
    place, step_axis = _step_axis([*history.steps, window.start_step, window.stop_step])
    x = [place(step) for step in history.steps]
    row = stop_row(analysis)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.58, 0.42])
    shown = [[f"{step:,}", number(float(time))] for step, time in zip(history.steps, history.times, strict=True)]
    hover = "step %{customdata[0]}, optimizer time %{customdata[1]}<br>%{y:.4g}"
    figure.add_trace(
        go.Scatter(
            x=x,
            y=_values(history.loss),
            name="observed loss",
            mode="lines+markers",
            line={"color": palette.BLUE, "width": 2},
            marker={"size": 6},
            customdata=shown,
            hovertemplate=hover + "<extra>observed</extra>",
        ),
        row=1,
        col=1,
    )
    figure.add_trace(
        go.Scatter(
            x=x,
            y=_values(history.predicted_loss),
            name="loss predicted from the kernels",
            mode="lines+markers",
            line={"color": palette.ORANGE, "width": 2, "dash": "dash"},
            marker={"size": 7, "symbol": "diamond-open"},
            customdata=shown,
            hovertemplate=hover + "<extra>predicted</extra>",
        ),
        row=1,
        col=1,
    )
    errors = [value if value is not None and value > 0 else None for value in _values(history.gradient_error)]
    figure.add_trace(
        go.Scatter(
            x=x,
            y=errors,
            name="error of the predicted gradient",
            mode="lines+markers",
            line={"color": palette.GREEN, "width": 2},
            marker={"size": 6, "symbol": "square"},
            customdata=shown,
            hovertemplate="step %{customdata[0]}<br>%{y:.2%}<extra>gradient error</extra>",
        ),
        row=2,
        col=1,
    )
    left, right = place(window.start_step), place(window.stop_step)
    figure.add_vrect(x0=left, x1=right, fillcolor=palette.SHADE, line={"width": 0}, layer="below", row="all", col=1)  # pyright: ignore[reportArgumentType]
    figure.add_hline(y=GRADIENT_LIMIT, line={"color": palette.VERMILION, "width": 2, "dash": "dot"}, row=2, col=1)  # pyright: ignore[reportArgumentType]
    known = [error for error in errors if error is not None]
    low = min([*known, 0.1]) / 1.6
    high = max([*known, GRADIENT_LIMIT]) * 1.6
    figure.add_annotation(
        text=f"limit {100 * GRADIENT_LIMIT:.0f} %",
        x=0,
        xref="x domain",
        xanchor="left",
        y=math.log10(GRADIENT_LIMIT),
        yref="y2",
        yanchor="bottom",
        showarrow=False,
    )
    start, end = float(history.loss[0]), float(history.loss[row])
    title = (
        f"The loss went from {number(start)} to {number(end)} in the window; "
        f"the predicted decrease is off by {percent(closure.energy_error)}, the predicted gradient by {percent(closure.gradient_error)}"
    )
    figure.update_layout(**palette.base_layout(title, height=560))
    figure.update_xaxes(**palette.axis("", **step_axis))
    figure.update_xaxes(title_text=f"training step (shaded: window, {window.start_step:,} to {window.stop_step:,})", row=2, col=1)
    figure.update_yaxes(**palette.axis("loss", rangemode="tozero"), row=1, col=1)
    figure.update_yaxes(**palette.axis("gradient error", **_percent_ticks(low, high)), row=2, col=1)
    return figure


def spectrum(analysis: AnalysisLike) -> go.Figure:
    """Draw ω of every direction, and below it where each rule draws the line.

    Args:
        analysis: The result.

    Returns:
        Two panels over the mode number.
    """
    omega = analysis.spectrum.eigvals
    total = len(omega)
    is_signal = signal_modes(analysis)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.07, row_heights=[0.64, 0.36])
    for name, wanted, colour, symbol in (
        ("signal (learned)", True, palette.SIGNAL, "circle"),
        ("reservoir (the rest)", False, palette.RESERVOIR, "x-thin-open"),
    ):
        chosen = [k for k in range(total) if is_signal[k] is wanted]
        figure.add_trace(
            go.Scatter(
                x=[k + 1 for k in chosen],
                y=_values(omega[chosen]),
                name=name,
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 7, "line": {"width": 1.6, "color": colour}},
                hovertemplate="mode %{x}<br>ω = %{y:.4g}<extra>" + name + "</extra>",
            ),
            row=1,
            col=1,
        )
    # From the bottom up: the chosen rule ends on top.
    rules = [rule for rule in analysis.cutoffs if rule != analysis.channels.rule][::-1] + [analysis.channels.rule]
    answered = [rule for rule in rules if rule in analysis.cutoffs and analysis.cutoffs[rule].rank is not None]
    figure.add_trace(
        go.Scatter(
            x=[analysis.cutoffs[rule].rank + 0.5 for rule in answered],
            y=[html.escape(rule) for rule in answered],
            mode="markers+text",
            text=[f"{analysis.cutoffs[rule].rank:,}" for rule in answered],
            textposition=["middle left" if analysis.cutoffs[rule].rank > total**0.6 else "middle right" for rule in answered],
            marker={
                "symbol": ["diamond" if rule == analysis.channels.rule else "diamond-open" for rule in answered],
                "size": 11,
                "color": palette.GREEN,
                "line": {"width": 2, "color": palette.GREEN},
            },
            showlegend=False,
            hovertemplate="rule %{y}: %{text} signal directions<extra></extra>",
        ),
        row=2,
        col=1,
    )
    silent = [rule for rule in rules if rule in analysis.cutoffs and analysis.cutoffs[rule].rank is None]
    for rule in silent:
        figure.add_annotation(
            text="no answer here", x=0.01, xref="x2 domain", xanchor="left", y=html.escape(rule), yref="y2", showarrow=False
        )
    rank = analysis.channels.signal_rank
    figure.add_vline(x=rank + 0.5, line={"color": palette.GREEN, "width": 2, "dash": "dash"})
    title = f"{rank:,} of {counted(total, 'direction')} {'carries' if rank == 1 else 'carry'} the signal by rule '{html.escape(analysis.channels.rule)}'"
    ranks = [analysis.cutoffs[rule].rank for rule in answered]
    if len(set(ranks)) > 1:
        title += f"; other rules say {min(ranks):,} to {max(ranks):,}"
    figure.update_layout(**palette.base_layout(title, height=560))
    is_log = total >= MIN_DECADE_SPAN
    low, high = (math.log10(0.45), math.log10(1.4 * (total + 0.5))) if is_log else (0.0, total + 1.0)
    figure.update_xaxes(**palette.axis("", type="log" if is_log else "linear", range=[low, high], tickformat=",d", **({"dtick": 1} if is_log else {})))
    figure.update_xaxes(title_text="direction (mode), strongest first", row=2, col=1)
    figure.update_yaxes(**palette.axis("ω, share of loss removed", rangemode="tozero"), row=1, col=1)
    figure.update_yaxes(
        **palette.axis("rule", type="category", categoryorder="array", categoryarray=[html.escape(rule) for rule in rules]), row=2, col=1
    )
    figure.update_yaxes(range=[-0.7, len(rules) - 0.3], row=2, col=1)
    return figure


def suspicious(analysis: AnalysisLike) -> go.Figure:
    """Draw the most suspicious examples.

    Args:
        analysis: The result.

    Returns:
        Horizontal bars of reservoir energy, planted wrong labels hatched when they are known.
    """
    examples = analysis.examples
    order = ranked(analysis)[:MAX_BARS]
    names = {i: f"#{examples.ids[i]}" + ("" if examples.labels is None else f" · {examples.labels[i]}") for i in order}
    figure = go.Figure()
    for name, colour, pattern, members in _bar_groups(analysis, order):
        figure.add_trace(
            go.Bar(
                x=_values(examples.reservoir_energy[members]),
                y=[names[i] for i in members],
                orientation="h",
                name=name,
                showlegend=bool(name),
                marker={
                    "color": colour,
                    "line": {"color": colour, "width": 1},
                    "pattern": {"shape": pattern, "fillmode": "replace", "size": 7, "solidity": 0.45},
                },
                customdata=[[*_hover_facts(analysis, i), percent(float(examples.reservoir_share[i]))] for i in members],
                hovertemplate="example %{customdata[0]}<br>given label %{customdata[1]}, true label %{customdata[2]}"
                "<br>reservoir energy %{x:.4g}, which is %{customdata[4]} of its initial error<extra></extra>",
            )
        )
    found = found_among(analysis, MAX_BARS)
    if not order:
        title = "No example has a known reservoir energy"
    elif found is not None:
        wrong, looked = found
        title = f"{wrong} of the {looked} most suspicious examples have labels that were planted wrong"
    else:
        energy, share = float(examples.reservoir_energy[order[0]]), float(examples.reservoir_share[order[0]])
        title = f"Example #{examples.ids[order[0]]} is most suspicious: {percent(share)} of its initial error ({number(energy)}) lies in the reservoir"
    figure.update_layout(**palette.base_layout(title, height=200 + 19 * max(len(order), 4)), bargap=0.25)
    label = "" if examples.labels is None else " · given label"
    figure.update_xaxes(**palette.axis("reservoir energy (2 × loss units)", rangemode="tozero"))
    figure.update_yaxes(
        **palette.axis(
            f"example{label}",
            type="category",
            categoryorder="array",
            categoryarray=[names[i] for i in reversed(order)],
            showgrid=False,
            dtick=1,
        )
    )
    return figure


def gate_openness(analysis: AnalysisLike) -> go.Figure:
    """Draw which share of the optimizer's gates was open.

    Args:
        analysis: The result of a run with a gate.

    Returns:
        Lines over training steps: all parameters, and each of the first few tensors.

    Raises:
        InputError: If the run had no gate.
    """
    gate = analysis.gate
    if gate is None:
        raise InputError(f"There is no gate to draw: {analysis.gate_reason}. Train with GatedAdamW to see one.")
    place, step_axis = _step_axis(gate.steps)
    x = [place(step) for step in gate.steps]
    figure = go.Figure(
        go.Scatter(
            x=x,
            y=_values(gate.open_share),
            name="all parameters",
            mode="lines+markers",
            line={"color": palette.BLUE, "width": 3},
            customdata=[f"{step:,}" for step in gate.steps],
            hovertemplate="step %{customdata}<br>%{y:.1%} open<extra>all parameters</extra>",
        )
    )
    dashes = ("dash", "dot", "dashdot", "longdash")
    colours = (palette.ORANGE, palette.GREEN, palette.PURPLE, palette.SKY, palette.VERMILION, palette.GREY, palette.OLIVE, palette.WINE)
    for k, (name, share) in enumerate(list(gate.by_parameter.items())[:MAX_PARAMETERS]):
        figure.add_trace(
            go.Scatter(
                x=x,
                y=_values(share),
                name=html.escape(name),
                mode="lines",
                line={"color": colours[k], "width": 1.5, "dash": dashes[k % len(dashes)]},
                customdata=[f"{step:,}" for step in gate.steps],
                hovertemplate="step %{customdata}<br>%{y:.1%} open<extra>" + html.escape(name) + "</extra>",
            )
        )
    last, first = float(gate.open_share[-1]), float(gate.open_share[0])
    title = f"{percent(last)} of the gates are open at step {gate.steps[-1]:,}"
    if len(gate.steps) > 1:
        title += f", against {percent(first)} at step {gate.steps[0]:,}"
    hidden = len(gate.by_parameter) - MAX_PARAMETERS
    if hidden > 0:
        title += f" ({hidden} more parameter tensors not drawn)"
    figure.update_layout(**palette.base_layout(title, height=460))
    figure.update_xaxes(**palette.axis("training step", **step_axis))
    figure.update_yaxes(**palette.axis("share of open gates (q > ½)", range=[-0.02, 1.02], tickformat=".0%"))
    return figure


FIGURES: dict[str, Callable[[AnalysisLike], go.Figure]] = {
    "spectrum": spectrum,
    "eigenstructure": eigenstructure,
    "omega_surface": omega_surface,
    "suspicious": suspicious,
    "loss_and_closure": loss_and_closure,
    "gate_openness": gate_openness,
}


def _rounded(value: float) -> float | None:
    """Keep a few significant digits; None where there is no finite number."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _values(column: Tensor) -> list[float | None]:
    """Turn a vector into drawable numbers."""
    return [_rounded(value) for value in column.tolist()]


def _table(matrix: Tensor) -> list[list[float | None]]:
    """Turn a matrix into drawable numbers."""
    return [_values(row) for row in matrix]


def _fixed_range(values: Tensor) -> list[float]:
    """Find a range that holds all frames, and the centre."""
    finite = values[torch.isfinite(values)]
    low, high = (min(float(finite.min()), 0.0), max(float(finite.max()), 0.0)) if finite.numel() else (0.0, 0.0)
    pad = 0.06 * (high - low) or 1.0
    return [low - pad, high + pad]


def _spread(total: int, limit: int) -> list[int]:
    """Choose at most `limit` of `total` positions: all of them if they fit, else denser at the start."""
    if total <= limit:
        return list(range(total))
    dense = limit // 2
    rest = limit - dense
    growth = [dense + round((total - 1 - dense) * (j / (rest - 1)) ** 2) for j in range(rest)]
    return sorted({*range(dense), *growth})


def _frame_rows(eigvals: Tensor) -> list[int]:
    """Choose the snapshots to draw: those at which something was learned, evenly thinned to what a page can hold."""
    rows = [row for row in range(len(eigvals)) if bool((eigvals[row].nan_to_num(0.0) > 0).any())]
    rows = rows or [len(eigvals) - 1]
    if len(rows) <= MAX_FRAMES:
        return rows
    return [rows[round(j * (len(rows) - 1) / (MAX_FRAMES - 1))] for j in range(MAX_FRAMES)]


def _position_at_most(rows: Sequence[int], row: int) -> int:
    """Find the last drawn snapshot that is not after `row`."""
    return max([position for position, candidate in enumerate(rows) if candidate <= row], default=0)


def _points(leading: Tensor, members: Sequence[int]) -> dict[str, list[float | None]]:
    """Place some examples in one snapshot."""
    return {letter: _values(leading[list(members), k]) for k, letter in enumerate("xyz")}


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


def _bar_groups(analysis: AnalysisLike, order: Sequence[int]) -> list[tuple[str, str, str, list[int]]]:
    """Group the bars: (name, colour, pattern, positions)."""
    noise = analysis.examples.is_noise
    if noise is None:
        return [("", palette.BLUE, "", list(order))]
    groups = [
        ("label was planted wrong", palette.VERMILION, "/", [i for i in order if noise[i]]),
        ("label is right", palette.BLUE, "", [i for i in order if not noise[i]]),
    ]
    return [group for group in groups if group[3]]


def _hover_facts(analysis: AnalysisLike, i: int) -> list[str]:
    """Collect what a hovering reader is told of an example."""
    examples = analysis.examples
    label = "unknown" if examples.labels is None else html.escape(str(examples.labels[i]))
    truth = "unknown" if examples.true_labels is None else html.escape(str(examples.true_labels[i]))
    return [html.escape(str(examples.ids[i])), label, truth, number(float(examples.reservoir_energy[i]))]


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
    energies = [value if value is not None else 0.0 for value in _values(examples.reservoir_energy)]
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
        buttons.append({"label": f"colour: {name}", "method": "update", "args": [{"marker.color": colours}, changes, list(range(len(colours)))]})
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
        wrong, right = _median(held[noise]), _median(held[~noise])
        if max(wrong, right) >= CLEAR_RATIO * min(wrong, right):
            return f"{begin}; they hold {percent(right)} of the error of a rightly labelled example and {percent(wrong)} of a wrongly labelled one"
    return f"{begin}; they hold {percent(_median(held))} of a typical example's error"


def _median(values: Tensor) -> float:
    """Take the median of what is finite."""
    finite = values[torch.isfinite(values)]
    return float(finite.median()) if finite.numel() else math.nan


def _step_axis(steps: Sequence[int]) -> tuple[Callable[[int], float], dict[str, Any]]:
    """Choose an axis for training steps: logarithmic with a place for step 0, or linear where the span is small."""
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


def _percent_ticks(low: float, high: float) -> dict[str, Any]:
    """Describe a logarithmic axis of percentages."""
    decades = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    texts = [f"{100 * tick:,.0f} %" if tick >= 0.01 else f"{100 * tick:.12f}".rstrip("0") + " %" for tick in decades]
    return {"type": "log", "range": [math.log10(low), math.log10(high)], "tickvals": decades, "ticktext": texts}
