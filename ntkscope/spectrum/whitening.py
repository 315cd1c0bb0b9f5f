"""Coordinates of R = range B_s in which a gradient, a motion and the Gramian can be compared (theory.md section 5).

B_s is block-diagonal, B_i = U_i diag(b) U_iᵀ. A coordinate of R is one pair (i, k) with b_k > 0. Gradients carry B^{-½}, motions B^{+½}:

    gradient g  ->  b^{-½} Uᵀ g        motion d  ->  b^{+½} Uᵀ d        W  ->  2 b^{½} Uᵀ W U b^{½}        P  ->  b^{-½} Uᵀ P U b^{½}
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ntkscope._checks import InputError
from ntkscope.dynamics.form import is_softmax_like

RANK_TOLERANCE = 1e-12
OUTSIDE_TOLERANCE = 1e-8


@dataclass(frozen=True)
class Whitening:
    """The change of coordinates.

    Attributes:
        root: U_i diag(b^{½}), one column per candidate coordinate; columns outside R are zero.
        inverse_root: U_i diag(b^{-½}), likewise.
        is_kept: Which columns belong to R.
    """

    root: Float[Tensor, "examples classes columns"]
    inverse_root: Float[Tensor, "examples classes columns"]
    is_kept: Bool[Tensor, "examples columns"]

    @property
    def num_modes(self) -> int:
        """Dimension of R."""
        return int(self.is_kept.sum())

    @property
    def owner(self) -> Int[Tensor, " modes"]:
        """Example that each coordinate of R belongs to."""
        examples = torch.arange(len(self.is_kept))[:, None].expand(self.is_kept.shape)
        return examples[self.is_kept]

    def gradient(self, columns: Float[Tensor, "outputs columns"]) -> Float[Tensor, "modes columns"]:
        """Whiten output gradients: B^{†½} times columns.

        Args:
            columns: Gradients.

        Returns:
            Their coordinates in R.
        """
        return self._apply(self.inverse_root, columns)

    def motion(self, columns: Float[Tensor, "outputs columns"]) -> Float[Tensor, "modes columns"]:
        """Whiten output motions: B^{½} times columns.

        Args:
            columns: Motions.

        Returns:
            Their coordinates in R.
        """
        return self._apply(self.root, columns)

    def unexplained(self, gradient: Float[Tensor, "outputs ..."]) -> float:
        """Measure ‖(I − R) g‖ / ‖g‖, the share of a gradient outside the range of B.

        Args:
            gradient: Output gradient.

        Returns:
            Between 0 and 1.
        """
        columns = gradient.reshape(len(gradient), -1)
        norm = float(torch.linalg.vector_norm(gradient))
        return float(torch.linalg.vector_norm(columns - self.gradient_back(self.gradient(columns)))) / norm if norm > 0 else 0.0

    def gradient_back(self, coordinates: Float[Tensor, "modes columns"]) -> Float[Tensor, "outputs columns"]:
        """Turn coordinates in R into output gradients: B^{½} times them, the inverse of `gradient` on R.

        Args:
            coordinates: Whitened gradients.

        Returns:
            Output gradients.
        """
        return self._apply_transposed(self.root, coordinates)

    def motion_back(self, coordinates: Float[Tensor, "modes columns"]) -> Float[Tensor, "outputs columns"]:
        """Turn coordinates in R into output motions: B^{†½} times them, the inverse of `motion` on R.

        Args:
            coordinates: Whitened motions.

        Returns:
            Output motions.
        """
        return self._apply_transposed(self.inverse_root, coordinates)

    def _apply(self, root: Tensor, columns: Tensor) -> Tensor:
        """Apply Uᵀ with its scales, block by block, and drop what lies outside R."""
        num_examples, num_classes, _ = root.shape
        product = torch.bmm(root.mT, columns.reshape(num_examples, num_classes, -1))  # [examples, columns of root, columns]
        return product[self.is_kept]

    def _apply_transposed(self, root: Tensor, coordinates: Tensor) -> Tensor:
        """Apply U with its scales, block by block, to coordinates of R."""
        inside = coordinates.new_zeros(*self.is_kept.shape, coordinates.shape[1])
        inside[self.is_kept] = coordinates
        return torch.bmm(root, inside).flatten(0, 1)


def whiten(hessian_blocks: Float[Tensor, "examples classes classes"]) -> Whitening:
    """Find the range of B and its square roots.

    Where every block annihilates the all-ones vector (softmax), R is its orthogonal complement in each block, whatever the size of
    the eigenvalues there: saturated examples have tiny ones that still matter. Elsewhere eigenvalues up to 1e-12 of the largest are zero.

    Args:
        hessian_blocks: B_i at the start of the window.

    Returns:
        The whitening.

    Raises:
        InputError: If B is zero.
    """
    num_classes = hessian_blocks.shape[1]
    largest = float(hessian_blocks.abs().max())
    if largest == 0.0:
        raise InputError(
            "The loss has no curvature at the start of the window (B = 0), so Omega is not defined. Start the window elsewhere."
        )
    if is_softmax_like(hessian_blocks):
        ones = torch.ones(num_classes, dtype=hessian_blocks.dtype)
        basis = torch.linalg.qr(torch.cat([ones[:, None], torch.eye(num_classes, dtype=ones.dtype)[:, 1:]], dim=1)).Q[:, 1:]
        eigvals, rotations = torch.linalg.eigh(basis.T @ hessian_blocks @ basis)
        eigvecs, floor = basis @ rotations, 0.0
    else:
        eigvals, eigvecs = torch.linalg.eigh(hessian_blocks)
        floor = RANK_TOLERANCE * float(eigvals.max())
    is_kept = eigvals > floor
    safe = torch.where(is_kept, eigvals, 1.0)
    zero = torch.zeros_like(eigvecs)
    mask = is_kept[:, None, :]
    return Whitening(
        root=torch.where(mask, eigvecs * safe.sqrt()[:, None, :], zero),
        inverse_root=torch.where(mask, eigvecs / safe.sqrt()[:, None, :], zero),
        is_kept=is_kept,
    )
