"""The site: built strictly, complete, loading nothing from elsewhere; snippets, quoted figures and links of the pages."""

import ast
import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_report_browser import browser  # ruff: ignore[unused-import]

import ntkscope
from ntkscope.view.figure_texts import FIGURE_TEXTS
from ntkscope.view.figures import FIGURES

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs" / "_build"))

import hooks  # ruff: ignore[module-import-not-at-top-of-file]
import site_api  # ruff: ignore[module-import-not-at-top-of-file]
import site_figures  # ruff: ignore[module-import-not-at-top-of-file]
import site_links  # ruff: ignore[module-import-not-at-top-of-file]
import site_notebooks  # ruff: ignore[module-import-not-at-top-of-file]
import site_results  # ruff: ignore[module-import-not-at-top-of-file]

PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [*PAGES, *(ROOT / name for name in ("README.md", "CHANGELOG.md", "benchmarks/RESULTS.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LOADING = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src", "object": "data"}
PATIENCE = 90  # seconds; a slow machine draws 3D on the CPU


def named(path):
    return str(path.relative_to(ROOT))


class Fetched(HTMLParser):
    """Collects what a browser would load for a page."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        address = dict(attrs).get(LOADING.get(tag, ""))
        if address:
            self.addresses.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly, its notebooks not run."""
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet: it hides the warnings that --strict counts.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NTKSCOPE_DOCS_EXECUTE": "false", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built_and_in_the_navigation(site):
    start = (site / "index.html").read_text(encoding="utf-8")
    for page in [*(f"{path.stem}.html" for path in PAGES), "benchmarks/RESULTS.html", "CHANGELOG.html"]:
        assert (site / page).exists(), page
        assert f'href="{page}"' in start, page


def test_nothing_is_fetched_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        reader = Fetched()
        reader.feed(page.read_text(encoding="utf-8"))
        assert reader.addresses, page
        assert not [address for address in reader.addresses if re.match(r"(?:https?:)?//", address)], page
        assert not re.search(r"import\W{1,4}https?:", page.read_text(encoding="utf-8")), page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


def test_the_reader_sees_what_a_page_loads():
    reader = Fetched()
    reader.feed('<script src="//cdn.example/x.js"></script><link rel="stylesheet" href="a.css"><a href="https://example.org">words</a>')
    assert reader.addresses == ["//cdn.example/x.js", "a.css"]


def test_plotly_is_there_once(site):
    large = [path for path in site.rglob("*") if path.is_file() and path.stat().st_size > 3_000_000]
    assert [path.name for path in large] == ["plotly.min.js"]


def test_every_figure_has_a_section():
    text = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    found = [re.findall(r"<!-- figure: (\w+) -->", section) for section in sections]
    assert sorted(found) == sorted([name] for name in FIGURES)
    for section, (name,) in zip(sections, found, strict=True):
        assert f"`analysis.plot.{name}()`" in section
        assert "**When not to believe it.**" in section


def test_the_words_of_the_report_are_on_the_page(site):
    page = (site / "figures.html").read_text(encoding="utf-8")
    for name, text in FIGURE_TEXTS.items():
        assert f'id="figure-{name}"' in page
        for words in (text.shows, text.reading):
            assert site_figures.html.escape(words) in page, name


def test_every_public_name_is_in_the_reference(site):
    names = [name for group in site_api.grouped_names().values() for name in group]
    assert names == ntkscope.__all__
    page = (site / "api.html").read_text(encoding="utf-8")
    missing = [name for name in ntkscope.__all__ if f'id="ntkscope.{name}"' not in page]
    assert not missing


def test_figures_are_drawn_in_light_and_dark_and_on_narrow_screens(site, browser):  # ruff: ignore[redefined-while-unused]
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get_log("browser")
    for page, width, scheme in (("figures.html", 380, "dark"), ("theory.html", 1280, "light"), ("gate.html", 1280, "dark")):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        )
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        browser.get((site / page).as_uri())
        deadline = time.monotonic() + PATIENCE
        while not browser.execute_script("return document.documentElement.dataset.drawn === 'true'"):
            assert time.monotonic() < deadline, page
            time.sleep(0.1)
        figures = browser.find_elements("css selector", "figure[data-figure]")
        assert figures
        assert not [figure for figure in figures if figure.get_attribute("data-drawn") != "true"]
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script("return document.body.dataset.mdColorScheme") == {"light": "default", "dark": "slate"}[scheme]
    requested = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            requested.append(message["params"]["request"]["url"])
    assert requested
    assert not [address for address in requested if not address.startswith(("file:", "data:", "blob:", "about:"))]
    assert not [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_snippets_are_python(path):
    for snippet in SNIPPET.findall(path.read_text(encoding="utf-8")):
        ast.parse(snippet)


def test_the_five_lines_are_the_kernel():
    snippets = SNIPPET.findall((ROOT / "docs" / "entk.md").read_text(encoding="utf-8"))
    assert len(snippets[1].splitlines()) == 5
    assert sum("assert_close" in snippet for snippet in snippets) == 2
    namespace: dict[str, object] = {}
    for snippet in snippets:
        exec(snippet, namespace)


@pytest.mark.parametrize("page", ["theory.md", "entk.md", "faq.md", "limits.md"])
def test_quoted_figures_were_measured(page):
    """Every decimal number and every percentage of these pages stands in RESULTS.md, but for rules and limits of the tool itself."""
    own = {"5 %", "25 %", "2605.01172"}
    text = SNIPPET.sub("", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    quoted = set(re.findall(r"\d[\d,]*\.\d+(?: %)?|\d+ %", text)) - own
    assert quoted
    measured = site_results.RESULTS.read_text(encoding="utf-8").replace("%", " %").replace("  %", " %")
    assert not [figure for figure in quoted if not re.search(rf"(?<![\d.,]){re.escape(figure)}(?!\d)", measured)]


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_links_lead_somewhere_in_the_repository(path):
    for target in re.findall(r"\]\(([^()\s]+)\)", site_links._FENCED.sub("", path.read_text(encoding="utf-8"))):
        if not re.match(r"https?:|#", target):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_the_readme_lists_all_pages():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    # api.md says nothing before the site is built.
    assert not [path.name for path in PAGES if path.name != "api.md" and f"(docs/{path.name})" not in readme]


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("gate.md", "[a](../benchmarks/RESULTS.md)", "[a](benchmarks/RESULTS.md)"),
        ("index.md", "[a](docs/gate.md#x) and [b](benchmarks/RESULTS.md)", "[a](gate.md#x) and [b](benchmarks/RESULTS.md)"),
        ("benchmarks/RESULTS.md", "[a](../docs/gate.md)", "[a](../gate.md)"),
        ("gate.md", "[the code](../benchmarks/gate_why.py)", "the code"),
        ("gate.md", "[gone](../benchmarks/gone.py)", "[gone](../benchmarks/gone.py)"),
        ("gate.md", "[web](https://example.org/a.md) [here](#x)", "[web](https://example.org/a.md) [here](#x)"),
        ("gate.md", "```python\nf[a](../benchmarks/RESULTS.md)\n```\n", "```python\nf[a](../benchmarks/RESULTS.md)\n```\n"),
    ],
)
def test_links_are_moved_to_the_site(page, text, expected):
    assert site_links.relink(text, page, ["index.md", "gate.md", "benchmarks/RESULTS.md"]) == expected


def test_tables_of_measurements_are_read():
    rows = site_results.table("Does gating help, and does the audit know?", "noise")
    assert [row["noise"] for row in rows[:4]] == ["0 %", "0 %", "0 %", "10 %"]
    assert {row["optimizer"] for row in rows} == {"adamw", "paper", "unbiased"}
    with pytest.raises(KeyError, match="no table whose first column is 'nothing'"):
        site_results.table("Does gating help, and does the audit know?", "nothing")
    with pytest.raises(KeyError, match="no section 'Nothing'"):
        site_results.section("Nothing")


def test_a_section_ends_where_the_next_begins():
    section = site_results.section("Step time")
    assert section.startswith("`python -m benchmarks.gate_step`")
    assert "Live audit" not in section
    assert "### Live audit" in site_results.section("Gate")
    assert "## Gate" not in site_results.section("Along trajectories")


def test_an_unknown_figure_is_refused(monkeypatch):
    monkeypatch.setattr(site_figures, "blocks", lambda: {"known": {}})
    with pytest.raises(KeyError, match="no figure 'unknown'; there are known"):
        site_figures.figure_html("unknown", with_words=True)


@pytest.mark.parametrize(
    "tag",
    ['<script src="https://a.example/x.js">', "<link rel=stylesheet href=//a.example/x.css>", '<img alt="" src="http://a.example/x.png">'],
)
def test_a_page_that_fetches_from_elsewhere_is_refused(tag):
    class Here:
        class file:
            src_uri = "x.md"

    assert hooks.on_post_page('<script src="assets/x.js"></script><a href="https://a.example">words</a>', Here, None)
    with pytest.raises(hooks.PluginError, match=r"x\.md would fetch from elsewhere"):
        hooks.on_post_page(tag, Here, None)


def test_a_notebook_page_loads_from_the_site():
    pages = ["notebooks/one.ipynb", "notebooks/two.ipynb", "gate.md"]
    plotly = '<script charset="utf-8" src="https://cdn.plot.ly/plotly-4.1.1.min.js" integrity="sha256-x" crossorigin="anonymous"></script>'
    module = '<script type="module">import "https://cdn.plot.ly/plotly-4.1.1.min"</script>'
    mathjax = '<script src="https://cdnjs.cloudflare.com/ajax/libs/mathjax/3.2.2/es5/tex-svg.min.js"></script>'
    mermaid = '<script type="module">if (a) { await import("https://cdnjs.cloudflare.com/ajax/libs/mermaid/11/mermaid.mjs") }</script>'
    links = '<a href="../gate.md#x">gate</a> <a href="two.ipynb">two</a> <a href="https://example.org/a.md">web</a>'
    made = site_notebooks.localized(
        f"{module}{plotly}1{mathjax}{mermaid}{plotly}2<script>keep()</script>{links}", "notebooks/one.ipynb", pages
    )
    assert made == (
        '<p><a href="one.ipynb" download>This page as a notebook</a></p><script src="../assets/plotly.min.js"></script>12'
        '<script>keep()</script><a href="../gate.html#x">gate</a> <a href="two.html">two</a> <a href="https://example.org/a.md">web</a>'
    )
    with pytest.raises(ValueError, match=r"link to \.\./gone\.md, which is no page"):
        site_notebooks.localized('<a href="../gone.md">', "notebooks/one.ipynb", pages)
