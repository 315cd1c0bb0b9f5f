"""What the case files share: `Case`, makers of inputs, and small modules from which the models are put together."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

NUM_EXAMPLES = 5
NUM_CLASSES = 3


@dataclass(frozen=True)
class Case:
    """A named maker; `build` gives the same values in every dtype (drawn in float32) and leaves the global RNG alone."""

    name: str
    make_model: Callable[[], nn.Module]
    make_inputs: Callable[[int], Any]
    training: bool
    stops_gradient: bool = False  # part of the forward pass is not differentiated: finite differences do not apply

    def build(self, dtype: torch.dtype = torch.float64, *, num_examples: int = NUM_EXAMPLES, draw: int = 0) -> tuple[nn.Module, Any]:
        """Return the model in its train or eval mode and inputs number `draw` of `num_examples` examples."""
        seed = zlib.crc32(self.name.encode()) % 2**31
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make_model().to(dtype).train(self.training)
            torch.manual_seed(seed + 1 + draw)
            inputs = self.make_inputs(num_examples)
        return model, pytree.tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)

    def __str__(self) -> str:
        """Return the name, for `ids=str`."""
        return self.name


def features(*shape: int) -> Callable[[int], Tensor]:
    """Return a maker of standard normal inputs of shape (n, *shape)."""
    return lambda num: torch.randn(num, *shape)


def perturb(model: nn.Module) -> nn.Module:
    """Move every parameter by noise, so that none is at a special value such as LayerNorm's ones and zeros."""
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return model


def tokens(vocabulary: int, *shape: int) -> Callable[[int], Tensor]:
    return lambda num: torch.randint(vocabulary, (num, *shape))


def vectors(*shapes: tuple[int, ...]) -> Callable[[int], tuple[Tensor, ...]]:
    """Return a maker of tuples of standard normal inputs of the shapes (n, *shape)."""
    return lambda num: tuple(torch.randn(num, *shape) for shape in shapes)


def bare(*shape: int) -> nn.Parameter:
    """Return a parameter that no library module owns."""
    return nn.Parameter(0.5 * torch.randn(*shape))


class MeanPool(nn.Module):
    def forward(self, x):
        return x.mean(dim=1)


class Net(nn.Module):
    """Modules, parameters and buffers by name, and the forward pass as a function of the module and its inputs."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if type(part) is Tensor:
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, inputs):
        return self.function(self, inputs)


def flat(*layers: nn.Module, shape: tuple[int, ...], num_outputs: int = NUM_CLASSES) -> nn.Module:
    """Return the layers on inputs (n, *shape), then tanh and a Linear on everything flattened."""
    body = nn.Sequential(*layers)
    with torch.no_grad():
        width = body(torch.zeros(2, *shape)).numel() // 2
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(width, num_outputs))
