"""Figures of `analysis.plot` fit where they stand alone: their title is inside them, in lines."""

import pytest
from view_case import synthetic_analysis

from ntkscope._display import Plots
from ntkscope.view import figures, standalone

ANALYSIS = synthetic_analysis(has_gate=True)


@pytest.mark.parametrize("name", figures.drawable(ANALYSIS))
def test_a_figure_alone_has_room_for_its_title(name):
    report = figures.FIGURES[name](ANALYSIS).to_dict()["layout"]
    alone = getattr(Plots(ANALYSIS), name)().to_dict()["layout"]
    lines = alone["title"]["text"].split("<br>")
    assert "".join(lines).replace(" ", "") == report["title"]["text"].replace("<br>", "").replace(" ", "")
    assert max(map(len, lines)) <= standalone.LINE_LENGTH or "<" in report["title"]["text"]
    more = alone["margin"]["t"] - report["margin"]["t"]
    assert more == standalone.LINE_HEIGHT * len(lines)
    assert alone["height"] - report["height"] == more, "the drawing keeps its size"
    assert alone["modebar"]["orientation"] == "v"


def test_a_title_with_markup_is_left_in_its_lines():
    figure = figures.spectrum(ANALYSIS)
    figure.update_layout(title={"text": "<b>one</b> " + "word " * 30 + "<br>two"})
    assert standalone.standalone(figure).to_dict()["layout"]["title"]["text"].count("<br>") == 1
