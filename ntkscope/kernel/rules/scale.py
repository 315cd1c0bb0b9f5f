"""Parameters that add or multiply elementwise: positions, class tokens, scales, and the affine part of every norm."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkscope.kernel.rules.conv import ChannelUse
from ntkscope.kernel.rules.use import ScaleUse, Seen, Use, bind

if TYPE_CHECKING:
    from ntkscope.kernel.watch import WeightWatch


IN_PLACE = ("mul_", "__imul__")


def _pair(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    left, right = (*args, *(kwargs[name] for name in ("input", "other") if name in kwargs))
    return left, right


def _sided(watch: "WeightWatch", output: Tensor, left: Any, right: Any, by_left: Any, by_right: Any) -> Seen:
    """Describe an elementwise call by its derivatives in its two arguments; None where it has none."""
    uses = [
        ScaleUse(weight, shape=tuple(weight.shape), multiplier=multiplier)
        for weight, multiplier in ((left, by_left), (right, by_right))
        if watch.is_weight(weight) and multiplier is not None
    ]
    return Seen(output, output, tuple(uses))


def add(watch: "WeightWatch", func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """`x + w`."""
    left, right = _pair(args, kwargs)
    return _sided(watch, func(*args, **kwargs), left, right, 1.0, kwargs.get("alpha", 1.0))


def subtract(watch: "WeightWatch", func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """`x - w` and `w - x`."""
    left, right = _pair(args, kwargs)
    return _sided(watch, func(*args, **kwargs), left, right, 1.0, -kwargs.get("alpha", 1.0))


def multiply(watch: "WeightWatch", func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """`x * w`."""
    left, right = _pair(args, kwargs)
    by_left = right.detach() if isinstance(right, Tensor) and watch.is_weight(left) else None
    by_right = left.detach() if isinstance(left, Tensor) and watch.is_weight(right) else None
    if by_right is not None and func.__name__ in IN_PLACE:
        by_right = by_right.clone()  # the call is about to overwrite it
    return _sided(watch, func(*args, **kwargs), left, right, by_left, by_right)


def divide(watch: "WeightWatch", func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """`x / w`."""
    rounds = kwargs.get("rounding_mode") is not None
    left, right = _pair(args, {name: value for name, value in kwargs.items() if name != "rounding_mode"})
    output = func(*args, **kwargs)
    by_right = -output.detach() / right.detach() if watch.is_weight(right) and not rounds else None
    by_left = 1.0 / right.detach() if watch.is_weight(left) and isinstance(right, Tensor) and not rounds else None
    return _sided(watch, output, left, right, by_left, by_right)


def broadcast(watch: "WeightWatch", func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """`w.expand(...)`, `w.expand_as(x)`, `w.repeat(...)` that gives every example its copy, as class tokens do."""
    weight = args[0]
    output = func(*args, **kwargs)
    shape = (1,) * (output.ndim - weight.ndim) + tuple(weight.shape)
    is_copy = all(size in (1, full) for size, full in zip(shape, output.shape, strict=True))
    return Seen(output, output, (ScaleUse(weight, shape=tuple(weight.shape)),) if is_copy else ())


def prelu(watch: "WeightWatch", func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """F.prelu: one slope, or one per channel."""
    given = bind(("input", "weight"), args, kwargs)
    output = func(*args, **kwargs)
    negative = given["input"].detach().clamp(max=0)
    weight = given["weight"]
    use = ScaleUse(weight, shape=(), multiplier=negative) if weight.numel() == 1 else ChannelUse(weight, multiplier=negative)
    return Seen(output, output, (use,))


def layer_norm(watch: "WeightWatch", func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """torch.layer_norm and torch.rms_norm: scale and shift on the last axes."""
    has_shift = func.__name__ == "layer_norm"
    names = ("input", "normalized_shape", "weight", *(("bias",) if has_shift else ()), "eps", "cudnn_enable")
    given = bind(names, args, kwargs)
    output = func(*args, **kwargs)
    uses: list[Use] = []
    if watch.is_weight(given["weight"]):
        plain = {"weight": None, "bias": None} if has_shift else {"weight": None}
        normalized = _without_affine(func, names, given | plain)
        uses.append(ScaleUse(given["weight"], shape=tuple(given["weight"].shape), multiplier=normalized))
    if watch.is_weight(given.get("bias")):
        uses.append(ScaleUse(given["bias"], shape=tuple(given["bias"].shape)))
    return Seen(output, output, tuple(uses))


CHANNEL_NORMS = {
    "batch_norm": ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled"),
    "instance_norm": ("input", "weight", "bias", "running_mean", "running_var", "use_input_stats", "momentum", "eps", "cudnn_enabled"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled"),
}


def channel_norm(watch: "WeightWatch", func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """torch.batch_norm (running statistics), torch.instance_norm, torch.group_norm: scale and shift per channel."""
    names = CHANNEL_NORMS[func.__name__]
    given = bind(names, args, kwargs)
    output = func(*args, **kwargs)
    uses: list[Use] = []
    if watch.is_weight(given["weight"]):
        normalized = _without_affine(func, names, given | {"weight": None, "bias": None})
        uses.append(ChannelUse(given["weight"], multiplier=normalized))
    if watch.is_weight(given["bias"]):
        uses.append(ChannelUse(given["bias"]))
    return Seen(output, output, tuple(uses))


def _without_affine(func: Callable[..., Any], names: Sequence[str], given: Mapping[str, Any]) -> Tensor:
    """Normalize again, without scale and shift: dividing them out of the output would fail where the scale is zero."""
    last = max(index for index, name in enumerate(names) if given[name] is not None)
    with torch.no_grad():
        return func(*(given[name] for name in names[: last + 1]))
