"""Figures and report of odd results: they draw something sensible or say why not, and write JSON that a browser reads."""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from view_case import MISSING, finite_json, synthetic_analysis, title_of

import ntkscope
from ntkscope._checks import InputError
from ntkscope.view import colourings, drawing, figures, report, suspects


def fill(part, value):
    """Set every floating-point tensor and number of a namespace, but for what the decomposition and the recorder keep finite."""
    for name, old in vars(part).items():
        if name in ("eigvecs", "residual"):
            continue
        if isinstance(old, torch.Tensor) and old.is_floating_point():
            setattr(part, name, torch.full_like(old, value))
        elif isinstance(old, float):
            setattr(part, name, value)


def constant(value, **options):
    """An analysis in which every measured number is the same."""
    analysis = synthetic_analysis(has_gate=True, **options)
    for part in (analysis.examples, analysis.history, analysis.spectrum, analysis.drift, analysis.closure):
        fill(part, value)
    analysis.stability = value
    if analysis.cells is not None:
        analysis.cells.norms = dict.fromkeys(analysis.cells.norms, value)
    analysis.gate.open_share = torch.full_like(analysis.gate.open_share, value)
    analysis.gate.by_parameter = {name: torch.full_like(share, value) for name, share in analysis.gate.by_parameter.items()}
    return analysis


def never_learned():
    """Half-times that no example reaches."""
    analysis = synthetic_analysis()
    for name in ("half_time", "quarter_time"):
        getattr(analysis.examples, name).fill_(torch.inf)
    return analysis


def thousand_classes():
    """Labels 0 to 999, with few directions: what many classes change is the labels."""
    analysis = synthetic_analysis(num_examples=1000, num_classes=1)
    analysis.examples.labels = list(range(1000))
    analysis.examples.true_labels = [(k + 1) % 1000 if bad else k for k, bad in enumerate(analysis.examples.is_noise)]
    analysis.run.num_classes = 1000
    return analysis


def long_names():
    """Names that no axis has room for."""
    analysis = thousand_classes()
    analysis.examples.labels = [f"the class of things that are called {k}" for k in range(1000)]
    return analysis


def one_sided(flag):
    """Planted noise that is everywhere, or nowhere."""
    analysis = synthetic_analysis()
    analysis.examples.is_noise[:] = flag
    analysis.examples.auroc = None
    return analysis


def no_direction():
    """A window in which nothing was learned, so that no direction is signal."""
    analysis = synthetic_analysis()
    analysis.spectrum.eigvals = torch.zeros_like(analysis.spectrum.eigvals)
    analysis.history.eigvals = torch.zeros_like(analysis.history.eigvals)
    analysis.history.leading = torch.zeros_like(analysis.history.leading)
    analysis.channels.signal_rank = 0
    analysis.cutoffs = {
        rule: SimpleNamespace(**{**vars(cutoff), "rank": 0 if rule == "half" else None}) for rule, cutoff in analysis.cutoffs.items()
    }
    return analysis


def large_values():
    """A run on its way to overflow."""
    analysis = synthetic_analysis(has_gate=True)
    for part in (analysis.history, analysis.drift):
        for name, tensor in vars(part).items():
            if isinstance(tensor, torch.Tensor) and name != "eigvals":
                setattr(part, name, tensor * 1e300)
    return analysis


ODD = {
    "everything NaN": lambda: constant(torch.nan),
    "everything infinite": lambda: constant(torch.inf),
    "everything zero": lambda: constant(0.0),
    "everything one": lambda: constant(1.0),
    "everything negative": lambda: constant(-1.0),
    "NaN, unlabeled": lambda: constant(torch.nan, has_labels=False, has_noise=False),
    "one example": lambda: synthetic_analysis(num_examples=1, num_classes=30, has_gate=True),
    "one example, one class": lambda: synthetic_analysis(num_examples=1, num_classes=15, num_snapshots=1),
    "one snapshot": lambda: synthetic_analysis(num_snapshots=1, has_gate=True),
    "one snapshot, unlabeled": lambda: synthetic_analysis(num_snapshots=1, has_labels=False, has_noise=False),
    "1,000 classes": thousand_classes,
    "1,000 long names": long_names,
    "unlabeled": lambda: synthetic_analysis(has_labels=False, has_noise=False, has_gate=True),
    "5,000 modes": lambda: synthetic_analysis(num_examples=500, num_classes=10, num_snapshots=40),
    "never learned": never_learned,
    "all labels wrong": lambda: one_sided(True),
    "no label wrong": lambda: one_sided(False),
    "nothing learned": no_direction,
    "large values": large_values,
}


@pytest.fixture(params=ODD.values(), ids=ODD.keys(), scope="module")
def odd(request):
    return request.param()


@pytest.mark.parametrize("name", figures.FIGURES)
def test_odd_results_are_drawn_or_refused_with_a_reason(odd, name):
    if name not in figures.drawable(odd):
        with pytest.raises(InputError, match=MISSING.get(name, "SGD has no gate")):
            figures.FIGURES[name](odd)
        return
    figure = figures.FIGURES[name](odd)
    spec = finite_json(figure)
    title = title_of(figure)
    assert spec["data"] or title.startswith("None of")
    assert re.search(r"\d|unknown|no |None", title), f"{title!r} has neither a number nor a reason"
    assert not re.search(r"\b(nan|inf)\b|\bNone\b(?! of)", title), title
    for axis, settings in spec["layout"].items():
        if axis.startswith(("xaxis", "yaxis")) and "range" in settings:
            low, high = settings["range"]
            assert low != high, f"{axis} is empty"
    assert spec["layout"]["height"] < 1000


