"""Operations with kinks are found wherever the forward pass meets them, and the model is left as it was."""

import pytest
import torch
from torch import nn

from ntkscope.kernel.model import kinked_kinds


class Functional(nn.Module):
    def forward(self, x):
        return torch.clamp(nn.functional.relu(x), max=1.0) + nn.functional.max_pool1d(x[:, None], 1)[:, 0]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4), nn.Tanh(), nn.Softmax(dim=1)), []),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), ["relu"]),
        (nn.Sequential(nn.LeakyReLU(), nn.PReLU(), nn.Hardtanh()), ["hardtanh", "leaky_relu", "prelu"]),
        (Functional(), ["clamp", "max_pool1d", "relu"]),
        (nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 1), nn.MaxPool2d(2), nn.Flatten()), ["max_pool2d"]),
    ],
    ids=["smooth", "in place", "modules", "functional", "pooling"],
)
def test_kinks_are_found(model, expected):
    assert kinked_kinds(model, torch.randn(3, 4), None) == expected


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU()).train()
    before, seed = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    kinked_kinds(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seed)
    assert model[1].training
