"""How far the kernel has moved, and whether a frozen one would have done (theory.md sections 5 and 8)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._display import Displayed

LAZY_BELOW = 0.1


@dataclass(frozen=True)
class Drift(Displayed):
    """Kernel drift.

    Attributes:
        kernel: "plain" (M = I) or "realized" (with the optimizer's M).
        relative: ‖K_j − K_0‖ / ‖K_0‖ (Frobenius) at every snapshot, against the first of the window.
        max: Largest inside the window.
        final: At the window's end.
    """

    kernel: str
    relative: Float[Tensor, " snapshots"]
    max: float
    final: float


@dataclass(frozen=True)
class Regime:
    """Whether training was lazy.

    Attributes:
        name: "lazy", "feature learning" or "not judged".
        reason: One sentence with the number.
    """

    name: str
    reason: str


def frozen_query_motion(
    kernel: Float[Tensor, "outputs outputs"],
    cross: Float[Tensor, "query_outputs outputs"],
    outputs: Float[Tensor, "examples classes"],
    gradient_of: Callable[[Tensor], Tensor],
    elapsed: float,
) -> Float[Tensor, " query_outputs"]:
    """Predict the test motion with the kernel frozen: du/dτ = −K_0 g(u), with the true g.

    Args:
        kernel: K_0.
        cross: K_QS at the same moment.
        outputs: u at the start.
        gradient_of: g, from outputs of shape (examples, classes).
        elapsed: Optimizer time.

    Returns:
        Motion of the query outputs.
    """
    start = outputs.double()

    # The state is a = ∫ g dτ: outputs are u_s − K_0 a, and the test motion is −K_QS a.
    def velocity(_: float, integral: np.ndarray) -> np.ndarray:
        moved = start - (kernel @ torch.from_numpy(integral)).view(start.shape)
        return gradient_of(moved).flatten().numpy()

    scale = float(torch.linalg.vector_norm(gradient_of(start))) * elapsed
    solution = scipy.integrate.solve_ivp(velocity, (0.0, elapsed), np.zeros(start.numel()), rtol=1e-4, atol=1e-8 * max(scale, 1e-300))
    return -cross @ torch.from_numpy(solution.y[:, -1])


def judge_regime(predicted: Float[Tensor, " query_outputs"], observed: Float[Tensor, " query_outputs"]) -> Regime:
    """Call training lazy only if a frozen kernel predicts the test motion to within 10 %.

    Args:
        predicted: From `frozen_query_motion`.
        observed: What happened.

    Returns:
        The verdict.
    """
    norm = float(torch.linalg.vector_norm(observed))
    if norm == 0.0:
        return Regime("not judged", "the query outputs did not move")
    error = float(torch.linalg.vector_norm(predicted - observed)) / norm
    name = "lazy" if error < LAZY_BELOW else "feature learning"
    return Regime(
        name,
        f"the kernel frozen at the window's start predicts the test motion with a relative error of {error:.1%} (lazy: below 10 %)",
    )
