"""The model as a function from a batch to rows of outputs, and the parameters the kernel is taken in."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ntkscope._checks import InputError, InputTypeError, UnsupportedError, check_finite
from ntkscope._types import ForwardFn
from ntkscope.kernel.batch import count_examples, map_batch
from ntkscope.kernel.capture import undisturbed

KINKED = {
    "relu",
    "relu6",
    "leaky_relu",
    "prelu",
    "rrelu",
    "threshold",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
    "hardshrink",
    "softshrink",
    "abs",
    "clamp",
    "clamp_min",
    "clamp_max",
    "maximum",
    "minimum",
    "amax",
    "amin",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
}


def forward_rows(model: nn.Module, batch: Any, forward_fn: ForwardFn | None = None) -> Float[Tensor, "examples classes"]:
    """Run the model and view its output as one row per example.

    Args:
        model: Any module.
        batch: As for `batch_tensors`; passed as the model's single argument unless `forward_fn` says otherwise.
        forward_fn: The model's call, `forward_fn(model, batch)`.

    Returns:
        Outputs; all axes after the first are flattened, a missing second axis has length one.

    Raises:
        InputTypeError: If the output is no tensor, or not of a floating-point type.
        InputError: If its first axis is not the examples.
    """
    own = map_batch(torch.clone, batch)  # an in-place first layer would write into the user's data
    outputs = forward_fn(model, own) if forward_fn is not None else model(own)
    if not isinstance(outputs, Tensor):
        raise InputTypeError(
            f"The model must return a tensor of shape (examples, outputs), got {type(outputs).__name__}. "
            "Give `forward_fn(model, batch)` that picks the tensor, for example `lambda model, batch: model(batch)[0]` "
            "(--output 0, or --forward SPEC)."
        )
    if not outputs.is_floating_point():
        raise InputTypeError(f"The model must return real floating-point outputs (logits, not labels), got {outputs.dtype}.")
    num_examples = count_examples(batch)
    if outputs.ndim == 0 or outputs.shape[0] != num_examples:
        raise InputError(
            f"The model's output must have one row per example: the batch has {num_examples} examples, "
            f"the output has shape {tuple(outputs.shape)}. The loss belongs in `loss=`, not in the model; of many "
            "rows per example, `forward_fn` (--forward SPEC) picks or joins some."
        )
    if outputs.numel() == 0:
        raise InputError(f"The model must have at least one output per example, got shape {tuple(outputs.shape)}.")
    return outputs.reshape(num_examples, -1)


def check_module(model: object) -> None:
    """Check that a model is a module.

    Args:
        model: What the user gave.

    Raises:
        InputTypeError: If it is not.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}. For another call give `forward_fn`.")


def select_parameters(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """List the parameters of the kernel, tied ones once, under their first name.

    Args:
        model: Any module.
        names: A subset of `named_parameters()`; all that require gradients if not given.

    Returns:
        Parameters by name.

    Raises:
        InputError: If there is none, a name is unknown, or a weight is not finite.
        InputTypeError: If the model is no module, or `names` is a text.
        UnsupportedError: If a parameter is complex or not yet initialized, or an embedding has sparse gradients or a maximal norm.
    """
    check_module(model)
    if isinstance(names, str):
        raise InputTypeError(f"`params` must be a list of names, got the text {names!r}. Give [{names!r}].")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and (module.sparse or module.max_norm is not None):
            raise UnsupportedError(
                f"Layer `{name}` has sparse=True or max_norm: sparse gradients are not supported, and max_norm rewrites weights in every "
                "forward pass. Set sparse=False and max_norm=None for the kernel; the weights may stay as they are."
            )
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if names is not None:
        wanted = list(names)
        unknown = sorted(set(wanted) - set(trainable))
        if not wanted:
            raise InputError("`params` is empty: name at least one parameter, or leave it out to take all.")
        if unknown:
            raise InputError(f"`params` names {unknown}, which the model does not train. It trains: {', '.join(trainable) or 'nothing'}.")
        trainable = {name: trainable[name] for name in wanted}
    if not trainable:
        raise InputError("The model has no parameter with requires_grad, so its tangent kernel is empty. Unfreeze a layer.")
    for name, parameter in trainable.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UnsupportedError(f"Parameter `{name}` is lazy and has no shape yet. Run one batch through the model first.")
        if parameter.is_complex():
            raise UnsupportedError(f"Parameter `{name}` is complex; only real parameters are supported.")
        check_finite(f"Parameter `{name}`", parameter.detach(), "The run has diverged, or the file is damaged: use an earlier one.")
    return trainable


def working_dtype(parameters: dict[str, nn.Parameter]) -> torch.dtype:
    """Choose the dtype in which factors are contracted.

    Args:
        parameters: Parameters of the kernel.

    Returns:
        float64 if any parameter is, else float32 (half precision accumulates too little).
    """
    is_double = any(parameter.dtype == torch.float64 for parameter in parameters.values())
    return torch.float64 if is_double else torch.float32


def train_only_kinds(model: nn.Module) -> list[str]:
    """List the kinds of modules that act differently in training than in evaluation mode, which the kernel is taken in.

    Args:
        model: Any module.

    Returns:
        Class names of dropout and batch normalization layers, sorted.
    """
    found = set()
    for module in model.modules():
        is_dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if is_dropout or isinstance(module, nn.modules.batchnorm._BatchNorm):
            found.add(type(module).__name__)
    return sorted(found)


def kinked_kinds(model: nn.Module, inputs: Any, forward_fn: ForwardFn | None) -> list[str]:
    """List the operations with kinks that a forward pass uses: where a value crosses a kink, the kernel jumps.

    Args:
        model: Any module.
        inputs: A few examples.
        forward_fn: The model's call.

    Returns:
        Names of operations, sorted; empty for a smooth model.
    """
    with undisturbed(model), torch.no_grad(), _KinkWatch() as watch:
        forward_rows(model, inputs, forward_fn)
    return sorted(watch.found)


class _KinkWatch(TorchFunctionMode):
    """Notes operations with kinks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").strip("_").removesuffix("_with_indices")
        if name in KINKED:
            self.found.add(name)
        return func(*args, **(kwargs or {}))
