"""Figures of a gate: how open it is, where its decisions agree with the signal channel, and what it removes."""

import html
import math
from collections.abc import Iterable
from itertools import pairwise

import plotly.graph_objects as go

from ntkscope._checks import InputError
from ntkscope.gate.audit_results import SHARE_EDGES, SNR_EDGES
from ntkscope.gate.compared import Compared
from ntkscope.gate.verdict import GateAudit
from ntkscope.view import palette
from ntkscope.view.drawing import spread, step_axis, table, values
from ntkscope.view.words import AnalysisLike, number, percent

MAX_PARAMETERS = 8
MAX_LAYERS = 30
MAX_MODES = 120
SURE = 0.05  # of p


def gate_openness(analysis: AnalysisLike) -> go.Figure:
    """Draw which share of the optimizer's gates was open.

    Args:
        analysis: The result of a run with a gate.

    Returns:
        Lines over training steps: all parameters, and each of the first few tensors.

    Raises:
        InputError: If the run had no gate.
    """
    gate = analysis.gate
    if gate is None:
        raise InputError(f"There is no gate to draw: {analysis.gate_reason}. Train with GatedAdamW to see one.")
    place, ticks = step_axis(gate.steps)
    x = [place(step) for step in gate.steps]
    figure = go.Figure(
        go.Scatter(
            x=x,
            y=values(gate.open_share),
            name="all parameters",
            mode="lines+markers",
            line={"color": palette.BLUE, "width": 3},
            customdata=[f"{step:,}" for step in gate.steps],
            hovertemplate="step %{customdata}<br>%{y:.1%} open<extra>all parameters</extra>",
        )
    )
    dashes = ("dash", "dot", "dashdot", "longdash")
    colours = (palette.ORANGE, palette.GREEN, palette.PURPLE, palette.SKY, palette.VERMILION, palette.GREY, palette.OLIVE, palette.WINE)
    for k, (name, share) in enumerate(list(gate.by_parameter.items())[:MAX_PARAMETERS]):
        figure.add_trace(
            go.Scatter(
                x=x,
                y=values(share),
                name=html.escape(name),
                mode="lines",
                line={"color": colours[k], "width": 1.5, "dash": dashes[k % len(dashes)]},
                customdata=[f"{step:,}" for step in gate.steps],
                hovertemplate="step %{customdata}<br>%{y:.1%} open<extra>" + html.escape(name) + "</extra>",
            )
        )
    last, first = float(gate.open_share[-1]), float(gate.open_share[0])
    title = f"{percent(last)} of the gates are open at step {gate.steps[-1]:,}"
    if len(gate.steps) > 1:
        title += f", against {percent(first)} at step {gate.steps[0]:,}"
    hidden = len(gate.by_parameter) - MAX_PARAMETERS
    if hidden > 0:
        title += f" ({hidden} more parameter tensors not drawn)"
    figure.update_layout(**palette.base_layout(title, height=460))
    figure.update_xaxes(**palette.axis("training step", **ticks))
    figure.update_yaxes(**palette.axis("share of open gates (q > ½)", range=[-0.02, 1.02], tickformat=".0%"))
    return figure


def gate_agreement(analysis: AnalysisLike) -> go.Figure:
    """Draw in every layer and at every audited step how often an open parameter has more signal than a closed one.

    Args:
        analysis: The result of an audited run.

    Returns:
        Heat map; 0.5 is chance, and what chance explains has no number in its cell.

    Raises:
        InputError: If the run was not audited.
    """
    audit = _audit_of(analysis)
    names = list(audit.layers)[:MAX_LAYERS]
    rows, words, hover = [], [], []
    for name in names:
        cells = [step.layers[name].figures["auroc"] if name in step.layers else None for step in audit.steps]
        rows.append([None if cell is None or cell.reason or math.isnan(cell.observed) else cell.observed for cell in cells])
        words.append([f"{cell.observed:.2f}" if cell is not None and cell.p <= SURE else "" for cell in cells])
        hover.append([
            "not in this step" if cell is None else html.escape(cell.reason) or f"AUROC {cell.observed:.3f}, z = {number(cell.z)}"
            for cell in cells
        ])
    overall = audit.overall["auroc"]
    finding = "cannot be compared" if overall.reason else f"{number(overall.observed, 2)} (0.5 is chance, z = {number(overall.z)})"
    title = f"Do open gates sit on signal parameters? AUROC over all layers and steps: {finding}"
    hidden = len(audit.layers) - len(names)
    if hidden:
        title += f" ({hidden} more layers not drawn)"
    figure = go.Figure(
        go.Heatmap(
            x=[f"{step.step:,}" for step in audit.steps],
            y=[html.escape(name) for name in names],
            z=rows,
            text=words,
            customdata=hover,
            texttemplate="%{text}",
            zmin=0,
            zmax=1,
            zmid=0.5,
            colorscale=[[0, palette.RESERVOIR], [0.5, "#f2f2f2"], [1, palette.SIGNAL]],
            colorbar={"title": {"text": "AUROC"}, "thickness": 12},
            hovertemplate="%{y}, step %{x}<br>%{customdata}<extra></extra>",
        )
    )
    figure.update_layout(**palette.base_layout(title, height=220 + 26 * len(names)))
    figure.update_xaxes(**palette.axis("audited step", type="category"))
    figure.update_yaxes(**palette.axis("parameter tensor", type="category", autorange="reversed"))
    return figure


