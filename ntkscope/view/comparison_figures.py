"""Figures of two results, A and B, in one frame. Each title states the finding.

A is blue, solid and round, B vermilion, dashed and a diamond: they can be told apart without colour.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from ntkscope.view import palette
from ntkscope.view.comparison_examples import STYLES, eigenstructures, half_times, suspects_in_common, titled
from ntkscope.view.comparison_words import learned_words, loss_removed
from ntkscope.view.drawing import MIN_DECADE_SPAN, percent_ticks, spread, step_axis, values
from ntkscope.view.figure_texts import FigureText
from ntkscope.view.findings import stop_row
from ntkscope.view.matching import Matching
from ntkscope.view.words import AnalysisLike, number, percent

MAX_MODES = 300


def losses(first: AnalysisLike, second: AnalysisLike, matching: Matching) -> go.Figure:
    """Draw the loss of both runs over steps.

    Args:
        first: Result A.
        second: Result B.
        matching: Their common examples; not used.

    Returns:
        Two lines; relative to the window's start where the losses differ.
    """
    is_relative = first.run.loss != second.run.loss
    columns, parts = [], []
    for style, analysis in zip(STYLES, (first, second), strict=True):
        loss, stop = analysis.history.loss, stop_row(analysis)
        columns.append(loss / loss[0] if is_relative else loss)
        change = f"from {number(float(loss[0]))} to {number(float(loss[stop]))}"
        removed = percent(loss_removed(analysis))
        parts.append(f"{removed} of the loss in {style.name}" if is_relative else f"{removed} of the loss in {style.name} ({change})")
    name = "loss, share of the window's start" if is_relative else "loss"
    ticks = {"tickformat": ".0%"} if is_relative else {}
    figure = _over_steps(first, second, columns, palette.axis(name, rangemode="tozero", **ticks), marks_windows=True)
    return titled(figure, f"Training removed {parts[0]} and {parts[1]}")


def signal_shares(first: AnalysisLike, second: AnalysisLike, matching: Matching) -> go.Figure:
    """Draw over steps which share of the squared error was gone.

    Args:
        first: Result A.
        second: Result B.
        matching: Their common examples; not used.

    Returns:
        Two lines.
    """
    runs = (first, second)
    ends = [percent(float(analysis.history.signal_share[stop_row(analysis)])) for analysis in runs]
    figure = _over_steps(
        first,
        second,
        [analysis.history.signal_share for analysis in runs],
        palette.axis("squared error removed", range=[-0.02, 1.05], tickformat=".0%"),
        marks_windows=True,
    )
    title = f"At the windows' ends {ends[0]} of the squared error was gone in A and {ends[1]} in B"
    halves = [f"by step {step:,} in {style.name}" for style, step in zip(STYLES, map(_half_gone, runs), strict=True) if step is not None]
    return titled(figure, title + (f"; half of it was gone {' and '.join(halves)}" if halves else ""))


def spectra(first: AnalysisLike, second: AnalysisLike, matching: Matching) -> go.Figure:
    """Draw ω of both runs.

    Args:
        first: Result A.
        second: Result B.
        matching: Their common examples; not used.

    Returns:
        Two lines over the mode number, or over the share of modes where their numbers differ, each with its cutoff.
    """
    runs = (first, second)
    sizes = [len(analysis.spectrum.eigvals) for analysis in runs]
    is_share = sizes[0] != sizes[1]
    figure = go.Figure()
    for style, analysis, size in zip(STYLES, runs, sizes, strict=True):
        modes, unit = spread(size, MAX_MODES), size if is_share else 1
        place = "%{x:.2%} of the modes" if is_share else "mode %{x}"
        marks = {"color": style.colour, "symbol": style.symbol, "size": 5}
        figure.add_scatter(
            x=[(k + 1) / unit for k in modes],
            y=values(analysis.spectrum.eigvals[modes]),
            name=style.name,
            mode="lines+markers",
            line={"color": style.colour, "dash": style.dash, "width": 1.5},
            marker=marks,
            hovertemplate=place + "<br>ω = %{y:.4g}<extra>" + style.name + "</extra>",
        )
        figure.add_vline(
            x=(analysis.channels.signal_rank + 0.5) / unit,
            line={"color": style.colour, "dash": style.dash, "width": 2},
        )
    smallest, largest = (min(1 / size for size in sizes), 1.0) if is_share else (1.0, float(max(sizes)))
    is_log = max(sizes) >= MIN_DECADE_SPAN
    if not is_log:
        scale = {"range": [0, 1.05 * largest], **({"tickformat": ".0%"} if is_share else {})}
    elif is_share:
        scale = percent_ticks(0.6 * smallest, 1.2)
    else:
        scale = {"type": "log", "range": [math.log10(0.6), math.log10(1.2 * largest)], "dtick": 1, "tickformat": ",d"}
    name = "mode, strongest first" + (" (share of all)" if is_share else "")
    figure.update_xaxes(**palette.axis(name, **scale))
    figure.update_yaxes(**palette.axis("ω, share of loss removed", rangemode="tozero"))
    return titled(figure, f"{learned_words(first, 'A learned', ' of its directions')}, {learned_words(second, 'B', '')}")


def gates(first: AnalysisLike, second: AnalysisLike, matching: Matching) -> go.Figure:
    """Draw which share of the gates was open in both runs.

    Args:
        first: Result A.
        second: Result B; both with a gate.
        matching: Their common examples; not used.

    Returns:
        Two lines.
    """
    runs = (first, second)
    steps = [analysis.gate.steps for analysis in runs]
    columns = [analysis.gate.open_share for analysis in runs]
    axis = palette.axis("share of open gates (q > ½)", range=[-0.02, 1.02], tickformat=".0%")
    figure = _over_steps(first, second, columns, axis, steps=steps)
    ends = [
        f"{percent(float(analysis.gate.open_share[-1]))} in {style.name}{_note(analysis)}"
        for style, analysis in zip(STYLES, runs, strict=True)
    ]
    return titled(figure, f"Open gates at the last snapshot: {ends[0]}, {ends[1]}")


Comparison = Callable[[AnalysisLike, AnalysisLike, Matching], go.Figure]
COMPARISONS: dict[str, Comparison] = {
    "losses": losses,
    "spectra": spectra,
    "signal_shares": signal_shares,
    "half_times": half_times,
    "eigenstructures": eigenstructures,
    "suspects_in_common": suspects_in_common,
    "gates": gates,
}
COMPARISON_TEXTS = {
    "losses": FigureText(
        "The loss on the followed examples, as it was.",
        "The vertical lines are the ends of the two windows: the numbers in this page speak of what lies before them. Where the two runs "
        "have different losses, each is drawn as a share of its own start.",
    ),
    "spectra": FigureText(
        "Every direction of both runs, strongest first. Its height ω is the share of the loss along it that training removed. The "
        "vertical lines are where the signal channel of each run ends, by its rule.",
        "The run whose line stays high further to the right learned more directions. The number of a direction is its place in its own "
        "run: direction 5 of A need not be direction 5 of B.",
    ),
    "signal_shares": FigureText(
        "The share of the initial squared error that training had removed, at every snapshot.",
        "Steeper is faster. A line that levels off below the top leaves the rest in the reservoir.",
    ),
    "half_times": FigureText(
        "Every mark is one example that both runs followed: after how many training steps half of its error was gone, in A to the right "
        "and in B upwards.",
        "On the dotted line it took equally long. A cloud beside it: one run is faster for all. Single marks far from the cloud are "
        "examples that the two runs treat differently; they are named. Later means not by the last snapshot of that run.",
    ),
    "eigenstructures": FigureText(
        "Every example twice, joined by a line: placed by the part of its error that each run removed along its own three leading "
        "directions.",
        "Each run has axes of its own, so that B is rotated as a whole to lie nearest to A. Short lines: both runs see the same structure. "
        "A residual of 0 % is the same picture, 100 % has nothing in common with it; the rotation alone brings shuffled examples to "
        "the second number in the title.",
    ),
    "suspects_in_common": FigureText(
        "Both runs rank the examples they share by suspicion. The line counts how many are among the first k of both.",
        "Near the dotted line both runs suspect the same examples, which speaks for the examples' fault. Inside the band they agree no "
        "more than chance.",
    ),
    "gates": FigureText(
        "The share of parameters whose gate was open, that is, whose gradient stood out from its noise.",
        "For a run without a gate these are the gates of its audit: those that would have been open.",
    ),
}


def comparable(first: AnalysisLike, second: AnalysisLike, matching: Matching) -> list[str]:
    """List the figures that have something to show.

    Args:
        first: Result A.
        second: Result B.
        matching: Their common examples.

    Returns:
        Names in `COMPARISONS`.
    """
    missing = set() if matching else {"half_times", "eigenstructures", "suspects_in_common"}
    if any(analysis.gate is None or not analysis.gate.steps for analysis in (first, second)):
        missing.add("gates")
    return [name for name in COMPARISONS if name not in missing]


def _over_steps(
    first: AnalysisLike,
    second: AnalysisLike,
    columns: Sequence[Tensor],
    y_axis: dict[str, Any],
    *,
    steps: Sequence[Sequence[int]] | None = None,
    marks_windows: bool = False,
) -> go.Figure:
    """Draw one line for each run over training steps."""
    runs = (first, second)
    steps = [analysis.history.steps for analysis in runs] if steps is None else steps
    place, ticks = step_axis([*steps[0], *steps[1]])
    figure = go.Figure()
    for style, at, column in zip(STYLES, steps, columns, strict=True):
        figure.add_scatter(
            x=[place(step) for step in at],
            y=values(column),
            name=style.name,
            mode="lines+markers",
            line={"color": style.colour, "dash": style.dash, "width": 2},
            marker={"color": style.colour, "symbol": style.symbol, "size": 7},
            customdata=[f"{step:,}" for step in at],
            hovertemplate="step %{customdata}<br>%{y:.4g}<extra>" + style.name + "</extra>",
        )
    if marks_windows:
        ends = [analysis.window.stop_step for analysis in runs]
        for k, (style, end) in enumerate(zip(STYLES, ends, strict=True)):
            is_same = ends[0] == ends[1]
            if is_same and k:
                continue
            text = "windows end" if is_same else f"{style.name}'s window ends"
            line = {"color": palette.GREY if is_same else style.colour, "dash": "dot" if is_same else style.dash, "width": 1.5}
            # An annotation on a log axis is placed by the logarithm; plotly does not do so for a line's.
            figure.add_vline(x=place(end), line=line)
            at = math.log10(place(end)) if ticks else place(end)
            figure.add_annotation(text=text, x=at, xref="x", xanchor="right", y=1 - 0.07 * k, yref="paper", yanchor="top", showarrow=False)
    figure.update_xaxes(**palette.axis("training step", **ticks))
    figure.update_yaxes(**y_axis)
    return figure


def _note(analysis: AnalysisLike) -> str:
    """Say of a gate that the run did not have it."""
    audit = analysis.gate.audit
    return " (of a gate that the run did not have)" if audit is not None and audit.is_counterfactual else ""


def _half_gone(analysis: AnalysisLike) -> int | None:
    """Find the first snapshot at which half of the squared error was gone."""
    gone = torch.nonzero(analysis.history.signal_share > 0.5).flatten()
    return analysis.history.steps[int(gone[0])] if len(gone) else None
