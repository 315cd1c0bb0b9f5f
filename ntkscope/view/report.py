"""The report: one HTML file that needs no network, for readers who know nothing of the theory."""

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ntkscope._atomic import replace_when_done
from ntkscope.view import evidence, findings
from ntkscope.view import suspects as suspicion
from ntkscope.view.figures import FIGURES, drawable
from ntkscope.view.words import AnalysisLike, counted, number, percent

FOLDER = Path(__file__).parent
NUM_SUSPECTS = 10


@dataclass(frozen=True)
class FigureText:
    """The words under a figure.

    Attributes:
        shows: What is seen.
        reading: How to read it.
    """

    shows: str
    reading: str


FIGURE_TEXTS = {
    "spectrum": FigureText(
        "Every mark in the upper panel is one direction. Its height ω is the share of the loss along that direction that training removed.",
        "Round marks are signal (learned), crosses are reservoir. A clean gap between them means that the split is meaningful; a smooth "
        "slope means that the number depends on the rule. The lower panel shows where each rule would draw the line.",
    ),
    "eigenstructure": FigureText(
        "Every point is one training example, placed by how much of its error training has removed along three "
        "directions: those along which it removed the most loss.",
        "Far from the centre: the shared patterns explain this example. Near the centre: they do not, so it is learned later, or stored "
        "by itself. Move the slider to watch training; drag, or use the turn buttons, to look from another side.",
    ),
    "omega_surface": FigureText(
        "The height is ω again, now for every direction and every moment of training.",
        "Directions are learned one after the other, the strongest first. The line on the surface marks ω = ½. "
        "Ground that stays flat is the reservoir.",
    ),
    "suspicious": FigureText(
        "The longer the bar, the more of the example's error at the start lies where training did little.",
        "Examples that agree with the others are learned through shared directions; a wrong label agrees with nothing and stays in the "
        "reservoir. So do rare but correct examples: look before you delete.",
    ),
    "loss_and_closure": FigureText(
        "Above: the loss as it was and as the recorded kernels predict it. Below: how far the predicted gradient is off.",
        "If the two upper lines agree and the lower one stays under the dotted limit inside the shaded window, the numbers in this report "
        "describe what the run really did.",
    ),
    "gate_openness": FigureText(
        "The share of parameters whose gate was open, that is, whose gradient stood out from its noise.",
        "A gate that closes almost everywhere stops training; one that never closes does nothing.",
    ),
    "gate_motion": FigureText(
        "At every audited step: of the output motion that the gate removed, the share that lay in the reservoir. The band is what the same "
        "gates remove when they are shuffled among the parameters of each layer.",
        "Above the band: the gate spares signal better than chance. Below: it hits signal. Inside: no evidence. The dotted line is the "
        "reservoir's share of all motion before the gate.",
    ),
    "gate_agreement": FigureText(
        "Every cell is one layer at one audited step: the chance that a parameter with an open gate has more signal than one with a "
        "closed gate.",
        "Blue: open gates sit on signal parameters. Red: on reservoir parameters. Pale: no relation. A number is written where shuffled "
        "gates would show it in fewer than one of twenty cases.",
    ),
    "gate_density": FigureText(
        "Every parameter by the signal-to-noise of its gradient, which is all the gate sees, and by its signal share: how much of what it "
        "moves lies in the signal channel.",
        "Right of the dashed line gates are open. If the theory's shortcut worked perfectly, parameters would lie low on the left and high "
        "on the right.",
    ),
    "gate_modes": FigureText(
        "One ribbon for each layer. Its height is how much of a direction's kernel the gate keeps in that layer, from the strongest signal "
        "direction to the last of the reservoir.",
        "A selective gate keeps ribbons high up to the red line and low behind it. Flat ribbons mean that the gate treats all directions "
        "alike. Drag, or use the turn buttons, to look from another side.",
    ),
}

WORDS = (
    ("direction (mode)", "One pattern across the outputs of all followed examples. There are as many as independent outputs."),
    ("ω (omega)", "For one direction: the share of the loss along it that training removed. 0 is untouched, 1 is fully learned."),
    ("signal channel", "The directions that count as learned, by the chosen rule."),
    ("reservoir", "All other directions. What lies there has moved the network's outputs little, on training and on test examples."),
    ("error of an example", "How far its outputs were from its target at the window's start, squared, in units of the loss times two."),
    ("window", "The part of training that was analyzed."),
    ("optimizer time", "The sum of learning rates over steps (with momentum's factor). Its unit is that of the learning rate."),
    ("AUROC", "The chance that a wrongly labelled example ranks above a rightly labelled one. 1 is perfect, 0.5 is chance."),
)


def write_report(analysis: AnalysisLike, path: str | Path) -> None:
    """Write the report; the file is whole or not there.

    Args:
        analysis: The result.
        path: The file; replaced if it exists.
    """
    page = render_report(analysis)
    with replace_when_done(Path(path)) as temporary:
        # Bytes: a translated line end would change the hashes of the scripts.
        temporary.write_bytes(page.encode("utf-8"))


