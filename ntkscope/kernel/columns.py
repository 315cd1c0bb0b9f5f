"""The Jacobian's columns, some parameters at a time: for what must look at every entry of J and cannot be contracted.

A parameter's columns are taken by rows of the parameter as a matrix (first axis, rest). All its factors are added up there, also
where it is used twice, or as a table and as a head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ntkscope._checks import InputError, format_bytes
from ntkscope.kernel.batch import count_examples
from ntkscope.kernel.blocks import as_rows
from ntkscope.kernel.coverage import Coverage
from ntkscope.kernel.factor import FactoredJacobian, OuterFactor
from ntkscope.kernel.jacobian import compute_jacobian
from ntkscope.kernel.routes import Routes, UnlikeProbe


@dataclass(frozen=True)
class Columns:
    """Derivatives of every output in some entries of one parameter.

    Attributes:
        where: Those entries, as positions in the flattened parameter.
        values: The derivatives.
    """

    where: Int[Tensor, " entries"]
    values: Float[Tensor, "examples classes entries"]


def whole_jacobian(model: nn.Module, inputs: Any, *, routes: Routes, coverage: Coverage, budget: int) -> FactoredJacobian:
    """Compute the factored Jacobian of all examples at once.

    Args:
        model: The model, inside `undisturbed`.
        inputs: Rows.
        routes: From `probe_routes`.
        coverage: From `probe_routes`.
        budget: Bytes that it may take.

    Returns:
        J, in factors.

    Raises:
        InputError: If it takes more.
        UnlikeProbe: If some examples take another way through the model even where autograd differentiates every output.
    """
    needed = jacobian_bytes(coverage, count_examples(inputs))
    if needed > budget:
        raise InputError(
            f"The Jacobian of {count_examples(inputs)} examples takes {format_bytes(needed)} in factors, more than the "
            f"{format_bytes(budget)} allowed. Raise max_memory, or record a smaller probe."
        )
    try:
        return compute_jacobian(model, inputs, routes)
    except UnlikeProbe:
        if not routes.ruled:
            raise
        return whole_jacobian(model, inputs, routes=routes.left_to_autograd(), coverage=as_rows(coverage, routes), budget=budget)


def jacobian_bytes(coverage: Coverage, num_examples: int) -> int:
    """Price the factored Jacobian of some examples.

    Args:
        coverage: From `probe_routes`.
        num_examples: n.

    Returns:
        Bytes.
    """
    return num_examples * (coverage.bytes_per_example + coverage.working_bytes_per_example)


def columns_of(jacobian: FactoredJacobian, name: str, *, chunk_bytes: int) -> Iterator[Columns]:
    """Walk over the columns of one parameter; entries that no example uses (tokens that do not occur) are left out.

    Args:
        jacobian: J, in factors.
        name: The parameter.
        chunk_bytes: About how much to form at a time; at least one row of the parameter.

    Yields:
        Columns, in the factors' precision; every entry at most once.
    """
    per_entry = jacobian.num_examples * jacobian.num_classes * jacobian.outputs.element_size()
    at_once = max(1, chunk_bytes // per_entry)
    if name in jacobian.rows:
        for start in range(0, jacobian.rows[name].shape[2], at_once):
            values = jacobian.rows[name][:, :, start : start + at_once]
            yield Columns(torch.arange(start, start + values.shape[2], device=values.device), values)
    factors = jacobian.factors.get(name, [])
    if not factors:
        return
    shape = jacobian.shapes[name]
    width = shape[1:].numel()
    for rows in _used_rows(factors).split(max(1, at_once // width)):
        total = jacobian.outputs.new_zeros(*jacobian.outputs.shape, len(rows), width, dtype=jacobian.dtype)
        for factor in factors:
            _add(total, factor, rows)
        where = rows[:, None] * width + torch.arange(width, device=rows.device)
        yield Columns(where.flatten(), total.flatten(2))


def _used_rows(factors: list[OuterFactor]) -> Int[Tensor, " rows"]:
    """List the rows of the parameter that occur."""
    device = factors[0].grads.device
    parts = [factor.inputs.flatten() if factor.is_token else torch.arange(factor.part.start, factor.part.stop) for factor in factors]
    return torch.cat([part.to(device) for part in parts]).unique()


def _add(total: Float[Tensor, "examples classes rows width"], factor: OuterFactor, rows: Int[Tensor, " rows"]) -> None:
    """Add the share of one factor."""
    if factor.is_token:
        hot = (factor.inputs[:, :, None] == rows).to(factor.grads)  # [examples, positions, rows]
        total += torch.einsum("icut,itr->icru", factor.grads, hot)
        return
    inside = (rows >= factor.part.start) & (rows < factor.part.stop)
    if not bool(inside.any()):
        return
    local = rows[inside] - factor.part.start
    if factor.has_modes:
        modes = factor.modes()  # [examples, units or one for all, inputs]
        if factor.transposed:
            share = torch.einsum("icu,iur->icru", factor.grads[..., 0], modes[:, :, local].expand(-1, factor.grads.shape[2], -1))
        else:
            chosen = modes if modes.shape[1] == 1 else modes[:, local]
            share = factor.grads[:, :, local, 0, None] * chosen[:, None]
    elif factor.transposed:
        share = torch.einsum("icut,itr->icru", factor.grads, factor.inputs[:, :, local])
    else:
        grads = factor.grads[:, :, local]
        share = (grads.flatten(1, 2) @ factor.inputs).view(*grads.shape[:3], -1)
    if bool(inside.all()):
        total += share
    else:
        total[:, :, inside] += share
