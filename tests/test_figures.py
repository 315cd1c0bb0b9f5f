"""Figures of results of every kind: they say what was found, and draw the numbers of the result."""

import base64
import itertools
import math
import re

import pytest
import torch
from _plotly_utils import png
from hypothesis import given
from hypothesis import strategies as st
from plotly.colors import hex_to_rgb, unlabel_rgb
from scipy.linalg import orthogonal_procrustes
from view_case import CASES, MISSING, NUM_NOISY, finite_json, synthetic_analysis, title_of

import ntkscope
from ntkscope._checks import InputError
from ntkscope.experiments.demo import train_demo
from ntkscope.view import colourings, drawing, eigenstructure, figures, palette, spectrum_figures, suspects, words


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def analysis(request):
    return synthetic_analysis(**request.param)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_draws_every_case(analysis, name):
    if name not in figures.drawable(analysis):
        with pytest.raises(InputError, match=MISSING.get(name, "SGD has no gate")):
            figures.FIGURES[name](analysis)
        return
    figure = figures.FIGURES[name](analysis)
    spec = finite_json(figure)
    assert spec["data"]
    assert re.search(r"\d", title_of(figure)), "a title states the finding with a number"
    assert "nan" not in title_of(figure).lower()


def test_titles_state_the_numbers_of_the_result():
    analysis = synthetic_analysis()
    rank = analysis.channels.signal_rank
    assert title_of(figures.spectrum(analysis)).startswith(f"{rank} of 120 directions carry the signal by rule 'half'")
    wrong = int(analysis.examples.is_noise[analysis.examples.ranking()[:20]].sum())
    assert title_of(figures.suspicious(analysis)).startswith(f"{wrong} of the 20 most suspicious")
    assert f"{int((analysis.history.eigvals[analysis.window.stop] > 0.5).sum())} of 120" in title_of(figures.omega_surface(analysis))
    assert "off by 0.3\u00a0%" in title_of(figures.loss_and_closure(analysis))


def test_eigenstructure_has_a_frame_for_every_snapshot_with_fixed_axes():
    analysis = synthetic_analysis()
    spec = finite_json(figures.eigenstructure(analysis))
    learned = [step for step in analysis.history.steps if step > 0]  # nothing is dissipated at the start
    assert [frame["name"] for frame in spec["frames"]] == [str(step) for step in learned]
    assert [step["label"] for step in spec["layout"]["sliders"][0]["steps"]] == [str(step) for step in learned]
    assert learned[spec["layout"]["sliders"][0]["active"]] == analysis.window.stop_step
    scene = spec["layout"]["scene"]
    assert scene["uirevision"] == "keep"
    for k, letter in enumerate("xyz"):
        low, high = scene[f"{letter}axis"]["range"]
        drawn = torch.tensor([value for frame in spec["frames"] for trace in frame["data"] for value in trace[letter]])
        finest = (high - low) / 300  # what can be seen
        torch.testing.assert_close(drawn.aminmax().max.double(), analysis.history.leading[1:, :, k].max(), rtol=0, atol=finest)
        assert low < drawn.min() < drawn.max() < high
        assert f"mode {k + 1}: " in scene[f"{letter}axis"]["title"]["text"]
    assert not any("layout" in frame for frame in spec["frames"]), "a frame must not move the axes"


def test_eigenstructure_tells_planted_noise_by_symbol_and_offers_colours():
    spec = finite_json(figures.eigenstructure(synthetic_analysis()))
    right, wrong = spec["data"][:2]
    assert (len(right["x"]), len(wrong["x"])) == (30 - NUM_NOISY, NUM_NOISY)
    assert right["marker"]["symbol"] != wrong["marker"]["symbol"]
    menu = next(menu for menu in spec["layout"]["updatemenus"] if menu["name"] == "colour")
    assert [button["label"] for button in menu["buttons"]] == [
        "colour: planted wrong labels",
        "colour: given label",
        "colour: reservoir energy",
        "colour: half-time",
    ]
    for button in menu["buttons"]:
        restyle, _, traces = button["args"]
        assert [len(colours) for colours in restyle["marker.color"]] == [len(spec["data"][k]["x"]) for k in traces]


def test_one_snapshot_needs_no_slider():
    spec = finite_json(figures.eigenstructure(synthetic_analysis(num_snapshots=1)))
    assert "sliders" not in spec["layout"]
    assert "frames" not in spec or not spec["frames"]


