"""How outputs are stacked: every output on its own (`full`), or one row per example with its classes as columns (`trace`).

The trace form stands for K ≈ (1/C) K_tr ⊗ I_C and B_i ≈ b_i I (theory.md section 4): one n x n problem for all classes. It is an
approximation. For softmax b_i = tr B_i / (C − 1) on the complement of the all-ones vector, where its gradients live anyway.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SOFTMAX_TOLERANCE = 1e-13


@dataclass(frozen=True)
class Form:
    """A way of stacking outputs.

    Attributes:
        is_trace: Whether classes share one kernel.
    """

    is_trace: bool

    def field(self, values: Float[Tensor, "examples classes"]) -> Float[Tensor, "outputs ..."]:
        """Stack a gradient or a motion.

        Args:
            values: One row per example.

        Returns:
            float64; one entry per output, or in the trace form the table as it is.
        """
        return values.double() if self.is_trace else values.double().flatten()

    def blocks(self, hessian: Float[Tensor, "examples classes classes"]) -> Float[Tensor, "examples block block"]:
        """Take what the form keeps of the loss Hessian.

        Args:
            hessian: Its blocks.

        Returns:
            The blocks, or in the trace form one number per example.
        """
        if not self.is_trace:
            return hessian
        num_classes = hessian.shape[1]
        free = num_classes - 1 if is_softmax_like(hessian) else num_classes
        return (hessian.diagonal(dim1=1, dim2=2).sum(dim=1) / free)[:, None, None]

    def self_influence(self, kernel: Float[Tensor, "outputs outputs"], num_examples: int, num_classes: int) -> Float[Tensor, " examples"]:
        """Sum the kernel's diagonal over each example's outputs.

        Args:
            kernel: In this form.
            num_examples: n.
            num_classes: C.

        Returns:
            Σ_c K[(i,c),(i,c)].
        """
        diagonal = kernel.diagonal()
        return num_classes * diagonal if self.is_trace else diagonal.view(num_examples, num_classes).sum(dim=1)

    def trace_kernel(
        self, kernel: Float[Tensor, "outputs outputs"], num_examples: int, num_classes: int
    ) -> Float[Tensor, "examples examples"]:
        """Sum the kernel over classes.

        Args:
            kernel: In this form.
            num_examples: n.
            num_classes: C.

        Returns:
            K_tr.
        """
        if self.is_trace:
            return num_classes * kernel
        return torch.einsum("icjc->ij", kernel.view(num_examples, num_classes, num_examples, num_classes))


def is_softmax_like(hessian: Float[Tensor, "examples classes classes"]) -> bool:
    """Say whether every block annihilates the all-ones vector, as that of a softmax does.

    Args:
        hessian: Loss Hessian blocks.

    Returns:
        True for softmax cross-entropy.
    """
    largest = float(hessian.abs().max())
    return hessian.shape[1] > 1 and float(hessian.sum(dim=2).abs().max()) <= SOFTMAX_TOLERANCE * largest
