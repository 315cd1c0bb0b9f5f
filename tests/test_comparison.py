"""Two results side by side: what is matched, what is said and drawn, and the page in a real browser."""

import json
import math
import re

import pytest
import test_report_browser
import torch
from hypothesis import given
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs
from test_view import HOSTILE, _parse
from view_case import finite_json, synthetic_analysis, title_of

from ntkscope.view.comparison import render_comparison, write_comparison
from ntkscope.view.comparison_examples import STYLES, _distances, _residual_by_chance, _rotated, eigenstructures, half_times
from ntkscope.view.comparison_figures import COMPARISON_TEXTS, COMPARISONS, comparable, gates, losses, spectra
from ntkscope.view.comparison_words import cautions, differences, headline, settings
from ntkscope.view.matching import common_rankings, half_steps, match_examples
from ntkscope.view.words import number

PAIRS = {
    "same settings": ({"has_gate": True}, {"has_gate": True}),
    "gate in one": ({"has_gate": True}, {}),
    "other sizes": ({}, {"num_examples": 20, "num_classes": 3}),
    "one snapshot": ({"num_snapshots": 1}, {}),
    "one snapshot each": ({"num_snapshots": 1}, {"num_snapshots": 1}),
    "nan": ({"has_nan": True, "is_trustworthy": False}, {"has_nan": True}),
    "no labels": ({"has_labels": False, "has_noise": False}, {"has_labels": False, "has_noise": False}),
    "labels in one": ({"has_noise": False}, {"has_labels": False, "has_noise": False}),
    "noise known in one": ({}, {"has_noise": False}),
    "few examples": ({"num_examples": 8, "num_classes": 2}, {"num_examples": 8, "num_classes": 2}),
    "one has no trust": ({}, {"is_trustworthy": False}),
}


@pytest.fixture(params=PAIRS.values(), ids=PAIRS.keys())
def pair(request):
    return tuple(synthetic_analysis(**options) for options in request.param)


def faster(times=3.0, **options):
    """The synthetic run, and the same learned some times as fast."""
    first, second = synthetic_analysis(**options), synthetic_analysis(**options)
    second.examples.half_time = second.examples.half_time / times
    return first, second


def words(page):
    return " ".join(" ".join(_parse(page.replace(get_plotlyjs(), "")).text).split()).replace("\u00a0", " ")


def test_every_figure_draws_every_pair(pair):
    matching = match_examples(*pair)
    names = comparable(*pair, matching)
    assert set(names) >= {"losses", "spectra", "signal_shares"}
    assert ("half_times" in names) == (len(matching) > 0)
    for name in names:
        figure = COMPARISONS[name](*pair, matching)
        assert finite_json(figure)["data"]
        assert re.search(r"\d", title_of(figure)), "a title states the finding with a number"
        assert "nan" not in re.findall(r"\w+", title_of(figure).lower())


