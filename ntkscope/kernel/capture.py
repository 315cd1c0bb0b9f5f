"""Hooks that see what a layer saw, and leave the model as they found it.

Only `capture_layers` registers hooks, only `undisturbed` touches modes, buffers and random state, and both are context managers.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerCall:
    """One call of one layer: a module called twice makes two."""

    module_name: str
    module: nn.Module
    input: Tensor  # detached
    output: Tensor  # in the autograd graph


@contextmanager
def capture_layers(modules: Mapping[str, nn.Module]) -> Generator[list[LayerCall], None, None]:
    """Record every call of `modules` made inside the block.

    Args:
        modules: Modules to watch, by name.

    Yields:
        The list of calls, in order; it fills as the model runs.
    """
    calls: list[LayerCall] = []
    handles = []

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and output.requires_grad):
                return None  # nothing differentiable happened, e.g. under torch.no_grad
            calls.append(LayerCall(name, module, args[0].detach(), output))
            # The model goes on with a copy: an in-place operation after the layer (nn.ReLU(inplace=True)) would otherwise
            # move our `output` to the far side of that operation, and its gradient with it.
            return output.clone()

        return hook

    try:
        for name, module in modules.items():
            # First in line: a user's own forward hook may replace the output, and the rule is about the layer itself.
            handles.append(module.register_forward_hook(hook_for(name), prepend=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def undisturbed(model: nn.Module) -> Generator[None, None, None]:
    """Run `model` in evaluation mode with gradients on; put modes, buffers and random state back bit for bit.

    Evaluation mode is set flag by flag: a user's own `train()` may do more than flip flags.

    Args:
        model: Any module.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    cuda_devices = list({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices=cuda_devices), torch.enable_grad():
        try:
            for module in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for buffer, saved in buffers:
                    # Written only if it changed: a write would bump the version counter of a buffer that a live graph holds.
                    if not torch.equal(buffer, saved):
                        buffer.copy_(saved)
