"""From a watched forward pass and one backward pass per class to the factored Jacobian of a block of examples."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ntkscope.kernel.batch import count_examples, take
from ntkscope.kernel.collect import Collector, Store
from ntkscope.kernel.factor import FactoredJacobian
from ntkscope.kernel.fallback import jacobian_rows
from ntkscope.kernel.model import forward_rows
from ntkscope.kernel.routes import Routes, UnlikeProbe
from ntkscope.kernel.watch import Call, WeightWatch


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


def compute_jacobian(model: nn.Module, batch: Any, routes: Routes, *, num_parts: int = 1) -> FactoredJacobian:
    """Run the model forward once and backward once per class, and factor what was seen.

    Args:
        model: Any module, inside `undisturbed`.
        batch: As for `batch_tensors`.
        routes: From `probe_routes`.
        num_parts: Differentiate the examples in so many parts, one after the other, which need less memory for activations.

    Returns:
        The factored Jacobian.

    Raises:
        UnlikeProbe: If the batch takes another way through the model than the probe did.
    """
    num_examples = count_examples(batch)
    step = -(-num_examples // num_parts)
    store = Store(routes, num_examples)
    outputs = []
    for start in range(0, num_examples, step):
        examples = slice(start, min(start + step, num_examples))
        outputs.append(_add_part(model, take(batch, examples), routes, store, examples))
    shapes = {name: parameter.shape for name, parameter in routes.parameters.items()}
    return FactoredJacobian(torch.cat(outputs), store.factors(), store.rows(), shapes, routes.dtype)


def _add_part(model: nn.Module, batch: Any, routes: Routes, store: Store, examples: slice) -> Tensor:
    """Differentiate some examples, and return their outputs."""
    plan = routes.plan
    outputs, watch = watched_forward(model, batch, routes, plan.decisions)
    seen = [(call.name, len(call.uses)) for call in watch.calls]
    if seen != [(planned.name, planned.num_weights) for planned in plan.calls] or watch.refused:
        raise UnlikeProbe("the model calls other layers on some examples than on others")
    num_classes = outputs.shape[1]
    collector = Collector(store, watch, examples, num_classes)
    mine = _random_half(len(outputs))
    for index in range(num_classes):
        is_last = index == num_classes - 1 and not routes.idle_parameters
        if index == 0 and bool(mine.any()):
            # In two passes, so that what the probe learned of two examples is confirmed on these: see `Collector.check_apart`.
            kept = mine.to(outputs.device, outputs.dtype)[:, None]
            first = class_grads(outputs * kept, index, watch.calls, retain=True)
            collector.check_apart(first, mine)
            second = class_grads(outputs * (1 - kept), index, watch.calls, retain=not is_last)
            grads = [_sum(first.pop(0), second.pop(0)) for _ in watch.calls]  # what is added up is let go at once
        else:
            grads = class_grads(outputs, index, watch.calls, retain=not is_last)
        collector.add_class(index, grads)
    _check_idle(outputs, routes.idle_parameters)
    collector.finish()
    if rest := routes.row_parameters:
        rows = jacobian_rows(model, batch, rest, forward_fn=routes.forward_fn, route=routes.row_route, dtype=routes.dtype)
        for name, own in rows.items():
            store.rows_of(name, num_classes)[examples] = own
    return outputs.detach()


def _random_half(num_examples: int) -> Tensor:
    """Mark about half of the examples; none of one, which cannot be mistaken for another."""
    if num_examples == 1:
        return torch.zeros(1, dtype=torch.bool)
    half = torch.randperm(num_examples, generator=torch.Generator().manual_seed(num_examples)) < num_examples // 2
    return half


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Add two gradients, of which None is zero."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


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
    grads = torch.autograd.grad(outputs.sum(), list(idle.values()), allow_unused=True, retain_graph=True)
    if any(grad is not None and bool(grad.any()) for grad in grads):
        raise UnlikeProbe("some examples use parameters that others do not")