def test_every_pair_has_a_page(pair, tmp_path):
    path = tmp_path / "comparison.html"
    write_comparison(*pair, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["comparison.html"]
    page = path.read_bytes().decode("utf-8")
    assert page.count(get_plotlyjs()) == 1
    page = page.replace(get_plotlyjs(), "")
    parsed = _parse(page)
    for tag, attributes in parsed.tags:
        assert not (attributes.get("src") or "").strip(), f"<{tag}> loads something"
        if tag in ("a", "link"):
            assert (attributes["href"] or "").startswith(("#", "data:"))
    assert "http" not in page.replace("http-equiv", "")
    assert "nan" not in re.findall(r"\w+", " ".join(parsed.text).lower())
    drawn = [attributes["data-figure"] for tag, attributes in parsed.tags if tag == "figure"]
    assert drawn == comparable(*pair, match_examples(*pair))
    anchors = {attributes.get("id") for _, attributes in parsed.tags}
    assert {attributes["href"][1:] for tag, attributes in parsed.tags if tag == "a"} <= anchors


def test_the_runs_can_be_told_apart_without_colour():
    assert len({style.dash for style in STYLES}) == len({style.symbol for style in STYLES}) == 2
    first, second = synthetic_analysis(has_gate=True), synthetic_analysis(has_gate=True)
    for make in (losses, spectra, gates):
        lines = finite_json(make(first, second, match_examples(first, second)))["data"]
        assert [(line["name"], line["line"]["dash"], line["marker"]["symbol"]) for line in lines] == [
            ("A", "solid", "circle"),
            ("B", "dash", "diamond-open"),
        ]
    assert set(COMPARISON_TEXTS) == set(COMPARISONS)


def test_what_cannot_be_trusted_is_said_first():
    good, bad = synthetic_analysis(), synthetic_analysis(is_trustworthy=False)
    assert headline(good, good).startswith("A learned ")
    assert headline(good, bad) == "Do not believe this comparison as it stands: the numbers of B do not describe its run."
    assert "A and B do not describe their runs" in headline(bad, bad)
    shown = words(render_comparison(good, bad))
    assert shown.index("Do not believe this comparison") < shown.index("Can you believe it?") < shown.index("What differs")
    assert "the kernel moved by 81% of its size" in shown
    shown = words(render_comparison(good, good))
    assert shown.index("What differs") < shown.index("Can you believe it?")
    assert "Do not believe" not in shown


def test_differences_state_the_numbers_of_both():
    first, second = faster()
    second.channels.signal_rank = 12
    second.history.loss = second.history.loss.clone()
    second.history.loss[second.window.stop] = second.history.loss[0] / 4
    found = [sentence.replace("\u00a0", " ") for sentence in differences(first, second)]
    rank = first.channels.signal_rank
    assert found[0] == f"A learned {100 * rank / 120:.1f} % of its directions ({rank} of 120), B 10.0 % (12 of 120)."
    assert found[1].endswith("and 75.0 % in B.")
    typical = half_steps(first).median(), half_steps(second).median()
    assert f"was gone: {number(float(typical[0]))} in A" in found[2]
    assert float(typical[0]) > 2 * float(typical[1])
    left = second.history.example_residual[second.window.stop]
    assert f"{100 * (1 - float(left[first.examples.is_noise].mean())):.1f} % in B was gone at the window's end" in found[3]
    assert len(differences(first, synthetic_analysis(has_noise=False))) == 3


def test_half_steps_are_the_steps_of_half_times():
    analysis = synthetic_analysis()
    analysis.examples.half_time[:4] = torch.tensor([
        0.5 * (analysis.history.times[3] + analysis.history.times[4]),
        0.0,
        torch.inf,
        torch.nan,
    ])
    found = half_steps(analysis)
    assert float(found[0]) == pytest.approx((analysis.history.steps[3] + analysis.history.steps[4]) / 2)
    assert float(found[1]) == 0
    assert float(found[2]) == math.inf
    assert math.isnan(float(found[3]))
    analysis.history.steps = [step + 100 for step in analysis.history.steps]
    torch.testing.assert_close(half_steps(analysis), found, equal_nan=True)


def test_matching_is_by_id_and_label():
    first, second = synthetic_analysis(), synthetic_analysis()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1)).tolist()
    for name in ("ids", "labels", "true_labels"):
        setattr(second.examples, name, [getattr(second.examples, name)[i] for i in order])
    matching = match_examples(first, second)
    assert matching.first == list(range(30))
    assert [order[j] for j in matching.second] == matching.first
    assert matching.sentence.startswith("30 examples of 30 in A and 30 in B are compared one by one")
    second.examples.labels[order.index(7)] = (first.examples.labels[7] + 1) % 4
    matching = match_examples(first, second)
    assert 7 not in matching.first
    assert "(1 more row has another label)" in matching.sentence
    second.examples.ids = [k + 1000 for k in range(30)]
    assert match_examples(first, second).sentence == "No examples are compared one by one: no row of the probe is in both runs."


def test_other_examples_in_the_same_rows_are_not_matched():
    first, second = synthetic_analysis(num_examples=40), synthetic_analysis(num_examples=40)
    shift = second.examples.labels[7:] + second.examples.labels[:7]
    second.examples.labels = second.examples.true_labels = shift
    matching = match_examples(first, second)
    assert not matching
    assert "have the same label, so that the runs followed other examples" in matching.sentence
    assert any("What differs may be due to the examples" in sentence for sentence in cautions(first, second, matching))
    assert comparable(first, second, matching) == ["losses", "spectra", "signal_shares"]
    # Other noise on the same examples: true labels agree.
    second = synthetic_analysis(num_examples=40)
    second.examples.labels = [(label + k % 2) % 4 for k, label in enumerate(second.examples.labels)]
    assert len(match_examples(first, second)) == 20


def test_examples_of_one_class_or_without_labels_are_matched_by_row():
    first, second = synthetic_analysis(has_noise=False), synthetic_analysis(has_noise=False)
    first.examples.labels = second.examples.labels = [2] * 30
    assert len(match_examples(first, second)) == 30
    first.examples.labels = second.examples.labels = None
    matching = match_examples(first, second)
    assert len(matching) == 30
    assert "by their row in the probe alone" in matching.sentence
    second.examples.labels = [2] * 30
    assert "one run has labels, and the other has none" in match_examples(first, second).sentence


