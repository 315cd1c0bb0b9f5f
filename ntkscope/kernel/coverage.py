"""Before any long job: which route each parameter takes, checked against autograd on a few of the user's own examples.

A rule is trusted only where it reproduces autograd; what fails (an operation without a rule, a layer whose rows are not the examples)
goes to autograd, and the report says why. The whole is then compared once more: a difference that is left is an error.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ntkscope._checks import InputError, UserError, check_finite, format_bytes
from ntkscope._display import Displayed
from ntkscope._types import ForwardFn, GramMethod
from ntkscope.kernel.batch import count_examples, take
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.factor import FactoredJacobian
from ntkscope.kernel.fallback import RowRoute, jacobian_rows
from ntkscope.kernel.jacobian import class_grads, compute_jacobian, watched_forward
from ntkscope.kernel.layout import Layout, by_example, possible_layouts
from ntkscope.kernel.model import forward_rows, select_parameters, working_dtype
from ntkscope.kernel.routes import Plan, PlannedCall, Routes, UnlikeProbe, without
from ntkscope.kernel.rows import check_rows_are_functions, first_rows, saved_bytes
from ntkscope.kernel.storage import OuterShape, Storage, choose_storage, outer_shape, resolve
from ntkscope.kernel.watch import Call, WeightWatch

HIDDEN_USE = "its rule does not account for the whole gradient (a use that torch functions do not show: TorchScript, a custom Function?)"
LOWEST_PRECISION = 0.05  # of a gradient: what autocast to bfloat16 may cost
NO_LAYOUT = "the rows of its layer are not the examples, in any layout that is known"


@dataclass(frozen=True)
class Share:
    """Sizes of one parameter's share of the Jacobian, from which a job is priced.

    Attributes:
        num_params: Entries of the parameter.
        factors: Sizes of its factors; empty where it is kept as rows.
        is_separated: Whether its factors separate into class amplitudes and patterns (`OuterFactor.separated`), on the probe.
    """

    num_params: int
    factors: tuple[OuterShape, ...] = ()
    is_separated: bool = False


@dataclass(frozen=True)
class Coverage(Displayed):
    """The route of every parameter, and what the probe measured.

    Attributes:
        routes: Parameter name to the torch functions it is used by ("linear", "conv2d", ...), or "torch.func" or "loop" where autograd
            differentiates every output.
        reasons: Parameter name to why no rule takes it, where that is so.
        excluded: Parameter name to why it is not in the kernel: frozen, not asked for, or without a way to the output.
        num_classes: Outputs per example.
        bytes_per_example: Bytes that the Jacobian of one example takes.
        working_bytes_per_example: Bytes needed besides while it is computed (activations kept for the backward passes).
        shares: Sizes, by parameter.
    """

    routes: dict[str, str]
    reasons: dict[str, str]
    excluded: dict[str, str]
    num_classes: int
    bytes_per_example: int
    working_bytes_per_example: int
    shares: dict[str, Share]


def probe_routes(
    model: nn.Module,
    inputs: Any,
    *,
    params: Iterable[str] | None = None,
    forward_fn: ForwardFn | None = None,
    method: GramMethod = "auto",
    budget: int | None = None,
) -> tuple[Routes, Coverage]:
    """Choose and verify the route of every parameter on a few examples of `inputs`.

    Args:
        model: Any module.
        inputs: The batch.
        params: Parameter names; all trained ones if not given.
        forward_fn: The model's call.
        method: "auto" uses layer rules where they are exact; "autograd" uses none.
        budget: Bytes that the job may take; a model with so many outputs that a few examples exceed them is refused.

    Returns:
        The routes, and the report.

    Raises:
        InputError: If the outputs are no rows, are random, or one row depends on another; or if the routes differ from autograd.
        UnsupportedError: If the output depends on no parameter.
    """
    parameters = select_parameters(model, params)
    last = count_examples(inputs) - 1
    # Two rows even of one example: only then does the probe see which rows are whose.
    pair = take(inputs, torch.tensor([0, last]))
    # Planned on a pair, verified on four: another number, and out of order, for models that sort or route their examples.
    four = take(inputs, torch.tensor([last, last // 3, 0, 2 * last // 3]))

    def run(batch: Any) -> Tensor:
        return forward_rows(model, batch, forward_fn)

    with undisturbed(model):
        outputs = first_rows(four, run)
        _check_width(outputs, budget)
        check_rows_are_functions(model, four, outputs, run)
        truth = _Truth(outputs, parameters)
        ruled = frozenset(parameters) if method == "auto" else frozenset()
        reasons = {} if method == "auto" else dict.fromkeys(parameters, "method='autograd' was asked for")
        routes = Routes(parameters, ruled, Plan(), "loop", forward_fn, working_dtype(parameters))
        tried = _Tried(routes)
        while routes.ruled:
            tried = _try_rules(model, pair, four, routes, truth)
            if not tried.failed:
                break
            reasons |= tried.failed
            routes = without(routes, frozenset(tried.failed))
            tried = _Tried(routes)
        routes, shares, names, jacobian = tried.routes, tried.shares, tried.names, tried.jacobian
        if jacobian is None or routes.row_parameters:
            routes = replace(routes, row_route=_row_route(model, pair, routes))
            jacobian = compute_jacobian(model, four, routes)
        working = saved_bytes(model, four, run)
        _check_whole(jacobian.pull_back(truth.weights), truth)
    idle = {name: "it does not reach the output (on the probe)" for name in parameters if truth.is_idle(name)}
    for name in routes.row_parameters:
        names[name] = routes.row_route
        shares[name] = Share(parameters[name].numel())
    for name, parts in jacobian.factors.items():
        shares[name] = replace(shares[name], is_separated=all(part.patterns is not None for part in parts))
    per_example = -(-jacobian.num_bytes // 4)
    return routes, Coverage(
        routes={name: names[name] for name in parameters if name in names and name not in idle},
        reasons=reasons,
        excluded=_excluded(model, parameters) | idle,
        num_classes=outputs.shape[1],
        bytes_per_example=per_example,
        working_bytes_per_example=working,
        shares={name: share for name, share in shares.items() if name not in idle},
    )


def _check_width(outputs: Tensor, budget: int | None) -> None:
    """Refuse to probe what cannot be held: the last layer's gradients alone are (examples, C, C)."""
    needed = 2 * outputs.numel() * outputs.shape[1] * outputs.element_size()
    if budget is not None and needed > budget:
        raise InputError(
            f"The model has {outputs.shape[1]:,} outputs per example; gradients of all of them for the probe alone take "
            f"{format_bytes(needed)}, more than max_memory ({format_bytes(budget)}). Take outputs='class=k', fewer outputs by "
            "`forward_fn`, or NTKOperator."
        )


