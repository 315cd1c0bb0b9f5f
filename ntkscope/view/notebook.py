"""Notebook cells: every result as a small table that says what was found, and what each number means.

No scripts and nothing from outside, so that a saved notebook shows what it showed. Colours are those of the text, for light and dark
themes.
"""

import dataclasses
import html
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, get_args

import torch
from torch import Tensor

from ntkscope.gate.audit_results import FIGURES
from ntkscope.view.brief import cut, shown_fields, words_of
from ntkscope.view.evidence import chance, gating, reach
from ntkscope.view.findings import headline, learned, next_steps, stored, verdict
from ntkscope.view.meanings import meanings_of, summary_of
from ntkscope.view.pictures import picture_uri
from ntkscope.view.sentences import sentence_of
from ntkscope.view.sparkline import histogram, sparkline
from ntkscope.view.suspects import Suspect, auroc_sentence, found_among, shown_scores, suspects
from ntkscope.view.words import AnalysisLike, counted, number, percent

NUM_SUSPECTS = 10
MAX_ROWS = 60  # of a table
MAX_TEXT = 2000  # characters of a cell
PICTURE_SIZE = 40  # pixels on the screen
UNORDERED = {"examples", "draws", "entries", "tensors", "pairs", "buffers", "params"}  # axes whose order says nothing
MIN_WIDTH = "min(44em,90vw)"  # captions are as wide as their table
CELL = "text-align:left;vertical-align:top;white-space:normal;max-width:{width}em"
HOW_TO_GO_ON = (
    "analysis.plot.spectrum(), analysis.plot.eigenstructure() and other figures (dir(analysis.plot)); analysis.examples; "
    "analysis.report('report.html') for all of it in one file; analysis.save('folder')."
)
Cell = tuple[str, int]  # HTML, and its width in em


def html_of(result: Any) -> str:
    """Describe any result in a notebook cell.

    Args:
        result: A result.

    Returns:
        A small HTML table.
    """
    describe = next((DESCRIBED[kind.__name__] for kind in type(result).__mro__ if kind.__name__ in DESCRIBED), None)
    return _fields_html(result) if describe is None else describe(result)


def analysis_html(analysis: AnalysisLike) -> str:
    """Describe an analysis: the findings, whether to believe them, and how to go on.

    Args:
        analysis: The result.

    Returns:
        A small HTML table; of a real analysis also a closed list of its parts.
    """
    judged = verdict(analysis.closure, analysis.density)
    rows = [
        ("what was found", headline(analysis)),
        ("believe it?", " ".join([f"{judged.short}.", *judged.sentences, *judged.causes])),
        ("learned", " ".join(learned(analysis))),
        ("reservoir", " ".join(stored(analysis))),
        ("held-out", " ".join(reach(analysis))),
        ("chance?", " ".join(chance(analysis))),
    ]
    if gating(analysis):
        rows.append(("gate", " ".join(gating(analysis))))
    scores = analysis.examples.auroc
    if scores:
        rows.append(("AUROC", ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in scores.items())))
    named = ", ".join(f"{row.id} ({percent(float(analysis.examples.reservoir_share[row.position]))})" for row in suspects(analysis, (), 5))
    if named:
        order = "largest loss" if analysis.examples.abstains else "most suspicious"
        rows.append((order, f"{named}: share of their initial error in the reservoir"))
    rows.extend(("warning", warning) for warning in analysis.warnings if judged.is_good or not warning.startswith("Not trustworthy"))
    rows.append(("next", " ".join(next_steps(analysis)) or "Compare with another run, or with a later window."))
    rows.append(("more", HOW_TO_GO_ON))
    findings = rows_html(rows, f"Analysis of {analysis.run.source}")
    return findings + (_details("All parts", _fields_table(analysis)) if dataclasses.is_dataclass(analysis) else "")


def rows_html(rows: Sequence[tuple[str, str]], caption: str) -> str:
    """Set rows of two columns; everything is escaped.

    Args:
        rows: (name, text).
        caption: Head of the table.

    Returns:
        HTML.
    """
    return _table([[_plain(name, 10), _plain(text, 56)] for name, text in rows], caption=f"<b>{html.escape(cut(caption, MAX_TEXT))}</b>")


def _fields_html(result: Any) -> str:
    """Describe a result by its fields."""
    return _table_of_fields(result, caption=_caption(result))


