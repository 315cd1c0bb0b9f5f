"""Figures of the most suspicious examples."""

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from ntkscope.view import palette
from ntkscope.view.drawing import hover_facts, values
from ntkscope.view.suspects import found_among, ranked
from ntkscope.view.words import AnalysisLike, number, percent

MAX_BARS = 20


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
