"""The figures of the site: made by two runs of the demo when the site is built, and kept until the code changes."""

import hashlib
import html
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import plotly
import plotly.graph_objects as go
import site_pictures
import torch

import ntkscope
from ntkscope._atomic import replace_when_done
from ntkscope.experiments.demo import train_demo
from ntkscope.view.figure_texts import FIGURE_TEXTS, FigureText
from ntkscope.view.figures import FIGURES, drawable
from ntkscope.view.page import figure_block

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "docs-figures"
NUM_EXAMPLES = 60  # in place of the demo's 100: the analysis takes a fifth of the time
SOURCES = (
    "ntkscope/**/*.py",
    "benchmarks/gate_*.py",
    "benchmarks/RESULTS.md",
    *(f"docs/_build/site_{name}.py" for name in ("figures", "pictures", "results")),
)


@cache
def blocks() -> dict[str, dict[str, Any]]:
    """Make all figures, or read them where nothing that they are made from has changed.

    Returns:
        By name: title, words and data, as the report has them.
    """
    path = CACHE / f"{_key()}.json"
    if not path.exists():
        made = _make()
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob("*.json"):
            old.unlink(missing_ok=True)
        with replace_when_done(path) as temporary:
            temporary.write_text(json.dumps(made), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def figure_html(name: str, *, with_words: bool) -> str:
    """Write a figure as the report's script expects it.

    Args:
        name: In `FIGURES` or `site_pictures.PICTURES`.
        with_words: Whether the report's words go under it.

    Returns:
        One element.

    Raises:
        KeyError: If there is no such figure.
    """
    made = blocks()
    if name not in made:
        raise KeyError(f"there is no figure {name!r}; there are {', '.join(made)}")
    block = made[name]
    words = ""
    if with_words:
        shows, reading = html.escape(block["shows"]), html.escape(block["reading"])
        words = f"<figcaption><strong>What you see.</strong> {shows} <strong>How to read it.</strong> {reading}</figcaption>"
    scene = ' data-scene="true"' if block["is_scene"] else ""
    label = html.escape(html.unescape(block["title"]).replace("<br>", " "), quote=True)
    return (
        f'<figure id="figure-{name}" data-figure="{name}"{scene}><p class="finding">{block["title"]}</p>'
        '<div class="controls" role="group" aria-label="Controls of this figure"></div>'
        f'<div class="plot" style="min-height: {block["height"]}px" role="img" aria-label="{label}"></div>{words}'
        f'<script type="application/json">{block["data"]}</script></figure>'
    )


def _key() -> str:
    """Name what the figures are made from."""
    digest = hashlib.sha256(f"{torch.__version__} {plotly.__version__}".encode())
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _make() -> dict[str, dict[str, Any]]:
    """Run the demo without and with a gate to audit, and draw."""
    print("ntkscope docs: two runs of the demo for the figures (about a minute)", file=sys.stderr)
    torch.set_num_threads(1)  # as fast for matrices of this size, and far faster on a machine that does other work too
    plain = train_demo(num_examples=NUM_EXAMPLES)
    analysis = ntkscope.analyze(plain.recorder)
    audited = train_demo(optimizer="adamw", num_examples=NUM_EXAMPLES)
    audited_analysis = ntkscope.analyze(audited.recorder)
    sources = dict.fromkeys(drawable(analysis), analysis)
    sources |= {name: audited_analysis for name in drawable(audited_analysis) if name not in sources}
    missing = [name for name in FIGURES if name not in sources]
    if missing:
        raise ValueError(f"neither run of the demo can show {', '.join(missing)}")
    made = {name: figure_block(name, FIGURES[name](sources[name]), FIGURE_TEXTS[name]) for name in FIGURES}
    pictures: dict[str, Callable[[], go.Figure]] = {
        "kernel_blocks": lambda: site_pictures.kernel_blocks(plain.recorder.trace, analysis.window.stop, plain.data.clean_labels),
        "gate_threshold": lambda: site_pictures.gate_threshold(audited.recorder.trace),
        "gate_accuracy": site_pictures.gate_accuracy,
        "gate_curves": site_pictures.gate_curves,
    }
    return made | {name: figure_block(name, draw(), FigureText("", "")) for name, draw in pictures.items()}