def gate_density(analysis: AnalysisLike) -> go.Figure:
    """Draw the parameters by gradient signal-to-noise, which the gate sees, and by signal share, which it does not.

    Args:
        analysis: The result of an audited run.

    Returns:
        Density over both at the last audited step, with the gate's boundary and the share of signal directions.

    Raises:
        InputError: If the run was not audited.
    """
    audit = _audit_of(analysis)
    step = audit.steps[-1]
    found = step.figures["rank_correlation"]
    words = "no correlation can be computed" if math.isnan(found.observed) else f"rank correlation {number(found.observed, 2)}"
    title = f"At step {step.step:,}, does the gradient's signal-to-noise tell signal parameters? Gate and signal share: {words}"
    counts = step.density.T
    log_counts = [[math.log10(value) if value > 0 else None for value in row] for row in counts.tolist()]
    figure = go.Figure(
        go.Heatmap(
            x=_middles(SNR_EDGES),
            y=_middles(SHARE_EDGES),
            z=log_counts,
            customdata=table(counts),
            colorscale=palette.CONTINUOUS,
            colorbar={"title": {"text": "parameters"}, "thickness": 12, **_decades(float(counts.max()))},
            hovertemplate="m̂²/ŝ = 10^%{x:.1f}<br>signal share %{y:.2f}<br>%{customdata:,.0f} parameters<extra></extra>",
        )
    )
    figure.add_vline(
        x=math.log10(_boundary(audit)), line={"color": palette.VERMILION, "width": 2, "dash": "dash"}, annotation_text="open →"
    )
    figure.add_hline(
        y=step.rank / step.num_modes,
        line={"color": palette.GREY, "width": 1.5, "dash": "dot"},
        annotation_text="signal directions",
    )
    figure.update_layout(**palette.base_layout(title, height=460))
    figure.update_xaxes(**palette.axis("gradient signal-to-noise m̂²/ŝ, log₁₀", range=[float(SNR_EDGES[0]), float(SNR_EDGES[-1])]))
    figure.update_yaxes(**palette.axis("signal share ρ of the parameter", range=[0, 1]))
    return figure


def gate_motion(analysis: AnalysisLike) -> go.Figure:
    """Draw which share of the removed motion lay in the reservoir, against permuted gates.

    Args:
        analysis: The result of an audited run.

    Returns:
        Line over audited steps, with the null's mean and two standard deviations, and the share of the whole ungated motion.

    Raises:
        InputError: If the run was not audited.
    """
    audit = _audit_of(analysis)
    steps = [step for step in audit.steps if not math.isnan(step.figures["precision"].observed)]
    place, ticks = step_axis([step.step for step in steps] or [0])
    x = [place(step.step) for step in steps]
    figures = [step.figures["precision"] for step in steps]
    low = [max(0.0, figure.mean - 2 * figure.deviation) for figure in figures]
    high = [min(1.0, figure.mean + 2 * figure.deviation) for figure in figures]
    beyond = sum(figure.p <= SURE and figure.z > 0 for figure in figures)
    below = sum(figure.p <= SURE and figure.z < 0 for figure in figures)
    title = (
        f"The removed motion lies in the reservoir more than by chance at {beyond} of {len(steps)} steps, less than by chance at {below}"
        if steps
        else "The gate removed no motion that could be judged"
    )
    figure = go.Figure()
    band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    figure.add_trace(go.Scatter(x=x, y=high, showlegend=False, **band))
    figure.add_trace(go.Scatter(x=x, y=low, name="permuted gates (± 2 deviations)", fill="tonexty", fillcolor=palette.SHADE, **band))
    figure.add_trace(
        go.Scatter(
            x=x,
            y=[found.mean for found in figures],
            name="permuted gates, mean",
            mode="lines",
            line={"color": palette.GREY, "dash": "dash"},
            hoverinfo="skip",
        )
    )
    figure.add_trace(
        go.Scatter(
            x=x,
            y=[found.observed for found in figures],
            name="the gate",
            mode="lines+markers",
            line={"color": palette.BLUE, "width": 3},
            customdata=[[f"{step.step:,}", number(found.z), percent(step.open_share)] for step, found in zip(steps, figures, strict=True)],
            hovertemplate="step %{customdata[0]}<br>%{y:.1%} of what it removed<br>z = %{customdata[1]}, %{customdata[2]} open"
            "<extra></extra>",
        )
    )
    figure.add_trace(
        go.Scatter(
            x=x,
            y=[step.reservoir_motion for step in steps],
            name="of all motion before the gate",
            mode="lines",
            line={"color": palette.VERMILION, "dash": "dot"},
            hovertemplate="%{y:.1%} of the ungated motion<extra></extra>",
        )
    )
    figure.update_layout(**palette.base_layout(title, height=440))
    figure.update_xaxes(**palette.axis("training step", **ticks))
    figure.update_yaxes(**palette.axis("share in the reservoir", tickformat=".0%", rangemode="tozero"))
    return figure


