"""Products with the Jacobian J of a few examples, without J: Jᵀv by a backward pass, J t by forward-mode AD.

Where forward-mode AD has no formula (torch's weight norm, an autograd.Function of the user's own), J t is d/dv ⟨Jᵀv, t⟩, a backward
pass through the backward pass. Which way is taken is chosen once, and only what satisfies ⟨v, J t⟩ = ⟨Jᵀv, t⟩ is taken: a
torch.no_grad inside the model stops backward passes but not forward-mode AD, and so does the `padding_idx` of an embedding.

Vectors come first: cotangents v are (vectors, examples, outputs), tangents t are (vectors, *parameter.shape), one per parameter.
"""

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkscope._types import ForwardFn

JvpMethod = Literal["forward", "double backward"]
Tangents = list[Tensor]


@dataclass(frozen=True)
class RowFunction:
    """The function that is differentiated: rows of a batch as a function of the parameters, at their present values.

    Attributes:
        model: The model, inside `undisturbed` whenever it is called.
        readout: From `make_readout`.
        parameters: Parameters of the kernel, by name.
    """

    model: nn.Module
    readout: ForwardFn
    parameters: dict[str, nn.Parameter]

    def rows(self, batch: Any) -> Float[Tensor, "examples outputs"]:
        """Run the model.

        Args:
            batch: What the readout takes.

        Returns:
            The rows, in the autograd graph.
        """
        return self.readout(self.model, batch)


@dataclass(frozen=True)
class Passes:
    """How passes through the model are made.

    Attributes:
        batched: Whether one pass takes all vectors; else there is one for each.
        portable: Whether cuDNN and oneDNN are off. Their RNNs have no forward-mode AD, and cuDNN's no backward pass in evaluation mode.
    """

    batched: bool
    portable: bool


@dataclass(frozen=True)
class Routes:
    """How the two products are taken.

    Attributes:
        vjp: Passes of Jᵀv.
        jvp: Passes of J t.
        method: How J t is taken.
        reason: Why it is not forward-mode AD; empty if it is.
    """

    vjp: Passes
    jvp: Passes
    method: JvpMethod
    reason: str


def pull(function: RowFunction, batch: Any, cotangents: Float[Tensor, "vectors examples outputs"], passes: Passes) -> Tangents:
    """Compute Jᵀv for each of some vectors.

    Args:
        function: What is differentiated, inside `undisturbed`.
        batch: Examples.
        cotangents: v.
        passes: How.

    Returns:
        One tensor per parameter, shape (vectors, *parameter.shape).
    """
    wanted = list(function.parameters.values())
    with _settings(portable=passes.portable, twice=False):
        rows = function.rows(batch)
        if not rows.requires_grad:  # these examples reach no parameter at all
            return _or_zeros([None] * len(wanted), wanted, len(cotangents))
        grads = _gradients([rows], wanted, [cotangents.to(rows.dtype)], batched=passes.batched)
    return _or_zeros(grads, wanted, len(cotangents))


def push(
    function: RowFunction, batch: Any, tangents: Tangents, passes: Passes, method: JvpMethod
) -> Float[Tensor, "vectors examples outputs"]:
    """Compute J t for each of some tangents.

    Args:
        function: What is differentiated, inside `undisturbed`.
        batch: Examples.
        tangents: t, as `pull` returns them.
        passes: How.
        method: How.

    Returns:
        J t.
    """
    directions = [tangent.to(parameter.dtype) for tangent, parameter in zip(tangents, function.parameters.values(), strict=True)]
    derivative = _push_forward if method == "forward" else _push_twice
    with _settings(portable=passes.portable, twice=True):
        return derivative(function, batch, directions, passes.batched).detach()


