"""Figures of the most suspicious examples: how suspicious they are, and what they look like."""

import html
from collections.abc import Sequence

import plotly.graph_objects as go
import torch
from torch import Tensor

from ntkscope._checks import InputError
from ntkscope.view import palette
from ntkscope.view.drawing import hover_facts, shortened, values
from ntkscope.view.pictures import LARGEST_SIDE, picture_uri
from ntkscope.view.suspects import found_among, ranked, ranked_by
from ntkscope.view.suspects import title as title_of
from ntkscope.view.words import AnalysisLike, counted, number, percent

MAX_BARS = 20
NUM_COLUMNS, NUM_ROWS = 6, 3
CARD_HEIGHT = 168  # pixels
WORDS_SHARE = 0.4  # of a card's height, for three lines of words
MARGIN = 0.04  # of a card
MAX_LETTERS = 12


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
    title = _suspicion_title(analysis, order)
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


def suspicious_inputs(analysis: AnalysisLike) -> go.Figure:
    """Draw the inputs of the most suspicious examples, in the order of `suspicious`.

    Args:
        analysis: The result of a run whose inputs are images.

    Returns:
        A card for each: picture, id, given label and if known the true one. Planted wrong labels have a thick dashed frame.

    Raises:
        InputError: If there are no pictures.
    """
    pictures = analysis.examples.pictures
    if pictures is None:
        raise InputError(
            "There are no pictures of inputs to draw: the record holds none. Give the recorder images as one tensor of shape "
            "(n, 1 or 3, height, width), or say how flat inputs are shaped: Recorder(image_shape=(height, width))."
        )
    order = ranked(analysis)[: NUM_COLUMNS * NUM_ROWS]
    noise = analysis.examples.is_noise
    places = {i: (k % NUM_COLUMNS + 0.5, k // NUM_COLUMNS) for k, i in enumerate(order)}
    figure = go.Figure()
    for name, dash, width, members in _card_groups(analysis, order):
        # Points under the pictures: they hover, can be clicked, and have the legend's marks.
        figure.add_trace(
            go.Scatter(
                x=[places[i][0] for i in members],
                y=[places[i][1] + (1 - WORDS_SHARE) / 2 for i in members],
                name=name,
                mode="markers",
                showlegend=False,
                marker={"size": 60, "opacity": 0, "symbol": "square"},
                customdata=[[*hover_facts(analysis, i), percent(float(analysis.examples.reservoir_share[i]))] for i in members],
                hovertemplate="example %{customdata[0]}<br>given label %{customdata[1]}, true label %{customdata[2]}"
                "<br>reservoir energy %{customdata[3]}, which is %{customdata[4]} of its initial error<extra></extra>",
            )
        )
        frame = {"color": palette.VERMILION if width > 1 else palette.GREY, "dash": dash, "width": width}
        if noise is not None:
            figure.add_trace(go.Scatter(x=[None], y=[None], name=name, mode="lines", line=frame))
        for i in members:
            x, y = places[i]
            figure.add_shape(
                type="rect", x0=x - 0.5 + MARGIN, x1=x + 0.5 - MARGIN, y0=y + MARGIN / 2, y1=y + 1 - MARGIN / 2, line=frame, layer="below"
            )
    for i, (x, y) in places.items():
        figure.add_layout_image(
            source=picture_uri(_enlarged(pictures[i])),
            xref="x",
            yref="y",
            x=x,
            y=y + (1 - WORDS_SHARE) / 2,
            sizex=1 - 4 * MARGIN,
            sizey=1 - WORDS_SHARE - 3 * MARGIN,
            sizing="contain",
            xanchor="center",
            yanchor="middle",
        )
        words = {"text": _card_words(analysis, i), "font": {"size": 11}, "align": "center"}
        figure.add_annotation(x=x, y=y + 1 - WORDS_SHARE + MARGIN, yanchor="top", showarrow=False, **words)
    num_rows = max(1, -(-len(order) // NUM_COLUMNS))
    figure.update_layout(**palette.base_layout(_suspicion_title(analysis, order), height=110 + CARD_HEIGHT * num_rows))
    figure.update_layout(legend={"y": -0.02}, margin={"l": 8, "r": 8, "b": 8})
    hidden = {"visible": False, "fixedrange": True}
    figure.update_xaxes(range=[0, NUM_COLUMNS], **hidden)
    figure.update_yaxes(range=[num_rows, 0], **hidden)
    return figure


def _suspicion_title(analysis: AnalysisLike, order: Sequence[int]) -> str:
    """Say what is found among the examples drawn."""
    examples = analysis.examples
    found = found_among(analysis, len(order))
    if not order:
        return f"None of {counted(len(examples.ids), 'example')} has a known {title_of(ranked_by(analysis))}"
    if found is not None:
        wrong, looked = found
        planted = int(examples.is_noise.sum())
        return f"{wrong} of the {looked} most suspicious examples have labels that were planted wrong; there are {planted:,} in all"
    energy, share = float(examples.reservoir_energy[order[0]]), float(examples.reservoir_share[order[0]])
    name = html.escape(str(examples.ids[order[0]]))
    return f"Example #{name} is most suspicious: {percent(share)} of its initial error ({number(energy)}) lies in the reservoir"


def _card_groups(analysis: AnalysisLike, order: Sequence[int]) -> list[tuple[str, str, int, list[int]]]:
    """Group the cards: (name, dash and width of the frame, positions)."""
    noise = analysis.examples.is_noise
    if noise is None:
        return [("inputs", "solid", 1, list(order))]
    groups = [
        ("label was planted wrong", "dash", 4, [i for i in order if noise[i]]),
        ("label is right", "solid", 1, [i for i in order if not noise[i]]),
    ]
    return [group for group in groups if group[3]]


def _card_words(analysis: AnalysisLike, i: int) -> str:
    """Write the words under a picture."""
    examples = analysis.examples
    lines = [f"#{_short(examples.ids[i])}"]
    if examples.labels is not None:
        lines.append(f"given {_short(examples.labels[i])}")
    if examples.true_labels is not None:
        truth = f"true {_short(examples.true_labels[i])}"
        lines.append(f"<b>{truth}</b>" if examples.is_noise is not None and bool(examples.is_noise[i]) else truth)
    return "<br>".join(lines)


def _short(name: object) -> str:
    """Shorten a name to what fits under a picture; safe to put into HTML."""
    return html.escape(shortened(name, MAX_LETTERS))


def _enlarged(picture: Tensor) -> Tensor:
    """Repeat the pixels of a small picture, so that a browser does not blur them."""
    factor = max(1, LARGEST_SIDE // max(picture.shape[:2]))
    return torch.repeat_interleave(torch.repeat_interleave(picture, factor, dim=0), factor, dim=1)


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