class _Truth:
    """Autograd's gradient of a random combination of the probe's outputs."""

    def __init__(self, outputs: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
        # Retained: a user's module may keep what it computed from parameters for the next call (parametrize.cached).
        grads = torch.autograd.grad(outputs, list(parameters.values()), self.weights, allow_unused=True, retain_graph=True)
        self.grads = dict(zip(parameters, grads, strict=True))
        for name, grad in self.grads.items():
            if grad is not None:
                check_finite(
                    f"The gradient in `{name}`", grad, "The weights are finite, so activations overflow: check inputs, or use float64."
                )
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        # The least precise of all dtypes in use sets what can be expected.
        dtypes = {outputs.dtype, *(parameter.dtype for parameter in parameters.values())}
        self._tolerance = max({torch.float64: 1e-8, torch.float32: 1e-3}.get(dtype, 0.1) for dtype in dtypes)
        # A gradient that is zero but for rounding (a key's bias in attention) has no scale of its own.
        total = sum(float(grad.detach().double().square().sum()) for grad in grads if grad is not None) ** 0.5
        self._floor = 30 * max(torch.finfo(dtype).eps for dtype in dtypes) * total + torch.finfo(outputs.dtype).tiny

    def is_idle(self, name: str) -> bool:
        """Say whether a parameter has no way to the output.

        Args:
            name: The parameter.

        Returns:
            Whether autograd found none.
        """
        return self.grads[name] is None

    def accepts(self, name: str, actual: Tensor | None, *, tolerance: float | None = None) -> bool:
        """Compare a gradient with autograd's.

        Args:
            name: The parameter.
            actual: The gradient; None for zero.
            tolerance: Relative; by the dtypes in use if not given.

        Returns:
            Whether they agree to rounding.
        """
        expected = self.grads[name]
        if expected is None or actual is None:
            given = actual if expected is None else expected
            return given is None or not bool(given.any())
        gap = float(torch.linalg.vector_norm(actual.reshape(expected.shape).to(expected) - expected))
        return gap <= (self._tolerance if tolerance is None else tolerance) * float(torch.linalg.vector_norm(expected)) + self._floor


@dataclass(frozen=True)
class _Tried:
    """What came of watching the probe: parameters that failed with their reasons, or if none did a plan and what was measured."""

    routes: Routes
    failed: dict[str, str] = field(default_factory=dict)
    shares: dict[str, Share] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    jacobian: FactoredJacobian | None = None  # of four examples, in the parameters under rules


def _try_rules(model: nn.Module, pair: Any, four: Any, routes: Routes, truth: _Truth) -> _Tried:
    """Watch the pair, plan, and compare with autograd on four examples.

    Returns:
        What came of it.

    Raises:
        UserError: If the input is at fault.
    """
    try:
        outputs, watch = watched_forward(model, pair, routes, None)
        if watch.refused:
            return _Tried(routes, watch.refused)
        layouts, mixed = _find_layouts(outputs, watch)
        if mixed:
            return _Tried(routes, {name: NO_LAYOUT for call in mixed for use in call.uses for name in watch.roots(use.weight)})
        calls = tuple(PlannedCall(call.name, layout, len(call.uses)) for call, layout in zip(watch.calls, layouts, strict=True))
        shares, names = _measure_shares(calls, watch, routes, outputs.shape[1])
        hidden = {name: HIDDEN_USE for name in routes.ruled if name not in shares and not truth.accepts(name, None)}
        if hidden:
            return _Tried(routes, hidden)
        storage: dict[str, Storage] = {name: "factors" if share.factors else "rows" for name, share in shares.items()}
        planned = replace(routes, plan=Plan(calls, tuple(watch.decisions), storage))
        jacobian = compute_jacobian(model, four, replace(planned, parameters=planned.ruled_parameters))
        pulled = jacobian.pull_back(truth.weights)
    except UserError:
        raise
    except UnlikeProbe as error:
        return _Tried(routes, dict.fromkeys(routes.ruled, str(error)))
    except Exception as error:
        # Whatever the model does that the watch does not understand, autograd can still differentiate it.
        return _Tried(routes, dict.fromkeys(routes.ruled, f"watching the forward pass failed: {type(error).__name__}: {error}"))
    differing = {name: HIDDEN_USE for name in routes.ruled if not truth.accepts(name, pulled.get(name))}
    return _Tried(planned, differing, shares, names, jacobian)


def _find_layouts(outputs: Tensor, watch: WeightWatch) -> tuple[list[Layout | None], list[Call]]:
    """Find every call's layout, None where its output reaches nothing; and the calls that no layout can tell the two examples apart in."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    per_example = [class_grads((outputs * weights)[i].sum()[None, None], 0, watch.calls, retain=i == 0) for i in (0, 1)]
    layouts: list[Layout | None] = []
    mixed = []
    for call, first, second in zip(watch.calls, *per_example, strict=True):
        fitting = [layout for layout in possible_layouts(call.shape, 2) if all(use.fits(layout, call.shape, 2) for use in call.uses)]
        apart = [layout for layout in fitting if not _leaks(first, layout, 1) and not _leaks(second, layout, 0)]
        is_used = first is not None or second is not None
        layouts.append(apart[0] if apart and is_used else None)
        if is_used and not apart:
            mixed.append(call)
    return layouts, mixed


def _leaks(grad: Tensor | None, layout: Layout, other: int) -> bool:
    """Say whether the gradient of one example's outputs reaches another example's rows."""
    return grad is not None and bool(by_example(grad, layout, 2)[other].any())


def _measure_shares(
    calls: tuple[PlannedCall, ...], watch: WeightWatch, routes: Routes, num_classes: int
) -> tuple[dict[str, Share], dict[str, str]]:
    """Measure the uses of every parameter, choose its storage, and name its route."""
    shapes: dict[str, list[OuterShape | None]] = {}
    names: dict[str, list[str]] = {}
    for call, planned in zip(watch.calls, calls, strict=True):
        for use in call.uses:
            target = resolve(use.weight, watch, routes.ruled_parameters)
            for name in watch.roots(use.weight):
                label = call.name if target.name is not None else f"{call.name} (computed weight)"
                if label not in names.setdefault(name, []):
                    names[name].append(label)
                if planned.layout is not None:
                    shapes.setdefault(name, []).append(outer_shape(use, target, planned.layout, 2))
    shares = {}
    for name, found in shapes.items():
        numel = routes.parameters[name].numel()
        kept = choose_storage(found, numel, num_classes) == "factors"
        shares[name] = Share(numel, tuple(shape for shape in found if shape is not None) if kept else ())
    return shares, {name: " + ".join(labels) for name, labels in names.items()}


def _row_route(model: nn.Module, pair: Any, routes: Routes) -> RowRoute:
    """Take torch.func where it runs and agrees with the loop on the pair, else the loop."""
    rest = routes.row_parameters
    if not rest:
        return "torch.func"
    options = {"forward_fn": routes.forward_fn, "dtype": routes.dtype}
    loop = jacobian_rows(model, pair, rest, route="loop", **options)
    try:
        func = jacobian_rows(model, pair, rest, route="torch.func", **options)
    except Exception:
        return "loop"
    tolerance = 1e-8 if routes.dtype == torch.float64 else 1e-3
    agree = all(
        float(torch.linalg.vector_norm(func[name] - rows)) <= tolerance * float(torch.linalg.vector_norm(rows))
        for name, rows in loop.items()
    )
    return "torch.func" if agree else "loop"


def _check_whole(pulled: Mapping[str, Tensor], truth: _Truth) -> None:
    """Compare the Jacobian that the job will use with autograd."""
    differing = [name for name in truth.grads if not truth.accepts(name, pulled.get(name), tolerance=LOWEST_PRECISION)]
    rough = [name for name in truth.grads if not truth.accepts(name, pulled.get(name))]
    if rough and not differing:
        warnings.warn(
            f"The Jacobian in {', '.join(f'`{name}`' for name in rough)} agrees with autograd's to {LOWEST_PRECISION:.0%} only: the model "
            "computes in a lower precision than its outputs have (autocast?). The kernel is as imprecise.",
            stacklevel=4,
        )
    if differing:
        raise InputError(
            f"The Jacobian in {', '.join(f'`{name}`' for name in differing)} differs from autograd's on a few of the examples, by every "
            "route there is: the model's gradient depends on which examples are in the batch. Its kernel is not defined."
        )


def _excluded(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """List the parameters of the model that were not asked for."""
    return {
        name: "not in `params`" if parameter.requires_grad else "frozen (requires_grad is False)"
        for name, parameter in model.named_parameters()
        if name not in parameters
    }
