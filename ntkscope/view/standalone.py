"""Figures that stand alone, in a notebook or an image: in the report a figure's title is a heading of the page, here it must fit in."""

import textwrap

import plotly.graph_objects as go

LINE_LENGTH = 84  # characters of a title; a notebook's column has room for about 90
LINE_HEIGHT = 22  # pixels
PADDING = 14  # pixels around the title


def standalone(figure: go.Figure) -> go.Figure:
    """Make room for the title, in lines, and put the tools beside the figure and not over it.

    Args:
        figure: As made for the report; it is changed.

    Returns:
        The figure.
    """
    spec = figure.to_dict()["layout"]
    title = spec["title"]["text"]
    lines = textwrap.wrap(title, LINE_LENGTH, break_long_words=False) if "<" not in title else title.split("<br>")
    room = PADDING + LINE_HEIGHT * len(lines)
    return figure.update_layout(
        title={
            "text": "<br>".join(lines),
            "automargin": False,
            "xref": "container",  # from the left edge: labels of an axis would push it under the tools
            "pad": {"t": PADDING, "l": PADDING},
            "y": 1,
            "yanchor": "top",
        },
        margin={"t": spec["margin"]["t"] + room - PADDING, "r": spec["margin"]["r"] + LINE_HEIGHT},
        height=spec["height"] + room - PADDING,
        modebar={"orientation": "v"},
    )
