"""`ntk_gram` against kernels computed once by two other libraries: neural-tangents (JAX) and nngeometry; see tests/frozen/make_*.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_close
from torch import nn

import ntkscope

FOLDER = Path(__file__).with_name("frozen")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))


def cnn(groups: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=(2, 1), padding=(1, 2)),
        nn.Tanh(),
        nn.Conv2d(4, 6, (3, 2), padding=(2, 0), dilation=(2, 1), groups=groups),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def sequence() -> nn.Module:
    """Linear and LayerNorm shared by four positions."""
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Flatten(), nn.Linear(24, 3))


def batch_norm() -> nn.Module:
    convolution = [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*convolution, nn.Linear(24, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def norms() -> nn.Module:
    convolution = [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten()]
    return nn.Sequential(*convolution, nn.Linear(24, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


MODELS = {
    "neural_tangents/mlp": mlp,
    "neural_tangents/cnn": lambda: cnn(groups=2),
    "neural_tangents/sequence": sequence,
    "nngeometry/mlp": mlp,
    "nngeometry/cnn": lambda: cnn(groups=1),
    "nngeometry/batch_norm": batch_norm,
    "nngeometry/norms": norms,
}
KERNELS = {"full": ("full", False), "trace": ("trace", False), "full_cross": ("full", True), "trace_cross": ("trace", True)}


def load(key: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model with its frozen weights, and the frozen arrays of that model."""
    peer, name = key.split("/")
    with np.load(FOLDER / f"{peer}.npz") as file:
        arrays = {entry.removeprefix(f"{name}/"): torch.from_numpy(file[entry]) for entry in file.files if entry.startswith(f"{name}/")}
    weights = {entry.removeprefix("weights/"): arrays.pop(entry) for entry in list(arrays) if entry.startswith("weights/")}
    model = MODELS[key]().double().eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(entry.endswith("num_batches_tracked") for entry in missing)
    return model, arrays


@pytest.mark.parametrize("peer", ["neural_tangents", "nngeometry"])
def test_every_frozen_model_is_compared(peer):
    with np.load(FOLDER / f"{peer}.npz") as file:
        frozen = {f"{peer}/{entry.split('/')[0]}" for entry in file.files if "/" in entry}
    assert frozen == {key for key in MODELS if key.startswith(peer)}


@pytest.mark.parametrize("key", MODELS)
def test_rebuilt_model_has_the_peers_outputs(key):
    model, frozen = load(key)
    assert_close(model(frozen["x"]), frozen["outputs"], 1e-13)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("key", MODELS)
def test_gram_matches_peer(key, kernel):
    model, frozen = load(key)
    outputs, is_cross = KERNELS[kernel]
    gram = ntkscope.ntk_gram(model, frozen["x"], frozen["other"] if is_cross else None, outputs=outputs)
    assert_close(gram.matrix, frozen[kernel], 1e-10)
