"""The Jacobian of one batch in factors: position factors where a layer rule holds, plain rows elsewhere.

The N x p Jacobian itself is never formed for a rule's parameters: contractions run in chunks of columns (`contract`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntkscope._checks import UnsupportedError
from ntkscope._types import ForwardFn
from ntkscope.kernel.capture import capture_layers
from ntkscope.kernel.fallback import RowRoute, jacobian_rows
from ntkscope.kernel.model import forward_rows
from ntkscope.kernel.rules.factor import PositionFactor, Rule, merge_factors
from ntkscope.kernel.rules.table import RULES


@dataclass(frozen=True)
class Owner:
    """The layers that may account for a parameter (several when it is tied), and their rule."""

    rule: Rule
    places: tuple[tuple[str, str], ...]  # (module name, parameter name inside it)


@dataclass(frozen=True)
class Routes:
    """How each parameter's share of the Jacobian is computed."""

    parameters: dict[str, nn.Parameter]
    owners: dict[str, Owner]  # parameters under a rule
    row_route: RowRoute  # for all others
    forward_fn: ForwardFn | None
    dtype: torch.dtype  # of the factors
    skip_rows: bool = False

    @property
    def row_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters without a rule."""
        if self.skip_rows:
            return {}
        return {name: parameter for name, parameter in self.parameters.items() if name not in self.owners}

    def with_owners(self, owners: dict[str, Owner]) -> "Routes":
        """Replace the rules.

        Args:
            owners: What remains under a rule.

        Returns:
            New routes.
        """
        return replace(self, owners=owners)

    def with_row_route(self, row_route: RowRoute) -> "Routes":
        """Replace the fallback.

        Args:
            row_route: The route of parameters without a rule.

        Returns:
            New routes.
        """
        return replace(self, row_route=row_route)

    def without_rows(self) -> "Routes":
        """Leave out parameters without a rule.

        Returns:
            New routes.
        """
        return replace(self, skip_rows=True)


@dataclass(frozen=True)
class FactoredJacobian:
    """J of one batch, by parameter name."""

    outputs: Float[Tensor, "examples classes"]  # detached
    factors: dict[str, list[PositionFactor]]
    rows: Float[Tensor, "examples classes row_params"]
    row_shapes: dict[str, torch.Size]  # columns of `rows`, in order

    @property
    def num_examples(self) -> int:
        """N."""
        return self.outputs.shape[0]

    @property
    def num_classes(self) -> int:
        """C."""
        return self.outputs.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes held by the factors."""
        held = sum(factor.num_bytes for parts in self.factors.values() for factor in parts)
        return held + self.rows.numel() * self.rows.element_size()

    def row_blocks(self) -> dict[str, Float[Tensor, "examples classes row_params"]]:
        """Cut the plain rows by parameter.

        Returns:
            Views, by name.
        """
        sizes = [shape.numel() for shape in self.row_shapes.values()]
        return dict(zip(self.row_shapes, self.rows.split(sizes, dim=2), strict=True))

    def weighted_gradient(self, name: str, weights: Float[Tensor, "examples classes"]) -> Float[Tensor, " parameter"] | None:
        """Compute Jᵀ weights for one parameter under a rule (the vector-Jacobian product).

        Args:
            name: The parameter.
            weights: One weight per output.

        Returns:
            The flattened gradient; None if no layer saw the parameter.
        """
        parts = sorted(self.factors.get(name, []), key=lambda factor: factor.units.start)
        slices = [torch.einsum("ic,icto,itk->ok", weights.to(f.activations), f.output_grads, f.activations).flatten() for f in parts]
        return torch.cat(slices) if slices else None

    def push_forward(self, tangents: Mapping[str, Tensor]) -> Float[Tensor, "examples classes"]:
        """Compute J t, the motion of the outputs when the parameters move along `tangents` (the Jacobian-vector product).

        Args:
            tangents: Directions by parameter name, shaped as the parameters.

        Returns:
            Motion of every output.
        """
        motion = torch.zeros_like(self.outputs, dtype=self.rows.dtype)
        for name, parts in self.factors.items():
            direction = tangents[name].to(motion).flatten(1) if tangents[name].ndim > 1 else tangents[name].to(motion)[:, None]
            for factor in parts:
                pushed = factor.activations @ direction[factor.units].T  # [examples, positions, units]
                motion += torch.einsum("icto,ito->ic", factor.output_grads, pushed)
        for name, block in self.row_blocks().items():
            motion += block @ tangents[name].to(motion).flatten()
        return motion


