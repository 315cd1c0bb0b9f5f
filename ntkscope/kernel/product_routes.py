"""Before any product of an operator: two examples of the user's own batch show how products are taken, and what they cost."""

from typing import Any

import torch
from torch import Tensor

from ntkscope._checks import UnsupportedError
from ntkscope.kernel.batch import count_examples, take
from ntkscope.kernel.products import JvpMethod, Passes, Routes, RowFunction, pull, push

UNSUPPORTED = (
    "`NTKOperator` needs J t, a product with the Jacobian, and neither forward-mode AD nor a double backward pass gives it for this model. "
    "{reasons}. Write the operation named here with others, give its autograd.Function a `jvp` and `setup_context`, or use `ntk_gram`, "
    "which needs backward passes only."
)


def choose_routes(function: RowFunction, pair: Any) -> Routes:
    """Take the first way of each product that runs, and under which ⟨v, J t⟩ = ⟨Jᵀv, t⟩.

    Args:
        function: What is differentiated, inside `undisturbed`.
        pair: One or two examples.

    Returns:
        The routes.

    Raises:
        UnsupportedError: If there are none.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(shape: torch.Size, like: Tensor) -> Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(like)

    with torch.no_grad():
        rows = function.rows(pair)
    cotangents = draw(rows.shape, rows)
    tangents = [draw(parameter.shape, parameter) for parameter in function.parameters.values()]
    failures: dict[str, str] = {}
    # Fused kernels before portable ones, all vectors at once before one by one.
    candidates = [Passes(batched, portable) for portable in (False, True) for batched in (True, False)]
    for vjp in candidates:
        try:
            pulled = pull(function, pair, cotangents, vjp)
        except Exception as error:
            failures["A backward pass"] = _first_line(error)
            continue
        break
    else:
        raise UnsupportedError(f"The model cannot be differentiated. A backward pass: {failures['A backward pass']}.")
    failures.clear()
    expected = torch.stack([_inner(grad, t) for grad, t in zip(pulled, tangents, strict=True)]).sum(dim=0)
    methods: dict[str, JvpMethod] = {"Forward-mode AD": "forward", "A double backward pass": "double backward"}
    for label, method in methods.items():
        for jvp in candidates:
            try:
                pushed = push(function, pair, tangents, jvp, method)
            except Exception as error:
                failures[label] = _first_line(error)
                continue
            gap = _disagreement(cotangents, pushed, expected)
            if gap <= _rounding(rows) ** 0.5:  # False for NaN
                return Routes(vjp, jvp, method, "" if method == "forward" else failures["Forward-mode AD"])
            failures[label] = f"⟨v, J t⟩ and ⟨Jᵀv, t⟩ differ by {gap:.1e} (torch.no_grad, padding_idx or random numbers in the model?)"
    raise UnsupportedError(UNSUPPORTED.format(reasons=". ".join(f"{label}: {why}" for label, why in failures.items())))


def ends(batch: Any) -> Any:
    """Take the first and the last example; the one, if there is but one.

    Args:
        batch: As for `batch_tensors`.

    Returns:
        One or two examples.
    """
    return take(batch, torch.tensor([0, -1])) if count_examples(batch) > 1 else batch


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner product of each vector of two stacks, in float64 on the CPU."""
    return (left.to("cpu", torch.float64) * right.to("cpu", torch.float64)).reshape(len(left), -1).sum(dim=1)


def _disagreement(cotangents: Tensor, pushed: Tensor, expected: Tensor) -> float:
    """|⟨v, J t⟩ − ⟨Jᵀv, t⟩| / (|v| |J t|), the largest of the vectors."""
    inner = _inner(cotangents, pushed)
    scale = (_inner(cotangents, cotangents) * _inner(pushed, pushed)).sqrt()
    return float(((inner - expected).abs() / torch.maximum(scale, expected.abs()).clamp(min=torch.finfo(torch.float64).tiny)).max())


def _rounding(rows: Tensor) -> float:
    """Unit of rounding of the products; float32 on a GPU may be TF32, with 10 bits."""
    return 2.0**-10 if rows.is_cuda and rows.dtype == torch.float32 else torch.finfo(rows.dtype).eps


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0].rstrip('.')}"
