"""Figures of an analysis. Each title states the finding; each function reads the result object and nothing else."""

import html
import math
from collections.abc import Callable, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ntkscope._checks import InputError
from ntkscope.dynamics.closure import GRADIENT_LIMIT
from ntkscope.view import palette
from ntkscope.view.drawing import MIN_DECADE_SPAN, frame_rows, hover_facts, percent_ticks, spread, step_axis, table, values
from ntkscope.view.eigenstructure import eigenstructure
from ntkscope.view.findings import signal_modes, stop_row
from ntkscope.view.gate_figures import gate_agreement, gate_density, gate_modes, gate_motion
from ntkscope.view.suspects import found_among, ranked
from ntkscope.view.words import AnalysisLike, counted, number, percent

MAX_MODES = 200
MAX_BARS = 20
MAX_PARAMETERS = 8


def omega_surface(analysis: AnalysisLike) -> go.Figure:
    """Draw ω of every direction over training.

    Args:
        analysis: The result.

    Returns:
        3D surface; a line when only one snapshot has anything to show.
    """
    history = analysis.history
    total = history.eigvals.shape[1]
    modes = spread(total, MAX_MODES)
    drawn = [row for row in frame_rows(history.eigvals) if history.steps[row] > 0]
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
            z=table(omega),
            customdata=[[number(float(history.times[row]))] * len(modes) for row in rows],
            colorscale=palette.CONTINUOUS,
            cmin=0,
            cmax=1,
            showscale=False,  # the height says it already
            contours={"z": {"show": True, "start": 0.5, "end": 0.6, "size": 1, "color": palette.VERMILION, "width": 4}},
            hovertemplate="mode %{x}<br>step %{y}, optimizer time %{customdata}<br>ω = %{z:.3f}<extra></extra>",
        )
    else:
        trace = go.Scatter3d(
            x=x,
            y=[steps[-1]] * len(modes),
            z=values(omega[-1]),
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
            "camera": {**palette.CAMERA, "eye": {"x": 1.2, "y": -1.45, "z": 0.75}},
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
    place, ticks = step_axis([*history.steps, window.start_step, window.stop_step])
    x = [place(step) for step in history.steps]
    row = stop_row(analysis)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.58, 0.42])
    shown = [[f"{step:,}", number(float(time))] for step, time in zip(history.steps, history.times, strict=True)]
    hover = "step %{customdata[0]}, optimizer time %{customdata[1]}<br>%{y:.4g}"
    figure.add_trace(
        go.Scatter(
            x=x,
            y=values(history.loss),
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
            y=values(history.predicted_loss),
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
    errors = [value if value is not None and value > 0 else None for value in values(history.gradient_error)]
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
    figure.update_xaxes(**palette.axis("", **ticks))
    figure.update_xaxes(title_text=f"training step (shaded: window, {window.start_step:,} to {window.stop_step:,})", row=2, col=1)
    figure.update_yaxes(**palette.axis("loss", rangemode="tozero"), row=1, col=1)
    figure.update_yaxes(**palette.axis("gradient error", **percent_ticks(low, high)), row=2, col=1)
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
                y=values(omega[chosen]),
                name=name,
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 7, "line": {"width": 1.6, "color": colour}},
                hovertemplate="mode %{x}<br>ω = %{y:.4g}<extra>" + name + "</extra>",
            ),
            row=1,
            col=1,
        )
    # From the bottom up: the chosen rule ends on top.
    others = [rule for rule in analysis.cutoffs if rule != analysis.channels.rule]
    rules = [*reversed(others), analysis.channels.rule]
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
    title = (
        f"{rank:,} of {counted(total, 'direction')} {'carries' if rank == 1 else 'carry'} the signal "
        f"by rule '{html.escape(analysis.channels.rule)}'"
    )
    ranks = [analysis.cutoffs[rule].rank for rule in answered]
    if len(set(ranks)) > 1:
        title += f"; other rules say {min(ranks):,} to {max(ranks):,}"
    figure.update_layout(**palette.base_layout(title, height=560))
    is_log = total >= MIN_DECADE_SPAN
    low, high = (math.log10(0.45), math.log10(1.4 * (total + 0.5))) if is_log else (0.0, total + 1.0)
    figure.update_xaxes(
        **palette.axis("", type="log" if is_log else "linear", range=[low, high], tickformat=",d", **({"dtick": 1} if is_log else {}))
    )
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
                x=values(examples.reservoir_energy[members]),
                y=[names[i] for i in members],
                orientation="h",
                name=name,
                showlegend=bool(name),
                marker={
                    "color": colour,
                    "line": {"color": colour, "width": 1},
                    "pattern": {"shape": pattern, "fillmode": "replace", "size": 7, "solidity": 0.45},
                },
                customdata=[[*hover_facts(analysis, i), percent(float(examples.reservoir_share[i]))] for i in members],
                hovertemplate="example %{customdata[0]}<br>given label %{customdata[1]}, true label %{customdata[2]}"
                "<br>reservoir energy %{x:.4g}, which is %{customdata[4]} of its initial error<extra></extra>",
            )
        )
    found = found_among(analysis, MAX_BARS)
    if not order:
        title = "No example has a known reservoir energy"
    elif found is not None:
        wrong, looked = found
        planted = int(examples.is_noise.sum())
        title = f"{wrong} of the {looked} most suspicious examples have labels that were planted wrong; there are {planted:,} in all"
    else:
        energy, share = float(examples.reservoir_energy[order[0]]), float(examples.reservoir_share[order[0]])
        name = html.escape(str(examples.ids[order[0]]))
        title = f"Example #{name} is most suspicious: {percent(share)} of its initial error ({number(energy)}) lies in the reservoir"
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
    place, ticks = step_axis(gate.steps)
    x = [place(step) for step in gate.steps]
    figure = go.Figure(
        go.Scatter(
            x=x,
            y=values(gate.open_share),
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
                y=values(share),
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
    figure.update_xaxes(**palette.axis("training step", **ticks))
    figure.update_yaxes(**palette.axis("share of open gates (q > ½)", range=[-0.02, 1.02], tickformat=".0%"))
    return figure


FIGURES: dict[str, Callable[[AnalysisLike], go.Figure]] = {
    "spectrum": spectrum,
    "eigenstructure": eigenstructure,
    "omega_surface": omega_surface,
    "suspicious": suspicious,
    "loss_and_closure": loss_and_closure,
    "gate_openness": gate_openness,
    "gate_motion": gate_motion,
    "gate_agreement": gate_agreement,
    "gate_density": gate_density,
    "gate_modes": gate_modes,
}
AUDITED = ("gate_motion", "gate_agreement", "gate_density", "gate_modes")


def drawable(analysis: AnalysisLike) -> list[str]:
    """List the figures that have something to show.

    Args:
        analysis: The result.

    Returns:
        Names in `FIGURES`.
    """
    gate = analysis.gate
    missing = () if gate is not None and gate.audit is not None else AUDITED if gate is not None else (*AUDITED, "gate_openness")
    return [name for name in FIGURES if name not in missing]


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
