"""The Jacobian of one block of examples, by parameter, in the form each parameter is cheapest in.

`OuterFactor`: output gradients and activations, whose outer products are never formed until a contraction asks for them.
Rows: the gradients themselves, for parameters that are smaller than their factors (convolutions over many pixels, norms, biases).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROUNDING = 16  # times eps: by how much classes may differ in the pattern of one unit and still be taken to share it
SEPARATED_AT_ONCE = 8  # examples, whose temporaries fit in cache


@dataclass(frozen=True)
class OuterFactor:
    """Gradients of one parameter, or of some of its rows, as sums of outer products over positions (layout: `rules`)."""

    grads: Float[Tensor, "examples classes units amplitudes"]  # one per position; one in all where `patterns` are given
    inputs: Float[Tensor, "examples positions inputs"] | Int[Tensor, "examples positions"]  # activations, or tokens for one-hot ones
    part: slice  # rows of the parameter as a matrix (first axis, rest)
    transposed: bool  # the parameter is [inputs, units]
    patterns: Float[Tensor, "examples units positions"] | None = None  # of each unit, times `grads`

    @property
    def is_token(self) -> bool:
        """Whether the activations are one-hot, given by token numbers."""
        return self.inputs.ndim == 2

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        held = (self.grads, self.inputs, *(() if self.patterns is None else (self.patterns,)))
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def has_modes(self) -> bool:
        """Whether every unit has one pattern of inputs, whatever the class: one position, or a separated factor."""
        return self.patterns is not None or (self.grads.shape[3] == 1 and not self.is_token)

    def modes(self) -> Float[Tensor, "examples units inputs"]:
        """Sum the inputs over positions by each unit's pattern: the gradient of class c is `grads[:, c, :, 0]` times it.

        Returns:
            Shape `(n, u, k)`, or `(n, 1, k)` where all units share one position.
        """
        return self.inputs if self.patterns is None else self.patterns @ self.inputs

    def separated(self) -> "OuterFactor":
        """Split output gradients into class amplitudes and position patterns, where each unit's pattern is the same for all classes.

        So it is in the last convolution before a pooled linear head: the class only scales what a unit's pixels receive.

        Returns:
            The same gradients, to rounding; this factor itself where classes differ in more than that.
        """
        if self.is_token or self.patterns is not None or self.grads.shape[3] == 1 or self.grads.shape[1] == 1:
            return self
        parts = []
        for examples in self.grads.split(SEPARATED_AT_ONCE):
            found = _separate(examples)
            if found is None:  # most factors say so at once
                return self
            parts.append(found)
        amplitudes, patterns = (torch.cat(both) for both in zip(*parts, strict=True))
        return OuterFactor(amplitudes, self.inputs, self.part, self.transposed, patterns)

    def joined(self) -> "OuterFactor":
        """Undo `separated`.

        Returns:
            A factor without patterns.
        """
        if self.patterns is None:
            return self
        return OuterFactor(self.grads * self.patterns[:, None], self.inputs, self.part, self.transposed)

    def restricted(self, start: int, stop: int) -> "OuterFactor":
        """Keep some of the parameter's rows.

        Args:
            start: First row.
            stop: Row after the last; both inside `part`.

        Returns:
            Views.
        """
        if (start, stop) == (self.part.start, self.part.stop):
            return self
        rows, part = slice(start - self.part.start, stop - self.part.start), slice(start, stop)
        if self.transposed:  # never of tokens: their part is the whole table
            return OuterFactor(self.grads, self.inputs[:, :, rows], part, True, self.patterns)
        patterns = None if self.patterns is None else self.patterns[:, rows]
        return OuterFactor(self.grads[:, :, rows], self.inputs, part, False, patterns)

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
                if factor.patterns is not None:
                    grads = grads * factor.patterns
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
                grads = factor.grads
                if factor.patterns is not None:
                    pushed = (factor.patterns * pushed.mT).sum(dim=2)[:, None]  # [examples, 1, units]
                motion += torch.einsum("icut,itu->ic", grads, pushed)
        return motion


def _separate(grads: Tensor) -> tuple[Tensor, Tensor] | None:
    """Factor each unit's (classes, positions) matrix into an outer product, if it is one to rounding."""
    # The pivot of each example's unit: its strongest class and, there, the strongest position. Their row and column are the factors.
    row = grads.abs().amax(dim=3).argmax(dim=1)  # [examples, units]
    pattern = grads.gather(1, row[:, None, :, None].expand(-1, -1, -1, grads.shape[3]))  # [examples, 1, units, positions]
    column = pattern.abs().argmax(dim=3, keepdim=True)
    pivot = pattern.gather(3, column)
    amplitudes = grads.gather(3, column.expand(-1, grads.shape[1], -1, -1)) / torch.where(pivot == 0, 1.0, pivot)
    gap = torch.addcmul(grads, amplitudes, pattern, value=-1).abs_().amax(dim=(1, 3))
    if bool((gap > ROUNDING * torch.finfo(grads.dtype).eps * pivot[:, 0, :, 0].abs()).any()):
        return None
    return amplitudes, pattern[:, 0]
