"""Puts the site together (mkdocs hook): pages from outside docs/, links, figures, the API reference and tables of measurements.

In a page, on a line of its own, where a reader of the repository sees nothing:

    <!-- figure: NAME -->     a figure of the report with the report's words
    <!-- picture: NAME -->    the same without words, or one of `site_pictures`
    <!-- api -->              the API reference
    <!-- measured: TITLE -->  a section of benchmarks/RESULTS.md
"""

import json
import os
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from plotly.offline import get_plotlyjs

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

import site_api  # ruff: ignore[module-import-not-at-top-of-file]
import site_figures  # ruff: ignore[module-import-not-at-top-of-file]
import site_links  # ruff: ignore[module-import-not-at-top-of-file]
import site_notebooks  # ruff: ignore[module-import-not-at-top-of-file]
import site_results  # ruff: ignore[module-import-not-at-top-of-file]

from ntkscope.view import page as report_page  # ruff: ignore[module-import-not-at-top-of-file]

SCRIPTS = {"assets/plotly.min.js": get_plotlyjs, "assets/report.js": lambda: (report_page.FOLDER / "report.js").read_text(encoding="utf-8")}
_FIGURE = re.compile(r"<!-- (figure|picture): (\w+) -->")
_MEASURED = re.compile(r"<!-- measured: (.+?) -->")
_FOREIGN = re.compile(
    r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>|\bimport\s*\(?\s*["'](?:https?:)?//[^"']*"""
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the notebooks, and say how their figures are written.

    Args:
        config: Of the site.

    Returns:
        The same, with its notebooks in the navigation.
    """
    os.environ["PLOTLY_RENDERER"] = site_notebooks.RENDERER  # for the kernels that run them
    notebooks = sorted(Path(config.docs_dir, "notebooks").glob("*.ipynb"))
    entries = [{_notebook_title(path): f"notebooks/{path.name}"} for path in notebooks]
    config.nav = [
        ({"Notebooks": entries} if "Notebooks" in part else part) for part in config.nav or [] if "Notebooks" not in part or entries
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/ and the scripts.

    Args:
        files: In docs/.
        config: Of the site.

    Returns:
        All files.
    """
    for place, path in site_links.OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    for place, read in SCRIPTS.items():
        files.append(File.generated(config, place, content=read()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the reference and measurements, and turn links between files into links between pages.

    Args:
        markdown: Text of the page.
        page: Where it goes.
        config: Of the site.
        files: All files.

    Returns:
        The text.

    Raises:
        PluginError: If there is no such section of measurements.
    """
    del config
    if "<!-- api -->" in markdown:
        markdown = markdown.replace("<!-- api -->", site_api.api_markdown())
    pages = [file.src_uri for file in files.documentation_pages()]
    markdown = site_links.relink(markdown, page.file.src_uri, pages)
    return _MEASURED.sub(lambda match: _measured(match[1], page), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the figures.

    Args:
        html: Content of the page.
        page: Where it goes.
        config: Of the site.
        files: All files.

    Returns:
        The content.

    Raises:
        PluginError: If there is no such figure, or a notebook links to what is no page.
    """
    del config
    if page.file.src_uri.endswith(".ipynb"):
        pages = [file.src_uri for file in files.documentation_pages()]
        try:
            return site_notebooks.localized(html, page.file.src_uri, pages)
        except ValueError as error:
            raise PluginError(f"{page.file.src_uri}: {error}") from error

    def drawn(match: re.Match[str]) -> str:
        try:
            return site_figures.figure_html(match[2], with_words=match[1] == "figure")
        except KeyError as error:
            raise PluginError(f"{page.file.src_uri}: {error.args[0]}") from error

    filled = _FIGURE.sub(drawn, html)
    if filled != html:
        filled += "".join(f'<script src="{"../" * page.file.src_uri.count("/")}{place}" defer></script>' for place in SCRIPTS)
    return filled


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that would fetch something from elsewhere.

    Args:
        output: The whole page.
        page: Where it goes.
        config: Of the site.

    Returns:
        The same.

    Raises:
        PluginError: If a script, style or picture has an address with a host.
    """
    del config
    foreign = _FOREIGN.findall(output)
    if foreign:
        raise PluginError(
            f"{page.file.src_uri} would fetch from elsewhere: {foreign[0][:200]}. Ship the file with the site, or leave it out."
        )
    return output


def _measured(title: str, page: Page) -> str:
    """Find a section of measurements, one heading level down from the page's."""
    try:
        return site_results.section(title)
    except KeyError as error:
        raise PluginError(f"{page.file.src_uri}: {error.args[0]}") from error


def _notebook_title(path: Path) -> str:
    """Read the first heading of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        for line in "".join(cell["source"]).splitlines():
            if cell["cell_type"] == "markdown" and line.startswith("# "):
                return line.removeprefix("# ").strip()
    raise PluginError(f"{path} has no heading: begin its first cell with '# title'.")
