"""Before any long job: which route each parameter takes, checked against autograd on examples of the user's own batch.

A layer rule is trusted only where it reproduces autograd on two examples; what fails (a weight used without calling its
module, a layer whose rows are not the examples) goes to the autograd fallback, and the report says why.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkscope._checks import InputError, UnsupportedError
from ntkscope._types import ForwardFn, GramMethod
from ntkscope.kernel.batch import count_examples, take
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.fallback import RowRoute, jacobian_rows
from ntkscope.kernel.jacobian import FactoredJacobian, Routes, compute_jacobian, rule_owners
from ntkscope.kernel.model import forward_rows, select_parameters, working_dtype


@dataclass(frozen=True)
class Coverage:
    """The route of every parameter, and what the probe measured.

    Attributes:
        routes: Parameter name to "Linear", "Conv2d", "torch.func" or "loop".
        reasons: Parameter name to why no rule takes it, where that is so.
        num_classes: Outputs per example.
        bytes_per_example: Bytes the Jacobian factors of one example take.
    """

    routes: dict[str, str]
    reasons: dict[str, str]
    num_classes: int
    bytes_per_example: int


def probe_routes(
    model: nn.Module,
    inputs: Any,
    *,
    params: list[str] | None = None,
    forward_fn: ForwardFn | None = None,
    method: GramMethod = "auto",
) -> tuple[Routes, Coverage]:
    """Choose and verify the route of every parameter on the first and last example of `inputs`.

    Args:
        model: Any module.
        inputs: The batch.
        params: Parameter names; all trained ones if not given.
        forward_fn: The model's call.
        method: "auto" uses layer rules where they are exact; "autograd" uses none.

    Returns:
        The routes, and the report.

    Raises:
        InputError: If the outputs are no rows, or one row depends on another.
        UnsupportedError: If the output depends on no parameter.
    """
    parameters = select_parameters(model, params)
    pair = take(inputs, torch.tensor([0, -1])) if count_examples(inputs) > 1 else inputs
    with undisturbed(model):
        outputs = forward_rows(model, pair, forward_fn)
        if not outputs.requires_grad:
            raise UnsupportedError(
                "The model's output depends on none of its trained parameters (a torch.no_grad or detach inside the model?), "
                "so its tangent kernel is zero. Check the forward pass."
            )
        _check_rows_are_independent(model, pair, outputs, forward_fn)
        owners, reasons = rule_owners(model, parameters) if method == "auto" else ({}, dict.fromkeys(parameters, "method=autograd"))
        routes = Routes(parameters, owners, "loop", forward_fn, working_dtype(parameters))
        routes, failed = _keep_what_autograd_confirms(model, pair, routes)
        reasons |= failed
        routes = routes.with_row_route(_row_route(model, pair, routes))
        probe = compute_jacobian(model, pair, routes)
    named = {
        name: type(owners[name].rule).__name__.removesuffix("Rule") if name in routes.owners else routes.row_route for name in parameters
    }
    return routes, Coverage(named, reasons, probe.num_classes, -(-probe.num_bytes // probe.num_examples))


def _check_rows_are_independent(model: nn.Module, pair: Any, outputs: Tensor, forward_fn: ForwardFn | None) -> None:
    """Check that the first row does not change when its neighbour does."""
    if outputs.shape[0] < 2:
        return
    with torch.no_grad():
        repeated = forward_rows(model, take(pair, torch.tensor([0, 0])), forward_fn)
    scale = float(outputs.detach().abs().max())
    gap = float((repeated[0] - outputs[0].detach()).abs().max())
    tolerance = 1e-8 if outputs.dtype == torch.float64 else 1e-3
    if gap > tolerance * max(scale, torch.finfo(outputs.dtype).tiny):
        norms = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and not module.track_running_stats
        ]
        culprit = f"BatchNorm without running statistics: {', '.join(norms)}" if norms else "batch statistics or a contrastive head?"
        raise InputError(
            f"Output rows must depend on their own input row only, but row 0 changed by {gap:.1e} when another row did ({culprit}). "
            "The kernel between examples is not defined then. Use a layer without batch statistics, or take the outputs before it."
        )


def _keep_what_autograd_confirms(model: nn.Module, pair: Any, routes: Routes) -> tuple[Routes, dict[str, str]]:
    """Compare the rules' gradient of a random combination of outputs with autograd's; drop the rules that differ."""
    if not routes.owners:
        return routes, {}
    jacobian, misshapen = _rule_factors(model, pair, routes)
    outputs = forward_rows(model, pair, routes.forward_fn)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    covered = {name: routes.parameters[name] for name in routes.owners}
    truth = torch.autograd.grad(outputs, list(covered.values()), weights, allow_unused=True)
    failed = dict(misshapen)
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(outputs.dtype, 0.1)
    for (name, parameter), grad in zip(covered.items(), truth, strict=True):
        if name in failed:
            continue
        expected = torch.zeros_like(parameter) if grad is None else grad
        actual = jacobian.weighted_gradient(name, weights)
        if actual is None:
            failed[name] = "its layer was not called on the probe"
            continue
        gap = float(torch.linalg.vector_norm(actual.reshape(parameter.shape).to(expected) - expected))
        if not gap <= tolerance * float(torch.linalg.vector_norm(expected)) + torch.finfo(outputs.dtype).tiny:
            failed[name] = "its layer does not account for the whole gradient (a weight used outside its own module?)"
    kept = {name: owner for name, owner in routes.owners.items() if name not in failed}
    return routes.with_owners(kept), failed


def _rule_factors(model: nn.Module, pair: Any, routes: Routes) -> tuple[FactoredJacobian, dict[str, str]]:
    """Compute factors of the rules alone, dropping layers whose rows are not the examples."""
    misshapen: dict[str, str] = {}
    only_rules = routes.without_rows()
    jacobian = compute_jacobian(model, pair, only_rules, misshapen=misshapen)
    return jacobian, misshapen


def _row_route(model: nn.Module, pair: Any, routes: Routes) -> RowRoute:
    """Take torch.func where it runs and agrees with the loop on the pair, else the loop."""
    rest = routes.row_parameters
    if not rest:
        return "torch.func"
    loop = jacobian_rows(model, pair, rest, forward_fn=routes.forward_fn, route="loop")
    try:
        func = jacobian_rows(model, pair, rest, forward_fn=routes.forward_fn, route="torch.func")
    except Exception:
        return "loop"
    gap = float(torch.linalg.vector_norm(func - loop))
    tolerance = 1e-8 if loop.dtype == torch.float64 else 1e-3
    return "torch.func" if gap <= tolerance * float(torch.linalg.vector_norm(loop)) else "loop"
