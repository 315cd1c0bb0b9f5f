"""The front door of the kernel engine."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntkscope._checks import InputError, check_choice, check_finite
from ntkscope._display import Displayed
from ntkscope._types import ForwardFn, GramMethod, KernelOutputs
from ntkscope.kernel.batch import count_examples, take
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.contract import Precond, contract
from ntkscope.kernel.coverage import Coverage, probe_routes
from ntkscope.kernel.jacobian import FactoredJacobian, Routes, compute_jacobian

DEFAULT_MEMORY = 2 * 2**30  # bytes: leaves room on an 8 GiB laptop


@dataclass(frozen=True)
class Gram(Displayed):
    """An empirical NTK Gram matrix.

    Attributes:
        matrix: "full": `(n C, n' C)`, output (i, c) at i * C + c. "trace": `(n, n')`, the sum over c of the full kernel's
            (i, c), (j, c) entries.
        num_examples: n, rows' examples.
        num_classes: C, outputs per example.
        outputs: The kind.
        coverage: Route of every parameter.
    """

    matrix: Float[Tensor, "rows columns"]
    num_examples: int
    num_classes: int
    outputs: KernelOutputs
    coverage: Coverage


def ntk_gram(
    model: nn.Module,
    inputs: Any,
    other: Any = None,
    *,
    outputs: KernelOutputs = "full",
    precond: Precond | None = None,
    params: Iterable[str] | None = None,
    forward_fn: ForwardFn | None = None,
    method: GramMethod = "auto",
    max_memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Gram:
    """Compute the empirical NTK J M Jᵀ exactly.

    The model is run in evaluation mode and left as found: parameters, buffers, modes, `.grad` and random state bit for bit.

    Args:
        model: Any module whose output rows depend on their own input row only.
        inputs: Batch of n examples: a tensor, or tuples, lists and dicts of tensors, examples on the first axis.
        other: Second batch of n' examples, for the cross kernel `J(inputs) M J(other)ᵀ`; `inputs` itself if not given.
        outputs: "full" or "trace" (see `Gram.matrix`).
        precond: Diagonal of M: parameter name to a nonnegative tensor shaped as the parameter, or to one number. Identity if
            not given.
        params: Names of the parameters to take; all with `requires_grad` if not given.
        forward_fn: The model's call, `forward_fn(model, batch)`, where it is not `model(batch)`.
        method: "auto" takes layer rules where they are exact; "autograd" differentiates every row (slow).
        max_memory: Bytes for Jacobian factors and result together; 2 GiB if not given. With less, examples are taken in blocks and
            some work is done twice.
        progress: Called with (blocks done, blocks in all).

    Returns:
        The kernel and its coverage.

    Raises:
        InputError: If the batch is empty, rows depend on one another, a weight or the kernel is not finite, `precond` does not
            fit, or the result does not fit in `max_memory`.
        InputTypeError: If the model's output is no floating-point tensor.
        UnsupportedError: If no trained parameter reaches the output.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> ntk_gram(model, torch.eye(2)).matrix  # a linear model's kernel is x xᵀ
        tensor([[1., 0.],
                [0., 1.]])

    Source:
        theory.md section 1; Jacot et al. 2018. Memory is O(N² + factors); the N x p Jacobian is never formed for layers with a rule.
    """
    check_choice("outputs", outputs, get_args(KernelOutputs))
    check_choice("method", method, get_args(GramMethod))
    num_examples = count_examples(inputs)
    routes, coverage = probe_routes(model, inputs, params=None if params is None else list(params), forward_fn=forward_fn, method=method)
    precond = None if precond is None else check_precond(precond, routes)
    budget = DEFAULT_MEMORY if max_memory is None else max_memory
    with undisturbed(model):
        matrix = blockwise_gram(
            model,
            inputs,
            other,
            routes=routes,
            coverage=coverage,
            outputs=outputs,
            precond=precond,
            budget=budget,
            progress=progress,
        )
    check_finite("The kernel", matrix, "The weights are finite, so activations overflow: check the inputs, or use float64.")
    return Gram(matrix, num_examples, coverage.num_classes, outputs, coverage)


def check_precond(precond: Mapping[str, Tensor | float], routes: Routes) -> Precond:
    """Check that M fits the parameters.

    Args:
        precond: As for `ntk_gram`.
        routes: The routes, which name the parameters.

    Returns:
        M for exactly these parameters.

    Raises:
        InputError: If a parameter is missing, a shape differs, or an entry is negative or not finite.
    """
    missing = sorted(set(routes.parameters) - set(precond))
    if missing:
        raise InputError(f"`precond` must name every parameter of the kernel, missing: {', '.join(missing)}.")
    for name, parameter in routes.parameters.items():
        value = torch.as_tensor(precond[name])
        if value.shape not in (parameter.shape, torch.Size([])):
            raise InputError(
                f"`precond[{name!r}]` must be one number or have the parameter's shape {tuple(parameter.shape)}, got {tuple(value.shape)}."
            )
        check_finite(f"`precond[{name!r}]`", value, "Check the optimizer's state.")
        if bool((value < 0).any()):
            raise InputError(f"`precond[{name!r}]` must be nonnegative, got {float(value.min()):.3g}: J M Jᵀ would not be a kernel.")
    return {name: precond[name] for name in routes.parameters}


def blockwise_gram(
    model: nn.Module,
    inputs: Any,
    other: Any,
    *,
    routes: Routes,
    coverage: Coverage,
    outputs: KernelOutputs,
    precond: Precond | None,
    budget: int,
    progress: Callable[[int, int], None] | None,
) -> Float[Tensor, "rows columns"]:
    """Fill the kernel block by block; one block when the factors of all examples fit.

    Args:
        model: The model, inside `undisturbed`.
        inputs: Rows.
        other: Columns, or None for the symmetric kernel.
        routes: From `probe_routes`.
        coverage: From `probe_routes`.
        outputs: The kind.
        precond: Checked M.
        budget: Bytes.
        progress: As for `ntk_gram`.

    Returns:
        The kernel.

    Raises:
        InputError: If the result alone exceeds the budget.
    """
    num_rows, num_columns = count_examples(inputs), count_examples(inputs if other is None else other)
    width = 1 if outputs == "trace" else coverage.num_classes
    itemsize = torch.finfo(routes.dtype).bits // 8
    result_bytes = num_rows * num_columns * width**2 * itemsize
    if result_bytes > budget // 2:
        raise InputError(
            f"The {outputs} kernel of {num_rows} x {num_columns} examples and {coverage.num_classes} outputs takes "
            f"{result_bytes / 2**30:.2f} GiB, more than half of max_memory ({budget / 2**30:.2f} GiB). "
            "Take fewer examples, outputs='trace', or raise max_memory."
        )
    remaining = budget - result_bytes
    # A third each for the rows' factors, the columns' factors, and a chunk of weight gradients.
    step = max(1, remaining // 3 // max(1, coverage.bytes_per_example))

    def jacobian(batch: Any, start: int) -> FactoredJacobian:
        return compute_jacobian(model, take(batch, slice(start, start + step)), routes)

    matrix: Tensor | None = None
    starts = [(i, j) for i in range(0, num_rows, step) for j in range(0, num_columns, step) if other is not None or j <= i]
    left, left_start = None, -1
    for done, (i, j) in enumerate(starts):
        if left is None or left_start != i:
            left, left_start = jacobian(inputs, i), i
        right = left if other is None and i == j else jacobian(inputs if other is None else other, j)
        block = contract(left, right, precond=precond, outputs=outputs, chunk_bytes=remaining // 3)
        if matrix is None:
            matrix = block.new_zeros(num_rows * width, num_columns * width)
        matrix[i * width : i * width + block.shape[0], j * width : j * width + block.shape[1]] = block
        if other is None and i != j:
            matrix[j * width : j * width + block.shape[1], i * width : i * width + block.shape[0]] = block.T
        if progress is not None:
            progress(done + 1, len(starts))
    assert matrix is not None  # a batch has at least one example
    return matrix
