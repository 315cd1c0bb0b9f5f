"""Figures over training: the loss, and how well the kernels predict it."""

import math

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ntkscope.dynamics.closure import GRADIENT_LIMIT
from ntkscope.view import palette
from ntkscope.view.drawing import percent_ticks, step_axis, values
from ntkscope.view.findings import stop_row
from ntkscope.view.words import AnalysisLike, number, percent


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
