"""From a watched forward pass and one backward pass per class to the factored Jacobian of a block of examples."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ntkscope._types import ForwardFn
from ntkscope.kernel.batch import count_examples
from ntkscope.kernel.factor import FactoredJacobian, OuterFactor
from ntkscope.kernel.fallback import RowRoute, jacobian_rows
from ntkscope.kernel.layout import Layout
from ntkscope.kernel.model import forward_rows
from ntkscope.kernel.rules.use import OuterUse, Use
from ntkscope.kernel.storage import Storage, num_rows, resolve
from ntkscope.kernel.watch import Call, WeightWatch


@dataclass(frozen=True)
class PlannedCall:
    """What the probe learned of one call."""

    name: str
    layout: Layout | None  # None: the call's output reaches no output of the model
    num_weights: int


@dataclass(frozen=True)
class Plan:
    """What the probe learned of the forward pass; later blocks must look the same."""

    calls: tuple[PlannedCall, ...] = ()
    decisions: tuple[bool, ...] = ()
    storage: dict[str, Storage] = field(default_factory=dict)  # of parameters with uses


@dataclass(frozen=True)
class Routes:
    """How each parameter's share of the Jacobian is computed."""

    parameters: dict[str, nn.Parameter]
    ruled: frozenset[str]  # parameters under rules; with a use, or reaching no output on the probe
    plan: Plan
    row_route: RowRoute  # for all others
    forward_fn: ForwardFn | None
    dtype: torch.dtype  # of the factors

    def with_dtype(self, dtype: torch.dtype) -> "Routes":
        """Contract in another precision.

        Args:
            dtype: Of the factors.

        Returns:
            New routes.
        """
        return replace(self, dtype=dtype)

    def left_to_autograd(self) -> "Routes":
        """Differentiate every output by autograd, in all parameters, one after the other: the way through the model depends on data.

        Returns:
            New routes.
        """
        return replace(without(self, self.ruled), row_route="loop")

    @property
    def ruled_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters under rules."""
        return {name: parameter for name, parameter in self.parameters.items() if name in self.ruled}

    @property
    def row_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters left to autograd."""
        return {name: parameter for name, parameter in self.parameters.items() if name not in self.ruled}

    @property
    def idle_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that reached no output on the probe."""
        return {name: parameter for name, parameter in self.ruled_parameters.items() if name not in self.plan.storage}


class UnlikeProbe(Exception):
    """A block takes another way through the model than the probe did, so what the probe learned does not hold."""


def watched_forward(model: nn.Module, batch: Any, routes: Routes, decisions: tuple[bool, ...] | None) -> tuple[Tensor, WeightWatch]:
    """Run the model under observation.

    Args:
        model: Any module, inside `undisturbed`.
        batch: As for `batch_tensors`.
        routes: Which parameters to watch.
        decisions: From the probe; None on the probe itself.

    Returns:
        Outputs, and what was seen.
    """
    watch = WeightWatch(routes.ruled_parameters, batch, count_examples(batch), decisions)
    with watch:
        outputs = forward_rows(model, batch, routes.forward_fn)
    return outputs, watch


def compute_jacobian(model: nn.Module, batch: Any, routes: Routes) -> FactoredJacobian:
    """Run the model forward once and backward once per class, and factor what was seen.

    Args:
        model: Any module, inside `undisturbed`.
        batch: As for `batch_tensors`.
        routes: From `probe_routes`.

    Returns:
        The factored Jacobian.

    Raises:
        UnlikeProbe: If the batch takes another way through the model than the probe did.
    """
    plan = routes.plan
    outputs, watch = watched_forward(model, batch, routes, plan.decisions)
    seen = [(call.name, len(call.uses)) for call in watch.calls]
    if seen != [(planned.name, planned.num_weights) for planned in plan.calls] or watch.refused:
        raise UnlikeProbe("the model calls other layers on some examples than on others")
    collected = _Collector(routes, watch, outputs)
    for index in range(outputs.shape[1]):
        is_last = index == outputs.shape[1] - 1 and not routes.idle_parameters
        collected.add_class(index, class_grads(outputs, index, watch.calls, retain=not is_last))
    _check_idle(outputs, routes.idle_parameters)
    factors, rows = collected.factors(), collected.rows()
    rest = routes.row_parameters
    if rest:
        rows |= jacobian_rows(model, batch, rest, forward_fn=routes.forward_fn, route=routes.row_route, dtype=routes.dtype)
    return FactoredJacobian(
        outputs.detach(), factors, rows, {name: parameter.shape for name, parameter in routes.parameters.items()}, routes.dtype
    )


def class_grads(outputs: Tensor, index: int, calls: list[Call], *, retain: bool) -> list[Tensor | None]:
    """Differentiate one class, summed over examples, in every call's output: rows are independent, so sums keep them apart.

    Args:
        outputs: Shape `(n, C)`.
        index: The class.
        calls: From the watch.
        retain: Whether the graph is needed again.

    Returns:
        One gradient per call, None where it reaches nothing.
    """
    if not calls:
        return []
    edges = [call.edge for call in calls]
    return list(torch.autograd.grad(outputs[:, index].sum(), edges, retain_graph=retain, allow_unused=True))


def _check_idle(outputs: Tensor, idle: Mapping[str, nn.Parameter]) -> None:
    """Check that parameters which reached no output of the probe reach none here either."""
    if not idle:
        return
    grads = torch.autograd.grad(outputs.sum(), list(idle.values()), allow_unused=True)
    if any(grad is not None and bool(grad.any()) for grad in grads):
        raise UnlikeProbe("some examples use parameters that others do not")


class _Collector:
    """Puts the gradients of every class where they belong."""

    def __init__(self, routes: Routes, watch: WeightWatch, outputs: Tensor) -> None:
        self.routes, self.watch = routes, watch
        self.num_examples, self.num_classes = outputs.shape
        self._rows: dict[str, Tensor] = {}
        self._computed: dict[int, tuple[Tensor, Tensor]] = {}  # id of a computed weight: the weight, its rows
        self._grads: dict[tuple[int, int], Tensor] = {}  # (call, use): [examples, classes, units, positions]
        self._inputs: dict[tuple[int, int], Tensor] = {}
        self._targets = {key: resolve(use.weight, watch, routes.ruled_parameters) for key, _, _, use in self._uses()}

    def _uses(self) -> Iterator[tuple[tuple[int, int], int, Layout, Use]]:
        for i, (call, planned) in enumerate(zip(self.watch.calls, self.routes.plan.calls, strict=True)):
            if planned.layout is not None:
                for j, use in enumerate(call.uses):
                    yield (i, j), i, planned.layout, use

    def add_class(self, index: int, grads: list[Tensor | None]) -> None:
        """Add one class.

        Args:
            index: The class.
            grads: From `class_grads`.

        Raises:
            UnlikeProbe: If the layouts that the plan names do not fit.
        """
        for grad, call, planned in zip(grads, self.watch.calls, self.routes.plan.calls, strict=True):
            if grad is None:
                continue
            if planned.layout is None:
                raise UnlikeProbe("the result of a layer reaches the output for some examples only")
            if not all(use.fits(planned.layout, call.shape, self.num_examples) for use in call.uses):
                raise UnlikeProbe(f"`{call.name}` has an output of shape {call.shape} for {self.num_examples} examples")
        cast = [None if grad is None else grad.to(self.routes.dtype) for grad in grads]
        for key, i, layout, use in self._uses():
            grad = cast[i]
            if grad is not None:
                self._add_use(key, index, layout, use, grad)

    def _add_use(self, key: tuple[int, int], index: int, layout: Layout, use: Use, grad: Tensor) -> None:
        target, n = self._targets[key], self.num_examples
        if isinstance(use, OuterUse) and key not in self._inputs:
            inputs = use.inputs(layout, n)
            self._inputs[key] = inputs.to(self.routes.dtype) if inputs.is_floating_point() else inputs
        inputs = self._inputs.get(key)
        if target.name is not None and self.routes.plan.storage[target.name] == "factors":
            assert isinstance(use, OuterUse)  # `choose_storage` said so
            factor = use.grads(grad, layout, n)
            if key not in self._grads:
                self._grads[key] = factor.new_zeros(n, self.num_classes, *factor.shape[1:])
            self._grads[key][:, index] = factor
            return
        rows = use.rows(grad, layout, n, inputs)
        if target.name is None:
            if id(use.weight) not in self._computed:
                self._computed[id(use.weight)] = (use.weight, rows.new_zeros(n, self.num_classes, use.weight.numel()))
            self._computed[id(use.weight)][1][:, index] += rows
            return
        store = self._row_store(target.name)[:, index].view(n, num_rows(self.routes.parameters[target.name]), -1)
        if target.transposed:
            rows = rows.view(n, *use.weight.shape).mT.reshape(n, -1)
        store[:, target.part] += rows.view(n, target.part.stop - target.part.start, -1)

    def _row_store(self, name: str) -> Tensor:
        if name not in self._rows:
            parameter = self.routes.parameters[name]
            self._rows[name] = torch.zeros(
                self.num_examples, self.num_classes, parameter.numel(), dtype=self.routes.dtype, device=parameter.device
            )
        return self._rows[name]

    def factors(self) -> dict[str, list[OuterFactor]]:
        """Put positions of the same part of a parameter side by side.

        Returns:
            Factors by parameter.
        """
        groups: dict[tuple[str, int, int, bool, bool], list[tuple[int, int]]] = {}
        for key, _, _, use in self._uses():
            if key in self._grads:
                assert isinstance(use, OuterUse)
                target = self._targets[key]
                assert target.name is not None
                is_token = self._inputs[key].ndim == 2
                kind = (target.name, target.part.start, target.part.stop, use.transposed != target.transposed, is_token)
                groups.setdefault(kind, []).append(key)
        found: dict[str, list[OuterFactor]] = {}
        for (name, start, stop, transposed, _), keys in groups.items():
            grads, inputs = ([store.pop(key) for key in keys] for store in (self._grads, self._inputs))
            factor = OuterFactor(
                grads[0] if len(grads) == 1 else torch.cat(grads, dim=3),
                inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1),
                slice(start, stop),
                transposed,
            )
            found.setdefault(name, []).append(factor.separated())
        return found

    def rows(self) -> dict[str, Tensor]:
        """Finish the rows, pulling those of computed weights back to their parameters.

        Returns:
            Rows by parameter.
        """
        parameters = self.routes.parameters
        for weight, rows in self._computed.values():
            names = sorted(self.watch.roots(weight))
            stores = [self._row_store(name) for name in names]
            for i in range(self.num_examples):
                for c in range(self.num_classes):
                    # One small backward pass per output: parametrizations have no batched derivative (weight_norm, for one).
                    grads = torch.autograd.grad(
                        weight,
                        [parameters[name] for name in names],
                        rows[i, c].view_as(weight).to(weight),
                        retain_graph=True,
                        allow_unused=True,
                    )
                    for store, grad in zip(stores, grads, strict=True):
                        if grad is not None:
                            store[i, c] += grad.flatten()
        return self._rows


def without(routes: Routes, names: frozenset[str]) -> Routes:
    """Leave some parameters to autograd.

    Args:
        routes: Routes.
        names: Parameters.

    Returns:
        New routes, without a plan.
    """
    return replace(routes, ruled=routes.ruled - names, plan=Plan())
