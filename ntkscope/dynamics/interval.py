"""One interval of training with constant kernel and loss Hessian, exactly (theory.md section 4).

With K = L Lᵀ and Lᵀ B L = Q diag(s) Qᵀ, put X = L Q. Then K = X Xᵀ, Xᵀ B X = diag(s), and over a length Δ

    W_step = Δ X φ(2Δs) Xᵀ        D_step = Δ X φ(Δs) Xᵀ        P_step = I − B D_step        E = Δ (I − Δ B X ψ(Δs) Xᵀ)

with φ(z) = (1 − e^{−z})/z, ψ(z) = (1 − φ(z))/z and χ(z) = (½ − ψ(z))/z. No inverse of B or of an eigenvalue appears, and any Δ is stable.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._checks import InputError
from ntkscope._eigh import eigh

SERIES_BELOW = 1e-2


@dataclass(frozen=True)
class Interval:
    """A factored interval."""

    factor: Float[Tensor, "outputs rank"]  # X
    rates: Float[Tensor, " rank"]  # s, eigenvalues of B^½ K B^½, nonnegative
    hessian_blocks: Float[Tensor, "examples classes classes"]
    elapsed: float  # Δ, optimizer time

    def apply_hessian(self, columns: Float[Tensor, "outputs columns"]) -> Float[Tensor, "outputs columns"]:
        """Compute B times columns, block by block.

        Args:
            columns: Any columns.

        Returns:
            The product.
        """
        num_examples, num_classes, _ = self.hessian_blocks.shape
        return torch.bmm(self.hessian_blocks, columns.view(num_examples, num_classes, -1)).view(columns.shape)

    def coordinates(self, columns: Float[Tensor, "outputs columns"]) -> Float[Tensor, "rank columns"]:
        """Compute Xᵀ times columns: what every step below is linear in.

        Args:
            columns: Any columns.

        Returns:
            The product.
        """
        return self.factor.T @ columns

    def displace(self, coordinates: Float[Tensor, "rank columns"]) -> Float[Tensor, "outputs columns"]:
        """Compute D_step times the columns with these coordinates.

        Args:
            coordinates: From `coordinates`.

        Returns:
            Train motion per unit of minus gradient.
        """
        return self.factor @ (self.elapsed * phi(self.elapsed * self.rates)[:, None] * coordinates)

    def dissipate(self, coordinates: Float[Tensor, "rank columns"]) -> Float[Tensor, "columns columns"]:
        """Compute columnsᵀ W_step columns.

        Args:
            coordinates: From `coordinates`.

        Returns:
            Symmetric positive semidefinite by construction.
        """
        half = (self.elapsed * phi(2 * self.elapsed * self.rates)).sqrt()[:, None] * coordinates
        return half.T @ half

    def average(self, columns: Float[Tensor, "outputs columns"]) -> Float[Tensor, "outputs columns"]:
        """Compute E times columns, E = ∫ e^{−τBK} dτ.

        Args:
            columns: Any columns.

        Returns:
            The product.
        """
        weights = self.elapsed * psi(self.elapsed * self.rates)[:, None]
        return self.elapsed * (columns - self.apply_hessian(self.factor @ (weights * self.coordinates(columns))))

    def average_transposed(self, columns: Float[Tensor, "outputs columns"]) -> Float[Tensor, "outputs columns"]:
        """Compute Eᵀ times columns.

        Args:
            columns: Any columns.

        Returns:
            The product.
        """
        weights = self.elapsed * psi(self.elapsed * self.rates)[:, None]
        return self.elapsed * (columns - self.factor @ (weights * self.coordinates(self.apply_hessian(columns))))

    def average_twice(self, columns: Float[Tensor, "outputs columns"]) -> Float[Tensor, "outputs columns"]:
        """Compute ∫ E(τ) dτ over the interval times columns: what a constant forcing adds to ∫ g dτ.

        Args:
            columns: Any columns.

        Returns:
            The product.
        """
        weights = self.elapsed * chi(self.elapsed * self.rates)[:, None]
        return self.elapsed**2 * (0.5 * columns - self.apply_hessian(self.factor @ (weights * self.coordinates(columns))))


def factor_interval(
    gram: Float[Tensor, "outputs outputs"],
    hessian_blocks: Float[Tensor, "examples classes classes"],
    elapsed: float,
    *,
    negative_tolerance: float = 1e-10,
    device: torch.device | str | None = None,
) -> Interval:
    """Factor an interval's average kernel and Hessian.

    Args:
        gram: Average kernel K, symmetric positive semidefinite.
        hessian_blocks: Average Hessian blocks B_i, positive semidefinite.
        elapsed: Length Δ of the interval in optimizer time, `>= 0`.
        negative_tolerance: Negative eigenvalues of K are clamped to zero down to this share of the largest.
        device: Where to decompose.

    Returns:
        The factored interval, float64 on the CPU.

    Raises:
        InputError: If `elapsed` is negative, or K has an eigenvalue below the tolerance.
    """
    if not elapsed >= 0:
        raise InputError(f"Time must not run backwards between snapshots, got an interval of {elapsed:g}. Are they of one run, in order?")
    blocks = hessian_blocks.to("cpu", torch.float64)
    scale = blocks[0, 0, 0]
    if torch.equal(blocks, (scale * torch.eye(blocks.shape[1], dtype=torch.float64)).expand_as(blocks)):
        # B is a multiple of the identity (squared loss): Lᵀ B L is diagonal already.
        factor, eigvals = _root(gram, negative_tolerance, device)
        return Interval(factor, scale * eigvals, blocks, elapsed)
    # Any factor will do here: a triangular one takes a tenth of the time, where rounding leaves the kernel positive definite.
    triangular, failed = torch.linalg.cholesky_ex(0.5 * (gram + gram.T).to("cpu", torch.float64))
    factor = triangular if not int(failed) else _root(gram, negative_tolerance, device)[0]
    unrotated = Interval(factor, factor.new_zeros(factor.shape[1]), blocks, elapsed)
    rates, rotation = eigh(factor.T @ unrotated.apply_hessian(factor), device=device)
    return Interval(factor @ rotation, rates.clamp(min=0.0), blocks, elapsed)


def _root(
    gram: Float[Tensor, "outputs outputs"], negative_tolerance: float, device: torch.device | str | None
) -> tuple[Float[Tensor, "outputs rank"], Float[Tensor, " rank"]]:
    """Factor K = L Lᵀ by its eigenvectors, and return L with the positive eigenvalues."""
    eigvals, eigvecs = eigh(gram, device=device)
    largest = max(float(eigvals[0]), 0.0)
    if float(eigvals[-1]) < -negative_tolerance * largest or largest == 0.0 > float(eigvals[-1]):
        raise InputError(
            f"A kernel must be positive semidefinite, got an eigenvalue {float(eigvals[-1]):.2e} beside a largest of {largest:.2e} "
            f"(tolerance {negative_tolerance:.0e}). The snapshot is damaged, or its kernel was computed in too low a precision."
        )
    kept = eigvals > 0
    return eigvecs[:, kept] * eigvals[kept].sqrt(), eigvals[kept]


def phi(z: Float[Tensor, " rank"]) -> Float[Tensor, " rank"]:
    """Compute (1 − e^{−z})/z, with φ(0) = 1.

    Args:
        z: Nonnegative.

    Returns:
        Values in (0, 1].
    """
    return torch.where(z > 0, -torch.expm1(-z) / torch.where(z > 0, z, 1.0), 1.0)


def psi(z: Float[Tensor, " rank"]) -> Float[Tensor, " rank"]:
    """Compute (1 − φ(z))/z, with ψ(0) = ½.

    Args:
        z: Nonnegative.

    Returns:
        Values in (0, ½].
    """
    small = z < SERIES_BELOW
    return torch.where(small, _series(z, 2), (1 - phi(z)) / torch.where(small, 1.0, z))


def chi(z: Float[Tensor, " rank"]) -> Float[Tensor, " rank"]:
    """Compute (½ − ψ(z))/z, with χ(0) = 1/6.

    Args:
        z: Nonnegative.

    Returns:
        Values in (0, 1/6].
    """
    small = z < 10 * SERIES_BELOW
    return torch.where(small, _series(z, 3), (0.5 - psi(z)) / torch.where(small, 1.0, z))


def _series(z: Float[Tensor, " rank"], offset: int) -> Float[Tensor, " rank"]:
    """Sum Σ (−z)^k / (k + offset)!: the closed forms cancel for small z, and twelve terms are exact to rounding there."""
    total = torch.zeros_like(z)
    for k in range(12):
        total = total + (-z) ** k / math.factorial(k + offset)
    return total
