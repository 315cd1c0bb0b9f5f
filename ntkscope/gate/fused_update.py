"""The compiled step on the parameters of a group: small ones joined, large ones a few per call."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ntkscope.gate.fused import Constants, Kernel, Parts, compiled_kernel, elementwise_step, flatten
from ntkscope.gate.job import Job
from ntkscope.gate.multi_tensor import FOREACH
from ntkscope.gate.options import path_of

# Parameters of at most this many elements are cheaper copied to one buffer and back than each stepped on its own.
SMALL = 2**13
# Elements of such a buffer.
JOINED = 2**18
# Parameters per call of a kernel: of these the smallest that takes all in one call. More cost seconds to compile.
SLOTS = (1, 4, 12)
# Places of w, m, v, s, which the step updates, among w, g, m, v, s.
UPDATED = (0, 2, 3, 4)


def run_rows(jobs: Sequence[Job], table: Tensor, options: Mapping[str, Any]) -> None:
    """Step parameters with numbers in a tensor: compiled, or eagerly for a capturable group without `foreach` and `fused`.

    Args:
        jobs: Of one device, dtypes and, but for a capturable group, one count of steps.
        table: One `StepRow` per job, or one for all.
        options: Of the group.
    """
    is_fused = path_of(options, jobs[0].weight.device) == "fused"
    constants = _constants(options)
    small: list[Parts] = []
    large: list[tuple[Parts, Tensor]] = []
    rows = list(table) if options["capturable"] else [table[0]] * len(jobs)
    for job, row in zip(jobs, rows, strict=True):
        tensors = [job.weight, job.gradient, job.exp_avg, job.exp_avg_sq, job.grad_var]
        flat = flatten(tensors) if is_fused else None
        if flat is not None and job.weight.numel() <= SMALL and not options["capturable"]:
            small.append(flat)
        # Not compiled: what no flat view shows, and single elements, for which torch would compile again.
        elif flat is None or job.weight.numel() < 2:
            elementwise_step(*tensors, row=row, constants=constants)
        else:
            large.append((flat, row))
    buffers = [(group, [torch.cat(tensors) for tensors in zip(*group, strict=True)]) for group in _joins(small)]
    for _, joined in buffers:
        if len(joined[0]) > 1:
            large.append((joined, table[0]))
        else:
            elementwise_step(*joined, row=table[0], constants=constants)
    if large:
        _run_slots(large, kernel_of(jobs, options), _num_slots(jobs, options), is_one_row=not options["capturable"])
    for group, joined in buffers:
        sizes = [len(parts[0]) for parts in group]
        for place in UPDATED:
            FOREACH._foreach_copy_([parts[place] for parts in group], joined[place].split(sizes))


def kernel_of(jobs: Sequence[Job], options: Mapping[str, Any]) -> Kernel:
    """Fetch the compiled kernel.

    Args:
        jobs: That are to be stepped, of one device and dtypes.
        options: Of the group.

    Returns:
        See `compiled_kernel`.

    Raises:
        UnsupportedError: If no compiler is there.
    """
    first = jobs[0]
    dtypes = (first.weight.dtype, first.gradient.dtype, first.exp_avg.dtype)
    slots = _num_slots(jobs, options)
    return compiled_kernel(_constants(options), dtypes, first.weight.device, threads=torch.get_num_threads(), slots=slots)


def _num_slots(jobs: Sequence[Job], options: Mapping[str, Any]) -> int:
    """Choose the parameters per call; one where CUDA graphs take the cost of calls away."""
    wanted = 1 if options["capturable"] else 1 + sum(job.weight.numel() > SMALL for job in jobs)
    return next((slots for slots in SLOTS if slots >= wanted), SLOTS[-1])


def _run_slots(work: Sequence[tuple[Parts, Tensor]], kernel: Kernel, slots: int, *, is_one_row: bool) -> None:
    """Call a kernel as often as needed."""
    shared = work[0][1].expand(slots, -1).contiguous() if is_one_row else None
    for start in range(0, len(work), slots):
        part = work[start : start + slots]
        kernel([flat for flat, _ in part], torch.stack([row for _, row in part]) if shared is None else shared)


def _constants(options: Mapping[str, Any]) -> Constants:
    """Collect the choices that a kernel is compiled for."""
    return options["gate"], options["decay"], options["center"], bool(options["maximize"])


def _joins(small: Sequence[Parts]) -> Iterator[list[Parts]]:
    """Sort small parameters into buffers."""
    group: list[Parts] = []
    size = 0
    for parts in small:
        if group and size + len(parts[0]) > JOINED:
            yield group
            group, size = [], 0
        group.append(parts)
        size += len(parts[0])
    if group:
        yield group
