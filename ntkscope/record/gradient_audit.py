"""What the optimizer received against the gradient of the loss on the probe (theory.md section 2, "Clipping and loss scaling")."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from ntkscope._types import ForwardFn
from ntkscope.dynamics.loss import ProbeLoss
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.model import forward_rows
from ntkscope.record.optimizers import received_gradients

NUM_COLUMNS = 4


class GradientAudit:
    """Compares gradients just before a step, and keeps a row of each comparison until the next snapshot."""

    def __init__(self) -> None:
        self._rows: list[list[float]] = []
        self._unexplained: list[Tensor] | None = None

    def look(self, optimizer: Optimizer, parameters: dict[str, nn.Parameter], expected: dict[str, Tensor]) -> None:
        """Compare what the optimizer is about to use with the loss's own gradient.

        Args:
            optimizer: In its pre-step hook: gradients are clipped, and still scaled where a fused optimizer unscales them itself.
            parameters: Trained parameters, by name.
            expected: ∇Φ at the same weights, from `probe_gradient`.
        """
        received = received_gradients(optimizer, parameters)
        product = sum(_dot(received[name], expected[name]) for name in parameters)
        square = sum(_dot(expected[name], expected[name]) for name in parameters)
        total = sum(_dot(received[name], received[name]) for name in parameters)
        if not all(math.isfinite(value) for value in (product, square, total)):
            return
        share = product / square if square > 0 else 0.0
        unexplained = [received[name] - share * expected[name].to(received[name]) for name in parameters]
        self._rows.append([product, square, total, _cosine(unexplained, self._unexplained)])
        self._unexplained = unexplained

    def collect(self) -> Float[Tensor, "audits 4"] | None:
        """Hand the rows over to a snapshot.

        Returns:
            The rows since the last call, float64; None if there are none.
        """
        rows, self._rows = self._rows, []
        return torch.tensor(rows, dtype=torch.float64) if rows else None


def when_received(args: tuple[Any, ...], kwargs: dict[str, Any], look: Callable[[], None]) -> tuple[Any, Any] | None:
    """Look at gradients when they are there: now, or after the closure that computes them inside the step (as Lightning's does).

    Args:
        args: Of the optimizer's step, the optimizer first.
        kwargs: Of the optimizer's step.
        look: Looks at them.

    Returns:
        Other arguments for the step, for its pre-hook to return; None if they may stay.
    """

    def followed(closure: Callable[[], Any]) -> Callable[[], Any]:
        def closure_and_look() -> Any:
            found = closure()
            look()
            return found

        return closure_and_look

    if not any(callable(value) for value in (*args[1:], *kwargs.values())):
        look()
        return None
    changed = [followed(value) if callable(value) else value for value in args[1:]]
    return (args[0], *changed), {name: followed(value) if callable(value) else value for name, value in kwargs.items()}


def probe_gradient(
    model: nn.Module, inputs: Any, loss: ProbeLoss, parameters: dict[str, nn.Parameter], forward_fn: ForwardFn | None
) -> dict[str, Tensor]:
    """Compute ∇Φ in the trained parameters, leaving model and gradients as they are.

    Args:
        model: Any module.
        inputs: Of the probe.
        loss: The loss on the probe.
        parameters: Trained parameters, by name.
        forward_fn: The model's call.

    Returns:
        Gradients by name, in evaluation mode; zero where a parameter does not reach the outputs.
    """
    with undisturbed(model):
        outputs = forward_rows(model, inputs, forward_fn)
        pull = loss.gradient(outputs.detach().cpu()).to(outputs)
        # Retained: a user's module may keep what it computed from parameters for the next call.
        grads = torch.autograd.grad(outputs, list(parameters.values()), pull, allow_unused=True, retain_graph=True)
    named = zip(parameters.items(), grads, strict=True)
    return {name: torch.zeros_like(parameter) if grad is None else grad.detach() for (name, parameter), grad in named}


def _dot(first: Tensor, second: Tensor) -> float:
    """Multiply and add up in float64."""
    return float((first.double() * second.double()).sum())


def _cosine(now: list[Tensor], before: list[Tensor] | None) -> float:
    """Compute the cosine between two lists of tensors; NaN where one is missing or zero."""
    if before is None:
        return math.nan
    product = sum(_dot(a, b) for a, b in zip(now, before, strict=True))
    norms = [sum(_dot(a, a) for a in part) ** 0.5 for part in (now, before)]
    return product / (norms[0] * norms[1]) if all(norm > 0 for norm in norms) else math.nan
