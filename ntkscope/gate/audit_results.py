"""What an audit of the gate found: at one step, in one layer, over the run."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ntkscope._display import Displayed
from ntkscope.gate.compared import Compared

# The figures that have a null, by their field name: what they measure, in words.
FIGURES = {
    "auroc": "chance that an open parameter has more signal than a closed one",
    "rank_correlation": "rank correlation of gate and signal share of parameters",
    "kappa": "Cohen's kappa of gate and signal share of parameters",
    "precision": "share of the removed motion that lies in the reservoir",
    "recall": "share of the reservoir motion that is removed",
    "collateral": "share of the signal motion that is removed",
    "advantage": "recall minus collateral",
    "direction": "cosine of the gated step with the signal direction",
    "selectivity": "kernel kept on the signal channel over kernel kept on the reservoir",
}
SNR_EDGES = np.linspace(-6.0, 4.0, 51)  # log10 of m̂²/ŝ; what is outside is counted at the edge
SHARE_EDGES = np.linspace(0.0, 1.0, 41)
LAYER_FIGURES = ("auroc", "precision", "recall", "collateral", "advantage", "selectivity")


@dataclass(frozen=True)
class LayerAudit(Displayed):
    """One parameter tensor at one audited step; fields as in `StepAudit`.

    Attributes:
        open_share: Share of live parameters with q > ½ (hard: q = 1).
        num_live: Parameters with a column of J that is not zero.
        removed_share: ‖Δ‖² / ‖δ⁰‖² of this tensor alone.
        figures: By name, those of `LAYER_FIGURES`, with permutations within this tensor.
    """

    open_share: float
    num_live: int
    removed_share: float
    figures: dict[str, Compared]


@dataclass(frozen=True)
class SpectralGate(Displayed):
    """The gate's rule applied to eigendirections instead of parameters (theory.md section 7, item 5).

    Attributes:
        rank: Directions whose mean motion beats its noise over examples.
        in_signal: How many of them are among the cutoff's r.
        cutoff_rank: r.
        num_modes: dim R.
        batch_size: b of the rule mean² > (α/α_U) var / (b − 1).
        signal_to_noise: mean² (b − 1) / var for every direction, in the channel's order.
    """

    rank: int
    in_signal: int
    cutoff_rank: int
    num_modes: int
    batch_size: int
    signal_to_noise: Float[Tensor, " modes"]


@dataclass(frozen=True)
class StepAudit(Displayed):
    """All comparisons of theory.md section 7 at one step.

    Attributes:
        step: Optimizer step.
        rank: r, directions of the signal channel of the window that ends here.
        num_modes: dim R.
        open_share: Share of live parameters with q > ½ (hard: q = 1).
        mean_gate: Mean of q over live parameters.
        num_live: Parameters with a column of J that is not zero.
        num_dead: The others; they move no output of the probe and are in no figure.
        figures: By name, see `FIGURES`.
        ungated_direction: Cosine of the ungated step with the signal direction M⁰ Jᵀ Π̂ g, over live parameters.
        kept_signal: tr(ΠK^q) / tr(ΠK^1).
        kept_reservoir: The same on the reservoir.
        reservoir_motion: ‖Π_r δ⁰‖² / ‖δ⁰‖²: share of the ungated motion in the reservoir.
        decay_share: Share of the squared step of live and dead parameters that weight decay makes up; NaN if unknown.
        layers: By parameter tensor.
        spectral_gate: The rule in the eigenbasis.
        openness: Σ_k q_k M⁰_k J̃_ik² / Σ_k M⁰_k J̃_ik² of every direction (in the channel's order) in every tensor of `layers`; NaN where
            it has no part.
        layer_share: Share of every direction's kernel Σ_k M⁰_k J̃_ik² that each tensor of `layers` has; rows add up to 1, NaN where
            there is no kernel.
        density: Parameters by log₁₀ of gradient signal-to-noise m̂²/ŝ (rows) and signal share ρ (columns), see `SNR_EDGES`, `SHARE_EDGES`.
    """

    step: int
    rank: int
    num_modes: int
    open_share: float
    mean_gate: float
    num_live: int
    num_dead: int
    figures: dict[str, Compared]
    ungated_direction: float
    kept_signal: float
    kept_reservoir: float
    reservoir_motion: float
    decay_share: float
    layers: dict[str, LayerAudit]
    spectral_gate: SpectralGate
    openness: Float[Tensor, "modes tensors"]
    layer_share: Float[Tensor, "modes tensors"]
    density: Float[Tensor, "snr shares"]
