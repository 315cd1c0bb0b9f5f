"""The models and inputs of the kernel benchmarks, seeded: `make_*(num)` returns a model in evaluation mode and `num` examples.

All have 10 outputs. The global random state stays as it is.
"""

import itertools
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import minilm

NUM_CLASSES = 10
MINILM_FOLDER = Path(__file__).parent.parent / "build" / "minilm"
MakeCase = Callable[[int], tuple[nn.Module, Any]]


def seeded(make: MakeCase) -> MakeCase:
    """Run `make` with the random state of seed 0, put the model in evaluation mode and restore the state."""

    @wraps(make)
    def run(num: int) -> tuple[nn.Module, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs = make(num)
        return model.eval(), inputs

    return run


@seeded
def make_mlp(num: int) -> tuple[nn.Module, Tensor]:
    """Build the MLP 784-512-512-10 with ReLU (669,706 parameters)."""
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, NUM_CLASSES))
    return model, torch.randn(num, 784)


@seeded
def make_cnn(num: int) -> tuple[nn.Module, Tensor]:
    """Build three 3 x 3 convolutions of 16, 32 and 64 channels with pooling between, on 28 x 28 pixels (23,946 parameters)."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(64, NUM_CLASSES),
    )
    return model, torch.randn(num, 1, 28, 28)


class MeanClassifier(nn.Module):
    """An encoder of 2 post-norm layers (width 128, 4 heads, 512 hidden), mean over the tokens, linear head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(d_model=128, nhead=4, dim_feedforward=512, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(128, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, T, 128) to (n, 10)."""
        return self.head(self.encoder(x).mean(dim=1))


@seeded
def make_transformer(num: int) -> tuple[nn.Module, Tensor]:
    """Build a Transformer encoder on 32 tokens of width 128 (397,834 parameters)."""
    return MeanClassifier(), torch.randn(num, 32, 128)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch normalization, added to the input (a strided 1 x 1 convolution of it where shapes differ)."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False), nn.BatchNorm2d(num_out)
        self.conv2, self.norm2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False), nn.BatchNorm2d(num_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or num_in != num_out:
            self.shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, C, H, W) to (n, C', H / stride, W / stride)."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


@seeded
def make_resnet18(num: int) -> tuple[nn.Module, Tensor]:
    """Build ResNet-18 for 32 x 32 pixels: 3 x 3 stem, no max-pool (11,173,962 parameters); running statistics are not the initial ones."""
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [ResidualBlock(num_in, num_out, 1 if num_in == num_out else 2) for num_in, num_out in itertools.pairwise(widths)]
    model = nn.Sequential(
        *(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *blocks,
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, NUM_CLASSES)),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model, torch.randn(num, 3, 32, 32)


def make_minilm(num: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """Load all-MiniLM-L6-v2 and `num` sentences of 32 tokens (see minilm.py, which says how to install it)."""
    return minilm.load_minilm(MINILM_FOLDER), minilm.tokenize(MINILM_FOLDER, minilm.sentences(num))
