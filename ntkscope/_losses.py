"""Losses that have a name, at the scale theory.md section 1 gives them."""

from jaxtyping import Float
from torch import Tensor, nn

from ntkscope._types import LossFn


def squared(outputs: Float[Tensor, "examples classes"], targets: Tensor) -> Float[Tensor, ""]:
    """Compute ½‖u_i − y_i‖², mean over examples (theory.md section 1).

    Args:
        outputs: Model outputs.
        targets: Same shape.

    Returns:
        The loss.
    """
    return 0.5 * (outputs - targets).square().sum(dim=1).mean()


NAMED_LOSSES: dict[str, LossFn] = {
    "squared": squared,
    "mse": nn.functional.mse_loss,
    "cross_entropy": nn.functional.cross_entropy,
}
