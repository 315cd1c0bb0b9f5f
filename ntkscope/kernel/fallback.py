"""Exact Jacobian rows by autograd, for parameters that no layer rule covers.

Two routes: torch.func (vmap over examples), and a plain loop of backward passes for models that vmap refuses
(data-dependent control flow, `.item()`, some in-place operations).
"""

import warnings
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntkscope._types import ForwardFn
from ntkscope.kernel.batch import count_examples, map_batch, take
from ntkscope.kernel.model import forward_rows

RowRoute = Literal["torch.func", "loop"]


class _Forward(nn.Module):
    """Make `forward_fn(model, batch)` a module, so that functional_call can swap the parameters under it."""

    def __init__(self, model: nn.Module, forward_fn: ForwardFn | None) -> None:
        super().__init__()
        self.model = model
        self.forward_fn = forward_fn

    def forward(self, batch: Any) -> Tensor:
        return forward_rows(self.model, batch, self.forward_fn)


def jacobian_rows(
    model: nn.Module,
    batch: Any,
    parameters: dict[str, nn.Parameter],
    *,
    forward_fn: ForwardFn | None,
    route: RowRoute,
    dtype: torch.dtype,
) -> dict[str, Float[Tensor, "examples classes columns"]]:
    """Compute the Jacobian of every output in `parameters`.

    Args:
        model: Any module whose output rows depend on their own input row only.
        batch: As for `batch_tensors`.
        parameters: The parameters, by name.
        forward_fn: The model's call.
        route: How.
        dtype: Of the result.

    Returns:
        Flattened gradients of every output, by parameter.
    """
    rows = _rows_by_vmap if route == "torch.func" else _rows_by_loop
    return {name: block.to(dtype) for name, block in rows(model, batch, parameters, forward_fn).items()}


def _rows_by_vmap(model: nn.Module, batch: Any, parameters: dict[str, nn.Parameter], forward_fn: ForwardFn | None) -> dict[str, Tensor]:
    module = _Forward(model, forward_fn)
    selected = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}

    def outputs_of(selected: dict[str, Tensor], example: Any) -> Tensor:
        single = map_batch(lambda tensor: tensor.unsqueeze(0), example)
        return torch.func.functional_call(module, selected, (single,)).squeeze(0)

    with warnings.catch_warnings():
        # torch warns where an operation is slow under vmap; the result is exact, and the user can do nothing about it.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        jacobian = torch.func.vmap(torch.func.jacrev(outputs_of), in_dims=(None, 0))(selected, batch)
    return {name: jacobian[f"model.{name}"].detach().flatten(2) for name in parameters}


def _rows_by_loop(model: nn.Module, batch: Any, parameters: dict[str, nn.Parameter], forward_fn: ForwardFn | None) -> dict[str, Tensor]:
    wanted = list(parameters.values())
    num_examples = count_examples(batch)
    rows: dict[str, Tensor] = {}
    for i in range(num_examples):
        outputs = forward_rows(model, take(batch, slice(i, i + 1)), forward_fn).squeeze(0)
        if not rows:
            rows = {name: p.new_zeros(num_examples, len(outputs), p.numel()) for name, p in parameters.items()}
        for c, output in enumerate(outputs):
            if not output.requires_grad:  # this example reaches no parameter at all
                continue
            grads = torch.autograd.grad(output, wanted, retain_graph=True, allow_unused=True)
            for store, grad in zip(rows.values(), grads, strict=True):
                if grad is not None:
                    store[i, c] = grad.detach().flatten()
    return rows
