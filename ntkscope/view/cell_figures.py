"""The figure of the four cells of test motion."""

import math

import plotly.graph_objects as go

from ntkscope._checks import InputError
from ntkscope.view import palette
from ntkscope.view.drawing import rounded
from ntkscope.view.words import AnalysisLike, percent

CHANNELS = {"signal": "signal channel", "reservoir": "reservoir"}
CAUSES = {"clean": ("clean labels", palette.BLUE, ""), "noise": ("label noise", palette.VERMILION, "/")}


def cells(analysis: AnalysisLike) -> go.Figure:
    """Draw test motion by what causes it, clean labels or label noise, and by where it goes, signal channel or reservoir.

    Args:
        analysis: The result of a run with a query set.

    Returns:
        Bars: the size of each part over that of the whole predicted motion. Label noise is hatched.

    Raises:
        InputError: If there was no query set.
    """
    found = analysis.cells
    if found is None:
        raise InputError(f"There are no cells of test motion to draw: {analysis.transfer_reason}.")
    figure = go.Figure()
    for cause, (name, colour, pattern) in CAUSES.items():
        sizes = [float(found.norms[f"{channel}_{cause}"]) for channel in CHANNELS]
        figure.add_trace(
            go.Bar(
                x=list(CHANNELS.values()),
                y=[rounded(size) for size in sizes],
                name=name,
                text=[percent(size) for size in sizes],
                textposition="outside",
                cliponaxis=False,
                marker={
                    "color": colour,
                    "line": {"color": colour, "width": 1},
                    "pattern": {"shape": pattern, "fillmode": "replace", "size": 8, "solidity": 0.45},
                },
                hovertemplate=f"{name} through the %{{x}}<br>%{{y:.3f}} of the whole motion's size<extra></extra>",
            )
        )
    share = {cell: percent(float(size)) for cell, size in found.norms.items()}
    title = (
        f"Label noise moves test outputs by {share['signal_noise']} of the predicted motion's size through the signal channel and by "
        f"{share['reservoir_noise']} through the reservoir; clean labels by {share['signal_clean']} and {share['reservoir_clean']}"
    )
    if not any(math.isfinite(size) for size in found.norms.values()):
        title = f"The sizes of all {len(found.norms)} parts of the test motion are unknown"
    if found.is_estimate:
        title = f"Estimated, as the noise is not known: {title[0].lower()}{title[1:]}"
        figure.add_annotation(
            text="estimated split: sizes are rough",
            x=1,
            xref="x domain",
            xanchor="right",
            y=1,
            yref="y domain",
            yanchor="top",
            showarrow=False,
        )
    figure.update_layout(**palette.base_layout(title, height=420), barmode="group", bargap=0.35)
    figure.update_xaxes(**palette.axis("through", type="category", showgrid=False))
    largest = max((size for size in found.norms.values() if math.isfinite(size)), default=0.0)
    figure.update_yaxes(**palette.axis("size over that of the whole motion", range=[0, 1.18 * largest or 1.0], tickformat=".0%"))
    return figure
