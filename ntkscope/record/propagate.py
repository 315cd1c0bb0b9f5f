"""One gradient followed over one interval with matrix-vector products only, for deciding when the next snapshot is due.

With constant K and B the flow is g(τ) = e^{−τA} g, A = BK. A is self-adjoint in the inner product ⟨x, y⟩ = xᵀ K y, so Lanczos in that
product gives V with Vᵀ K V = 1 and a tridiagonal T = Vᵀ K A V, and with ρ = ‖g‖_K

    ∫ g dτ = ρ V Δφ(ΔT) e₁        ∫ gᵀ K g dτ = ρ² Δ [φ(2ΔT)]₁₁        φ(z) = (1 − e^{−z})/z

up to the kernel of K, which neither moves outputs nor dissipates. The number of products grows like √(Δ λ_max), not like N.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy  # its subpackages load when first used
import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope.dynamics.interval import phi

MAX_PRODUCTS = 300
CHECK_EVERY = 5
RESOLUTION = 1e-7  # of the motion, in the last Lanczos vector: far below any tolerance asked for
ROUNDING = 1e-12  # of the largest rate, squared: what is left of a Lanczos vector once it is rounding error

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Propagated:
    """Where an interval takes a gradient.

    Attributes:
        gradient: At its end.
        energy: Loss dissipated on the way.
    """

    gradient: Float[Tensor, "examples classes"]
    energy: float


def propagate(gradient: Float[Tensor, "examples classes"], apply_kernel: Linear, apply_hessian: Linear, elapsed: float) -> Propagated:
    """Follow dg/dτ = −B K g without forcing.

    Args:
        gradient: g at the start, float64.
        apply_kernel: K times an array shaped as g; symmetric positive semidefinite.
        apply_hessian: B times such an array; symmetric positive semidefinite.
        elapsed: Length of the interval, `>= 0`.

    Returns:
        Gradient at the end, and energy.

    Source:
        theory.md section 4 for φ; Lanczos in the K inner product is ours.
    """
    pushed = apply_kernel(gradient)  # K v
    norm = float((gradient * pushed).sum())
    if elapsed == 0.0 or norm <= 0.0:
        return Propagated(gradient, 0.0)
    scale = norm**0.5
    basis, images = [gradient / scale], [pushed / scale]  # V and K V
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for count in range(1, min(MAX_PRODUCTS, gradient.numel()) + 1):
        moved = apply_hessian(images[-1])  # A v
        diagonal.append(float((images[-1] * moved).sum()))
        # Twice: once leaves rounding errors that grow with every vector.
        stacked, stacked_images = torch.stack(basis).flatten(1), torch.stack(images).flatten(1)
        for _ in range(2):
            moved = moved - (stacked.T @ (stacked_images @ moved.flatten())).view_as(moved)
        image = apply_kernel(moved)
        square = float((moved * image).sum())
        is_exhausted = square <= ROUNDING * max(diagonal) ** 2
        if is_exhausted or (count % CHECK_EVERY == 0 and _is_resolved(diagonal, off_diagonal, elapsed)):
            break
        off_diagonal.append(square**0.5)
        basis.append(moved / off_diagonal[-1])
        images.append(image / off_diagonal[-1])
    weights, energy = _integrate(diagonal, off_diagonal[: len(diagonal) - 1], elapsed)
    travelled = torch.einsum("m,mnc->nc", scale * weights, torch.stack(images[: len(diagonal)]))  # K ∫ g dτ
    return Propagated(gradient - apply_hessian(travelled), norm * energy)


def _integrate(diagonal: list[float], off_diagonal: list[float], elapsed: float) -> tuple[Tensor, float]:
    """Compute Δφ(ΔT) e₁ and Δ[φ(2ΔT)]₁₁."""
    eigvals, eigvecs = scipy.linalg.eigh_tridiagonal(np.array(diagonal), np.array(off_diagonal))
    rates = torch.from_numpy(eigvals).clamp(min=0.0)
    vectors = torch.from_numpy(eigvecs)
    first = vectors[0]
    weights = vectors @ (elapsed * phi(elapsed * rates) * first)
    return weights, float(elapsed * (phi(2 * elapsed * rates) * first.square()).sum())


def _is_resolved(diagonal: list[float], off_diagonal: list[float], elapsed: float) -> bool:
    """Say whether further vectors would add nothing: the last ones take no part in the motion."""
    weights, _ = _integrate(diagonal, off_diagonal, elapsed)
    return float(weights[-2:].abs().max()) <= RESOLUTION * float(torch.linalg.vector_norm(weights))