def _audit_html(audit: Any) -> str:
    """Describe an audit of the gate: the verdict, then every figure beside chance, then the fields."""
    figures = [
        [
            *(_plain(text, 20) for text in (name, number(each.observed), number(each.mean), number(each.z, 2), number(each.p, 2))),
            _plain(FIGURES.get(name, ""), 40),
        ]
        for name, each in audit.overall.items()
    ]
    head = ("figure", "observed", "by chance", "z", "p", "meaning")
    return _table(figures, head=head, caption=_caption(audit)) + _details("All fields", _fields_table(audit))


def _transfer_html(transfer: Any) -> str:
    """Describe predictions of test motion beside their baselines."""
    named = {"operators": transfer.fit, **transfer.baselines}
    rows = [[_plain(name, 20), _plain(percent(fit.relative_error), 10), _plain(number(fit.correlation), 10)] for name, fit in named.items()]
    rows += [[_plain(name, 20), _plain("none", 10), _plain(reason, 30)] for name, reason in transfer.missing.items()]
    head = ("prediction", "error", "correlation")
    return _table(rows, head=head, caption=_caption(transfer)) + _details("All fields", _fields_table(transfer))


def _sensitivity_html(sensitivity: Any) -> str:
    """Describe the split under other cutoffs."""
    rows = [
        [
            _plain(text, 16)
            for text in (
                row.rule,
                f"{row.signal_rank:,}",
                percent(row.reservoir_share),
                number(row.rank_correlation),
                "unknown" if row.auroc is None else f"{row.auroc:.2f}",
            )
        ]
        for row in sensitivity.rows
    ]
    head = ("cutoff", "signal rank", "share in the reservoir", "rank correlation of examples", "AUROC")
    return _table(rows, head=head, caption=_caption(sensitivity))


def _coverage_html(coverage: Any) -> str:
    """Describe the route of every parameter."""
    rows = [[_plain(name, 24), _plain(route, 20), _plain(coverage.reasons.get(name, ""), 40)] for name, route in coverage.routes.items()]
    rows += [[_plain(name, 24), _plain("excluded", 20), _plain(reason, 40)] for name, reason in coverage.excluded.items()]
    head = ("parameter", "route", "why")
    return _table(rows, head=head, caption=_caption(coverage)) + _details("All fields", _fields_table(coverage))


def _examples_html(examples: Any) -> str:
    """Describe the most suspicious examples, with pictures where inputs are images, and what the scores mean."""
    holder = SimpleNamespace(examples=examples)
    scores = shown_scores(holder)
    rows = suspects(holder, scores, NUM_SUSPECTS)
    pictures = getattr(examples, "pictures", None)
    columns = ["", "example"] if pictures is not None else ["example"]
    columns += ["label"] if examples.labels is not None else []
    columns += ["true label", "planted wrong"] if examples.is_noise is not None else []
    body = [_suspect_cells(row, examples, pictures) for row in rows]
    sentences = [_examples_sentence(examples, len(rows)), auroc_sentence(holder), "`examples.to_pandas()` has all rows."]
    caption = _caption(examples, " ".join(text for text in sentences if text))
    meanings = rows_html([(score.title, score.meaning) for score in scores], "Scores")
    table = _table(body, head=[*columns, *(score.title for score in scores)], caption=caption)
    return table + _details("What the scores mean", meanings)


def _examples_sentence(examples: Any, count: int) -> str:
    """Say how the table is ordered, and what not to read into it."""
    total = counted(len(examples.ids), "example")
    if examples.abstains:
        return f"Of {total} the {count} with the largest loss; no ranking by the reservoir: {examples.abstains}."
    found = found_among(SimpleNamespace(examples=examples), count)
    planted = "" if found is None else f"; {found[0]} of these {found[1]} have labels planted wrong"
    return f"Of {total} the {count} most suspicious{planted}. A high rank is a reason to look, no proof."


def _suspect_cells(row: Suspect, examples: Any, pictures: Tensor | None) -> list[Cell]:
    """Set one row of the table of examples."""
    cells = [] if pictures is None else [_picture(pictures[row.position], row.id)]
    cells.append(_plain(row.id, 8))
    if examples.labels is not None:
        cells.append(_plain(row.label, 8))
    if examples.is_noise is not None:
        cells += [_plain(row.true_label, 8), _plain("yes" if row.is_noise else "no", 8)]
    return cells + [_plain(text, 10) for text in row.values]