def test_a_uniform_speedup_is_a_ratio_and_names_nobody():
    first, second = faster(2.0)
    figure = half_times(first, second, match_examples(first, second))
    assert "typically in 0.500 times as many steps in B as in A" in title_of(figure)
    assert "furthest" not in title_of(figure)
    same = half_times(first, first, match_examples(first, first))
    assert "typically in as many steps in B as in A" in title_of(same)
    assert "rank correlation 1.00" in title_of(same)
    assert "typical ratio" not in {trace.name for trace in same.data}


def test_the_examples_that_two_runs_treat_differently_are_named():
    first, second = faster(1.0)
    reached = [k for k in range(30) if math.isfinite(float(first.examples.half_time[k]))]
    early, late = reached[0], reached[1]
    second.examples.half_time[early] /= 50
    second.examples.half_time[late] = torch.inf
    spec = finite_json(half_times(first, second, match_examples(first, second)))
    named = {text for trace in spec["data"] for text in trace.get("text", ()) if text}
    assert f"#{early}" in named
    assert "furthest from the common line" in spec["layout"]["title"]["text"]
    assert f"{len(reached) - 1} examples lost half" in spec["layout"]["title"]["text"]
    assert "later" in spec["layout"]["yaxis"]["ticktext"]
    assert spec["layout"]["xaxis"]["tickvals"] == spec["layout"]["yaxis"]["tickvals"]


def test_what_was_not_reached_is_far_only_as_far_as_the_record_proves():
    columns = torch.tensor([[10.0, 90.0, torch.inf, torch.inf, 10.0], [torch.inf, torch.inf, torch.inf, 80.0, 20.0]])
    found = _distances(columns, [200, 100], math.log(2))
    expected = [math.log(100 / 10 / 2), 0.0, 0.0, -math.log(80 / 200 / 2), 0.0]
    torch.testing.assert_close(found, torch.tensor(expected))


@given(seed=st.integers(0, 2**31), angle=st.floats(-3.2, 3.2), is_mirrored=st.booleans(), scale=st.floats(0.1, 10))
def test_rotated_pictures_are_the_same_picture(seed, angle, is_mirrored, scale):
    points = torch.randn(20, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]], dtype=torch.float64)
    if is_mirrored:
        turn[:, 0] *= -1
    fixed, turned, residual = _rotated(points, points @ turn)
    torch.testing.assert_close(turned, fixed)
    assert residual < 1e-12
    # Sizes are not taken out: a picture of another size is another one.
    other = _rotated(points, scale * points @ turn)[2]
    assert other == pytest.approx(abs(1 - scale) / math.sqrt(1 + scale**2), abs=1e-9)


