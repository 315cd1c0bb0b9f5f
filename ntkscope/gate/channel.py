"""The signal channel at the end of a window, where an audited step acts (theory.md section 7)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope.dynamics.dissipation import Dissipation
from ntkscope.spectrum.eigen import whitened_propagator
from ntkscope.spectrum.whitening import Whitening


@dataclass(frozen=True)
class Channel:
    """Directions at the window's end, in the coordinates of R: signal first.

    A direction at the end is a left singular vector of P̃; the smaller its singular value, the less of the residual is left there.

    Attributes:
        whitening: Of B_s, the loss Hessian at the window's start.
        basis: Left singular vectors of P̃ as columns, singular values ascending.
        rank: r; the first r are signal.
    """

    whitening: Whitening
    basis: Float[Tensor, "modes modes"]
    rank: int

    @property
    def num_modes(self) -> int:
        """Dimension of R."""
        return len(self.basis)

    def rows_per_example(self, num_classes: int) -> int:
        """Say how an example's outputs are stacked: C rows each, or one in the trace form, where classes are columns.

        Args:
            num_classes: C.

        Returns:
            C or 1.
        """
        return min(self.whitening.root.shape[1], num_classes)

    def motion(self, motions: Float[Tensor, "examples classes columns"]) -> Float[Tensor, "modes fields columns"]:
        """Write output motions in the channel's directions: Vᵀ B_s^½ d.

        Args:
            motions: One motion of all outputs per column.

        Returns:
            Coordinates; `fields` is 1, or C in the trace form. The first `rank` rows are the signal part.
        """
        num_examples, num_classes, num_columns = motions.shape
        fields = num_classes // self.rows_per_example(num_classes)
        stacked = motions.double().reshape(num_examples * num_classes // fields, fields * num_columns)
        return (self.basis.T @ self.whitening.motion(stacked)).view(-1, fields, num_columns)

    def signal_gradient(self, gradient: Float[Tensor, "examples classes"]) -> Float[Tensor, "examples classes"]:
        """Project an output gradient onto the signal channel: B_s^½ Π B_s^{†½} g.

        Args:
            gradient: g at the window's end.

        Returns:
            Π̂ g.
        """
        num_examples, num_classes = gradient.shape
        stacked = gradient.double().reshape(num_examples * self.rows_per_example(num_classes), -1)
        signal = self.basis[:, : self.rank]
        coordinates = signal @ (signal.T @ self.whitening.gradient(stacked))
        return self.whitening.gradient_back(coordinates).view(num_examples, num_classes)


def channel_at(state: Dissipation, whitening: Whitening, rank: int) -> Channel:
    """Find the channel at the end of a window.

    Args:
        state: Operators of the window.
        whitening: Of B_s.
        rank: Number of signal directions, from a cutoff on the window's ω.

    Returns:
        The channel.

    Source:
        theory.md section 7: there the left singular vectors of P̃; the right ones, which order ω, are on the window's start.
    """
    left, _, _ = torch.linalg.svd(whitened_propagator(state, whitening))
    return Channel(whitening, left.flip(1).contiguous(), rank)
