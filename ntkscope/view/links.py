"""What the linked view shows: the examples, layers and gate share of a direction, and the directions of an example.

A direction v_k (a column of V) lies on example i with weight ‖v_k[i]‖²; over examples the weights add up to 1. Of the squared residual
‖h_i‖² of example i, the part along direction k is ⟨v_k[i], h_i⟩ (v_kᵀh); over directions the parts add up to the whole, single ones may be
negative.
"""

import base64
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ntkscope.gate.audit_results import StepAudit
from ntkscope.view.drawing import spread, values
from ntkscope.view.findings import signal_modes
from ntkscope.view.suspects import ranked
from ntkscope.view.words import AnalysisLike

MAX_MODES = 1000
MAX_AUDITED_MODES = 300  # whose layers are kept
MAX_LAYERS = 12
NUM_SHOWN = 6  # examples of a direction, directions of an example
NUM_LABELS = 2
PICTURE_BYTES = 200_000
SMALLEST_SIDE = 8  # pixels

# A click in the figure chooses this; the mode number is on its x axis, an example's id is the first of its `customdata`.
CHOSEN_BY_CLICK = {
    "spectrum": "mode",
    "omega_surface": "mode",
    "gate_modes": "mode",
    "eigenstructure": "example",
    "suspicious": "example",
    "suspicious_inputs": "example",
}


def links(analysis: AnalysisLike) -> dict[str, Any]:
    """Collect what the linked view needs, in plain containers.

    Args:
        analysis: The result.

    Returns:
        Columns of modes and of examples; shares are in thousandths, modes and examples are positions.
    """
    lies, parts = energy_tables(analysis)
    modes = _kept_modes(parts)
    position = {mode: k for k, mode in enumerate(modes)}
    omega, energy = analysis.spectrum.eigvals, analysis.spectrum.residual_energy
    is_signal = signal_modes(analysis)
    examples = analysis.examples
    labels = None if examples.labels is None else [str(label) for label in examples.labels]
    return {
        "num_modes": len(omega),
        "modes": [mode + 1 for mode in modes],
        "omega": values(omega[modes]),
        "is_signal": [int(is_signal[mode]) for mode in modes],
        "energy": _thousandths(energy[modes] / energy.sum()),
        "learned_at": [_half_learned(analysis, mode) for mode in modes],
        "mode_examples": [_largest(lies[:, mode]) for mode in modes],
        "mode_labels": None if labels is None else _by_label(lies[:, modes], labels),
        "ids": [str(name) for name in examples.ids],
        "labels": labels,
        "true_labels": None if examples.true_labels is None else [str(label) for label in examples.true_labels],
        "is_noise": None if examples.is_noise is None else [int(flag) for flag in examples.is_noise],
        "reservoir_share": _thousandths(examples.reservoir_share),
        "half_time": values(examples.half_time),
        "loss": values(examples.loss),
        "example_modes": [[(position[k], share) for k, share in _largest(row) if k in position] for row in parts],
        "first": ranked(analysis)[:1],
        "layers": _layers(analysis),
        "pictures": pictures_of(analysis),
    }


def energy_tables(analysis: AnalysisLike) -> tuple[Float[Tensor, "examples modes"], Float[Tensor, "examples modes"]]:
    """Spread every direction over the examples, and every example's residual over the directions.

    Args:
        analysis: The result.

    Returns:
        ‖v_k[i]‖², whose columns add up to 1, and ⟨v_k[i], h_i⟩ (v_kᵀh) / ‖h_i‖², whose rows do (zero where h_i is).
    """
    spectrum = analysis.spectrum
    num_examples = len(analysis.examples.ids)
    residual = spectrum.residual.reshape(len(spectrum.owner), -1)  # [modes, fields]
    coordinates = spectrum.eigvecs.T @ residual  # [modes, fields]
    energy = torch.zeros(num_examples, dtype=residual.dtype).index_add(0, spectrum.owner, residual.square().sum(dim=1))
    lies = _sum_by_owner(torch.ones(len(residual), dtype=residual.dtype), spectrum.owner, num_examples, spectrum.eigvecs.square())
    fields = zip(residual.T, coordinates.T, strict=True)
    parts = sum(_sum_by_owner(own, spectrum.owner, num_examples, spectrum.eigvecs) * along for own, along in fields)
    return lies, torch.where(energy[:, None] > 0, parts / energy[:, None], 0.0)


