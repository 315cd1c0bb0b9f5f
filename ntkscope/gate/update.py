"""One step of all parameters of a group, by the path that the group chose."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ntkscope._checks import InputError, InputTypeError, UnsupportedError
from ntkscope.gate.adamw_state import HALF_PRECISION
from ntkscope.gate.fused_update import kernel_of, run_rows
from ntkscope.gate.gate_statistics import count_step
from ntkscope.gate.job import Job, local_part
from ntkscope.gate.multi_tensor import FOREACH, multi_tensor_step
from ntkscope.gate.options import alpha_of, path_of
from ntkscope.gate.step import StepRow, gate_values, gated_adam_step, stack_rows, step_row

AVERAGES = ("exp_avg", "exp_avg_sq", "grad_var")
# Lists of tensors on a CPU are worked through in parts that stay in its cache, in bytes of weights.
CPU_PART = 2**20


def new_state(parameter: Tensor, *, capturable: bool) -> dict[str, Tensor]:
    """Make the state of a parameter before its first step.

    Args:
        parameter: Any dtype; for half precision the averages are float32.
        capturable: Whether t lives on the parameter's device.

    Returns:
        Zeros.
    """
    dtype = torch.float32 if parameter.dtype in HALF_PRECISION else None
    averages = {name: torch.zeros_like(parameter, dtype=dtype, requires_grad=False) for name in AVERAGES}
    return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device if capturable else "cpu")} | averages


def check_gradient(parameter: Tensor) -> None:
    """Check that the gradient is dense.

    Args:
        parameter: With or without a gradient.

    Raises:
        UnsupportedError: If it is sparse.
    """
    if parameter.grad is not None and parameter.grad.layout != torch.strided:
        raise UnsupportedError("GatedAdamW does not support sparse gradients. Use nn.Embedding(sparse=False).")


def check_variances(variance: Mapping[Tensor, Tensor], groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, Tensor]:
    """Check variances from outside.

    Args:
        variance: By parameter.
        groups: The optimizer's.

    Returns:
        The same.

    Raises:
        InputTypeError: If one is no tensor.
        InputError: If one belongs to no parameter, or its shape or values are impossible.
    """
    if not variance:
        return {}
    held = {parameter: (place, group) for group in groups for place, parameter in enumerate(group["params"])}
    bad = []
    for parameter, value in variance.items():
        if not isinstance(parameter, Tensor) or parameter not in held:
            given = f"a tensor of shape {tuple(parameter.shape)}" if isinstance(parameter, Tensor) else repr(parameter)
            raise InputError(f"`variance` names {given} that the optimizer does not hold. Its keys are the parameters themselves.")
        if not isinstance(value, Tensor):
            raise InputTypeError(f"`variance` must hold tensors, got {type(value).__name__}.")
        if value.shape != parameter.shape or hasattr(value, "placements") != hasattr(parameter, "placements"):
            raise InputError(
                f"`variance` must have the shape and the layout of its parameter, got {tuple(value.shape)} for {tuple(parameter.shape)}. "
                "For a DTensor parameter give a DTensor."
            )
        if not held[parameter][1]["capturable"]:
            local = local_part(value)
            bad.append((~(torch.isfinite(local) & (local >= 0))).sum())
    num_bad = sum(int(count) for count in bad)
    if num_bad:
        raise InputError(f"`variance` must be finite and >= 0, got {num_bad} negative, NaN or infinite entries.")
    return dict(variance)


def prepare_jobs(jobs: Sequence[Job], options: Mapping[str, Any]) -> None:
    """Compile what is missing, before any state changes.

    Args:
        jobs: Of one group.
        options: Of the group.

    Raises:
        UnsupportedError: If no compiler is there.
    """
    if jobs and path_of(options, jobs[0].weight.device) == "fused":
        kernel_of(jobs, options)


def run_jobs(jobs: Sequence[Job], options: Mapping[str, Any]) -> None:
    """Take one step, in place.

    Args:
        jobs: Of one group.
        options: Of the group.
    """
    if not jobs:
        return
    alpha = alpha_of(options)
    steps = [job.step for job in jobs]
    FOREACH._foreach_add_(steps, torch.ones((), device=steps[0].device))  # a number would be made a tensor for each
    if not options["capturable"] and path_of(options, jobs[0].weight.device) == "single":
        for job in jobs:
            _run_single(job, options, alpha)
        return
    for bucket in _buckets(jobs, options):
        numbers, table = _numbers_of(bucket, options, alpha)
        for job, row in zip(bucket, numbers, strict=True):
            if job.variance is not None:
                job.grad_var.copy_(job.variance).div_(row.variance_scale)
        before = [None if job.counts is None else job.weight.clone() for job in bucket]
        if path_of(options, bucket[0].weight.device) == "foreach":
            _run_foreach(bucket, numbers, options)
        else:
            run_rows(bucket, table, options)
        for job, start, row in zip(bucket, before, numbers, strict=True):
            if job.counts is not None and start is not None:
                gate = _applied_gate(job, row, options, alpha=alpha)
                count_step(job.counts, gate, start, job.weight, strength=row.decay, is_gated=options["decay"] == "gated")


def _numbers_of(jobs: Sequence[Job], options: Mapping[str, Any], alpha: float) -> tuple[list[StepRow], Tensor]:
    """Compute the numbers of a step, floats or for a capturable group 0-d tensors; and a table, with one row for all or a row for each."""
    first = jobs[0]
    device, dtype, is_external = first.weight.device, first.exp_avg.dtype, first.variance is not None
    if not options["capturable"]:
        row = step_row(int(first.step), options, alpha=alpha, is_external=is_external)
        return [row] * len(jobs), torch.tensor([row], dtype=dtype, device=device)
    steps = torch.stack([job.step for job in jobs]).to(torch.float32 if device.type == "mps" else torch.float64)
    table = stack_rows(step_row(steps, options, alpha=alpha, is_external=is_external), steps, dtype)
    return [StepRow._make(row.unbind()) for row in table], table


def _buckets(jobs: Sequence[Job], options: Mapping[str, Any]) -> Iterator[list[Job]]:
    """Sort jobs by what tensors of one call must share."""
    buckets: dict[Any, list[Job]] = {}
    for job in jobs:
        step = None if options["capturable"] else int(job.step)
        dtypes = (job.weight.dtype, job.gradient.dtype, job.exp_avg.dtype)
        key = (job.weight.device, dtypes, step, job.variance is not None)
        buckets.setdefault(key, []).append(job)
    yield from buckets.values()


def _run_single(job: Job, options: Mapping[str, Any], alpha: float) -> None:
    """Step one parameter."""
    weight, wide = job.weight, job.exp_avg.dtype
    before = None if job.counts is None else weight.clone()
    working = weight.to(wide)
    gradient = job.gradient.to(wide)
    lr = float(options["lr"])
    names = ("betas", "eps", "weight_decay", "rho", "gate", "lambda_pop", "gate_warmup", "center", "decay")
    gate = gated_adam_step(
        working,
        -gradient if options["maximize"] else gradient,
        job.exp_avg,
        job.exp_avg_sq,
        job.grad_var,
        step=int(job.step),
        lr=lr,
        alpha=alpha,
        variance=job.variance,
        **{name: options[name] for name in names},
    )
    if working is not weight:
        weight.copy_(working)
    if job.counts is not None and before is not None:
        strength = lr * options["weight_decay"]
        count_step(job.counts, gate, before, weight, strength=strength, is_gated=options["decay"] == "gated")


def _run_foreach(jobs: list[Job], numbers: list[StepRow], options: Mapping[str, Any]) -> None:
    """Step the parameters of one call as lists of tensors."""
    wide = jobs[0].exp_avg.dtype
    weights = [job.weight.to(wide) for job in jobs]
    for part in _parts(jobs):
        row = StepRow._make(list(column) for column in zip(*numbers[part], strict=True)) if options["capturable"] else numbers[0]
        multi_tensor_step(
            weights[part],
            [job.gradient.to(wide) for job in jobs[part]],
            [job.exp_avg for job in jobs[part]],
            [job.exp_avg_sq for job in jobs[part]],
            [job.grad_var for job in jobs[part]],
            row,
            options,
            is_external=jobs[0].variance is not None,
        )
    if jobs[0].weight.dtype != wide:
        FOREACH._foreach_copy_([job.weight for job in jobs], weights)


def _parts(jobs: Sequence[Job]) -> Iterator[slice]:
    """Cut a list on a CPU into parts of at most `CPU_PART` bytes, or one tensor; a GPU takes all at once."""
    if jobs[0].weight.device.type != "cpu":
        yield slice(0, len(jobs))
        return
    start, size = 0, 0
    for index, job in enumerate(jobs):
        own = job.exp_avg.numel() * job.exp_avg.element_size()
        if index > start and size + own > CPU_PART:
            yield slice(start, index)
            start, size = index, 0
        size += own
    yield slice(start, len(jobs))


def _applied_gate(job: Job, row: StepRow, options: Mapping[str, Any], *, alpha: float) -> Tensor:
    """Compute the gate of the step just taken from its numbers."""
    gate = gate_values(
        job.exp_avg * row.mean_scale,
        job.grad_var * row.variance_scale,
        kind=options["gate"],
        alpha=alpha,
        lambda_pop=options["lambda_pop"],
    )
    return gate * (1 - row.warm) + row.warm
