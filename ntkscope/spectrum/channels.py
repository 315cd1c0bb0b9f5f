"""Signal channel and reservoir."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._display import Displayed
from ntkscope.spectrum.cutoffs import Cutoff
from ntkscope.spectrum.eigen import Spectrum


@dataclass(frozen=True)
class ChannelSplit(Displayed):
    """A split of the output directions, in the coordinates of R (theory.md section 5).

    Attributes:
        rule: The cutoff rule.
        threshold: ω above which a direction is signal; ω of the last signal direction for rules that give a rank.
        signal_rank: r, number of signal directions: the leading ones.
        num_modes: dim R.
        signal_basis: Orthonormal basis of the signal channel, as columns.
        reservoir_basis: That of the reservoir.
    """

    rule: str
    threshold: float
    signal_rank: int
    num_modes: int
    signal_basis: Float[Tensor, "modes signal"]
    reservoir_basis: Float[Tensor, "modes reservoir"]

    def signal_projector(self) -> Float[Tensor, "modes modes"]:
        """Form Π.

        Returns:
            Symmetric, idempotent; I − Π projects onto the reservoir.
        """
        return self.signal_basis @ self.signal_basis.T

    def reservoir_part(self, residual: Float[Tensor, "modes ..."]) -> Float[Tensor, "modes ..."]:
        """Project onto the reservoir: (I − Π) h.

        Args:
            residual: Whitened gradient.

        Returns:
            Its reservoir part.
        """
        return self.reservoir_basis @ (self.reservoir_basis.T @ residual)


def split_channels(spectrum: Spectrum, cutoff: Cutoff) -> ChannelSplit:
    """Split at a cutoff; the signal channel is spanned by the `cutoff.rank` leading directions, or those that the rule selected.

    Args:
        spectrum: The spectrum.
        cutoff: A verdict with a rank.

    Returns:
        Two orthonormal bases that span R together.

    Raises:
        ValueError: If the cutoff has no rank.
    """
    if cutoff.rank is None:
        raise ValueError(f"cutoff {cutoff.rule!r} has no rank: {cutoff.note}")
    rank = cutoff.rank
    threshold = cutoff.threshold
    if threshold is None:
        threshold = float(spectrum.eigvals[rank - 1]) if rank else float("inf")
    is_signal = torch.arange(len(spectrum.eigvals)) < rank if cutoff.selected is None else cutoff.selected
    return ChannelSplit(
        rule=cutoff.rule,
        threshold=threshold,
        signal_rank=rank,
        num_modes=len(spectrum.eigvals),
        signal_basis=spectrum.eigvecs[:, is_signal],
        reservoir_basis=spectrum.eigvecs[:, ~is_signal],
    )


def example_energy(coordinates: Float[Tensor, "modes ..."], owner: Tensor, num_examples: int) -> Float[Tensor, " examples"]:
    """Sum squared coordinates by example.

    Args:
        coordinates: A vector in the coordinates of R.
        owner: Example of each coordinate.
        num_examples: n.

    Returns:
        ‖[·]_i‖² for every example.
    """
    squares = coordinates.reshape(len(coordinates), -1).square().sum(dim=1)
    return torch.zeros(num_examples, dtype=coordinates.dtype).index_add(0, owner, squares)
