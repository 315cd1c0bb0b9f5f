"""The loss as a function of outputs: value, gradient g and Hessian blocks B_i, at the scale the user trains with.

Φ is the user's callable on the whole probe, in float64. It must be convex and a sum over examples; both are checked.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntkscope._checks import InputError, UserError, check_choice, check_finite
from ntkscope._losses import NAMED_LOSSES
from ntkscope._types import LossFn

CONVEXITY_TOLERANCE = 1e-8


@dataclass(frozen=True)
class ProbeLoss:
    """A convex loss bound to the targets of one probe set."""

    name: str
    function: Callable[[Tensor], Tensor]  # outputs (float64) -> scalar
    targets: Tensor
    unbound: LossFn

    def value(self, outputs: Float[Tensor, "examples classes"]) -> float:
        """Evaluate Φ.

        Args:
            outputs: Model outputs.

        Returns:
            The loss.
        """
        with torch.no_grad():
            return float(self.function(outputs.double()))

    def rebind(self, targets: Tensor) -> "ProbeLoss":
        """Bind the same loss to other targets of the same shape.

        Args:
            targets: For example clean or shuffled ones.

        Returns:
            The loss of these targets.
        """
        held = targets.to(self.targets).reshape(self.targets.shape)
        return ProbeLoss(self.name, lambda predictions: self.unbound(predictions, held), held, self.unbound)

    def gradient(self, outputs: Float[Tensor, "examples classes"]) -> Float[Tensor, "examples classes"]:
        """Compute g = ∇Φ.

        Args:
            outputs: Model outputs.

        Returns:
            float64 gradient.
        """
        variable = outputs.detach().double().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.function(variable), variable)
        return gradient.detach()

    def hessian_blocks(self, outputs: Float[Tensor, "examples classes"]) -> Float[Tensor, "examples classes classes"]:
        """Compute the blocks B_i of ∇²Φ.

        Args:
            outputs: Model outputs.

        Returns:
            float64 symmetric blocks.

        Raises:
            InputError: If Φ couples examples, or is not convex here.
        """
        variable = outputs.detach().double().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.function(variable), variable, create_graph=True)
            columns = [_hessian_product(gradient, variable, c) for c in range(variable.shape[1])]
            blocks = torch.stack(columns, dim=2)
            self._check_no_coupling(gradient, variable, blocks)
        blocks = 0.5 * (blocks + blocks.mT)
        check_finite("The loss Hessian", blocks, "The loss must be twice differentiable at the outputs of the model.")
        eigvals = torch.linalg.eigvalsh(blocks)
        if float(eigvals.min()) < -CONVEXITY_TOLERANCE * float(eigvals.abs().max()):
            raise InputError(
                f"The loss must be convex in the outputs, but its Hessian has an eigenvalue {float(eigvals.min()):.2e} "
                f"(largest {float(eigvals.max()):.2e}). The dissipation theory does not cover it; use a convex loss for the analysis."
            )
        return blocks

    def mean_hessian_blocks(
        self, start: Float[Tensor, "examples classes"], stop: Float[Tensor, "examples classes"]
    ) -> Float[Tensor, "examples classes classes"]:
        """Average B along the segment between two outputs, by three-point Gauss quadrature (theory.md section 4).

        Args:
            start: Outputs at the earlier snapshot.
            stop: Outputs at the later one.

        Returns:
            float64 blocks.
        """
        offset = 0.5 * (3 / 5) ** 0.5
        first, last = start.detach().double(), stop.detach().double()
        points = ((0.5 - offset, 5 / 18), (0.5, 8 / 18), (0.5 + offset, 5 / 18))
        blocks = torch.zeros(*first.shape, first.shape[1], dtype=torch.float64, device=first.device)
        for position, weight in points:
            blocks += weight * self.hessian_blocks(torch.lerp(first, last, position))
        return blocks

    def _check_no_coupling(self, gradient: Tensor, variable: Tensor, blocks: Tensor) -> None:
        """Check B v against its blocks for one random v."""
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(variable.shape, generator=generator, dtype=torch.float64).to(variable.device)
        product = _product(gradient, variable, probe)
        gap = float(torch.linalg.vector_norm(product - torch.einsum("ncd,nd->nc", blocks, probe)))
        if gap > 1e-8 * float(torch.linalg.vector_norm(product)):
            raise InputError(
                f"The loss `{self.name}` couples examples: its Hessian is not block-diagonal (relative gap {gap:.1e}). "
                "Only losses that are a sum or mean over examples are covered."
            )


def bind_loss(loss: str | LossFn | nn.Module, targets: Tensor, outputs: Float[Tensor, "examples classes"]) -> ProbeLoss:
    """Bind a loss to the targets of the probe, and try it once on the outputs.

    Args:
        loss: "squared", "mse", "cross_entropy", a torch loss module, or a callable `(outputs, targets) -> scalar`.
        targets: What the loss takes.
        outputs: Model outputs on the probe.

    Returns:
        The bound loss, in float64.

    Raises:
        InputError: If the name is unknown, the shapes do not fit, or the loss is no finite scalar.
    """
    if isinstance(loss, str):
        check_choice("loss", loss, NAMED_LOSSES)
        name, function = loss, NAMED_LOSSES[loss]
    elif isinstance(loss, nn.Module):
        # A copy: class weights must be float64 here, and the user's module must stay as it is.
        name, function = type(loss).__name__, copy.deepcopy(loss).double()
    elif callable(loss):
        name, function = getattr(loss, "__name__", type(loss).__name__), loss
    else:
        raise InputError(f"`loss` must be one of {', '.join(map(repr, NAMED_LOSSES))}, a torch loss or a callable, got {loss!r}.")
    num_examples = outputs.shape[0]
    if targets.ndim == 0 or targets.shape[0] != num_examples:
        raise InputError(
            f"The probe's targets must have one entry per example: {num_examples} examples, targets of shape {tuple(targets.shape)}."
        )
    held = targets.to(outputs.device)
    held = held.double() if held.is_floating_point() else held.long()
    if name in ("squared", "mse") and outputs.shape[1:] == (1,) and held.ndim == 1:
        held = held.double()  # one output has no classes: whole numbers are values
    if held.is_floating_point() and held.numel() == outputs.numel():
        held = held.reshape(outputs.shape)  # outputs are always seen as (examples, classes), also where the model returns (examples,)
    if name in ("squared", "mse") and held.shape != outputs.shape:
        raise InputError(
            f"Loss {name!r} needs targets of the outputs' shape {tuple(outputs.shape)}, got {tuple(held.shape)} of {targets.dtype}. "
            "Encode class labels one-hot, or use loss='cross_entropy'."
        )

    def bound(predictions: Tensor) -> Tensor:
        return function(predictions, held)

    _try_once(name, bound, outputs, held)
    return ProbeLoss(name, bound, held, function)


def _try_once(name: str, bound: Callable[[Tensor], Tensor], outputs: Tensor, targets: Tensor) -> None:
    """Call the loss once; turn what goes wrong into one message."""
    call = f"Loss `{name}` on outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} of {targets.dtype}"
    try:
        value: Any = bound(outputs.detach().double())
    except UserError:
        raise
    except Exception as error:
        if name in ("cross_entropy", "CrossEntropyLoss") and targets.is_floating_point() and targets.ndim == 1:
            raise InputError(f"{call} failed: class labels are whole numbers. Convert them with .long(), or use loss='squared'.") from error
        raise InputError(
            f"{call} failed: {str(error).rstrip('.')}. Mismatched probe and labels? The loss is called in float64, on the whole probe."
        ) from error
    if not isinstance(value, Tensor) or value.ndim != 0:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{call} must return a scalar tensor, got {shape}. Use reduction='mean' or the scale you train with.")
    check_finite(f"{call}:", value, "Check the probe for NaN and the labels for values the loss does not take.")


def _product(gradient: Tensor, variable: Tensor, direction: Tensor) -> Tensor:
    """Differentiate the gradient along a direction; zero where it does not depend on the outputs (absolute error, hinge)."""
    if not gradient.requires_grad:
        return torch.zeros_like(variable)
    (product,) = torch.autograd.grad(gradient, variable, direction, retain_graph=True, allow_unused=True)
    return torch.zeros_like(variable) if product is None else product.detach()


def _hessian_product(gradient: Tensor, variable: Tensor, column: int) -> Tensor:
    """Compute column `column` of every block at once: the examples do not interact."""
    direction = torch.zeros_like(variable)
    direction[:, column] = 1.0
    return _product(gradient, variable, direction)