def _sum_by_owner(weights: Tensor, owner: Tensor, num_examples: int, rows: Tensor) -> Tensor:
    """Add up weighted rows of each example: [modes], [modes], [modes, columns] -> [examples, columns]."""
    places = torch.stack([owner, torch.arange(len(owner))])
    return torch.sparse.mm(torch.sparse_coo_tensor(places, weights, (num_examples, len(owner)), check_invariants=True), rows)


def _kept_modes(parts: Float[Tensor, "examples modes"]) -> list[int]:
    """Choose the directions that can be looked at: all of them, or the leading ones and those that examples lie along."""
    total = parts.shape[1]
    if total <= MAX_MODES:
        return list(range(total))
    wanted = set(range(MAX_MODES // 2))
    order = parts.nan_to_num(0.0).abs().max(dim=0).values.argsort(descending=True)
    for mode in order.tolist():
        if len(wanted) == MAX_MODES:
            break
        wanted.add(mode)
    return sorted(wanted)


def _largest(column: Tensor) -> list[tuple[int, int]]:
    """Name the largest parts: (position, thousandths), those that round to zero left out."""
    known = torch.where(column.isfinite(), column, 0.0)
    found = [(k, round(1000 * float(known[k]))) for k in known.abs().topk(min(NUM_SHOWN, len(known))).indices.tolist()]
    return [(k, share) for k, share in found if share]


def _by_label(lies: Tensor, labels: list[str]) -> list[list[tuple[str, int]]]:
    """Name the labels on whose examples each direction lies most."""
    names = list(dict.fromkeys(labels))
    code = torch.tensor([names.index(label) for label in labels])
    totals = torch.zeros(len(names), lies.shape[1], dtype=lies.dtype).index_add_(0, code, torch.where(lies.isfinite(), lies, 0.0))
    top = totals.topk(min(NUM_LABELS, len(names)), dim=0)
    return [
        [(names[k], round(1000 * share)) for k, share in zip(*column, strict=True)]
        for column in zip(top.indices.T.tolist(), top.values.T.tolist(), strict=True)
    ]


def _half_learned(analysis: AnalysisLike, mode: int) -> int | None:
    """Find the first recorded step by which as many directions as this one's number had ω > ½."""
    reached = analysis.history.eigvals[:, mode].nan_to_num(0.0) > 0.5
    return analysis.history.steps[int(reached.int().argmax())] if bool(reached.any()) else None


def _thousandths(shares: Tensor) -> list[int | None]:
    """Round shares; None where there is no finite one."""
    return [None if value is None else round(1000 * value) for value in values(shares)]


def _layers(analysis: AnalysisLike) -> dict[str, Any] | None:
    """Collect layers and gate share of directions, of the audited step nearest to the window's end; None without an audit."""
    audit = None if analysis.gate is None else analysis.gate.audit
    if audit is None or not audit.steps:
        return None
    step: StepAudit = min(audit.steps, key=lambda step: abs(step.step - analysis.window.stop_step))
    modes = spread(step.num_modes, MAX_AUDITED_MODES)
    largest = step.layer_share.nan_to_num(0.0).mean(dim=0).argsort(descending=True)[:MAX_LAYERS].sort().values
    names = list(step.layers)
    return {
        "step": step.step,
        "modes": [mode + 1 for mode in modes],
        "names": [names[k] for k in largest.tolist()],
        "num_left_out": len(names) - len(largest),
        "share": [_thousandths(row[largest]) for row in step.layer_share[modes]],
        "kept": [_thousandths(row[largest]) for row in step.openness[modes]],
    }


def pictures_of(analysis: AnalysisLike) -> dict[str, Any] | None:
    """Pack the pictures, made smaller until they fit; then only those of the most suspicious examples.

    Args:
        analysis: The result.

    Returns:
        Positions of the examples that have one, height, width and channels of all, and the bytes in base64, example after example; None
        where inputs were no images.
    """
    pictures: UInt8[Tensor, "examples height width channels"] | None = analysis.examples.pictures
    if pictures is None:
        return None
    while pictures.numel() > PICTURE_BYTES and min(pictures.shape[1:3]) >= 2 * SMALLEST_SIDE:
        halved = torch.nn.functional.avg_pool2d(pictures.permute(0, 3, 1, 2).float(), 2)
        pictures = halved.round().to(torch.uint8).permute(0, 2, 3, 1)
    shown = (ranked(analysis) or list(range(len(pictures))))[: max(1, PICTURE_BYTES // pictures[0].numel())]
    data = base64.b64encode(pictures[shown].contiguous().numpy().tobytes()).decode("ascii")
    _, height, width, channels = pictures.shape
    return {"examples": shown, "height": height, "width": width, "channels": channels, "data": data}
