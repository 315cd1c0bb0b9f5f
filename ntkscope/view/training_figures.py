"""Figures over training: the loss and how well the kernels predict it, what the signal channel took, and how the kernel moved."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from ntkscope.dynamics.closure import GRADIENT_LIMIT
from ntkscope.view import palette
from ntkscope.view.drawing import MIN_DECADE_SPAN, percent_ticks, step_axis, values
from ntkscope.view.findings import signal_modes, stop_row
from ntkscope.view.words import AnalysisLike, number, percent


@dataclass(frozen=True)
class _Steps:
    """Where the snapshots of a history are drawn.

    Attributes:
        x: One place for each.
        ticks: Of the axis.
        shown: What a hovering reader is told: step, optimizer time.
        place: Where a step is drawn.
    """

    x: list[float]
    ticks: dict[str, Any]
    shown: list[list[str]]
    place: Callable[[int], float]


def loss_and_closure(analysis: AnalysisLike) -> go.Figure:
    """Draw observed and predicted loss, and below it how well the gradient is predicted.

    Args:
        analysis: The result.

    Returns:
        Two panels over training steps, the window shaded.
    """
    history, closure = analysis.history, analysis.closure
    steps = _steps_of(analysis)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.58, 0.42])
    look = {"dash": "solid", "symbol": "circle"}
    figure.add_trace(_line(steps, values(history.loss), "observed loss", palette.BLUE, look), row=1, col=1)
    look = {"dash": "dash", "symbol": "diamond-open"}
    figure.add_trace(_line(steps, values(history.predicted_loss), "loss predicted from the kernels", palette.ORANGE, look), row=1, col=1)
    errors = [value if value is not None and value > 0 else None for value in values(history.gradient_error)]
    look = {"dash": "solid", "symbol": "square"}
    figure.add_trace(_line(steps, errors, "error of the predicted gradient", palette.GREEN, look, form=".2%"), row=2, col=1)
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
    start, end = float(history.loss[0]), float(history.loss[stop_row(analysis)])
    title = (
        f"The loss went from {number(start)} to {number(end)} in the window; "
        f"the predicted decrease is off by {percent(closure.energy_error)}, the predicted gradient by {percent(closure.gradient_error)}"
    )
    _finish(figure, analysis, steps, title, height=560, panels=2)
    figure.update_yaxes(**palette.axis("loss", rangemode="tozero"), row=1, col=1)
    figure.update_yaxes(**palette.axis("gradient error", **percent_ticks(low, high)), row=2, col=1)
    return figure


def signal_share(analysis: AnalysisLike) -> go.Figure:
    """Draw which share of the squared residual is gone and which is left, and what the signal channel holds of it.

    Args:
        analysis: The result.

    Returns:
        Two lines over training steps, and the share of the initial residual that lies in the signal channel of the window's end.
    """
    history, spectrum = analysis.history, analysis.spectrum
    steps = _steps_of(analysis)
    gone = history.signal_share
    look = {"dash": "solid", "symbol": "circle"}
    figure = go.Figure(_line(steps, values(gone), "removed", palette.SIGNAL, look, form=".1%"))
    look = {"dash": "dash", "symbol": "diamond-open"}
    figure.add_trace(_line(steps, values(1 - gone), "left", palette.RESERVOIR, look, form=".1%"))
    is_signal = torch.tensor(signal_modes(analysis), dtype=torch.bool)
    energy = spectrum.residual_energy
    held = _part(energy[is_signal].sum(), energy.sum())
    if not math.isnan(held):
        figure.add_hline(y=held, line={"color": palette.GREEN, "width": 2, "dash": "dot"})
        figure.add_annotation(
            text=f"signal channel: {percent(held)}",
            x=0,
            xref="x domain",
            xanchor="left",
            y=held,
            yanchor="bottom" if held < 0.9 else "top",
            showarrow=False,
        )
    share = float(gone[stop_row(analysis)])
    step = f"{analysis.window.stop_step:,}"
    title = f"By step {step} training removed {percent(share)} of the squared residual"
    if math.isnan(share):
        title = f"How much of the squared residual training removed by step {step} is unknown"
    elif not math.isnan(held):
        removed = spectrum.eigvals * energy
        parts = [
            f"{percent(_part(removed[chosen].sum(), energy[chosen].sum()))} of the {percent(part)} in the {name}"
            for name, chosen, part in (("signal channel", is_signal, held), ("reservoir", ~is_signal, 1 - held))
            if part > 0
        ]
        title += f": {' and '.join(parts)}"
    _finish(figure, analysis, steps, title, height=440)
    figure.update_yaxes(**palette.axis("share of the initial squared residual", range=[-0.03, 1.03], tickformat=".0%"))
    return figure


def drift(analysis: AnalysisLike) -> go.Figure:
    """Draw how far the kernel has moved, how fast it moves, and how it aligns with its start and with the targets.

    Args:
        analysis: The result.

    Returns:
        Three panels over training steps, the window shaded.
    """
    found = analysis.drift
    steps = _steps_of(analysis)
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.36, 0.26, 0.38])
    look = {"dash": "solid", "symbol": "circle"}
    figure.add_trace(_line(steps, values(found.relative), "kernel drift", palette.BLUE, look, form=".1%"), row=1, col=1)
    velocities = values(found.velocity)
    known = [value for value in velocities if value is not None and value > 0]
    is_log = bool(known) and max(known) >= MIN_DECADE_SPAN * min(known)
    if is_log:
        velocities = [value if value is not None and value > 0 else None for value in velocities]
    look = {"dash": "dash", "symbol": "diamond-open"}
    figure.add_trace(_line(steps, velocities, "velocity", palette.VERMILION, look), row=2, col=1)
    look = {"dash": "solid", "symbol": "square"}
    figure.add_trace(_line(steps, values(found.alignment_start), "alignment with the start", palette.GREEN, look), row=3, col=1)
    look = {"dash": "dashdot", "symbol": "triangle-up-open"}
    figure.add_trace(_line(steps, values(found.alignment_targets), "alignment with the targets", palette.ORANGE, look), row=3, col=1)
    row = stop_row(analysis)
    moved = float(found.relative[row])
    title = f"By step {analysis.window.stop_step:,} the kernel moved by {percent(moved)} of its size"
    if math.isnan(moved):
        title = f"How far the kernel moved by step {analysis.window.stop_step:,} is unknown"
    before, after = float(found.alignment_targets[0]), float(found.alignment_targets[row])
    if not (math.isfinite(before) and math.isfinite(after)):
        title += "; its alignment with the targets is unknown here"
    else:
        title += f"; its alignment with the targets went from {before:.2f} to {after:.2f}"
    _finish(figure, analysis, steps, title, height=620, panels=3)
    kind = "" if found.kernel == "plain" else "<br>(with preconditioner)"
    figure.update_yaxes(**palette.axis(f"kernel drift{kind}", rangemode="tozero", tickformat=".0%"), row=1, col=1)
    scale = {"type": "log", "dtick": 1, "exponentformat": "power"} if is_log else {"rangemode": "tozero"}
    figure.update_yaxes(**palette.axis("velocity<br>(1/optimizer time)", **scale), row=2, col=1)
    figure.update_yaxes(**palette.axis("centered alignment", range=[-0.03, 1.03]), row=3, col=1)
    return figure


def _steps_of(analysis: AnalysisLike) -> _Steps:
    """Place the snapshots of the history."""
    history, window = analysis.history, analysis.window
    place, ticks = step_axis([*history.steps, window.start_step, window.stop_step])
    shown = [[f"{step:,}", number(float(time))] for step, time in zip(history.steps, history.times, strict=True)]
    return _Steps([place(step) for step in history.steps], ticks, shown, place)


def _line(steps: _Steps, y: list[float | None], name: str, colour: str, look: dict[str, str], *, form: str = ".4g") -> go.Scatter:
    """Draw one quantity over steps: lines differ by dash and marker, not by colour alone."""
    return go.Scatter(
        x=steps.x,
        y=y,
        name=name,
        mode="lines+markers",
        line={"color": colour, "width": 2, "dash": look["dash"]},
        marker={"size": 7, "symbol": look["symbol"]},
        customdata=steps.shown,
        hovertemplate=f"step %{{customdata[0]}}, optimizer time %{{customdata[1]}}<br>%{{y:{form}}}<extra>{name}</extra>",
    )


def _part(some: Tensor, whole: Tensor) -> float:
    """Divide; NaN where there is nothing."""
    return float(some / whole) if float(whole) > 0 else math.nan


def _finish(figure: go.Figure, analysis: AnalysisLike, steps: _Steps, title: str, *, height: int, panels: int = 1) -> None:
    """Add title, step axis and the shaded window."""
    window = analysis.window
    where: dict[str, Any] = {} if panels == 1 else {"row": "all", "col": 1}
    left, right = steps.place(window.start_step), steps.place(window.stop_step)
    figure.add_vrect(x0=left, x1=right, fillcolor=palette.SHADE, line={"width": 0}, layer="below", **where)
    figure.update_layout(**palette.base_layout(title, height=height))
    figure.update_xaxes(**palette.axis("", **steps.ticks))
    name = f"training step (shaded: window, {window.start_step:,} to {window.stop_step:,})"
    last: dict[str, Any] = {} if panels == 1 else {"row": panels, "col": 1}
    figure.update_xaxes(title_text=name, **last)
