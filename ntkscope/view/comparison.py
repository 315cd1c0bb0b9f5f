"""Two results side by side: one HTML file that needs no network, for readers who would rather look than read."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ntkscope.view import comparison_words, findings
from ntkscope.view.comparison_examples import STYLES, TOP
from ntkscope.view.comparison_figures import COMPARISON_TEXTS, COMPARISONS, comparable
from ntkscope.view.matching import Matching, common_rankings, match_examples
from ntkscope.view.page import figure_block, render_page, write_page
from ntkscope.view.suspects import title as score_title
from ntkscope.view.words import AnalysisLike, number, percent

Measure = Callable[[AnalysisLike], float]


def write_comparison(first: AnalysisLike, second: AnalysisLike, path: str | Path) -> None:
    """Write the page; the file is whole or not there.

    Args:
        first: Result A.
        second: Result B.
        path: The file; replaced if it exists.
    """
    write_page(render_comparison(first, second), path)


def render_comparison(first: AnalysisLike, second: AnalysisLike) -> str:
    """Render the page.

    Args:
        first: Result A.
        second: Result B.

    Returns:
        One HTML page with everything it needs inside.
    """
    matching = match_examples(first, second)
    runs = [
        {
            "name": style.name,
            "source": analysis.run.source,
            "headline": findings.headline(analysis),
            "verdict": findings.verdict(analysis.closure, analysis.density),
            "warnings": [warning for warning in analysis.warnings if not warning.startswith("Not trustworthy")],
        }
        for style, analysis in zip(STYLES, (first, second), strict=True)
    ]
    differing, same = comparison_words.settings(first, second)
    return render_page(
        "comparison.html.jinja",
        headline=comparison_words.headline(first, second),
        runs=runs,
        is_trusted=first.closure.trustworthy and second.closure.trustworthy,
        differences=comparison_words.differences(first, second),
        cautions=comparison_words.cautions(first, second, matching),
        matching=matching.sentence if matching else "",
        differing=differing,
        same=same,
        figures=[
            figure_block(name, COMPARISONS[name](first, second, matching), COMPARISON_TEXTS[name])
            for name in comparable(first, second, matching)
        ],
        numbers=[row for row in (_row(first, second, *entry) for entry in NUMBERS) if row is not None],
        suspects=_suspects(first, second, matching),
    )


def _reservoir_error(analysis: AnalysisLike) -> float:
    """Compute which share of the initial squared error lies in the reservoir."""
    total = float(analysis.spectrum.residual_energy.sum())
    return float(analysis.examples.reservoir_energy.nansum()) / total if total > 0 else math.nan


def _heldout_error(analysis: AnalysisLike) -> float:
    """Read how far the prediction of held-out motion is off."""
    return math.nan if analysis.transfer is None else float(analysis.transfer.fit.relative_error)


def _auroc(analysis: AnalysisLike) -> float:
    """Read how well the score that examples are ranked by finds planted wrong labels."""
    return (analysis.examples.auroc or {}).get(analysis.examples.ranked_by, math.nan)


def _open_gates(analysis: AnalysisLike) -> float:
    """Read which share of the gates was open at the end."""
    return math.nan if analysis.gate is None or not analysis.gate.steps else float(analysis.gate.open_share[-1])


# (name, what to read, its kind, meaning)
NUMBERS: tuple[tuple[str, Measure, str, str], ...] = (
    ("loss at the start", lambda a: float(a.history.loss[0]), "number", "Of the followed examples, at the window's start."),
    ("loss at the end", lambda a: float(a.history.loss[findings.stop_row(a)]), "number", "At the window's end."),
    ("loss removed", comparison_words.loss_removed, "share", "The difference of the two over the first."),
    (
        "squared error removed",
        lambda a: float(a.history.signal_share[findings.stop_row(a)]),
        "share",
        "The same for the squared error in the coordinates that ω is measured in; it has no units, whatever the loss.",
    ),
    ("signal directions", lambda a: float(a.channels.signal_rank), "count", "How many count as learned by the rule."),
    ("their share", comparison_words.signal_directions, "share", "Of all directions: comparable where the probes differ in size."),
    (
        "effective rank",
        lambda a: float(a.spectrum.effective_rank),
        "number",
        "How many directions would share the same ω evenly; it needs no rule.",
    ),
    (
        "error in the reservoir",
        _reservoir_error,
        "share",
        "Share of the initial squared error along directions that do not count as learned.",
    ),
    (
        "steps to half",
        comparison_words.typical_half_step,
        "time",
        "Training steps, from the window's start, after which half of the error of a typical (median) example was gone.",
    ),
    (
        "not half learned",
        comparison_words.never_half_learned,
        "share",
        "Share of the examples that had not lost half of their error by the last snapshot.",
    ),
    (
        "wrong labels memorized",
        comparison_words.memorized,
        "share",
        "Share of the error of examples with labels planted wrong that is gone at the window's end, a mean over these examples.",
    ),
    ("wrong labels found", _auroc, "number", "AUROC of the score that each ranks its examples by: 1 is perfect, 0.5 is chance."),
    ("kernel drift", lambda a: float(a.drift.max), "share", "Largest change of the kernel in the window, over its size at the start."),
    ("held-out error", _heldout_error, "share", "How far the predicted motion of held-out outputs is off."),
    ("gates open at the end", _open_gates, "share", "Share of parameters whose gate was open, or would have been, at the last snapshot."),
    (
        "energy error",
        lambda a: float(a.closure.energy_error),
        "share",
        "Predicted against observed decrease of the loss; the limit is 5 %.",
    ),
    ("gradient error", lambda a: float(a.closure.gradient_error), "share", "Of the gradient at the window's end; the limit is 25 %."),
)


def _row(first: AnalysisLike, second: AnalysisLike, name: str, measure: Measure, kind: str, meaning: str) -> dict[str, str] | None:
    """Prepare a row of the table of numbers; None where neither run has the number."""
    a, b = measure(first), measure(second)
    if math.isnan(a) and math.isnan(b):
        return None
    difference = ""
    if math.isfinite(b - a):
        sign = "+" if b > a else "−" if b < a else ""
        difference = sign + (f"{100 * abs(b - a):,.1f} points" if kind == "share" else _write(abs(b - a), kind))
    return {"name": name, "first": _write(a, kind), "second": _write(b, kind), "difference": difference, "meaning": meaning}


def _write(value: float, kind: str) -> str:
    """Write a number of the table; a dash where there is none."""
    if math.isnan(value):
        return "–"
    if kind == "time" and math.isinf(value):
        return "not reached"
    if kind == "count" and math.isfinite(value):
        return f"{value:,.0f}"
    return percent(value) if kind == "share" else number(value)


def _suspects(first: AnalysisLike, second: AnalysisLike, matching: Matching) -> dict[str, Any]:
    """Prepare the table of the most suspicious examples of both runs, with the rank of each in the other."""
    ours, theirs, by = common_rankings(first, second, matching)
    ranks = [{k: rank + 1 for rank, k in enumerate(order)} for order in (ours, theirs)]
    top = [set(order[:TOP]) for order in (ours, theirs)]

    def cell(k: int, other: int) -> dict[str, Any]:
        i, examples = matching.first[k], first.examples
        label = "" if examples.labels is None else f" · {examples.labels[i]}"
        wrong = " (planted wrong)" if examples.is_noise is not None and bool(examples.is_noise[i]) else ""
        return {"name": f"#{examples.ids[i]}{label}{wrong}", "rank": ranks[other][k], "is_shared": k in top[other]}

    rows = [
        {"rank": rank + 1, "first": cell(k, 1), "second": cell(m, 0)}
        for rank, (k, m) in enumerate(zip(ours[:TOP], theirs[:TOP], strict=True))
    ]
    return {"rows": rows, "by": score_title(by), "has_labels": first.examples.labels is not None}
