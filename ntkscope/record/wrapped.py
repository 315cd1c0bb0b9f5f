"""Models and optimizers as training libraries wrap them: what is inside is what a record is about."""

from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ntkscope._checks import UnsupportedError

SHARDED = (
    "The model's weights are spread over processes ({how}), and the kernel needs whole weights in each of them. Record a run under "
    "DistributedDataParallel or in one process, or record a smaller model of the same kind."
)


def plain_module(model: Any) -> Any:
    """Take off DistributedDataParallel, DataParallel and torch.compile.

    The parameters are the same, and running a wrapper would talk to other processes, or start a compilation.

    Args:
        model: A module, wrapped or not.

    Returns:
        What is inside; anything else as it is.

    Raises:
        UnsupportedError: If the weights are spread over processes (FSDP, tensor parallel, ZeRO).
    """
    while isinstance(model, DistributedDataParallel | nn.DataParallel) or isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    if isinstance(model, nn.Module):
        # Known by what they look like: importing FSDP or DeepSpeed to ask would cost every user their import time.
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
            raise UnsupportedError(SHARDED.format(how="FullyShardedDataParallel"))
        if any(hasattr(parameter, "to_local") for parameter in model.parameters()):
            raise UnsupportedError(SHARDED.format(how="DTensor, as of FSDP2 or tensor parallelism"))
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise UnsupportedError(SHARDED.format(how="DeepSpeed ZeRO"))
    return model


def plain_optimizer(optimizer: Optimizer) -> Optimizer:
    """Take off what Lightning and Accelerate put around an optimizer.

    Args:
        optimizer: Wrapped or not.

    Returns:
        The one that steps.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def seal(parameters: dict[str, nn.Parameter]) -> tuple[tuple[int, int], ...]:
    """Mark the weights as they are, to see later whether something else than the optimizer has written to them.

    Args:
        parameters: By name.

    Returns:
        Equal to a later seal if nothing was written in between.
    """
    return tuple(_mark(parameter) for parameter in parameters.values())


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Read where a tensor's values lie, and how often they were written."""
    return tensor.data_ptr(), tensor._version