def rule_owners(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Owner], dict[str, str]]:
    """Find the rule of every parameter, by looking at the modules that hold it.

    Args:
        model: Any module.
        parameters: Parameters of the kernel, by name.

    Returns:
        Owners, and for parameters without one the reason.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    places: dict[str, list[tuple[str, str, nn.Module]]] = {}
    for module_name, module in model.named_modules():
        for local_name, parameter in module._parameters.items():
            if id(parameter) in names:
                places.setdefault(names[id(parameter)], []).append((module_name, local_name, module))
    owners, reasons = {}, {}
    for name, held in places.items():
        rules = {id(rule): rule for *_, module in held for rule in RULES if rule.matches(module)}
        types = sorted({type(module).__name__ for *_, module in held})
        if len(rules) == 1 and all(any(rule.matches(module) for rule in RULES) for *_, module in held):
            owners[name] = Owner(next(iter(rules.values())), tuple((m, local) for m, local, _ in held))
        else:
            reasons[name] = f"no layer rule for {', '.join(types)}"
    return owners, reasons


def compute_jacobian(model: nn.Module, batch: Any, routes: Routes, *, misshapen: dict[str, str] | None = None) -> FactoredJacobian:
    """Run the model forward once and backward once per class, and factor what the layers saw.

    Call it inside `undisturbed(model)`.

    Args:
        model: Any module.
        batch: As for `batch_tensors`.
        routes: From `probe_routes`.
        misshapen: If given, parameters whose layer's rows are not the examples are left out and noted here with the reason.

    Returns:
        The factored Jacobian.

    Raises:
        UnsupportedError: If a layer's rows are not the examples and `misshapen` was not given.
    """
    modules = dict(model.named_modules())
    watched = {place: modules[place] for owner in routes.owners.values() for place, _ in owner.places}
    with capture_layers(watched) as calls:
        outputs = forward_rows(model, batch, routes.forward_fn)
    num_examples = outputs.shape[0]
    factors: dict[str, list[PositionFactor]] = {}
    grads = _output_grads(outputs, [call.output for call in calls])
    for index, call in enumerate(calls):
        owned = [
            (name, local, owner.rule) for name, owner in routes.owners.items() for place, local in owner.places if place == call.module_name
        ]
        if call.input.shape[0] != num_examples or call.input.ndim < 2 or call.output.ndim != call.input.ndim:
            reason = f"layer `{call.module_name}` sees {call.input.shape[0]} rows for {num_examples} examples"
            if misshapen is None:
                raise UnsupportedError(f"{reason}, unlike in the probe. Use method='autograd'.")
            misshapen |= {name: reason for name, *_ in owned}
            continue
        rule = owned[0][2]
        cast = replace(call, input=call.input.to(routes.dtype))
        parts = rule.factors(cast, torch.stack([by_class[index] for by_class in grads]).to(routes.dtype))
        for name, local, _ in owned:
            factors.setdefault(name, []).extend(parts[local])
    rest = routes.row_parameters
    if rest:
        rows = jacobian_rows(model, batch, rest, forward_fn=routes.forward_fn, route=routes.row_route).to(routes.dtype)
    else:
        rows = outputs.new_zeros((*outputs.shape, 0), dtype=routes.dtype).detach()
    merged = {name: merge_factors(parts) for name, parts in factors.items()}
    return FactoredJacobian(outputs.detach(), merged, rows, {name: parameter.shape for name, parameter in rest.items()})


def _output_grads(outputs: Float[Tensor, "examples classes"], layer_outputs: list[Tensor]) -> list[list[Tensor]]:
    """Differentiate each class, summed over examples, in every layer output: rows are independent, so sums keep them apart."""
    if not layer_outputs:
        return []
    totals = outputs.sum(dim=0)
    last = len(totals) - 1
    return [
        [
            torch.zeros_like(layer) if grad is None else grad
            for layer, grad in zip(
                layer_outputs,
                torch.autograd.grad(total, layer_outputs, retain_graph=c < last, allow_unused=True),
                strict=True,
            )
        ]
        for c, total in enumerate(totals)
    ]