def _push_forward(function: RowFunction, batch: Any, directions: Tangents, batched: bool) -> Tensor:
    module = _Readout(function.model, function.readout)
    # Parameters outside the kernel are detached too: nothing is saved for a backward pass that never comes.
    primals = {f"model.{name}": parameter.detach() for name, parameter in function.model.named_parameters()}
    names = [f"model.{name}" for name in function.parameters]

    def rows_at(*selected: Tensor) -> Tensor:
        return torch.func.functional_call(module, primals | dict(zip(names, selected, strict=True)), (batch,))

    def derivative(*direction: Tensor) -> Tensor:
        return torch.func.jvp(rows_at, tuple(primals[name] for name in names), direction)[1]

    if batched:
        return torch.func.vmap(derivative)(*directions)
    return torch.stack([derivative(*direction) for direction in zip(*directions, strict=True)])


def _push_twice(function: RowFunction, batch: Any, directions: Tangents, batched: bool) -> Tensor:
    rows = function.rows(batch)
    num_vectors = len(directions[0])
    cotangent = torch.zeros_like(rows, requires_grad=True)  # Jᵀv is linear in v: its derivative is the same everywhere
    wanted = list(function.parameters.values())
    reached: list[tuple[Tensor, Tensor]] = []
    if rows.requires_grad:
        pulled = torch.autograd.grad(rows, wanted, cotangent, create_graph=True, allow_unused=True)
        reached = [(grad, t) for grad, t in zip(pulled, directions, strict=True) if grad is not None and grad.requires_grad]
    if not reached:
        return rows.new_zeros(num_vectors, *rows.shape)
    grads = _gradients([grad for grad, _ in reached], [cotangent], [t for _, t in reached], batched=batched)
    if grads[0] is None:
        raise RuntimeError("the backward pass cannot be differentiated itself (once_differentiable?)")
    return grads[0]


class _Readout(nn.Module):
    """Makes `readout(model, batch)` a module, so that functional_call can swap the parameters under it."""

    def __init__(self, model: nn.Module, readout: ForwardFn) -> None:
        super().__init__()
        self.model = model
        self.readout = readout

    def forward(self, batch: Any) -> Tensor:
        return self.readout(self.model, batch)


def _gradients(outputs: Tangents, wanted: list[Any], cotangents: Tangents, *, batched: bool) -> list[Tensor | None]:
    """Gradients of `outputs` in `wanted` for each of the cotangents, which have an axis of vectors in front."""
    num_vectors = len(cotangents[0])
    if batched and num_vectors > 1:
        return list(torch.autograd.grad(outputs, wanted, cotangents, is_grads_batched=True, allow_unused=True))
    single = [
        torch.autograd.grad(outputs, wanted, [c[i] for c in cotangents], retain_graph=i + 1 < num_vectors, allow_unused=True)
        for i in range(num_vectors)
    ]
    return [None if grads[0] is None else torch.stack(grads) for grads in zip(*single, strict=True)]


def _or_zeros(grads: list[Tensor | None], wanted: list[Any], num_vectors: int) -> Tangents:
    return [w.new_zeros(num_vectors, *w.shape) if grad is None else grad.detach() for grad, w in zip(grads, wanted, strict=True)]


@contextmanager
def _settings(*, portable: bool, twice: bool) -> Generator[None, None, None]:
    """Switch off kernels without a formula for the derivative, and torch's remarks about its own insides."""
    mkldnn, cudnn, fastpath = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.mha.get_fastpath_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")  # vmap without a batching rule: slow, but exact
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # torch imports its own forward-mode formulas
        try:
            if portable:
                torch.backends.mkldnn.enabled = torch.backends.cudnn.enabled = False  # pyright: ignore[reportAttributeAccessIssue]
            if not twice:
                yield
                return
            torch.backends.mha.set_fastpath_enabled(False)  # MultiheadAttention in evaluation mode, where no weight wants a gradient
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled = mkldnn, cudnn  # pyright: ignore[reportAttributeAccessIssue]
            torch.backends.mha.set_fastpath_enabled(fastpath)