def test_large_results_are_thinned_and_the_title_says_so(monkeypatch):
    analysis = synthetic_analysis(num_examples=60, num_classes=5, num_snapshots=6)
    surface = figures.omega_surface(analysis)
    assert len(surface.data[0].x) <= spectrum_figures.MAX_MODES
    assert (surface.data[0].x[0], surface.data[0].x[-1]) == (1, 300)
    assert f"({len(surface.data[0].x)} of 300 directions drawn" in title_of(surface)
    monkeypatch.setattr(spectrum_figures, "MAX_MARKS", 100)
    marks = figures.spectrum(analysis)
    numbers = sorted([*marks.data[0].x, *marks.data[1].x])
    assert (numbers[0], numbers[-1]) == (1, 300)
    assert f"({len(numbers)} directions drawn" in title_of(marks)
    assert len(numbers) <= 100
    monkeypatch.setattr(eigenstructure, "MAX_EXAMPLES", 30)
    monkeypatch.setattr(eigenstructure, "MAX_PLACES", 90)
    points = figures.eigenstructure(analysis)
    shown = {int(facts[0]) for trace in points.data for facts in trace.customdata or ()}
    assert len(shown) == 30
    assert shown >= set(suspects.ranked(analysis)[:15])
    assert len(points.frames) == 3
    assert str(analysis.window.stop_step) in [frame.name for frame in points.frames], "the title speaks of the window's end"
    assert "(30 of 60 examples drawn, the most suspicious among them; 3 of 5 snapshots drawn)" in title_of(points)
    analysis.history.eigvals = torch.ones(500, 4, dtype=torch.float64)
    assert len(drawing.thinned(drawing.frame_rows(analysis.history.eigvals))) == drawing.MAX_FRAMES


@given(st.integers(0, 300), st.integers(2, 80), st.data())
def test_thinning_keeps_both_ends_and_what_must_stay(total, limit, data):
    rows = list(range(5, 5 + 2 * total, 2))
    keep = data.draw(st.sampled_from([None, *rows]))
    chosen = drawing.thinned(rows, limit, keep=keep)
    assert len(chosen) == len(set(chosen)) == min(total, limit)
    assert chosen == sorted(chosen)
    assert set(chosen) <= set(rows)
    if rows:
        assert (chosen[0], chosen[-1]) == (rows[0], rows[-1])
    if keep is not None and limit > 2:
        assert keep in chosen


def test_signal_share_is_that_of_the_history_and_says_what_each_channel_gave():
    analysis = synthetic_analysis()
    spec = finite_json(figures.signal_share(analysis))
    removed, left = spec["data"]
    assert removed["y"] == pytest.approx(analysis.history.signal_share.tolist(), rel=1e-3)
    assert [a + b for a, b in zip(removed["y"], left["y"], strict=True)] == pytest.approx([1.0] * len(left["y"]), abs=1e-3)
    assert removed["line"]["dash"] != left["line"]["dash"]
    assert removed["marker"]["symbol"] != left["marker"]["symbol"]
    energy, rank, omega = analysis.spectrum.residual_energy, analysis.channels.signal_rank, analysis.spectrum.eigvals
    held = float(energy[:rank].sum() / energy.sum())
    line, window = sorted(spec["layout"]["shapes"], key=lambda shape: shape["type"])
    assert line["y0"] == line["y1"] == pytest.approx(held)
    assert window["x1"] == analysis.window.stop_step
    parts = [float((omega * energy)[part].sum() / energy[part].sum()) for part in (slice(rank), slice(rank, None))]
    title = title_of(figures.signal_share(analysis)).replace(words.SPACE, " ")
    assert f"removed {100 * float(analysis.history.signal_share[analysis.window.stop]):.1f} % of the squared residual" in title
    assert f"{100 * parts[0]:.1f} % of the {100 * held:.1f} % in the signal channel" in title
    assert f"{100 * parts[1]:.1f} % of the {100 * (1 - held):.1f} % in the reservoir" in title
    assert spec["layout"]["xaxis"]["type"] == "log"


def test_drift_shows_all_four_columns():
    analysis = synthetic_analysis()
    spec = finite_json(figures.drift(analysis))
    found = analysis.drift
    for trace, column in zip(spec["data"], (found.relative, found.velocity, found.alignment_start, found.alignment_targets), strict=True):
        expected = [None if value != value else value for value in column.tolist()]
        assert [value is None for value in trace["y"]] == [value is None for value in expected]
        assert [v for v in trace["y"] if v is not None] == pytest.approx([v for v in expected if v is not None], rel=1e-3)
    assert len({(trace["line"]["dash"], trace["marker"]["symbol"]) for trace in spec["data"]}) == 4
    row = analysis.window.stop
    assert title_of(figures.drift(analysis)) == (
        f"By step {analysis.window.stop_step:,} the kernel moved by {words.percent(float(found.relative[row]))} of its size; "
        f"its alignment with the targets went from 0.10 to {float(found.alignment_targets[row]):.2f}"
    )
    found.kernel = "realized"
    assert "preconditioner" in figures.drift(analysis).layout.yaxis.title.text
    assert "unknown here" in title_of(figures.drift(synthetic_analysis(has_labels=False, has_noise=False)))