def test_the_residual_is_between_nothing_and_everything():
    generator = torch.Generator().manual_seed(0)
    points, others = (torch.randn(40, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    apart = torch.zeros(40, 3, dtype=torch.float64)
    assert _rotated(points, apart)[2] == 1.0
    assert math.isnan(_rotated(points[:0], points[:0])[2])
    assert _rotated(points, others)[2] == pytest.approx(_residual_by_chance(points, others), abs=0.1)
    assert _rotated(points, points)[2] < 0.1 < _residual_by_chance(points, points)


def test_the_eigenstructures_are_aligned_over_the_matched_examples():
    first, second = synthetic_analysis(), synthetic_analysis()
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    second.history.leading = second.history.leading @ turn
    spec = finite_json(eigenstructures(first, second, match_examples(first, second)))
    ours, theirs = spec["data"][1:]
    for letter in "xyz":
        assert ours[letter] == pytest.approx(theirs[letter], abs=1e-6)
    assert "place 30 examples with a residual of" in spec["layout"]["title"]["text"]
    assert ours["marker"]["symbol"] != theirs["marker"]["symbol"]


def test_rankings_are_of_matched_examples_by_one_score():
    first, second = synthetic_analysis(), synthetic_analysis()
    second.examples.half_time[2] = math.nan
    matching = match_examples(first, second)
    ours, theirs, by = common_rankings(first, second, matching)
    assert by == "half_time"
    assert ours == theirs == [k for k in first.examples.ranking() if k != 2]
    second.examples.abstains = "the closure errors are too large"
    assert common_rankings(first, second, matching)[2] == "loss"
    shown = words(render_comparison(first, synthetic_analysis()))
    assert "10 of the 10 most suspicious examples are the same in A and B (by half-time, of 30 compared); chance would give 3.3" in shown


def test_settings_that_differ_are_listed():
    first, second = synthetic_analysis(), synthetic_analysis(num_examples=20)
    second.run.optimizer, second.run.loss = "AdamW(lr=0.001)", "mse"
    differing, same = settings(first, second)
    assert ("optimizer", "SGD(lr=0.05)", "AdamW(lr=0.001)") in differing
    assert {name for name, _, _ in differing} == {"optimizer", "loss", "examples followed"}
    assert ("parameters", "3,658") in same
    assert "None of those that a result holds" in words(render_comparison(first, first))


def test_what_stands_in_the_way_of_comparing_is_said():
    first, second = synthetic_analysis(), synthetic_analysis(num_examples=20)
    same = match_examples(first, first)
    assert cautions(first, first, same) == []
    second.run.loss, second.run.outputs, second.run.optimizer = "mse", "trace", "Adam"
    second.window.start_step, second.window.stop_step = 5, 20
    second.channels.rule, second.channels.signal_rank = "gap", 80
    found = cautions(first, second, match_examples(first, second))
    starts = ("No examples", "The kernels differ", "The probes differ", "The losses differ", "The windows differ", "The cutoff rules")
    starts = (*starts, "The optimizers", "Almost every direction of B")
    assert len(found) == len(starts)
    assert all(sentence.startswith(start) for sentence, start in zip(found, starts, strict=True))
    assert "--window 5:20" in found[4]
    second.window.start_step, second.window.stop_step = 5000, 6000
    assert "--window" not in cautions(first, second, same)[3]


def test_other_sizes_are_drawn_over_shares_of_modes():
    first, second = synthetic_analysis(), synthetic_analysis(num_examples=20)
    spec = finite_json(spectra(first, second, match_examples(first, second)))
    assert [line["x"][-1] for line in spec["data"]] == [1.0, 1.0]
    assert "share of all" in spec["layout"]["xaxis"]["title"]["text"]
    second.run.loss = "mse"
    spec = finite_json(losses(first, second, match_examples(first, second)))
    assert [line["y"][0] for line in spec["data"]] == [1.0, 1.0]
    assert "share of the window's start" in spec["layout"]["yaxis"]["title"]["text"]


def test_hostile_strings_are_escaped():
    first, second = synthetic_analysis(source=HOSTILE, has_gate=True), synthetic_analysis(source=HOSTILE, has_gate=True)
    for analysis in (first, second):
        analysis.run.optimizer = analysis.run.loss = analysis.channels.rule = HOSTILE
        analysis.warnings = (HOSTILE,)
        analysis.examples.ids[analysis.examples.ranking()[0]] = HOSTILE
        analysis.examples.labels = analysis.examples.true_labels = [HOSTILE] * 30
    second.examples.half_time[first.examples.ranking()[0]] = 1e-6
    page = render_comparison(first, second)
    tags = _parse(page.replace(get_plotlyjs(), "")).tags
    kinds = [attributes.get("type") for tag, attributes in tags if tag == "script"]
    assert kinds.count(None) == 2
    assert kinds.count("application/json") == len(COMPARISONS)
    assert not [tag for tag, _ in tags if tag == "img"]
    assert "<script>alert" not in page


browser = test_report_browser.browser


def test_the_page_in_a_browser(browser, tmp_path):
    first, second = faster(has_gate=True)
    path = tmp_path / "comparison.html"
    write_comparison(first, second, path)
    test_report_browser._resize(browser, 1280)
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(path.as_uri())
    test_report_browser._wait(browser, "return document.documentElement.dataset.drawn === 'true'")
    requested = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [message["params"]["request"]["url"] for message in requested if message["method"] == "Network.requestWillBeSent"]
    assert urls
    assert not [url for url in urls if not url.startswith(("file:", "data:", "blob:"))]
    for name in COMPARISONS:
        plot = f"document.querySelector('#figure-{name} .plot')"
        assert browser.execute_script(f"return {plot}.querySelectorAll('svg.main-svg').length") > 0
        assert "could not be drawn" not in browser.execute_script(f"return {plot}.textContent")
    for width in (380, 1280, 2560):
        test_report_browser._resize(browser, width)
        test_report_browser._wait(browser, f"return innerWidth === {width}")
        test_report_browser._wait(browser, "return document.documentElement.scrollWidth <= innerWidth")
    assert not [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
