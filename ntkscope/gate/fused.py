"""The gated-Adam step as one pass over memory: w, g, m, v, s are read once, and all but g written once.

One kernel is compiled per gate, other choices, dtypes and device, when it is first needed, for a few parameters (slots) as flat tensors of
any length. That compiles once where a graph over all parameters compiles for every model, in time that grows with it; one parameter per
call would spend more on calls (benchmarks/RESULTS.md). The numbers of the step are a tensor, so that neither the count of steps nor a
schedule compiles again.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import no_type_check

import torch
from torch import Tensor

from ntkscope._checks import UnsupportedError
from ntkscope._types import GateKind
from ntkscope.gate.step import Center, Decay, StepRow

Parts = list[Tensor]  # w, g, m, v, s of one parameter
Kernel = Callable[[Sequence[Parts], Tensor], None]
Constants = tuple[GateKind, Decay, Center, bool]
# What is compiled on: long enough that the kernel is laid out for all threads; slots differ, else torch would take their lengths for one.
SAMPLE_LENGTH = 2**18
# Of the tensors that fill empty slots.
SPARE_LENGTH = 16

NO_COMPILER = (
    "GatedAdamW(fused=True) could not compile its kernel for device {device}: {reason} It needs a C++ compiler (g++ or clang++) for CPU, "
    "Triton for CUDA. Install one, or use foreach=True, which computes the same step without it."
)


# Without type checks, which torch.compile cannot trace.
@no_type_check
def elementwise_step(w, g, m, v, s, row, constants):  # ruff: ignore[missing-type-function-argument, missing-return-type-public-function]
    """Take the step of `gated_adam_step` in place, with the numbers of a `StepRow` in a tensor; any shapes, strides and half precision.

    Args:
        w: Weights, updated.
        g: Their gradient.
        m: First moment, updated.
        v: Second moment, updated.
        s: Variance, updated.
        row: A `StepRow` as a tensor of one axis, in the dtype of the state.
        constants: Kind of the gate, `decay` and `center` as for `gated_adam_step`, and whether the gradient's sign is turned.
    """
    gate, decay, center, maximize = constants
    correction, keep, new, mean_new, square_keep, square_new, _, _, *others = row.unbind()
    step_size, shrink, eps, threshold, noise, smallest, warm = others
    gradient = -g.to(m.dtype) if maximize else g.to(m.dtype)
    weight = w.to(m.dtype)
    deviation = gradient - (m * correction if center == "corrected" else m)
    variance = s * keep + deviation * deviation * new
    mean = m + (gradient - m) * mean_new
    square = v * square_keep + gradient * gradient * square_new
    squared = mean * mean
    if gate == "open":
        q = torch.ones_like(mean)
    elif gate == "hard":
        q = torch.maximum((squared > threshold * variance).to(mean.dtype), warm)
    else:
        excess = torch.clamp(squared - threshold * variance, min=0.0) if gate == "soft" else squared
        q = torch.maximum(excess / (excess + noise * variance + smallest), warm)
    shrunk = weight * (1 - shrink * q) if decay == "gated" else weight * (1 - shrink)
    moved = shrunk - step_size * (q * mean / (square.sqrt() + eps))
    w.copy_(moved)
    m.copy_(mean)
    v.copy_(square)
    s.copy_(variance)


@no_type_check
def _step_slots(tensors, rows, constants):  # ruff: ignore[missing-type-function-argument, missing-return-type-private-function]
    """Take the step of every slot's parameter."""
    for parts, row in zip(tensors, rows.unbind(), strict=True):
        elementwise_step(*parts, row, constants)


@cache
def compiled_kernel(
    constants: Constants, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], device: torch.device, *, threads: int, slots: int
) -> Kernel:
    """Compile the step for up to `slots` parameters as flat tensors of at least two elements; once per process and arguments.

    Args:
        constants: As for `elementwise_step`.
        dtypes: Of weights, gradients and state.
        device: Where they are.
        threads: CPU threads, for which the kernel is laid out.
        slots: Parameters per call.

    Returns:
        Called with the parameters' tensors, at most `slots`, and exactly so many rows of a `StepRow`.

    Raises:
        UnsupportedError: If no compiler is there.
    """
    # A code object of its own: torch counts recompilations per code object.
    name = "_".join([
        "gated_adam",
        *map(str, constants),
        *(str(dtype).removeprefix("torch.") for dtype in dtypes),
        device.type,
        str(threads),
        str(slots),
    ])
    code = _step_slots.__code__.replace(co_name=name)
    compiled = torch.compile(
        FunctionType(code, _step_slots.__globals__, name),
        fullgraph=True,
        dynamic=True,
        # Without guards, whose evaluation costs as much as the call: what the kernel depends on is among its arguments.
        options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe, "size_asserts": False, "alignment_asserts": False},
    )

    def parts(length: int) -> Parts:
        return [torch.ones(length, dtype=dtype, device=device) for dtype in (*dtypes, dtypes[2], dtypes[2])]

    def trace() -> None:
        rows = torch.full((slots, len(StepRow._fields)), 0.5, dtype=dtypes[2], device=device)
        compiled([parts(SAMPLE_LENGTH + slot) for slot in range(slots)], rows, constants)

    spare = [parts(SPARE_LENGTH) for _ in range(slots)]

    def kernel(tensors: Sequence[Parts], rows: Tensor) -> None:
        if not torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code):  # pyright: ignore[reportAttributeAccessIssue]
            trace()  # torch forgot it (torch._dynamo.reset); traced on these tensors it would take equal lengths for one
        compiled([*tensors, *spare[len(tensors) :]], rows, constants)

    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself; where warnings are errors they would stop the compiler
            trace()
    except (RuntimeError, OSError) as error:
        reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])
        raise UnsupportedError(NO_COMPILER.format(device=device, reason=reason)) from error
    return kernel


def flatten(tensors: list[Tensor]) -> list[Tensor] | None:
    """View tensors of one shape as flat, in the order of memory.

    Args:
        tensors: w, g, m, v, s.

    Returns:
        The views, g copied if its strides differ; None where memory has gaps or overlaps, or the others' strides differ.
    """
    first, size = tensors[0], tensors[0].numel()
    if all(tensor.is_contiguous() for tensor in tensors):
        return tensors if first.dim() == 1 else [tensor.view(-1) for tensor in tensors]
    strides = first.stride()
    if any(tensor.stride() != strides for tensor in tensors[2:]) or not _is_dense(first):
        return None
    if tensors[1].stride() != strides:
        tensors = [first, torch.empty_like(first, dtype=tensors[1].dtype).copy_(tensors[1]), *tensors[2:]]
    return [tensor.as_strided((size,), (1,)) for tensor in tensors]


def _is_dense(tensor: Tensor) -> bool:
    """Say whether the elements fill a stretch of memory, in any order of the axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
