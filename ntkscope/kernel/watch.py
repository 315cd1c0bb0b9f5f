"""A forward pass under observation: which weight is used where, with which activations.

Module hooks see a layer's input and output, but not a weight that is used by `F.linear`, added as a bare parameter, sliced by
`nn.MultiheadAttention` or computed by a parametrization. `WeightWatch` sees the torch functions themselves. Every tensor is one of

- weight: a parameter of the kernel, or computed from such parameters and constants only (`weight_norm`, a transpose, a slice);
- data: computed from the batch;
- constant: everything else.

A call that joins a weight with data is a *use* of the weight: by a rule where there is one, else the weight is refused with the
reason, and its share of the Jacobian is left to autograd. Nothing in the forward pass is changed, but recurrent layers are unrolled.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ntkscope._checks import UnsupportedError
from ntkscope.kernel.batch import batch_tensors
from ntkscope.kernel.layout import possible_layouts
from ntkscope.kernel.rules.table import LIKES, RULES
from ntkscope.kernel.rules.use import Use

# Python functions that only pass tensors on to others: what they call is watched instead.
TRANSPARENT = ("torch.nn.functional", "torch.functional")
GUARDS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
COPIES = ("expand", "expand_as", "repeat", "broadcast_to")
# Calls that make one row per example of a weight alone: class tokens, tables of positions, the first step from a zero state.
OPEN = (*COPIES, "embedding", "linear")


@dataclass(frozen=True, eq=False)
class Call:
    """One call in which weights met data."""

    name: str  # of the torch function
    edge: GradientEdge  # where in the autograd graph its output is: an in-place operation on the output does not move it
    shape: tuple[int, ...]  # of the output
    uses: tuple[Use, ...]


class WeightWatch(TorchFunctionMode):
    """Observe the torch functions called inside the block.

    Args:
        parameters: Parameters of the kernel, by name.
        batch: What the model is about to see.
        num_examples: n of the batch.
        decisions: From an earlier pass over other examples of the same batch: for each weight that might have been copied once per
            example, whether it was. With a shape alone it cannot be known (T = n); None makes the choice by shape.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], batch: Any, num_examples: int, decisions: tuple[bool, ...] | None = None
    ) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.refused: dict[str, str] = {}  # parameter name: reason
        self.decisions: list[bool] = []
        self._planned = None if decisions is None else iter(decisions)
        self._num_examples = num_examples
        self._roots: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight: names of the parameters it comes from
        self._data: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for name, parameter in parameters.items():
            self._roots[parameter] = frozenset((name,))
        for tensor in batch_tensors(batch):
            self._data[tensor] = True

    def is_weight(self, value: Any) -> bool:
        """Say whether a value is a weight.

        Args:
            value: Anything.

        Returns:
            Whether it is.
        """
        return isinstance(value, Tensor) and value in self._roots

    def is_data(self, value: Any) -> bool:
        """Say whether a value depends on the batch.

        Args:
            value: Anything.

        Returns:
            Whether it does; a tensor of unknown origin that carries gradients is taken to.
        """
        if not isinstance(value, Tensor) or value in self._roots:
            return False
        return value in self._data or (value.requires_grad and not value.is_leaf)

    def roots(self, weight: Tensor) -> frozenset[str]:
        """Name the parameters that a weight is computed from.

        Args:
            weight: A weight.

        Returns:
            Their names.
        """
        return self._roots[weight]

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make the call, and note what it does."""
        kwargs = kwargs or {}
        tensors = list(_tensors((args, kwargs)))
        name = getattr(func, "__name__", str(func))
        if name == "embedding_renorm_":
            raise UnsupportedError("An embedding with max_norm rewrites its weights in every forward pass. Set max_norm=None.")
        weights = [tensor for tensor in tensors if tensor in self._roots]
        if name in LIKES and len(args) > 1:
            weights = [tensor for tensor in weights if tensor is args[0]]
        has_data = any(self.is_data(tensor) for tensor in tensors)
        if not weights:
            result = func(*args, **kwargs)
            if has_data:
                self._mark_data(result, name, args)
            return result
        if _is_transparent(func) and (has_data or name == "embedding"):
            with self:
                return _without_guards(func)(*args, **kwargs)
        if has_data or name in OPEN:
            return self._use(name, func, args, kwargs, weights, is_open=not has_data)
        result = func(*args, **kwargs)
        self._mark_weight(result, weights)
        return result

    def _use(self, name: str, func: Callable[..., Any], args: Any, kwargs: Any, weights: list[Tensor], *, is_open: bool) -> Any:
        """Make a call in which weights meet data, or (open) may be copied once per example."""
        rule = RULES.get(name)
        num_before = len(self.calls)
        if rule is None:
            result = func(*args, **kwargs)
            if any(tensor.requires_grad for tensor in _tensors((result, args[:1]))):
                self._refuse(weights, f"it is used by {_full_name(func, name)}, for which there is no rule")
            self._mark_data(result, name, args)
            return result
        seen = rule(self, func, args, kwargs)
        result, output, uses = seen.result, seen.output, seen.uses
        if is_open and not self._is_per_example(output if output is not None else result):
            self._mark_weight(result, weights)
            return result
        if output is None:
            if len(self.calls) == num_before and torch.is_grad_enabled():
                self._refuse(weights, f"{_full_name(func, name)} was called in a way that its rule does not cover")
        elif output.requires_grad:
            accounted = {id(use.weight) for use in uses}
            missing = [weight for weight in weights if id(weight) not in accounted and weight.requires_grad]
            self._refuse(missing, f"{_full_name(func, name)} was called in a way that its rule does not cover")
            if uses:
                self.calls.append(Call(name, get_gradient_edge(output), tuple(output.shape), uses))
                if result is output and output._is_view() and name not in COPIES and output is not args[0]:
                    # A Linear on a sequence returns a view. Written to in place (nn.ReLU(inplace=True)), a view loses its place in
                    # the graph, so the model goes on with a copy.
                    result = output.clone()
        self._mark_data(result, name, args)
        return result

    def _is_per_example(self, output: Tensor) -> bool:
        """Decide whether a weight that met no data was copied once per example (class tokens) or not (position tables)."""
        if self._planned is not None:
            decision = next(self._planned, False)
        else:
            shape = tuple(output.shape)
            decision = bool({layout.name for layout in possible_layouts(shape, self._num_examples)} & {"FIRST", "SECOND"})
        self.decisions.append(decision)
        return decision

    def _refuse(self, weights: Iterable[Tensor], reason: str) -> None:
        for weight in weights:
            for name in self._roots[weight]:
                self.refused.setdefault(name, reason)

    def _mark_data(self, result: Any, name: str, args: Any) -> None:
        for tensor in _tensors(result):
            if tensor not in self._roots:
                self._data[tensor] = True
        writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
        if writes and args and isinstance(args[0], Tensor):
            if args[0] in self._roots and not isinstance(args[0], nn.Parameter):
                self._refuse([args[0]], f"what is computed from it is overwritten by {name}")
                del self._roots[args[0]]
            self._data[args[0]] = True

    def _mark_weight(self, result: Any, weights: list[Tensor]) -> None:
        roots = frozenset().union(*(self._roots[weight] for weight in weights))
        for tensor in _tensors(result):
            if tensor.requires_grad and tensor not in self._roots:
                self._roots[tensor] = roots


def _tensors(values: Any) -> Iterator[Tensor]:
    """Iterate over the tensors among nested arguments."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, tuple | list) and not isinstance(values, torch.Size):
        for value in values:
            yield from _tensors(value)


def _is_transparent(func: Callable[..., Any]) -> bool:
    return isinstance(func, FunctionType) and func.__module__ in TRANSPARENT and any(guard in func.__globals__ for guard in GUARDS)


def _without_guards(func: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a function of torch.nn.functional that does not ask for overrides again, which would never end."""
    assert isinstance(func, FunctionType)
    scope = func.__globals__ | dict.fromkeys(GUARDS, lambda *_: False)
    copied = FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    copied.__kwdefaults__ = func.__kwdefaults__
    return copied


def _full_name(func: Callable[..., Any], name: str) -> str:
    module = inspect.getmodule(func)
    return f"{module.__name__}.{name}" if module is not None and module.__name__.startswith("torch.") else f"torch's `{name}`"