def test_cells_tell_noise_by_hatching_and_warn_where_they_are_estimated():
    analysis = synthetic_analysis()
    spec = finite_json(figures.cells(analysis))
    assert {bar["name"]: bar["marker"]["pattern"]["shape"] for bar in spec["data"]} == {"clean labels": "", "label noise": "/"}
    norms = analysis.cells.norms
    drawn = {(bar["name"], place): size for bar in spec["data"] for place, size in zip(bar["x"], bar["y"], strict=True)}
    assert drawn == {
        ("clean labels", "signal channel"): norms["signal_clean"],
        ("clean labels", "reservoir"): norms["reservoir_clean"],
        ("label noise", "signal channel"): norms["signal_noise"],
        ("label noise", "reservoir"): norms["reservoir_noise"],
    }
    title = title_of(figures.cells(analysis)).replace(words.SPACE, " ")
    assert title.startswith("Label noise moves test outputs by 40.0 %")
    assert "by 9.0 % through the reservoir; clean labels by 110 % and 10.0 %" in title
    assert "annotations" not in spec["layout"]
    estimated = figures.cells(synthetic_analysis(has_noise=False))
    assert title_of(estimated).startswith("Estimated, as the noise is not known: label noise moves")
    assert "estimated" in estimated.layout.annotations[0].text


def test_suspicious_inputs_are_drawn_in_order_and_marked():
    analysis = synthetic_analysis()
    noise, order = analysis.examples.is_noise, suspects.ranked(analysis)[:18]
    spec = finite_json(figures.suspicious_inputs(analysis))
    layout = spec["layout"]
    assert len(layout["images"]) == len(order) == 18
    pictures = [_pixels(image["source"]) for image in layout["images"]]
    for picture, i in zip(pictures, order, strict=True):
        expected = analysis.examples.pictures[i, :, :, 0]
        assert picture.shape == (32, 32)
        assert torch.equal(picture[::4, ::4], expected), "pixels are repeated, not changed"
    words_below = [note["text"] for note in layout["annotations"]]
    for text_below, i in zip(words_below, order, strict=True):
        truth = f"true {analysis.examples.true_labels[i]}"
        assert text_below.startswith(f"#{i}<br>given {analysis.examples.labels[i]}<br>")
        assert text_below.endswith(f"<b>{truth}</b>" if noise[i] else truth)
    frames = [shape["line"] for shape in layout["shapes"]]
    assert sum(frame["dash"] == "dash" and frame["width"] > 2 for frame in frames) == int(noise[order].sum())
    hovered = {point[0] for trace in spec["data"] for point in trace.get("customdata", [])}
    assert hovered == {str(i) for i in order}
    places = [(image["x"], image["y"]) for image in layout["images"]]
    assert places == sorted(places, key=lambda place: (place[1], place[0])), "in reading order"
    plain = finite_json(figures.suspicious_inputs(synthetic_analysis(has_labels=False, has_noise=False)))
    assert {note["text"].count("<br>") for note in plain["layout"]["annotations"]} == {0}
    assert {shape["line"]["dash"] for shape in plain["layout"]["shapes"]} == {"solid"}


def _pixels(uri: str) -> torch.Tensor:
    """Read a PNG from a data URI."""
    width, height, rows, info = png.Reader(bytes=base64.b64decode(uri.partition(",")[2])).read()
    channels = info["planes"]
    values = torch.tensor([list(row) for row in rows], dtype=torch.uint8)
    return values if channels == 1 else values.view(height, width, channels)


