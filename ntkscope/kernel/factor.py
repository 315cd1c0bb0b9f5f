"""The Jacobian of one block of examples, by parameter, in the form each parameter is cheapest in.

`OuterFactor`: output gradients and activations, whose outer products are never formed until a contraction asks for them.
Rows: the gradients themselves, for parameters that are smaller than their factors (convolutions over many pixels, norms, biases).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class OuterFactor:
    """Gradients of one parameter, or of some of its rows, as sums of outer products over positions (layout: `rules`)."""

    grads: Float[Tensor, "examples classes units positions"]
    inputs: Float[Tensor, "examples positions inputs"] | Int[Tensor, "examples positions"]  # activations, or tokens for one-hot ones
    part: slice  # rows of the parameter as a matrix (first axis, rest)
    transposed: bool  # the parameter is [inputs, units]

    @property
    def is_token(self) -> bool:
        """Whether the activations are one-hot, given by token numbers."""
        return self.inputs.ndim == 2

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.grads, self.inputs))

    def take(self, examples: slice) -> "OuterFactor":
        """Take some examples.

        Args:
            examples: Which.

        Returns:
            Views.
        """
        return OuterFactor(self.grads[examples], self.inputs[examples], self.part, self.transposed)

    def diagonal(self, precond: Tensor) -> Tensor:
        """Cut M for this factor out of M for the parameter.

        Args:
            precond: Shaped as the parameter.

        Returns:
            Shape `(units, inputs)`.
        """
        matrix = precond.flatten(1) if precond.ndim > 1 else precond[:, None]
        return matrix[self.part].T if self.transposed else matrix[self.part]


@dataclass(frozen=True)
class FactoredJacobian:
    """J of one block of examples.

    Attributes:
        outputs: Detached.
        factors: By parameter, for those kept in factors.
        rows: By parameter, for all others that reach the output.
        shapes: Of all parameters of the kernel.
        dtype: Of the factors.
    """

    outputs: Float[Tensor, "examples classes"]
    factors: dict[str, list[OuterFactor]]
    rows: dict[str, Float[Tensor, "examples classes columns"]]
    shapes: dict[str, torch.Size]
    dtype: torch.dtype

    @property
    def num_examples(self) -> int:
        """N."""
        return self.outputs.shape[0]

    @property
    def num_classes(self) -> int:
        """C."""
        return self.outputs.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        held = sum(factor.num_bytes for parts in self.factors.values() for factor in parts)
        return held + sum(row.numel() * row.element_size() for row in self.rows.values())

    def pull_back(self, weights: Float[Tensor, "examples classes"]) -> dict[str, Tensor]:
        """Compute Jᵀ weights (the vector-Jacobian product).

        Args:
            weights: One weight per output.

        Returns:
            Gradients by parameter, shaped as it; parameters that reach no output are left out.
        """
        scale = weights.to(self.dtype)
        found = {name: torch.einsum("ic,icp->p", scale, rows).view(self.shapes[name]) for name, rows in self.rows.items()}
        for name, parts in self.factors.items():
            total = self.outputs.new_zeros(self.shapes[name], dtype=self.dtype)
            matrix = total.view(len(total), -1)
            for factor in parts:
                grads = torch.einsum("ic,icut->iut", scale, factor.grads)
                if factor.is_token:
                    matrix.index_add_(0, factor.inputs.flatten(), grads.mT.flatten(0, 1))
                else:
                    product = torch.einsum("iut,itk->uk", grads, factor.inputs)
                    matrix[factor.part] += product.T if factor.transposed else product
            found[name] = total
        return found

    def push_forward(self, tangents: Mapping[str, Tensor]) -> Float[Tensor, "examples classes"]:
        """Compute J t, the motion of the outputs when the parameters move along `tangents` (the Jacobian-vector product).

        Args:
            tangents: Directions by parameter name, shaped as the parameters.

        Returns:
            Motion of every output.
        """
        motion = torch.zeros_like(self.outputs, dtype=self.dtype)
        for name, rows in self.rows.items():
            motion += rows @ tangents[name].to(motion).flatten()
        for name, parts in self.factors.items():
            for factor in parts:
                direction = factor.diagonal(tangents[name].to(motion))  # [units, inputs]
                pushed = direction.T[factor.inputs] if factor.is_token else factor.inputs @ direction.T  # [examples, positions, units]
                motion += torch.einsum("icut,itu->ic", factor.grads, pushed)
        return motion
