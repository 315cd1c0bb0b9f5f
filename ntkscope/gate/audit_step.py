"""One step of an optimizer against the signal channel: all comparisons of theory.md section 7, in one pass over the Jacobian's columns.

Coordinates are those of the channel, J̃ = Vᵀ B_s^½ J, one column per parameter; the first r rows are signal. No kernel and no whole
Jacobian is formed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ntkscope._checks import InputError
from ntkscope.gate.audit_results import SHARE_EDGES, SNR_EDGES, LayerAudit, SpectralGate, StepAudit
from ntkscope.gate.channel import Channel
from ntkscope.gate.compared import Compared, compare
from ntkscope.gate.figures import kernel_figures, motion_figures, parameter_figures, ratio
from ntkscope.kernel.columns import Columns
from ntkscope.spectrum.cutoffs import moments_over_examples

ColumnsOf = Callable[[str], Iterator[Columns]]


@dataclass(frozen=True)
class Update:
    """What an optimizer's step was made of, by parameter tensor; shaped as the parameters.

    Attributes:
        mean: m̂.
        precond: M⁰, ungated, the learning rate's share of the group included.
        gate: q.
        variance: ŝ, as the gate used it.
        is_hard: Whether open means q = 1 (or else q > ½).
    """

    mean: Mapping[str, Tensor]
    precond: Mapping[str, Tensor | float]
    gate: Mapping[str, Tensor]
    variance: Mapping[str, Tensor]
    is_hard: bool

    def is_open(self, gate: Tensor) -> Tensor:
        """Say which gates count as open."""
        return gate == 1 if self.is_hard else gate > 0.5


@dataclass
class _Tensor:
    """What was summed up over the columns of one parameter tensor; draws come after the gate itself."""

    signal: Float[Tensor, " live"]  # ‖Π J̃_k‖²
    total: Float[Tensor, " live"]  # ‖J̃_k‖²
    is_open: Bool[Tensor, " live"]
    gate: Float[Tensor, " live"]
    orders: Tensor  # [draws, live]: permutations of the live columns
    num_dead: int
    ungated: Tensor  # [modes * fields], motion of M⁰ m̂
    gated: Tensor  # [modes * fields, 1 + draws]
    kept: Tensor  # [2, 1 + draws]: Σ q M⁰ ‖·‖² on signal and reservoir
    whole: Tensor  # [2]: the same with q = 1
    products: Tensor  # [1 + draws]: ⟨q M⁰ m̂, a⟩
    squares: Tensor  # [1 + draws]: ‖q M⁰ m̂‖²
    ungated_product: float = 0.0
    ungated_square: float = 0.0
    direction_square: float = 0.0
    weight: Tensor = field(default_factory=lambda: torch.empty(0))  # [modes]: Σ M⁰ J̃², share of the direction's kernel
    opened: Tensor = field(default_factory=lambda: torch.empty(0))  # [modes]: the same, weighted by the gate


def audit_step(
    columns_of: ColumnsOf,
    update: Update,
    channel: Channel,
    gradient: Float[Tensor, "examples classes"],
    *,
    step: int,
    strictness: float = 1.0,
    batch_size: int | None = None,
    decay_share: float = float("nan"),
    num_permutations: int = 100,
    seed: int = 0,
) -> StepAudit:
    """Compare the gate of one step with the signal channel.

    Args:
        columns_of: Walks over the Jacobian's columns of a parameter tensor, in its own order at every call.
        update: The step.
        channel: Signal channel of the window that ends at the step.
        gradient: Output gradient g at the step.
        step: Its number.
        strictness: α/α_U, how much stricter than the unbiased rule the gate is; the spectral gate uses the same.
        batch_size: b of the spectral gate's rule; the number of examples if not given.
        decay_share: Share of the step that weight decay makes up.
        num_permutations: Permutations of the gate within each tensor, for the null.
        seed: Of the permutations.

    Returns:
        The audit.

    Raises:
        InputError: If no parameter moves an output.

    Source:
        theory.md section 7, items 1 to 6.
    """
    num_examples, num_classes = gradient.shape
    direction = channel.signal_gradient(gradient)
    found: dict[str, _Tensor] = {}
    motions = torch.zeros(channel.num_modes * _fields(channel, num_classes), num_examples, dtype=torch.float64)
    density = np.zeros((len(SNR_EDGES) - 1, len(SHARE_EDGES) - 1))
    generator = torch.Generator().manual_seed(seed)
    for name in update.gate:
        part = _pass_over(name, columns_of, update, channel, direction, gradient, motions, density, num_permutations, generator)
        if part is not None:
            found[name] = part
    if not found:
        raise InputError("No parameter moves an output of the probe at this step, so there is nothing to audit.")
    parts = list(found.values())
    figures, open_share = _overall(parts, channel)
    whole, kept = _summed(parts, "whole"), _summed(parts, "kept")
    undirected = _cosine(
        sum(part.ungated_product for part in parts),
        sum(part.ungated_square for part in parts),
        sum(part.direction_square for part in parts),
    )
    ungated = _summed(parts, "ungated")
    reservoir = ungated.view(channel.num_modes, -1)[channel.rank :]
    num_live = sum(len(part.gate) for part in parts)
    weights, opened = (torch.stack([getattr(part, name) for part in parts], dim=1) for name in ("weight", "opened"))  # [modes, tensors]
    return StepAudit(
        step=step,
        rank=channel.rank,
        num_modes=channel.num_modes,
        open_share=open_share,
        mean_gate=float(torch.cat([part.gate for part in parts]).mean()),
        num_live=num_live,
        num_dead=sum(gate.numel() for gate in update.gate.values()) - num_live,
        figures=figures,
        ungated_direction=undirected,
        kept_signal=ratio(float(kept[0, 0]), float(whole[0])),
        kept_reservoir=ratio(float(kept[1, 0]), float(whole[1])),
        reservoir_motion=ratio(float(reservoir.square().sum()), float(ungated.square().sum())),
        decay_share=decay_share,
        layers={name: _layer(part, channel) for name, part in found.items()},
        spectral_gate=_spectral_gate(motions.view(channel.num_modes, -1, num_examples), channel, strictness, batch_size or num_examples),
        openness=opened / weights,  # 0/0 is NaN: the tensor has no part in the direction
        layer_share=weights / weights.sum(dim=1, keepdim=True),
        density=torch.from_numpy(density),
    )


def _fields(channel: Channel, num_classes: int) -> int:
    """Count the columns that share one direction: 1, or C in the trace form."""
    return num_classes // channel.rows_per_example(num_classes)


def _pass_over(
    name: str,
    columns_of: ColumnsOf,
    update: Update,
    channel: Channel,
    direction: Tensor,
    gradient: Tensor,
    motions: Tensor,
    density: np.ndarray,
    num_draws: int,
    generator: torch.Generator,
) -> _Tensor | None:
    """Sum up everything over the columns of one tensor; None where all of them are zero."""
    live = _live_entries(columns_of(name), update.gate[name].numel())
    num_live = int(live.sum())
    if not num_live:
        return None
    flat = {key: _flat(getattr(update, key)[name], live) for key in ("mean", "precond", "gate", "variance")}
    precond, step = flat["precond"], flat["precond"] * flat["mean"]
    orders = torch.rand(num_draws, num_live, generator=generator).argsort(dim=1)
    gates = torch.cat([flat["gate"][None], flat["gate"][orders]])  # [1 + draws, live]
    rows = motions.shape[0]
    part = _Tensor(
        signal=torch.zeros(num_live, dtype=torch.float64),
        total=torch.zeros(num_live, dtype=torch.float64),
        is_open=update.is_open(flat["gate"]),
        gate=flat["gate"],
        orders=orders,
        num_dead=update.gate[name].numel() - num_live,
        ungated=torch.zeros(rows, dtype=torch.float64),
        gated=torch.zeros(rows, 1 + num_draws, dtype=torch.float64),
        kept=torch.zeros(2, 1 + num_draws, dtype=torch.float64),
        whole=torch.zeros(2, dtype=torch.float64),
        products=torch.zeros(1 + num_draws, dtype=torch.float64),
        squares=(gates.square() @ step.square()),
        ungated_square=float(step.square().sum()),
    )
    opened = torch.zeros(channel.num_modes, dtype=torch.float64)
    weight = torch.zeros(channel.num_modes, dtype=torch.float64)
    position = torch.cumsum(live, dim=0) - 1
    own = gradient.double() * len(gradient)  # of one example's own loss
    for columns in columns_of(name):
        inside = live[columns.where.cpu()]
        at = position[columns.where.cpu()[inside]]
        values = columns.values.detach().cpu()[:, :, inside].double()  # [examples, classes, entries]
        coordinates = channel.motion(values)  # [modes, fields, entries]
        squares = coordinates.square().sum(dim=1)
        signal, total = squares[: channel.rank].sum(dim=0), squares.sum(dim=0)
        part.signal[at], part.total[at] = signal, total
        flattened = coordinates.flatten(0, 1)
        part.ungated += flattened @ step[at]
        part.gated += flattened @ (gates[:, at] * step[at]).T
        split = torch.stack([signal, total - signal])  # [2, entries]
        part.kept += (split * precond[at]) @ gates[:, at].T
        part.whole += split @ precond[at]
        pulled = precond[at] * torch.einsum("ice,ic->e", values, direction)
        part.products += (gates[:, at] * step[at]) @ pulled
        part.ungated_product += float(step[at] @ pulled)
        part.direction_square += float(pulled.square().sum())
        motions += flattened @ (precond[at][:, None] * torch.einsum("ice,ic->ei", values, own))
        opened += squares @ (flat["gate"][at] * precond[at])
        weight += squares @ precond[at]
    part.weight, part.opened = weight, opened
    density += _density(flat["mean"], flat["variance"], part)
    return part


def _live_entries(chunks: Iterator[Columns], num_entries: int) -> Bool[Tensor, " entries"]:
    """Find the parameters that move an output."""
    live = torch.zeros(num_entries, dtype=torch.bool)
    for columns in chunks:
        live[columns.where.cpu()] = (columns.values != 0).any(dim=1).any(dim=0).cpu()
    return live


def _flat(values: Tensor | float, live: Bool[Tensor, " entries"]) -> Float[Tensor, " live"]:
    """Take the live entries, in float64 on the CPU."""
    if not isinstance(values, Tensor):
        return torch.full((int(live.sum()),), float(values), dtype=torch.float64)
    return values.detach().to("cpu", torch.float64).flatten()[live]


def _density(mean: Tensor, variance: Tensor, part: _Tensor) -> np.ndarray:
    """Count parameters by signal-to-noise and signal share."""
    known = (mean != 0) | (variance != 0)
    snr = torch.log10(mean.square() / variance)[known].clamp(float(SNR_EDGES[0]), float(SNR_EDGES[-1]))
    shares = (part.signal / part.total)[known].clamp(0.0, 1.0)
    return np.histogram2d(snr.numpy(), shares.numpy(), bins=(SNR_EDGES, SHARE_EDGES))[0]


def _summed(parts: list[_Tensor], name: str) -> Tensor:
    """Add up over tensors."""
    return torch.stack([getattr(part, name) for part in parts]).sum(dim=0)


def _overall(parts: list[_Tensor], channel: Channel) -> tuple[dict[str, Compared], float]:
    """Compute the figures of the whole step."""
    is_open = torch.cat([part.is_open for part in parts])
    figures = parameter_figures(
        [part.signal / part.total for part in parts],
        [part.gate for part in parts],
        [part.is_open for part in parts],
        [part.orders for part in parts],
        threshold=channel.rank / channel.num_modes,
        no_split=_no_split(channel),
    )
    figures |= motion_figures(_summed(parts, "ungated"), _summed(parts, "gated"), channel.rank, channel.num_modes)
    products, squares = _summed(parts, "products"), _summed(parts, "squares")
    cosines = products / (squares * sum(part.direction_square for part in parts)).sqrt()
    figures["direction"] = compare(float(cosines[0]), cosines[1:], reason=_no_split(channel, allow_full=True))
    figures["selectivity"] = kernel_figures(_summed(parts, "kept"), _summed(parts, "whole"), _no_split(channel))
    return figures, float(is_open.double().mean())


def _layer(part: _Tensor, channel: Channel) -> LayerAudit:
    """Compute the figures of one tensor."""
    figures = parameter_figures(
        [part.signal / part.total],
        [part.gate],
        [part.is_open],
        [part.orders],
        threshold=channel.rank / channel.num_modes,
        no_split=_no_split(channel),
    )
    figures = {"auroc": figures["auroc"]} | motion_figures(part.ungated, part.gated, channel.rank, channel.num_modes)
    figures["selectivity"] = kernel_figures(part.kept, part.whole, _no_split(channel))
    return LayerAudit(
        open_share=float(part.is_open.double().mean()),
        num_live=len(part.gate),
        removed_share=ratio(float((part.ungated - part.gated[:, 0]).square().sum()), float(part.ungated.square().sum())),
        figures=figures,
    )


def _no_split(channel: Channel, *, allow_full: bool = False) -> str:
    """Say why there are not two channels to compare."""
    if channel.rank == 0:
        return "the cutoff finds no signal direction"
    if channel.rank == channel.num_modes and not allow_full:
        return "the cutoff finds no reservoir: every direction is signal"
    return ""


def _cosine(product: float, square: float, other: float) -> float:
    """Compute a cosine from sums."""
    return ratio(product, (square * other) ** 0.5)


def _spectral_gate(motions: Float[Tensor, "modes fields examples"], channel: Channel, strictness: float, batch_size: int) -> SpectralGate:
    """Apply the leave-one-out rule to the motion along every direction."""
    squared_mean, variance = moments_over_examples(motions.transpose(1, 2))
    snr = squared_mean * max(1, batch_size - 1) / variance
    is_open = squared_mean * max(1, batch_size - 1) > strictness * variance
    return SpectralGate(
        rank=int(is_open.sum()),
        in_signal=int(is_open[: channel.rank].sum()),
        cutoff_rank=channel.rank,
        num_modes=channel.num_modes,
        batch_size=batch_size,
        signal_to_noise=snr,
    )
