"""Tables of an analysis: one row per example, one per snapshot, and the gate's statistics."""

import math

import torch
from torch import Tensor

from ntkscope.gate.verdict import GateAudit
from ntkscope.record.snapshot import Snapshot
from ntkscope.record.trace import Trace
from ntkscope.results import GateStats, History
from ntkscope.spectrum.channels import ChannelSplit, example_energy
from ntkscope.spectrum.eigen import Spectrum
from ntkscope.spectrum.examples import Examples, best_score, class_labels, crossing_times, margins
from ntkscope.walk import Row, Walk

NUM_LEADING = 3  # axes of the 3D view


def gate_of(walk: Walk, trace: Trace, audit: GateAudit | None, reason: str) -> tuple[GateStats | None, str]:
    """Collect how open the gate was, and what its audit found.

    Args:
        walk: The trajectory.
        trace: The record.
        audit: The audit.
        reason: Why there is none.

    Returns:
        Statistics, or None and the reason.
    """
    rows = [row.snapshot.live_audit for row in walk.history if row.snapshot.live_audit is not None]
    live = torch.cat(rows) if rows else None
    if audit is not None and audit.is_counterfactual:
        steps = audit.steps
        opened = {
            name: torch.tensor([step.layers[name].open_share if name in step.layers else math.nan for step in steps]).double()
            for name in trace.facts.parameters
        }
        shares = torch.tensor([step.open_share for step in steps], dtype=torch.float64)
        return GateStats(audit.kind, [step.step for step in steps], shares, opened, audit, live=live), ""
    if trace.facts.gate is None:
        return None, f"{trace.facts.optimizer.partition('(')[0]} has no gate, and {reason}"
    shares = [(row.snapshot.step, row.snapshot.gate_open) for row in walk.history]
    known = [(step, share) for step, share in shares if share is not None]
    if not known:
        return None, "the snapshots hold no gate statistics"
    table = torch.stack([share for _, share in known])
    sizes = torch.tensor(trace.facts.parameter_sizes, dtype=torch.float64)
    overall = (table * sizes).sum(dim=1) / sizes.sum()
    by_parameter = {name: table[:, k].contiguous() for k, name in enumerate(trace.facts.parameters)}
    return GateStats(trace.facts.gate, [step for step, _ in known], overall, by_parameter, audit, reason, live), ""


def examples_of(trace: Trace, spectrum: Spectrum, channels: ChannelSplit, rows: list[Row], history: History, *, abstains: str) -> Examples:
    """Fill the table of examples.

    Args:
        trace: The record.
        spectrum: Spectra at the window's end.
        channels: The split.
        rows: The window's snapshots.
        history: The whole history.
        abstains: Why nothing should be called suspicious; empty where nothing speaks against it.

    Returns:
        The table.
    """
    num_examples, num_classes = rows[-1].snapshot.outputs.shape
    targets, clean = trace.probe["targets"], trace.probe.get("clean_targets")
    labels = class_labels(targets, num_classes)
    true_labels = None if clean is None else class_labels(clean, num_classes)
    undefined = torch.full((num_examples,), torch.nan, dtype=torch.float64)
    margin = average = start = undefined
    if labels is not None:
        table = torch.stack([margins(row.snapshot.outputs.double(), labels) for row in rows])
        steps = torch.tensor([float(row.snapshot.step) for row in rows], dtype=torch.float64)
        start, margin, average = table[0], table[-1], torch.trapezoid(table, steps, dim=0) / (steps[-1] - steps[0])
    in_reservoir = example_energy(channels.reservoir_part(spectrum.residual), spectrum.owner, num_examples)
    whole = example_energy(spectrum.residual, spectrum.owner, num_examples)
    times = history.times.tolist()
    is_noise = None
    if clean is not None:
        is_noise = (targets != clean).flatten(1).any(dim=1) if targets.ndim > 1 else targets != clean
    return Examples(
        ids=list(range(num_examples)),
        labels=None if labels is None else labels.tolist(),
        true_labels=None if true_labels is None else true_labels.tolist(),
        is_noise=is_noise,
        reservoir_energy=in_reservoir,
        reservoir_share=in_reservoir / whole.clamp(min=torch.finfo(torch.float64).tiny),
        loss=_example_losses(trace, rows[-1].snapshot),
        margin=margin,
        area_under_margin=average,
        self_influence=rows[-1].self_influence,
        half_time=crossing_times(history.example_residual, times, 0.5),
        quarter_time=crossing_times(history.example_residual, times, 0.25),
        residual_left=history.example_residual[-1],
        abstains=abstains,
        pictures=trace.probe.get("pictures"),
        ranked_by=best_score(start, labels),
    )


