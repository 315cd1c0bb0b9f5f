"""A page: one HTML file that loads nothing, with plotly once and every figure's data inside."""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ntkscope._atomic import replace_when_done
from ntkscope.view.figure_texts import FigureText

FOLDER = Path(__file__).parent


def write_page(page: str, path: str | Path) -> None:
    """Write a page; the file is whole or not there.

    Args:
        page: HTML.
        path: The file; replaced if it exists.
    """
    with replace_when_done(Path(path)) as temporary:
        # Bytes: a translated line end would change the hashes of the scripts.
        temporary.write_bytes(page.encode("utf-8"))


def render_page(template: str, *, scripts: Sequence[str] = ("report.js",), **content: Any) -> str:
    """Fill a template that extends `page.html.jinja`.

    Args:
        template: Name of a file beside this module.
        scripts: Names of files beside this module, run in order after plotly.
        **content: What it shows.

    Returns:
        One HTML page with everything it needs inside.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    sources = [get_plotlyjs(), *(_read(script) for script in scripts)]
    return environment.get_template(template).render(
        style=_trusted(_read("report.css")),
        scripts=[_trusted(source) for source in sources],
        script_hashes=[_hash(source) for source in sources],
        **content,
    )


def figure_block(name: str, figure: go.Figure, text: FigureText) -> dict[str, Any]:
    """Prepare one figure: its title becomes a heading, the rest data for the drawing script.

    Args:
        name: Unique in the page.
        figure: From `figures`.
        text: The words under it.

    Returns:
        What the template's `figure_block` macro shows.
    """
    spec = json.loads(figure.to_json() or "{}")
    title = Markup(spec["layout"].pop("title")["text"])
    spec["layout"].pop("template", None)
    return {
        "name": name,
        "title": title,
        "shows": text.shows,
        "reading": text.reading,
        "height": int(spec["layout"]["height"]),
        "is_scene": "scene" in spec["layout"],
        "data": json_in_html(spec),
    }


def json_in_html(value: Any) -> Markup:
    """Write JSON so that nothing in it can end the script element around it.

    Args:
        value: Plain containers without NaN or infinity.

    Returns:
        Text for a script element.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _read(name: str) -> str:
    """Read a file beside this module."""
    return (FOLDER / name).read_text(encoding="utf-8")


def _trusted(source: str) -> Markup:
    """Mark our own style and scripts, and plotly's, as safe to put in as they are."""
    return Markup(source)


def _hash(script: str) -> str:
    """Name a script by its content, for the page's security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
