"""The report: one HTML file that needs no network, for readers who know nothing of the theory."""

from pathlib import Path
from typing import Any

from ntkscope.view import evidence, findings
from ntkscope.view import suspects as suspicion
from ntkscope.view.figure_texts import FIGURE_TEXTS
from ntkscope.view.figures import FIGURES, drawable
from ntkscope.view.links import CHOSEN_BY_CLICK, links
from ntkscope.view.page import figure_block, json_in_html, render_page, write_page
from ntkscope.view.words import AnalysisLike, counted, number, percent

NUM_SUSPECTS = 10

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
    write_page(render_report(analysis), path)


def render_report(analysis: AnalysisLike) -> str:
    """Render the report.

    Args:
        analysis: The result.

    Returns:
        One HTML page with everything it needs inside.
    """
    linked = links(analysis)
    return render_page(
        "report.html.jinja",
        scripts=("links.js", "report.js"),
        links=json_in_html(linked),
        num_modes=linked["num_modes"],
        num_linked=len(linked["modes"]),
        example_names=linked["ids"],
        clicks=CHOSEN_BY_CLICK,
        headline=findings.headline(analysis),
        learned=findings.learned(analysis),
        stored=findings.stored(analysis),
        verdict=findings.verdict(analysis.closure, analysis.density),
        reach=evidence.reach(analysis),
        chance=evidence.chance(analysis),
        auroc_sentence=suspicion.auroc_sentence(analysis),
        next_steps=findings.next_steps(analysis),
        warnings=[warning for warning in analysis.warnings if not warning.startswith("Not trustworthy")],
        rule_words=findings.rule_words(analysis.channels.rule),
        run=analysis.run,
        window=analysis.window,
        facts=_facts(analysis),
        figures=[figure_block(name, FIGURES[name](analysis), FIGURE_TEXTS[name]) for name in drawable(analysis)],
        table=_suspect_table(analysis),
        abstains=analysis.examples.abstains,
        ranked_by=suspicion.title(suspicion.ranked_by(analysis)),
        cutoffs=_cutoff_rows(analysis),
        words=WORDS,
        gating=evidence.gating(analysis),
        gate_head=evidence.gate_head(analysis),
        gate_reason=analysis.gate_reason if analysis.gate is None else analysis.gate.audit_reason,
    )


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
