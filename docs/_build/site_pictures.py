"""Pictures of the site that are not figures of the report: from the demo's record, a short run, and benchmarks/RESULTS.md."""

import re

import plotly.graph_objects as go
import site_results
import torch
from jaxtyping import Int
from plotly.subplots import make_subplots
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.gate_runs import NUM_EXAMPLES, Setting, make_optimizer, train
from benchmarks.gate_table import GATES, NUM_STEPS
from ntkscope.experiments.demo import load_digits_data, make_model
from ntkscope.gate.step import gate_values
from ntkscope.record.trace import Trace
from ntkscope.view import palette

ALPHA = 1 / 19  # the unbiased rule at the usual momentum of 0.9
AUDITED_NEAR = 100  # steps
MAX_POINTS = 1200
NOISE, SEED, NUM_LOOKS = 0.2, 0, 60
LOOKS = {
    "adamw": ("AdamW", palette.BLUE, "circle", "solid"),
    "unbiased": ("gated, α = λ = α_U", palette.VERMILION, "diamond", "dash"),
    "paper": ("gated, α = λ = 1 (the paper's)", palette.GREY, "square", "dot"),
}


def kernel_blocks(trace: Trace, stop: int, labels: Int[Tensor, " examples"]) -> go.Figure:
    """Draw the kernel between examples at the start and at the window's end.

    Args:
        trace: Of a run on labelled examples.
        stop: Position of the snapshot at the window's end.
        labels: True labels; examples are ordered by them.

    Returns:
        Two heat maps on one scale.
    """
    order = labels.argsort(stable=True)
    same = (labels[order, None] == labels[order]) & ~torch.eye(len(order), dtype=torch.bool)
    different = labels[order, None] != labels[order]
    maps, means = [], []
    for position in (0, stop):
        kernel = trace[position].kernel()
        blocks = kernel.reshape(len(labels), -1, len(labels), len(kernel) // len(labels))
        shared = torch.einsum("icjc->ij", blocks)[order][:, order]
        norms = shared.diagonal().sqrt()
        maps.append(shared / norms[:, None] / norms)
        means.append([float(maps[-1][mask].mean()) for mask in (same, different)])
    steps = [trace[position].step for position in (0, stop)]
    figure = make_subplots(rows=1, cols=2, subplot_titles=[f"step {step:,}" for step in steps], horizontal_spacing=0.06)
    for column, cosines in enumerate(maps, start=1):
        figure.add_trace(
            go.Heatmap(
                z=[[round(value, 2) for value in row] for row in cosines.tolist()],
                coloraxis="coloraxis",
                hovertemplate="examples %{x} and %{y}<br>cosine %{z}<extra></extra>",
            ),
            row=1,
            col=column,
        )
    title = (
        f"Before training the gradients of two images have a cosine of {means[0][0]:.2f} where the digit is the same and {means[0][1]:.2f} "
        f"where it is not; at step {steps[1]:,} of {means[1][0]:.2f} and {means[1][1]:.2f}"
    )
    figure.update_layout(**palette.base_layout(title, height=380))
    figure.update_layout(
        coloraxis={"colorscale": palette.CONTINUOUS, "cmin": 0, "cmax": 1, "colorbar": {"title": {"text": "cosine"}, "thickness": 12}}
    )
    figure.update_xaxes(**palette.axis("examples by digit", showgrid=False, showticklabels=False, ticks=""))
    figure.update_yaxes(**palette.axis("", showgrid=False, showticklabels=False, ticks="", autorange="reversed"))
    figure.update_yaxes(title_text="examples by digit", row=1, col=1)
    return figure


def gate_threshold(trace: Trace) -> go.Figure:
    """Draw what the gate sees of every parameter over Adam's own step.

    Args:
        trace: Of an AdamW run with audit data.

    Returns:
        Scatter with both thresholds.
    """
    audited = [snapshot for snapshot in trace if snapshot.audit_mean is not None]
    snapshot = min(audited, key=lambda one: abs(one.step - AUDITED_NEAR))
    mean, variance, precond = (part.double() for part in (snapshot.audit_mean, snapshot.audit_variance, snapshot.audit_precond))
    live = variance > 0
    mean, variance = mean[live], variance[live]
    move, ratio = (precond[live] * mean).abs(), mean.square() / variance
    edge = (ALPHA / (1 + ALPHA)) ** 0.5
    gate = gate_values(mean, variance, kind="hard", alpha=ALPHA) > 0
    agree = float((gate == (move > edge)).double().mean())
    drawn = torch.randperm(len(move), generator=torch.Generator().manual_seed(0))[:MAX_POINTS]
    drawn = drawn[(move[drawn] > 1e-3) & (ratio[drawn] > 1e-6)]
    figure = go.Figure()
    for name, colour, symbol, is_open in (
        ("gate open", palette.BLUE, "circle", True),
        ("gate closed", palette.VERMILION, "x-thin-open", False),
    ):
        chosen = drawn[gate[drawn] == is_open]
        figure.add_trace(
            go.Scatter(
                x=[float(f"{value:.3g}") for value in move[chosen].tolist()],
                y=[float(f"{value:.3g}") for value in ratio[chosen].tolist()],
                name=name,
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 5, "line": {"width": 1.2, "color": colour}},
                hovertemplate="|u| = %{x}<br>m̂²/ŝ = %{y}<extra>" + name + "</extra>",
            )
        )
    curve = torch.logspace(-3, -0.002, 80, dtype=torch.float64)
    figure.add_trace(
        go.Scatter(
            x=[float(f"{value:.4g}") for value in curve.tolist()],
            y=[float(f"{value:.4g}") for value in (curve.square() / (1 - curve.square())).tolist()],
            name="if v̂ were m̂² + ŝ",
            mode="lines",
            line={"color": palette.GREEN, "width": 2},
            hoverinfo="skip",
        )
    )
    figure.add_hline(
        y=ALPHA,
        line={"color": palette.GREY, "width": 2, "dash": "dash"},
        annotation={"text": "the gate's threshold, α_U", "x": 0, "xanchor": "left"},
    )
    figure.add_vline(
        x=edge, line={"color": palette.GREY, "width": 2, "dash": "dot"}, annotation={"text": "√(α/(1+α))", "y": 0, "yanchor": "bottom"}
    )
    title = (
        f"At step {snapshot.step:,} the gate and a threshold on Adam's own step decide alike for {agree:.0%} of {len(move):,} parameters"
    )
    figure.update_layout(**palette.base_layout(title, height=480))
    figure.update_xaxes(**palette.axis("|u| = |m̂| / √v̂, Adam's step in units of the learning rate", type="log", dtick=1))
    figure.update_yaxes(**palette.axis("m̂² / ŝ, which is all the gate sees", type="log", dtick=1, tickformat=".0e"))
    return figure


