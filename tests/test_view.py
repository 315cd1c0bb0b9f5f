"""Report and terminal summary on results of every kind (the browser test is in test_report_browser.py)."""

import io
import re
from html.parser import HTMLParser

import pytest
from plotly.offline import get_plotlyjs
from rich.console import Console
from view_case import CASES, synthetic_analysis, title_of

from ntkscope.view import figures, notebook, report, suspects, text, words

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>[red]x[/red]\x1b[31m{{ 7*7 }}"


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def analysis(request):
    return synthetic_analysis(**request.param)


class _Tags(HTMLParser):
    """Collects start tags and the text of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.text.append(data)


def _parse(page: str) -> _Tags:
    tags = _Tags()
    tags.feed(page)
    return tags


def test_report_is_one_offline_file(analysis, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    report.write_report(analysis, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    page = path.read_bytes().decode("utf-8")
    assert page.count(get_plotlyjs()) == 1
    page = page.replace(get_plotlyjs(), "")
    parsed = _parse(page)
    for tag, attributes in parsed.tags:
        if tag in ("script", "link", "img", "iframe", "source", "object"):
            assert not (attributes.get("src") or "").strip(), f"<{tag}> loads something"
            assert (attributes.get("href") or "data:").startswith("data:")
        if tag == "a":
            assert (attributes["href"] or "").startswith("#")
    assert "mathjax" not in page.lower()
    assert "http" not in page.replace("http-equiv", "")
    drawn = [attributes["data-figure"] for tag, attributes in parsed.tags if tag == "figure"]
    assert drawn == figures.drawable(analysis)
    assert "nan" not in re.findall(r"\w+", " ".join(parsed.text).lower())


def test_report_shows_verdict_table_and_baselines():
    good, bad = (
        " ".join(" ".join(_parse(report.render_report(synthetic_analysis(is_trustworthy=flag))).text).split()) for flag in (True, False)
    )
    assert "Yes: prediction and run agree" in good
    assert "Not as they stand" in bad
    assert "the kernel moved by 81% of its size" in bad
    for score in suspects.SCORES:
        assert score.title in good
    assert "AUROC" in good
    assert "0.97" in good
    assert "half (used here)" in good


def test_report_is_small_beside_plotly():
    page = report.render_report(synthetic_analysis(num_examples=200, num_classes=4))
    assert len(page) - len(get_plotlyjs()) < 700_000


def test_a_failed_report_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(analysis):
        raise RuntimeError("broken")

    monkeypatch.setitem(report.FIGURES, "spectrum", fail)
    with pytest.raises(RuntimeError, match="broken"):
        report.write_report(synthetic_analysis(), path)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_hostile_strings_are_escaped_everywhere():
    analysis = synthetic_analysis(source=HOSTILE, has_gate=True)
    analysis.run.optimizer = analysis.run.loss = analysis.regime_reason = analysis.window.reason = HOSTILE
    analysis.warnings = (HOSTILE,)
    analysis.examples.ids[analysis.examples.ranking()[0]] = HOSTILE
    analysis.examples.labels = [HOSTILE] * 30
    analysis.cutoffs[HOSTILE] = analysis.cutoffs.pop("half")
    analysis.channels.rule = HOSTILE
    analysis.gate.by_parameter = {HOSTILE: analysis.gate.open_share}
    page = report.render_report(analysis)
    # One security policy covers three scripts; JSON scripts do not run.
    tags = _parse(page.replace(get_plotlyjs(), "")).tags
    kinds = [attributes.get("type") for tag, attributes in tags if tag == "script"]
    assert kinds.count(None) == 3
    assert kinds.count("application/json") == len(figures.drawable(analysis)) + 1, "every figure, and the linked view"
    assert not [tag for tag, _ in tags if tag == "img"]
    assert "<script>alert" not in page
    for figure in (make(analysis) for make in figures.FIGURES.values()):
        assert "<script>" not in title_of(figure)
        assert "<img" not in figure.to_json()
    assert "<script>" not in notebook.analysis_html(analysis)
    shown = _printed(analysis)
    assert "\x1b" not in shown
    assert "[red]x[/red]" in shown


def _printed(analysis, *, width: int = 80, encoding: str | None = None, **settings) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding or "utf-8", errors="strict", newline="\n")
    text.print_summary(analysis, Console(file=stream, width=width, **settings))
    stream.flush()
    return raw.getvalue().decode(encoding or "utf-8")


def test_summary_fits_one_screen(analysis):
    lines = _printed(analysis).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert "nan" not in " ".join(lines).lower().split()


def test_summary_with_much_to_say_fits_one_screen_and_counts_what_it_hides():
    analysis = synthetic_analysis(is_trustworthy=False, source="/a/very/long/path" * 20)
    analysis.closure.causes = tuple(f"Cause {k}: " + "words " * 40 for k in range(4))
    analysis.warnings = tuple(f"Warning {k}: " + "words " * 30 for k in range(5))
    shown = _printed(analysis)
    assert len(shown.splitlines()) <= 40
    assert "Cause 0" in shown
    assert "... and 7 more" in shown


def test_summary_says_what_was_found():
    analysis = synthetic_analysis()
    shown = " ".join(_printed(analysis).split())
    rank = analysis.channels.signal_rank
    assert f"learned {rank} of 120 directions and left {120 - rank} in the reservoir" in shown
    assert "the loss went from 0.450 to" in shown
    assert "an error of 0.3 % (limit 5 %)" in shown
    assert "predicted with an error of 3.7 % (limit 25 %)" in shown
    assert re.search(r"AUROC 0\.97 0\.91 0\.93 0\.90 0\.51 0\.95", shown)
    first = analysis.examples.ranking()[0]
    assert f"{analysis.examples.ids[first]}*" in shown
    assert "NEXT" in shown


def test_summary_names_the_cause_of_a_bad_closure():
    shown = " ".join(_printed(synthetic_analysis(is_trustworthy=False)).split())
    assert "Not as they stand" in shown
    assert "Too few snapshots" in shown


@pytest.mark.parametrize("width", [20, 40, 60, 200])
def test_summary_keeps_to_any_width(width):
    assert max(map(len, _printed(synthetic_analysis(), width=width).splitlines())) <= width


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437"])
def test_summary_needs_no_unicode(encoding):
    analysis = synthetic_analysis(source="läufe/Ω.pt", is_trustworthy=False)
    analysis.closure.causes = ("ω → 1, √ω ≥ ½, 例",)
    analysis.warnings = ("κ ≤ 36 …",)
    shown = _printed(analysis, encoding=encoding)
    assert "omega -> 1" in shown


def test_summary_respects_no_color(monkeypatch):
    assert "\x1b[" in _printed(synthetic_analysis(), force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1;36m" not in _printed(synthetic_analysis(), force_terminal=True)
    assert "\x1b" not in _printed(synthetic_analysis())


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.00"),
        (0.01234, "0.0123"),
        (1.0, "1.00"),
        (1234.5, "1,234"),
        (3.14159e-5, "3.14e-05"),
        (-0.5, "-0.500"),
        (float("nan"), "unknown"),
        (float("inf"), "infinite"),
    ],
)
def test_numbers_are_short(value, shown):
    assert words.number(value) == shown


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.0371, "3.7 %"), (0.0001, "< 0.1 %"), (0.9999, "> 99.9 %"), (1.5, "150 %"), (float("nan"), "unknown"), (0.0, "0.0 %")],
)
def test_shares_are_percentages(share, shown):
    assert words.percent(share).replace(words.SPACE, " ") == shown


def test_examples_without_a_number_are_left_out_of_the_ranking():
    analysis = synthetic_analysis(has_nan=True)
    assert 1 not in suspects.ranked(analysis)
    assert len(suspects.ranked(analysis)) == 29
