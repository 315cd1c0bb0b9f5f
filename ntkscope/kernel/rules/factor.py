"""What a rule returns, and what a rule is."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntkscope.kernel.capture import LayerCall


@dataclass(frozen=True)
class PositionFactor:
    """One parameter's share of the Jacobian, or that of some of its rows, kept in two factors (layout: the package docstring)."""

    units: slice  # rows of the parameter, seen as a matrix (first axis, rest), that this factor covers
    activations: Float[Tensor, "examples positions inputs"]
    output_grads: Float[Tensor, "examples classes positions units"]

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.activations, self.output_grads))


@runtime_checkable
class Rule(Protocol):
    """A layer family."""

    def matches(self, module: nn.Module) -> bool:
        """Say whether the rule is exact for `module`.

        Args:
            module: A layer.

        Returns:
            Whether its own parameters can be taken.
        """
        ...

    def factors(self, call: LayerCall, output_grads: Tensor) -> dict[str, list[PositionFactor]]:
        """Factor the Jacobian of one call.

        Args:
            call: What the layer saw.
            output_grads: Gradient of each output class (summed over examples) with respect to the layer's output, classes on
                the first axis.

        Returns:
            Factors by the parameter's name inside the module (`weight`, `bias`).
        """
        ...


def merge_factors(factors: list[PositionFactor]) -> list[PositionFactor]:
    """Put the calls of one parameter side by side, so that their gradients add up.

    Args:
        factors: All factors of one parameter.

    Returns:
        One factor per row slice.
    """
    merged = []
    for units in {(factor.units.start, factor.units.stop): factor.units for factor in factors}.values():
        group = [factor for factor in factors if factor.units == units]
        if len(group) == 1:
            merged.append(group[0])
        else:
            activations = torch.cat([factor.activations for factor in group], dim=1)
            merged.append(PositionFactor(units, activations, torch.cat([factor.output_grads for factor in group], dim=2)))
    return merged


def bias_factor(output_grads: Float[Tensor, "examples classes positions units"]) -> PositionFactor:
    """Factor a bias: a weight whose single input is always one.

    Args:
        output_grads: Gradients with respect to the layer's output.

    Returns:
        The factor.
    """
    # Positions only add up, so add them here: one position, and the cheap contraction for every bias.
    summed = output_grads.sum(dim=2, keepdim=True)
    ones = summed.new_ones(summed.shape[0], 1, 1)
    return PositionFactor(slice(0, summed.shape[-1]), ones, summed)
