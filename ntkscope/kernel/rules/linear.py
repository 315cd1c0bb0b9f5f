"""Products with a weight matrix: F.linear, matmul on either side, addmm, bilinear."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ntkscope.kernel.rules.use import LinearUse, ScaleUse, Seen, Use, bind

if TYPE_CHECKING:
    from ntkscope.kernel.watch import WeightWatch


def linear(watch: "WeightWatch", func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """F.linear on inputs of shape (..., inputs)."""
    given = bind(("input", "weight", "bias"), args, kwargs)
    output = func(*args, **kwargs)
    uses: list[Use] = []
    if watch.is_weight(given["weight"]) and not watch.is_weight(given["input"]):
        uses.append(LinearUse(given["weight"], activations=given["input"].detach()))
    if watch.is_weight(given["bias"]):
        uses.append(ScaleUse(given["bias"], shape=tuple(given["bias"].shape)))
    return Seen(output, output, tuple(uses))


def matmul(watch: "WeightWatch", func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """`x @ w` and `w @ x` with a matrix w."""
    left, right = tuple(args) + tuple(kwargs.values())
    output = func(*args, **kwargs)
    use = None
    if watch.is_weight(right) and right.ndim == 2 and left.ndim > 1 and watch.is_data(left):
        use = LinearUse(right, transposed=True, activations=left.detach())
    elif watch.is_weight(left) and left.ndim == 2 and right.ndim > 2 and watch.is_data(right):
        use = LinearUse(left, activations=right.detach().mT, columns=True)
    return Seen(output, output, () if use is None else (use,))


def addmm(watch: "WeightWatch", func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """`bias + x @ w`, as GPT-2's Conv1D has it."""
    given = bind(("input", "mat1", "mat2"), args, kwargs)
    output = func(*args, **kwargs)
    uses: list[Use] = []
    is_plain = given.get("beta") in (None, 1) and given.get("alpha") in (None, 1)
    if is_plain and watch.is_weight(given["mat2"]) and watch.is_data(given["mat1"]):
        uses.append(LinearUse(given["mat2"], transposed=True, activations=given["mat1"].detach()))
    if is_plain and watch.is_weight(given["input"]):
        uses.append(ScaleUse(given["input"], shape=tuple(given["input"].shape)))
    return Seen(output, output, tuple(uses))


def bilinear(watch: "WeightWatch", func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """F.bilinear: a Linear on the outer product of two inputs."""
    given = bind(("input1", "input2", "weight", "bias"), args, kwargs)
    output = func(*args, **kwargs)
    uses: list[Use] = []
    first, second = given["input1"], given["input2"]
    if watch.is_weight(given["weight"]) and watch.is_data(first) and watch.is_data(second):
        products: Tensor = first.detach()[..., :, None] * second.detach()[..., None, :]
        uses.append(LinearUse(given["weight"], activations=products.flatten(-2)))
    if watch.is_weight(given["bias"]):
        uses.append(ScaleUse(given["bias"], shape=tuple(given["bias"].shape)))
    return Seen(output, output, tuple(uses))