def test_half_time_has_a_logarithmic_scale_and_a_colour_for_never():
    analysis = synthetic_analysis()
    times = analysis.examples.half_time
    times[:3] = torch.tensor([0.5, 5.0, 50.0])
    never = [i for i, time in enumerate(times.tolist()) if time == float("inf")]
    assert never
    spec = finite_json(figures.eigenstructure(analysis))
    menu = next(menu for menu in spec["layout"]["updatemenus"] if menu["name"] == "colour")
    restyle, axis, _ = next(button for button in menu["buttons"] if button["label"] == "colour: half-time")["args"]
    noise = analysis.examples.is_noise
    order = [i for i in range(30) if not noise[i]] + [i for i in range(30) if noise[i]]
    colours = dict(zip(order, [value for trace in restyle["marker.color"] for value in trace], strict=True))
    for i, time in enumerate(times.tolist()):
        if i not in never:
            assert colours[i] == pytest.approx(math.log10(time), abs=1e-3)
    ticks = dict(zip(axis["coloraxis.colorbar.ticktext"], axis["coloraxis.colorbar.tickvals"], strict=True))
    assert {colours[i] for i in never} == {round(ticks["never"], 3)}
    finite = max(value for i, value in colours.items() if i not in never)
    assert finite < ticks["never"] <= axis["coloraxis.cmax"]
    scale = axis["coloraxis.colorscale"]
    edge = (finite - axis["coloraxis.cmin"]) / (axis["coloraxis.cmax"] - axis["coloraxis.cmin"])
    assert {colour for position, colour in scale if position > edge + 1e-6} == {palette.WINE}
    assert [position for position, _ in scale] == sorted(position for position, _ in scale)
    assert (scale[0][0], scale[-1][0]) == (0, 1)


def test_colours_by_half_time_keep_their_order_in_black_and_white():
    scale = [unlabel_rgb(colour) for colour in colourings._half_time_colours()]
    scale.extend(hex_to_rgb(colour) for colour in (colourings.NEVER,))
    luminance = [0.2126 * (r / 255) ** 2.2 + 0.7152 * (g / 255) ** 2.2 + 0.0722 * (b / 255) ** 2.2 for r, g, b in scale]
    assert luminance == sorted(luminance, reverse=True)
    assert luminance[-2] > 2 * luminance[-1], "never stands out"


def test_many_labels_share_a_scale_and_a_readable_bar():
    analysis = synthetic_analysis(num_classes=2)
    analysis.examples.labels = [f"class number {i:03d} of many" for i in range(30)]
    menu = next(menu for menu in figures.eigenstructure(analysis).layout.updatemenus if menu.name == "colour")
    axis = next(button for button in menu.buttons if button.label == "colour: given label").args[1]
    assert axis["coloraxis.colorscale"] == palette.CONTINUOUS, "with more labels than colours, a colour must not stand for two"
    texts = axis["coloraxis.colorbar.ticktext"]
    assert 2 <= len(texts) <= 8
    assert sum(map(len, texts)) <= 100


def test_frames_need_no_alignment():
    """Coordinates are in the axes of the window's end, so no rotation or reflection brings successive frames nearer together."""
    run = train_demo(num_examples=40, num_steps=300)
    history = ntkscope.analyze(run.recorder).history
    rows = drawing.frame_rows(history.eigvals)
    assert len(rows) > 8
    for before, after in itertools.pairwise(rows):
        old, new = history.leading[before].numpy(), history.leading[after].numpy()
        turn, _ = orthogonal_procrustes(old, new)
        gain = ((new - old) ** 2).sum() - ((new - old @ turn) ** 2).sum()
        assert 0 <= gain < 0.02 * (new**2).sum()
        flipped = ((new + old) ** 2).sum()
        assert flipped > ((new - old) ** 2).sum()


def test_planted_noise_is_hatched():
    bars = finite_json(figures.suspicious(synthetic_analysis()))["data"]
    assert {bar["name"]: bar["marker"]["pattern"]["shape"] for bar in bars} == {"label was planted wrong": "/", "label is right": ""}
    assert len(finite_json(figures.suspicious(synthetic_analysis(has_noise=False)))["data"]) == 1


def test_spectrum_marks_every_cutoff_and_a_selection_that_is_not_leading():
    analysis = synthetic_analysis()
    spec = finite_json(figures.spectrum(analysis))
    rules = spec["data"][2]
    assert {*rules["y"]} == {rule for rule, cutoff in analysis.cutoffs.items() if cutoff.rank is not None}
    assert rules["x"][rules["y"].index("energy")] == analysis.cutoffs["energy"].rank + 0.5
    assert any(note["text"] == "no answer here" and note["y"] == "gd" for note in spec["layout"]["annotations"])
    selected = torch.zeros(120, dtype=torch.bool)
    selected[[0, 7]] = True
    analysis.cutoffs["half"].selected = selected
    assert finite_json(figures.spectrum(analysis))["data"][0]["x"] == [1, 8]
