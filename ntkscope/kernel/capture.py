"""Running a model for a measurement, and leaving it as it was found: modes, buffers, random state, numerical settings."""

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import nn

from ntkscope._checks import InputError
from ntkscope._types import BatchNormMode


@contextmanager
def undisturbed(model: nn.Module) -> Generator[None, None, None]:
    """Run `model` in evaluation mode with gradients on; put modes, buffers and random state back bit for bit.

    Evaluation mode is set flag by flag: a user's own `train()` may do more than flip flags.

    Args:
        model: Any module.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    bound = [(module, dict(module._buffers)) for module in model.modules()]
    cuda_devices = list({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices=cuda_devices), torch.enable_grad():
        try:
            for module in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for module, own in bound:  # a forward pass may bind a name anew, or register another buffer
                module._buffers.clear()
                module._buffers.update(own)
            with torch.no_grad():
                for buffer, saved in buffers:
                    # Written only if it changed: a write would bump the version counter of a buffer that a live graph holds.
                    if not torch.equal(buffer, saved):
                        buffer.copy_(saved)


@contextmanager
def full_precision() -> Generator[None, None, None]:
    """Multiply float32 in float32: no TF32 or bfloat16 inside products, on any device; settings are put back."""
    precision = torch.get_float32_matmul_precision()
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


@contextmanager
def batch_norm_statistics(model: nn.Module, mode: BatchNormMode, run: Callable[[], object]) -> Generator[None, None, None]:
    """Choose what BatchNorm normalizes with; running statistics are put back.

    Args:
        model: Any module.
        mode: "eval": its running statistics, with a warning where they were never updated; "batch": those of the batch, held fixed.
        run: Runs the model on the batch.

    Raises:
        InputError: If the batch is too small to have statistics.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    }
    if mode == "eval":
        fresh = [name for name, norm in norms.items() if _is_fresh(norm)]
        if fresh:
            warnings.warn(
                f"BatchNorm {', '.join(fresh)} has running statistics that were never updated (mean 0, variance 1). "
                "Train first, or use bn='batch'.",
                stacklevel=4,
            )
        yield
        return
    with undisturbed(model), torch.no_grad():
        momenta = {norm: norm.momentum for norm in norms.values()}
        try:
            for norm in momenta:
                norm.training, norm.momentum = True, 1.0  # one pass replaces the statistics by the batch's
            run()
        except ValueError as error:  # torch wants more than one value per channel
            raise InputError(f"bn='batch' needs the statistics of a batch: {error}. Give more examples, or use bn='eval'.") from error
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum
        for norm in momenta:
            norm.training = False
        with torch.enable_grad():
            yield


def _is_fresh(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Say whether running statistics are as they were made."""
    mean, variance = norm.running_mean, norm.running_var
    return mean is not None and variance is not None and not bool(mean.any()) and bool((variance == 1).all())
