"""The summary for a terminal: sentences with numbers, one screen, no markup that a pipe or an old encoding could not take."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from ntkscope.view.evidence import chance, gating, reach
from ntkscope.view.findings import Verdict, headline, learned, next_steps, rule_words, stored, verdict
from ntkscope.view.suspects import Score, Suspect, found_among, order_words, shown_scores, suspects
from ntkscope.view.words import SPACE, AnalysisLike

MAX_WIDTH = 100  # longer lines are hard to read
TERMINAL_SCORES = ("reservoir_energy", "loss", "margin", "area_under_margin", "self_influence", "half_time")
GAP = 2  # columns
MIN_WIDTH = 20
MAX_LINES = 40  # one screen
MAX_SOURCE = 56  # characters of a path
NOTHING_AMISS = "Nothing is amiss: compare with another run, or with a later window (--window START:STOP)."
HEAD_STYLE = "bold cyan"


class Limits(NamedTuple):
    """How many sentences or rows of each kind are shown, and whether words are explained."""

    causes: int
    warnings: int
    steps: int
    reach: int
    chance: int
    gate: int
    suspects: int
    has_words: bool


LIMITS = (
    Limits(4, 4, 4, 4, 4, 3, 10, True),
    Limits(2, 3, 3, 3, 2, 2, 10, True),
    Limits(2, 1, 2, 1, 2, 1, 10, True),
    Limits(1, 1, 1, 1, 1, 1, 10, True),
    Limits(1, 1, 1, 1, 1, 1, 5, True),
    Limits(1, 1, 1, 0, 0, 1, 5, True),
    Limits(1, 1, 1, 0, 0, 1, 5, False),
)
ASCII_WORDS = {
    "Ω": "Omega",
    "ω": "omega",
    "κ": "kappa",
    "τ": "tau",
    "λ": "lambda",
    "√": "sqrt ",
    "½": "1/2",
    "²": "^2",
    "−": "-",
    "–": "-",
    "—": "-",
    "‖": "||",
    "≥": ">=",
    "≤": "<=",
    "→": "->",
    "×": "x",
    "·": "*",
    "…": "...",
    "’": "'",
    "“": '"',
    "”": '"',
}


def print_summary(analysis: AnalysisLike, console: Console) -> None:
    """Print what was learned, what was stored, how far to trust it, and what to do next.

    Args:
        analysis: The result.
        console: Where to; its width and encoding are respected.
    """
    width = max(MIN_WIDTH, min(console.width, MAX_WIDTH))
    # The less there is room for, the fewer causes, warnings and next steps are shown; what is left out is counted.
    lines, heads = _compose(analysis, width, console.encoding, LIMITS[0])
    for limits in LIMITS[1:]:
        if len(lines) <= MAX_LINES:
            break
        lines, heads = _compose(analysis, width, console.encoding, limits)
    if len(lines) + len(heads) <= MAX_LINES:
        for position in reversed(heads):
            lines.insert(position, ("", ""))
    for text, style in lines:
        console.print(Text(text.replace(SPACE, " "), style=style), no_wrap=True, overflow="crop", crop=True)


def _compose(analysis: AnalysisLike, width: int, encoding: str, limits: Limits) -> tuple[list[tuple[str, str]], list[int]]:
    """Set the summary in lines of (text, style), with the positions of the section heads."""
    judged = verdict(analysis.closure, analysis.density)
    run, window = analysis.run, analysis.window
    lines: list[tuple[str, str]] = []
    heads: list[int] = []

    def say(text: str, style: str = "", indent: str = "") -> None:
        shown = _readable(text, encoding)
        lines.extend((line, style) for line in textwrap.wrap(shown, width, initial_indent=indent, subsequent_indent=" " * len(indent)))

    def head(title: str, rest: str = "") -> None:
        heads.append(len(lines))
        say(title.upper() + rest, HEAD_STYLE)

    source = str(run.source)
    source = source if len(source) <= MAX_SOURCE else "..." + source[3 - MAX_SOURCE :]
    say(headline(analysis), "bold")
    say(f"{source}: {run.num_examples:,} examples, steps {window.start_step:,} to {window.stop_step:,} of {run.num_steps:,}.", "dim")
    if limits.has_words:
        say(_direction_words(analysis.channels.rule), "dim")
    head("Learned")
    say(" ".join(learned(analysis)))
    head("In the reservoir")
    say(" ".join(stored(analysis)))
    if limits.reach:
        head("Held-out examples")
        say(" ".join(reach(analysis)[: limits.reach]))
    head("Can the numbers be trusted?")
    say(f"{judged.short}. {' '.join(judged.sentences)}", "" if judged.is_good else "bold")
    warnings = _shown_warnings(analysis, judged)
    for sentence in chance(analysis)[: limits.chance]:
        say(sentence)
    for cause in judged.causes[: limits.causes]:
        say(cause, indent="- ")
    for warning in warnings[: limits.warnings]:
        say(warning, indent="! ")
    hidden = max(0, len(judged.causes) - limits.causes) + max(0, len(warnings) - limits.warnings)
    if hidden:
        say(f"... and {hidden} more: see the report, or causes and warnings in summary.json.", indent="! ")
    audited = gating(analysis)
    if audited and analysis.gate is not None:
        head("What would gating do?" if analysis.gate.audit.is_counterfactual else "The gate")
        say(" ".join(audited[: limits.gate]))
    scores = shown_scores(analysis, TERMINAL_SCORES)
    rows = suspects(analysis, scores, limits.suspects)
    if rows:
        head("Largest losses" if analysis.examples.abstains else "Most suspicious examples", _found_words(analysis, limits.suspects))
        lines.extend((_readable(text, encoding), style) for text, style in _suspect_table(analysis, rows, scores, width))
        if limits.has_words:
            say(_table_words(analysis), "dim")
    steps = next_steps(analysis)
    head("Next")
    for step in steps[: limits.steps] or [NOTHING_AMISS]:
        say(step, indent="- ")
    return lines, heads


def _direction_words(rule: str) -> str:
    """Explain the two words of the headline."""
    condition = rule_words(rule)
    among = "it is among " if rule.startswith(("rank:", "energy")) else ""
    return f"A direction is one pattern across all examples' outputs: learned when {among}{condition}, else in the reservoir."


def _table_words(analysis: AnalysisLike) -> str:
    """Explain the order of the table, and its last row."""
    first = order_words(analysis)
    return f"{first} AUROC: 1 ranks wrong labels first, 0.5 is chance." if analysis.examples.auroc else first


def _shown_warnings(analysis: AnalysisLike, judged: Verdict) -> list[str]:
    """Leave out the warning that repeats the verdict."""
    return [warning for warning in analysis.warnings if judged.is_good or not warning.startswith("Not trustworthy")]


def _found_words(analysis: AnalysisLike, count: int) -> str:
    """Say how many planted wrong labels the table holds."""
    found = found_among(analysis, count)
    return "" if found is None else f" ({found[0]} of {found[1]} have labels planted wrong, marked *)"


def _suspect_table(analysis: AnalysisLike, rows: Sequence[Suspect], scores: Sequence[Score], width: int) -> list[tuple[str, str]]:
    """Set the table in columns; on a narrow screen the last scores are left out."""
    has_labels = analysis.examples.labels is not None
    head = ["example", *(["label"] if has_labels else []), *(score.short for score in scores)]
    body = [[f"{row.id}{'*' if row.is_noise else ' '}", *([row.label] if has_labels else []), *row.values] for row in rows]
    aurocs = analysis.examples.auroc
    foot = []
    if aurocs:
        values = [f"{aurocs[score.name]:.2f}" if score.name in aurocs else "" for score in scores]
        foot = [["AUROC", *([""] if has_labels else []), *values]]
    table = [head, *body, *foot]
    widths = [max(len(row[k]) for row in table) for k in range(len(head))]
    shown = 0
    while shown < len(head) and sum(widths[: shown + 1]) + GAP * shown <= width:
        shown += 1
    shown = max(1, shown)
    styles = ["underline", *[""] * len(body), *["bold"] * len(foot)]
    return [((" " * GAP).join(row[k].rjust(widths[k]) for k in range(shown)), style) for row, style in zip(table, styles, strict=True)]


def _readable(text: str, encoding: str) -> str:
    """Write what the console can show: Greek in words where it is not UTF-8, and no control characters."""
    shown = "".join(letter if letter.isprintable() or letter == SPACE else "?" for letter in text)
    try:
        shown.replace(SPACE, " ").encode(encoding)
    except (UnicodeEncodeError, LookupError):
        for letter, word in ASCII_WORDS.items():
            shown = shown.replace(letter, word)
        shown = SPACE.join(part.encode("ascii", errors="replace").decode("ascii") for part in shown.split(SPACE))
    return shown