def gate_accuracy() -> go.Figure:
    """Draw the table of gates: test accuracy at the end, and at its best on the way.

    Returns:
        For each share of wrong labels and each optimizer a line from the end to the best.
    """
    rows = site_results.table("Does gating help, and does the audit know?", "noise")
    figure = go.Figure()
    noises = list(dict.fromkeys(row["noise"] for row in rows))
    ends: dict[str, list[float]] = {}
    bests: dict[str, list[float]] = {}
    for k, (key, (name, colour, symbol, _)) in enumerate(LOOKS.items()):
        own = [row for row in rows if row["optimizer"] == key]
        ends[key] = [float(re.findall(r"[\d.]+", row["test accuracy"])[0]) for row in own]
        bests[key] = [float(row["best on the way"]) for row in own]
        places = [position + 0.2 * (k - 1) for position in range(len(own))]
        for place, end, best in zip(places, ends[key], bests[key], strict=True):
            line = {"color": colour, "width": 2}
            figure.add_trace(go.Scatter(x=[place, place], y=[end, best], mode="lines", line=line, showlegend=False, hoverinfo="skip"))
        for words, shown, mark in (("best on the way", bests[key], f"{symbol}-open"), ("at the end", ends[key], symbol)):
            figure.add_trace(
                go.Scatter(
                    x=places,
                    y=shown,
                    mode="markers",
                    name=f"{name}: {words}",
                    marker={"color": colour, "symbol": mark, "size": 11, "line": {"width": 2, "color": colour}},
                    hovertemplate=f"{name}, {words}<br>test accuracy %{{y:.3f}}<extra></extra>",
                )
            )
    gains = [gated - plain for gated, plain in zip(ends["unbiased"], ends["adamw"], strict=True)]
    apart = max(abs(gated - plain) for gated, plain in zip(bests["unbiased"], bests["adamw"], strict=True))
    title = (
        f"The gate at α_U ends {100 * min(gains):.1f} to {100 * max(gains):.1f} points above AdamW, but their best on the way differ by "
        f"{100 * apart:.1f} at most: it overfits later"
    )
    figure.update_layout(**palette.base_layout(title, height=500))
    figure.update_layout(legend={"y": -0.2})
    figure.update_xaxes(**palette.axis("wrong labels", tickvals=list(range(len(noises))), ticktext=noises, showgrid=False))
    figure.update_yaxes(**palette.axis("test accuracy, mean of 5 seeds"))
    return figure


def gate_curves() -> go.Figure:
    """Train one case of the table again, and draw test accuracy over training.

    Returns:
        One line for each optimizer.
    """
    setting = Setting(label_noise=NOISE, seed=SEED, num_steps=NUM_STEPS)
    data = load_digits_data(NUM_EXAMPLES, NOISE, SEED)
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    inputs = (pixels / 16).float()
    inputs = inputs - inputs.mean(dim=0)
    held_out = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))[NUM_EXAMPLES:]
    every = NUM_STEPS // NUM_LOOKS
    steps = list(range(every, NUM_STEPS + 1, every))
    figure = go.Figure()
    falls: dict[str, float] = {}
    for key, (name, colour, symbol, dash) in LOOKS.items():
        model, seen = make_model(SEED), []

        def look(model: torch.nn.Module = model, seen: list[float] = seen) -> None:
            with torch.no_grad():
                seen.append(round(float((model(inputs[held_out]).argmax(dim=1) == labels[held_out]).double().mean()), 4))

        train(model, make_optimizer(model, setting, **GATES.get(key, {})), data, setting, NUM_STEPS, every=every, look=look)
        falls[key] = 100 * (max(seen) - seen[-1])
        figure.add_trace(
            go.Scatter(
                x=steps,
                y=seen,
                name=name,
                mode="lines+markers",
                line={"color": colour, "width": 2, "dash": dash},
                marker={"symbol": symbol, "size": 5},
                hovertemplate=f"step %{{x:,}}<br>test accuracy %{{y:.3f}}<extra>{name}</extra>",
            )
        )
    title = (
        f"One of these runs, {NOISE:.0%} wrong labels: from its best to the end AdamW loses {falls['adamw']:.1f} points of test accuracy, "
        f"with the gate at α_U {falls['unbiased']:.1f}"
    )
    figure.update_layout(**palette.base_layout(title, height=420))
    figure.update_xaxes(**palette.axis("training step"))
    figure.update_yaxes(**palette.axis("test accuracy"))
    return figure