def _example_losses(trace: Trace, snapshot: Snapshot) -> Tensor:
    """Compute each example's own loss; for a loss known only as a callable, its quadratic model n/2 g_iᵀ B_i† g_i."""
    outputs, targets = snapshot.outputs.double(), trace.probe["targets"]
    if trace.facts.loss == "cross_entropy":
        targets = targets.double() if targets.is_floating_point() else targets.long()
        return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
    num_examples = len(outputs)
    solved = torch.linalg.pinv(snapshot.hessian, hermitian=True) @ snapshot.gradient[:, :, None]
    return 0.5 * num_examples * (snapshot.gradient[:, :, None] * solved).sum(dim=(1, 2))


def history_of(walk: Walk, spectrum: Spectrum) -> History:
    """Stack the rows.

    Args:
        walk: The trajectory.
        spectrum: Spectra at the window's end.

    Returns:
        The history.
    """
    rows = walk.history
    modes, leading = _leading(walk, spectrum)
    start = walk.first.snapshot

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return History(
        steps=[row.snapshot.step for row in rows],
        times=column([row.snapshot.time - start.time for row in rows]),
        loss=column([row.snapshot.loss for row in rows]),
        predicted_loss=column([start.loss - row.state_energy for row in rows]),
        gradient_error=column([row.gradient_error for row in rows]),
        eigvals=torch.stack([row.eigvals for row in rows]),
        leading_modes=modes,
        leading=leading,
        example_residual=torch.stack([row.residual_share for row in rows]),
        signal_share=column([row.signal_share for row in rows]),
        is_refined=[row.is_refined for row in rows],
    )


def _leading(walk: Walk, spectrum: Spectrum) -> tuple[list[int], Tensor]:
    """Place every example by how much of its residual is gone along the modes that removed the most loss.

    The modes are those of the window's end for every snapshot, so points move because examples are learned and never because
    nearly equal eigenvalues swap. The three largest ω would not do: hundreds are near 1, and the first three may hold little loss.

    Args:
        walk: The trajectory.
        spectrum: Spectra at the window's end.

    Returns:
        The modes, and the places at every snapshot.
    """
    removed_loss = spectrum.eigvals * spectrum.residual_energy
    modes = removed_loss.argsort(descending=True)[:NUM_LEADING]
    axes = spectrum.eigvecs[:, modes]
    # Trace form: each axis shows the classes along which the residual lies in its mode. Either way an eigenvector's sign is free.
    along = (axes.T @ spectrum.residual).reshape(len(modes), -1)
    classes = along / torch.linalg.vector_norm(along, dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    num_examples = walk.first.snapshot.outputs.shape[0]
    norms = example_energy(spectrum.residual, spectrum.owner, num_examples).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    placed = torch.zeros(len(walk.history), num_examples, NUM_LEADING, dtype=torch.float64)
    for row, point in zip(walk.history, placed, strict=True):
        gone = ((spectrum.residual - row.left).reshape(len(axes), -1) @ classes.T) * axes
        point[:, : len(modes)].index_add_(0, spectrum.owner, gone)
        point /= norms[:, None]
    return modes.tolist(), placed