def render_report(analysis: AnalysisLike) -> str:
    """Render the report.

    Args:
        analysis: The result.

    Returns:
        One HTML page with everything it needs inside.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    drawing, plotly = _read("report.js"), get_plotlyjs()
    return environment.get_template("report.html.jinja").render(
        headline=findings.headline(analysis),
        learned=findings.learned(analysis),
        stored=findings.stored(analysis),
        verdict=findings.verdict(analysis),
        reach=evidence.reach(analysis),
        chance=evidence.chance(analysis),
        auroc_sentence=suspicion.auroc_sentence(analysis),
        next_steps=findings.next_steps(analysis),
        warnings=[warning for warning in analysis.warnings if not warning.startswith("Not trustworthy")],
        rule_words=findings.rule_words(analysis.channels.rule),
        run=analysis.run,
        window=analysis.window,
        facts=_facts(analysis),
        figures=[_figure_block(name, analysis) for name in drawable(analysis)],
        table=_suspect_table(analysis),
        abstains=analysis.examples.abstains,
        ranked_by=suspicion.title(suspicion.ranked_by(analysis)),
        cutoffs=_cutoff_rows(analysis),
        words=WORDS,
        gating=evidence.gating(analysis),
        gate_reason=analysis.gate_reason if analysis.gate is None else analysis.gate.audit_reason,
        style=_trusted(_read("report.css")),
        plotly=_trusted(plotly),
        drawing=_trusted(drawing),
        script_hashes=[_hash(plotly), _hash(drawing)],
    )


def _figure_block(name: str, analysis: AnalysisLike) -> dict[str, Any]:
    """Prepare one figure: its title becomes a heading, the rest data for the drawing script."""
    figure: go.Figure = FIGURES[name](analysis)
    text = FIGURE_TEXTS[name]
    spec = json.loads(figure.to_json() or "{}")
    title = Markup(spec["layout"].pop("title")["text"])
    spec["layout"].pop("template", None)
    return {
        "name": name,
        "title": title,
        "shows": text.shows,
        "reading": text.reading,
        "height": int(spec["layout"]["height"]),
        "data": _json_in_html(spec),
    }


def _suspect_table(analysis: AnalysisLike) -> dict[str, Any]:
    """Prepare the table of the most suspicious examples."""
    examples = analysis.examples
    scores = suspicion.shown_scores(analysis)
    aurocs = examples.auroc
    return {
        "scores": scores,
        "rows": suspicion.suspects(analysis, scores, NUM_SUSPECTS),
        "has_labels": examples.labels is not None,
        "has_truth": examples.true_labels is not None,
        "has_noise": examples.is_noise is not None,
        "aurocs": None if not aurocs else [f"{aurocs[score.name]:.2f}" if score.name in aurocs else "" for score in scores],
    }


def _cutoff_rows(analysis: AnalysisLike) -> list[dict[str, Any]]:
    """Prepare the table of rules."""
    total = analysis.channels.num_modes
    return [
        {
            "rule": rule,
            "words": findings.rule_words(rule),
            "is_chosen": rule == analysis.channels.rule,
            "rank": "no answer" if cutoff.rank is None else f"{cutoff.rank:,}",
            "share": "" if cutoff.rank is None or not total else percent(cutoff.rank / total),
            "threshold": "" if cutoff.threshold is None else number(float(cutoff.threshold)),
            "note": cutoff.note,
        }
        for rule, cutoff in analysis.cutoffs.items()
    ]


def _facts(analysis: AnalysisLike) -> list[tuple[str, str]]:
    """List the facts of the run."""
    run, window, closure, drift, spectrum = analysis.run, analysis.window, analysis.closure, analysis.drift, analysis.spectrum
    kernel = "plain kernel" if drift.kernel == "plain" else "kernel with the optimizer's preconditioner"
    return [
        ("source", str(run.source)),
        ("examples followed", f"{run.num_examples:,}, {run.num_classes:,} outputs each ({run.num_outputs:,} in all)"),
        ("held-out query examples", f"{run.num_query:,}"),
        ("parameters", f"{run.num_params:,}"),
        ("loss", run.loss),
        ("optimizer", f"{run.optimizer}, preconditioner {run.precond}"),
        ("training steps", f"{run.num_steps:,}, with {counted(run.num_snapshots, 'snapshot')}"),
        ("window", f"steps {window.start_step:,} to {window.stop_step:,} ({window.reason})"),
        ("effective rank", f"{number(spectrum.effective_rank)} (how many directions would share the same ω evenly)"),
        ("stable rank", f"{number(spectrum.stable_rank)} (sum of all ω over the largest)"),
        (
            "kernel drift in the window",
            f"{percent(drift.max)} at most, {percent(drift.final)} at its end ({kernel}, relative to the start)",
        ),
        ("regime", f"{analysis.regime}: {analysis.regime_reason}"),
        ("stability", f"{number(float(analysis.stability))} (above 1 the learning rate is too large for smooth descent)"),
        ("gradient error relative to the start", percent(closure.gradient_error_initial)),
        ("share of the decrease due to weight decay", percent(closure.forcing_share)),
        ("gate", analysis.gate.kind if analysis.gate is not None else f"none: {analysis.gate_reason}"),
    ]


def _read(name: str) -> str:
    """Read a file beside this module."""
    return (FOLDER / name).read_text(encoding="utf-8")


def _trusted(source: str) -> Markup:
    """Mark our own style and scripts, and plotly's, as safe to put in as they are."""
    return Markup(source)


def _json_in_html(value: Any) -> Markup:
    """Write JSON so that nothing in it can end the script element around it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _hash(script: str) -> str:
    """Name a script by its content, for the page's security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