def _optimizer_html(optimizer: Any) -> str:
    """Describe a gated optimizer: one column a group."""
    meanings = meanings_of(type(optimizer), "Args")
    groups = optimizer.param_groups
    steps = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
    entries = [f"{counted(len(group['params']), 'tensor')}, {sum(p.numel() for p in group['params']):,} entries" for group in groups]
    rows = [[_plain("params", 10), *(_plain(text, 16) for text in entries), _plain(meanings.get("params", ""), 40)]]
    rows += [
        [_plain(name, 10), *(_plain(words_of(group[name], name), 16) for group in groups), _plain(meanings.get(name, ""), 40)]
        for name in groups[0]
        if name != "params"
    ]
    head = ("option", *(f"group {k}" for k in range(len(groups))), "meaning")
    count = optimizer.gate_statistics() if any(group["gate_stats"] for group in groups) else None
    counts = "gate_stats=True counts what the gate lets through." if count is None else sentence_of(count)
    said = f"{counted(steps, 'step')} taken. {counts}"
    return _table(rows, head=head, caption=_caption(optimizer, said))


DESCRIBED: dict[str, Callable[[Any], str]] = {
    "Analysis": analysis_html,
    "Coverage": _coverage_html,
    "Examples": _examples_html,
    "GateAudit": _audit_html,
    "GatedAdamW": _optimizer_html,
    "Sensitivity": _sensitivity_html,
    "Transfer": _transfer_html,
}


def _table_of_fields(result: Any, *, caption: str) -> str:
    """Set name, value and meaning of every field."""
    meanings, axes = meanings_of(type(result)), _axes(type(result))
    rows = [
        [_plain(name, 12), _value(value, name, axes.get(name, "")), _plain(meanings.get(name, ""), 40)]
        for name, value in shown_fields(result).items()
    ]
    return _table(rows, head=("name", "value", "meaning"), caption=caption)


def _fields_table(result: Any) -> str:
    """Set the fields without repeating what was said above them."""
    return _table_of_fields(result, caption="")


def _caption(result: Any, said: str | None = None) -> str:
    """Name a result, say what it is and what it says."""
    kind = type(result)
    text = sentence_of(result) if said is None else said
    head = f"<b>{html.escape(kind.__name__)}</b>: {html.escape(summary_of(kind))}"
    return head + (f"<br>{html.escape(cut(text, MAX_TEXT))}" if text else "")


def _value(value: Any, name: str, axis: str) -> Cell:
    """Describe a value, and draw it if it is a vector."""
    text = html.escape(cut(words_of(value, name), MAX_TEXT))
    if isinstance(value, Tensor) and value.ndim == 1 and _is_drawn(value):
        picture = (histogram if axis in UNORDERED else sparkline)(value, name)
        text += f"<br>{picture}" if picture else ""
    return text, 24


def _is_drawn(value: Tensor) -> bool:
    """Say whether a vector holds measured numbers that can be read; whole ones are indices and counts."""
    return not value.is_meta and value.layout == torch.strided and value.is_floating_point()


def _axes(kind: type) -> dict[str, str]:
    """Read from the annotations what the axes of tensors are."""
    if not dataclasses.is_dataclass(kind):
        return {}
    return {
        field.name: next((axis for each in (field.type, *get_args(field.type)) if (axis := getattr(each, "dim_str", "").strip())), "")
        for field in dataclasses.fields(kind)
    }


def _picture(pixels: Tensor, name: str) -> Cell:
    """Show an input."""
    size = f"height:{PICTURE_SIZE}px;max-width:{2 * PICTURE_SIZE}px;image-rendering:pixelated"
    return f'<img src="{picture_uri(pixels)}" alt="input of example {html.escape(name)}" style="{size}">', 8


def _plain(text: str, width: int) -> Cell:
    """Escape a text."""
    return html.escape(cut(text, MAX_TEXT)), width


def _details(title: str, content: str) -> str:
    """Fold something away, without a script."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def _table(rows: Sequence[Sequence[Cell]], *, caption: str, head: Iterable[str] = ()) -> str:
    """Set a table; the first column are row heads. Cells and caption are HTML already."""
    heads = "".join(f'<th scope="col" style="text-align:left">{html.escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(_cell(k, cell) for k, cell in enumerate(row))}</tr>" for row in rows[:MAX_ROWS])
    if len(rows) > MAX_ROWS:
        caption += f"<br>{len(rows) - MAX_ROWS:,} more rows are not shown."
    style = "text-align:left;white-space:normal;color:inherit"
    titled = f'<caption style="{style}">{caption}</caption>' if caption else ""
    return (
        f'<table style="min-width:{MIN_WIDTH}">{titled}{f"<thead><tr>{heads}</tr></thead>" if heads else ""}<tbody>{body}</tbody></table>'
    )


def _cell(column: int, cell: Cell) -> str:
    """Set one cell."""
    content, width = cell
    tag, scope = ("th", ' scope="row"') if column == 0 else ("td", "")
    return f'<{tag}{scope} style="{CELL.format(width=width)}">{content}</{tag}>'