def gate_modes(analysis: AnalysisLike) -> go.Figure:
    """Draw how far the gate is open for every direction in every layer.

    Args:
        analysis: The result of an audited run.

    Returns:
        3D surface over mode and layer at the last audited step; height is the share of the direction's kernel that the gate keeps there.

    Raises:
        InputError: If the run was not audited.
    """
    audit = _audit_of(analysis)
    step = audit.steps[-1]
    names = list(step.layers)[:MAX_LAYERS]
    modes = spread(step.num_modes, MAX_MODES)
    heights = step.openness[modes][:, : len(names)].T
    title = (
        f"At step {step.step:,} the gate keeps {percent(step.kept_signal)} of the kernel on the {step.rank:,} signal directions and "
        f"{percent(step.kept_reservoir)} on the rest"
    )
    x = [k + 1 for k in modes]
    figure = go.Figure()
    for position, (name, row) in enumerate(zip(names, table(heights), strict=True)):
        # A ribbon for each layer: layers have no order in between that a surface could stand for.
        figure.add_trace(
            go.Surface(
                x=[x, x],
                y=[[position - 0.35] * len(x), [position + 0.35] * len(x)],
                z=[row, row],
                colorscale=palette.CONTINUOUS,
                cmin=0,
                cmax=1,
                showscale=False,
                hovertemplate="mode %{x}<br>" + html.escape(name) + "<br>%{z:.1%} kept<extra></extra>",
            )
        )
    figure.add_trace(
        go.Scatter3d(
            x=[step.rank + 0.5] * 2,
            y=[-0.5, len(names) - 0.5],
            z=[0, 0],
            mode="lines",
            line={"color": palette.VERMILION, "width": 6},
            name="signal | reservoir",
            hoverinfo="skip",
        )
    )
    figure.update_layout(
        **palette.base_layout(title, height=560),
        scene={
            "xaxis": palette.scene_axis("mode, signal first", type="log" if step.num_modes > 50 else "linear"),
            "yaxis": palette.scene_axis("", tickvals=list(range(len(names))), ticktext=[html.escape(name) for name in names]),
            "zaxis": palette.scene_axis("share kept by the gate", range=[0, 1], tickformat=".0%"),
            "camera": palette.CAMERA,
        },
    )
    return figure


def _cell_words(cell: Compared | None) -> str:
    """Describe one cell of the heat map."""
    if cell is None:
        return "not in this step"
    return html.escape(cell.reason) or f"AUROC {cell.observed:.3f}, z = {number(cell.z)}"


def _audit_of(analysis: AnalysisLike) -> GateAudit:
    """Get the audit."""
    gate = analysis.gate
    if gate is None or gate.audit is None:
        reason = analysis.gate_reason if gate is None else gate.audit_reason
        raise InputError(f"The gate was not audited: {reason}.")
    return gate.audit


def _middles(edges: Iterable[float]) -> list[float]:
    """Compute the middles of bins."""
    return [float(a + b) / 2 for a, b in pairwise(edges)]


def _boundary(audit: GateAudit) -> float:
    """Compute m̂²/ŝ above which a gate counts as open."""
    if audit.kind == "hard":
        return max(audit.alpha, 1e-12)
    # q = ½ where the excess over α ŝ (soft), or m̂² itself (snr), is λ ŝ.
    return max(audit.lambda_pop + (audit.alpha if audit.kind == "soft" else 0.0), 1e-12)


def _decades(largest: float) -> dict[str, list[float] | list[str]]:
    """Label a logarithmic colour bar by whole numbers."""
    powers = list(range(int(math.log10(max(1.0, largest))) + 1))
    return {"tickvals": [float(power) for power in powers], "ticktext": [f"{10**power:,}" for power in powers]}
