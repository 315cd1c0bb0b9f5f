"""Figures of the spectrum: ω of every direction over training, and where each rule draws the line."""

import html
import math
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ntkscope.view import palette
from ntkscope.view.drawing import MIN_DECADE_SPAN, fixed, frame_rows, spread, thinned, values
from ntkscope.view.findings import signal_modes, stop_row
from ntkscope.view.words import AnalysisLike, counted

MAX_MODES = 200
MAX_MARKS = 3000


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
    learned = [row for row in frame_rows(history.eigvals) if history.steps[row] > 0] or [len(history.steps) - 1]
    row = stop_row(analysis)
    rows = thinned(learned, keep=row)
    above = int((history.eigvals[row] > 0.5).sum())
    title = (
        f"By step {history.steps[row]:,}, {above:,} of {counted(total, 'direction')} "
        f"{'has' if above == 1 else 'have'} lost more than half of {'its' if above == 1 else 'their'} loss"
    )
    parts = [f"{len(modes)} of {total:,} directions drawn, denser at the start"] if len(modes) < total else []
    if len(rows) < len(learned):
        parts.append(f"{len(rows)} of {len(learned)} snapshots drawn")
    if parts:
        title += f" ({'; '.join(parts)})"
    omega = history.eigvals[rows][:, modes]
    x = [k + 1 for k in modes]
    steps = [history.steps[row] for row in rows]
    if len(rows) > 1 and len(modes) > 1:
        trace = go.Surface(
            x=x,
            y=steps,
            z=[fixed(row, 1.0) for row in omega],
            colorscale=palette.CONTINUOUS,
            cmin=0,
            cmax=1,
            showscale=False,  # the height says it already
            contours={"z": {"show": True, "start": 0.5, "end": 0.6, "size": 1, "color": palette.VERMILION, "width": 4}},
            hovertemplate="mode %{x}<br>step %{y}<br>ω = %{z:.3f}<extra></extra>",
        )
    else:
        trace = go.Scatter3d(
            x=x,
            y=[steps[-1]] * len(modes),
            z=fixed(omega[-1], 1.0),
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
    modes = spread(total, MAX_MARKS)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.07, row_heights=[0.64, 0.36])
    for name, wanted, colour, symbol in (
        ("signal (learned)", True, palette.SIGNAL, "circle"),
        ("reservoir (the rest)", False, palette.RESERVOIR, "x-thin-open"),
    ):
        chosen = [k for k in modes if is_signal[k] is wanted]
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
                "symbol": [_symbol(analysis.cutoffs[rule], is_chosen=rule == analysis.channels.rule) for rule in answered],
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
    if not _is_selection(analysis.cutoffs.get(analysis.channels.rule)):
        figure.add_vline(x=rank + 0.5, line={"color": palette.GREEN, "width": 2, "dash": "dash"})
    title = (
        f"{rank:,} of {counted(total, 'direction')} {'carries' if rank == 1 else 'carry'} the signal "
        f"by rule '{html.escape(analysis.channels.rule)}'"
    )
    ranks = [analysis.cutoffs[rule].rank for rule in answered]
    if len(set(ranks)) > 1:
        title += f"; other rules say {min(ranks):,} to {max(ranks):,}"
    if len(modes) < total:
        title += f" ({len(modes):,} directions drawn, denser at the start)"
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


def _symbol(cutoff: Any, *, is_chosen: bool) -> str:
    """Choose a rule's mark: round for one that selects directions one by one, and so draws no line; filled for the one in use."""
    return ("circle" if _is_selection(cutoff) else "diamond") + ("" if is_chosen else "-open")


def _is_selection(cutoff: Any) -> bool:
    """Say whether a rule selects directions that need not be the leading ones."""
    return getattr(cutoff, "selected", None) is not None
