"""Colours that colour-blind readers can tell apart, and the common look of all figures.

The hues are those of Okabe and Ito (2008), without black, which is lost on a dark page; two of Paul Tol's muted scheme
follow for label sets of more than eight. Figures have no background of their own and mid-grey text, so they read on light and
dark pages; the report sets exact colours for either.
"""

from typing import Any

import plotly.graph_objects as go

BLUE = "#0072B2"
VERMILION = "#D55E00"
GREEN = "#009E73"
ORANGE = "#E69F00"
SKY = "#56B4E9"
PURPLE = "#CC79A7"
YELLOW = "#F0E442"
GREY = "#8A8A8A"
WINE = "#882255"
OLIVE = "#999933"

LABEL_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW, GREY, WINE, OLIVE)

SIGNAL = BLUE
RESERVOIR = VERMILION
NEUTRAL = GREY
TEXT = "#757575"  # contrast 4.6 on white, 4.1 on near-black
GRID = "rgba(128,128,128,0.28)"
SCENE_GRID = "#b4b9bf"  # WebGL draws no see-through lines
SHADE = "rgba(86,180,233,0.16)"
CAMERA = {"eye": {"x": 1.45, "y": 1.45, "z": 0.85}, "center": {"x": 0, "y": 0, "z": -0.16}}  # room for the lower axes' titles
CONTINUOUS = "Cividis"  # even in lightness, and the same to colour-blind readers

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def base_layout(title: str, *, height: int = 480) -> dict[str, Any]:
    """Collect what all figures share.

    Args:
        title: The finding.
        height: Pixels.

    Returns:
        Arguments for `go.Layout`.
    """
    return {
        "template": go.layout.Template(),
        "title": {"text": title, "x": 0, "xref": "paper", "automargin": True, "yref": "container", "font": {"size": 16}},
        "height": height,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "color": TEXT, "size": 13},
        "margin": {"l": 64, "r": 16, "t": 48, "b": 56},
        "legend": {"orientation": "h", "x": 0, "y": -0.16, "yanchor": "top", "yref": "paper"},
        "hoverlabel": {"font": {"family": FONT}},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": TEXT},
        "uirevision": "keep",
    }


def axis(title: str, **settings: Any) -> dict[str, Any]:
    """Describe one axis of a flat figure.

    Args:
        title: What it shows, with its unit.
        **settings: Anything else plotly accepts.

    Returns:
        An axis description.
    """
    return {
        "title": {"text": title, "font": {"size": 13}, "standoff": 10},
        "gridcolor": GRID,
        "zeroline": False,
        "showline": True,
        "linecolor": GREY,
        "automargin": True,
        **settings,
    }


def scene_axis(title: str, **settings: Any) -> dict[str, Any]:
    """Describe one axis of a 3D figure.

    Args:
        title: What it shows.
        **settings: Anything else plotly accepts.

    Returns:
        An axis description.
    """
    return {
        "title": {"text": title, "font": {"size": 12}},
        "tickfont": {"size": 10},
        "color": TEXT,
        "gridcolor": SCENE_GRID,
        "zerolinecolor": GREY,
        "showbackground": False,
        "showspikes": False,
        **settings,
    }


def discrete_scale(colours: list[str]) -> list[list[Any]]:
    """Turn colours into a stepped colour scale for values 0, 1, 2, ….

    Args:
        colours: At least one.

    Returns:
        Scale for `cmin` = -½ and `cmax` = number of colours - ½.
    """
    count = len(colours)
    return [[position / count, colour] for k, colour in enumerate(colours) for position in (k, k + 1)]