def test_words_in_bars_and_legends_stay_few():
    analysis = long_names()
    for name in figures.drawable(analysis):
        spec = finite_json(figures.FIGURES[name](analysis))
        menus = [menu for menu in spec["layout"].get("updatemenus", []) if menu["name"] == "colour"]
        bars = [
            spec["layout"].get("coloraxis", {}).get("colorbar", {}),
            *(button["args"][1] for menu in menus for button in menu["buttons"]),
        ]
        for bar in bars:
            texts = next((value for key, value in bar.items() if key.endswith("ticktext")), None) or []
            assert len(texts) <= colourings.MAX_TICKS
            assert sum(map(len, texts)) <= 1.2 * colourings.MAX_TICK_LETTERS
        assert len([trace for trace in spec["data"] if trace.get("showlegend", True)]) <= 12


class _Scripts(HTMLParser):
    """Collects JSON scripts and the text that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: tuple[str, str] = ("", "")
        self.data: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "style"):
            self.inside = (tag, dict(attrs).get("type") or "")

    def handle_endtag(self, tag):
        self.inside = ("", "")

    def handle_data(self, data):
        if self.inside[1] == "application/json":
            self.data.append(data)
        elif not self.inside[0]:
            self.text.append(data)


def test_the_report_of_odd_results_is_whole(odd):
    page = report.render_report(odd)
    parsed = _Scripts()
    parsed.feed(page)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in the page")

    for data in parsed.data:
        json.loads(data, parse_constant=refuse)
    assert len(parsed.data) >= len(figures.drawable(odd))
    read = re.findall(r"\w+", " ".join(parsed.text).lower())
    assert "nan" not in read
    assert len(page.encode()) < 6_000_000


def test_all_figures_of_500_examples_fit_a_page():
    """900 kB, so that plotly (4.8 MB) and the rest of the report stay below 6 MB."""
    analysis = synthetic_analysis(num_examples=500, num_classes=10, num_snapshots=40, has_gate=True)
    sizes = {
        name: len(json.dumps(finite_json(figures.FIGURES[name](analysis)), separators=(",", ":"))) for name in figures.drawable(analysis)
    }
    assert set(sizes) == set(figures.FIGURES)
    assert sum(sizes.values()) < 900_000, sizes


def test_larger_results_take_hardly_more():
    analysis = synthetic_analysis(num_examples=5000, num_classes=1, num_snapshots=70)
    sizes = {name: len(figures.FIGURES[name](analysis).to_json()) for name in figures.drawable(analysis)}
    assert sum(sizes.values()) < 1_100_000, sizes
    assert "of 5,000 examples drawn" in title_of(figures.eigenstructure(analysis))


def test_nothing_suspicious_is_said_so():
    analysis = constant(torch.nan)
    assert suspects.ranked(analysis) == []
    for make in (figures.suspicious, figures.suspicious_inputs):
        assert title_of(make(analysis)) == "None of 30 examples has a known half-time"
    analysis.examples.abstains = "the closure errors are too large"
    assert title_of(figures.suspicious(analysis)) == "None of 30 examples has a known loss"


def test_a_run_that_was_never_learned_has_one_colour():
    analysis = never_learned()
    (axis,) = (offer.axis for offer in colourings.colourings(analysis) if offer.name == "half-time")
    assert axis["colorbar"]["ticktext"] == ["never"]
    assert axis["cmin"] < axis["colorbar"]["tickvals"][0] < axis["cmax"]


def test_numbers_of_no_span_are_drawn():
    assert drawing.fixed(torch.tensor([0.0, 1e-9, torch.nan]), 1e-8) == [0.0, 1e-9, None]
    assert drawing.fixed(torch.tensor([1.0e300, -0.0], dtype=torch.float64), 2e300) == [1e300, 0.0]
    assert drawing.fixed_range(torch.full((3,), torch.nan)) == [-1.0, 1.0]


def test_a_tiny_real_run_is_drawn():
    """Two examples, one output, two steps: no stand-in for the real dataclasses."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    inputs, targets = torch.randn(2, 2), torch.randn(2, 1)
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), loss="squared")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        (0.5 * (model(inputs) - targets).square()).mean().backward()
        optimizer.step()
    analysis = ntkscope.analyze(recorder)
    names = figures.drawable(analysis)
    assert {"spectrum", "signal_share", "drift"} <= set(names)
    assert not {"cells", "suspicious_inputs", "gate_openness"} & set(names)
    for name in names:
        assert finite_json(getattr(analysis.plot, name)())["data"]
    with pytest.raises(InputError, match=MISSING["cells"]):
        analysis.plot.cells()
    assert report.render_report(analysis)


def test_titles_of_unknown_numbers_are_sentences():
    analysis = constant(torch.nan)
    titles = [title_of(figures.FIGURES[name](analysis)) for name in ("signal_share", "drift", "cells", "eigenstructure")]
    assert titles == [
        f"How much of the squared residual training removed by step {analysis.window.stop_step:,} is unknown",
        f"How far the kernel moved by step {analysis.window.stop_step:,} is unknown; its alignment with the targets is unknown here",
        "The sizes of all 4 parts of the test motion are unknown",
        "How much of the loss that training removed went along 3 of 120 directions is unknown",
    ]


def test_long_names_are_shortened_where_they_are_alike():
    assert drawing.shortened("the class of things 599", 12) == "the cl…s 599"
    assert drawing.shortened(7, 12) == "7"
    assert len(drawing.shortened("x" * 50, 12)) == 12
    (axis,) = (offer.axis for offer in colourings.colourings(long_names()) if offer.name == "given label")
    texts = axis["colorbar"]["ticktext"]
    assert len(set(texts)) == len(texts)
