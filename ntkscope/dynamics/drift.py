"""How far the kernel has moved, and whether a frozen one would have done (theory.md sections 5 and 8)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._display import Displayed

LAZY_BELOW = 0.1
CENTERED_FLOOR = 1e-24  # of the kernels before centering: below it centering leaves rounding


@dataclass(frozen=True)
class Drift(Displayed):
    """Kernel drift.

    Attributes:
        kernel: "plain" (M = I) or "realized" (with the optimizer's M).
        relative: ‖K_j − K_0‖ / ‖K_0‖ (Frobenius) at every snapshot, against the first of the window.
        max: Largest inside the window.
        final: At the window's end.
        velocity: ‖K_j − K_{j−1}‖ / (‖K_{j−1}‖ Δτ) at every snapshot, per optimizer time; NaN at the first.
        alignment_start: Centered alignment of K_tr with that at the window's start, in [0, 1].
        alignment_targets: Centered alignment of K_tr with y yᵀ; NaN where targets are no labels or numbers.
    """

    kernel: str
    relative: Float[Tensor, " snapshots"]
    max: float
    final: float
    velocity: Float[Tensor, " snapshots"]
    alignment_start: Float[Tensor, " snapshots"]
    alignment_targets: Float[Tensor, " snapshots"]


@dataclass(frozen=True)
class Regime:
    """Whether training was lazy.

    Attributes:
        name: "lazy", "feature learning" or "not judged".
        reason: One sentence with the number.
    """

    name: str
    reason: str


def centered_alignment(first: Float[Tensor, "examples examples"], second: Float[Tensor, "examples examples"]) -> float:
    """Compute ⟨HAH, HBH⟩ / (‖HAH‖ ‖HBH‖), H = I − 11ᵀ/n: 1 for kernels that differ by a factor and a constant.

    Args:
        first: Symmetric positive semidefinite A.
        second: Symmetric positive semidefinite B.

    Returns:
        Alignment in [0, 1]; NaN where a centered kernel vanishes.

    Source:
        Cortes, Mohri & Rostamizadeh (2012), "Algorithms for learning kernels based on centered alignment".
    """
    a, b = _centered(first), _centered(second)
    norms = float(torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
    floor = CENTERED_FLOOR * float(torch.linalg.vector_norm(first) * torch.linalg.vector_norm(second))
    return float((a * b).sum()) / norms if norms > floor else math.nan


def _centered(kernel: Tensor) -> Tensor:
    """Take the mean out of rows and columns."""
    half = kernel - kernel.mean(dim=0, keepdim=True)
    return half - half.mean(dim=1, keepdim=True)


def frozen_query_motion(
    kernel: Float[Tensor, "outputs outputs"],
    cross: Float[Tensor, "query_outputs outputs"],
    outputs: Float[Tensor, "examples classes"],
    gradient_of: Callable[[Tensor], Tensor],
    elapsed: float,
) -> Float[Tensor, "query_outputs ..."]:
    """Predict the test motion with the kernel frozen: du/dτ = −K_0 g(u), with the true g.

    Args:
        kernel: K_0; one row per output, or per example in the trace form.
        cross: K_QS at the same moment.
        outputs: u at the start.
        gradient_of: g, from outputs of shape (examples, classes).
        elapsed: Optimizer time.

    Returns:
        Motion of the query outputs; in the trace form one column per class.
    """
    start = outputs.double()
    shape = (len(kernel), -1)

    # The state is a = ∫ g dτ: outputs are u_s − K_0 a, and the test motion is −K_QS a.
    def velocity(_: float, integral: np.ndarray) -> np.ndarray:
        moved = start - (kernel @ torch.from_numpy(integral).view(shape)).view(start.shape)
        return gradient_of(moved).flatten().numpy()

    scale = float(torch.linalg.vector_norm(gradient_of(start))) * elapsed
    solution = scipy.integrate.solve_ivp(velocity, (0.0, elapsed), np.zeros(start.numel()), rtol=1e-6, atol=1e-9 * max(scale, 1e-300))
    motion = -cross @ torch.from_numpy(solution.y[:, -1].copy()).view(shape)
    return motion.squeeze(1) if len(kernel) == start.numel() else motion


def judge_regime(error: float) -> Regime:
    """Call training lazy only if a frozen kernel predicts the test motion to within 10 %.

    Args:
        error: Relative error of that prediction.

    Returns:
        The verdict.
    """
    name = "lazy" if error < LAZY_BELOW else "feature learning"
    return Regime(
        name,
        f"the kernel frozen at the window's start predicts the test motion with a relative error of {error:.1%} (lazy: below 10 %)",
    )
