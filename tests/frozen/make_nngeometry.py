"""Freeze empirical NTKs of nngeometry 0.4 in nngeometry.npz, which tests/test_frozen_peers.py reads.

The test suite never runs this. To make the file again, from the repository root, in a virtual environment of its own:

    python3 -m venv /tmp/venv-nng
    /tmp/venv-nng/bin/pip install -c constraints.txt torch numpy
    /tmp/venv-nng/bin/pip install --no-deps nngeometry==0.4
    /tmp/venv-nng/bin/python tests/frozen/make_nngeometry.py

`--no-deps` because nngeometry requires torchvision, which it does not import and which replaces torch with a CUDA build. The kernel
is `nngeometry.GramMatrix(model, examples)`, indices (c, i, d, j). It has no kernel between two batches: both are given as one and
the blocks are cut out. Kernels are converted to ours: `full` (n C, n' C) with row i * C + c, `trace` (n, n') the sum over c, taken
here. Models are those nngeometry is right about: its Conv2d ignores `groups` without a word (10 % off on a small CNN), its Linear and
LayerNorm take no sequences. The default dtype must be float64, as its buffers for layers without a rule have it.
"""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from nngeometry import GramMatrix
from torch import nn

NUM_EXAMPLES, NUM_OTHER, NUM_CLASSES = 5, 4, 3
TARGET = Path(__file__).with_name("nngeometry.npz")


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=(2, 1), padding=(1, 2)),
        nn.Tanh(),
        nn.Conv2d(4, 6, (3, 2), padding=(2, 0), dilation=(2, 1)),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def batch_norm():
    convolution = [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*convolution, nn.Linear(24, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def norms():
    convolution = [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten()]
    return nn.Sequential(*convolution, nn.Linear(24, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


# name: (model, shape of one input)
MODELS = {"mlp": (mlp, (6,)), "cnn": (cnn, (2, 8, 6)), "batch_norm": (batch_norm, (2, 5, 4)), "norms": (norms, (2, 5, 4))}


def perturb(model):
    """Move biases, norms and running statistics away from the 0 and 1 they are initialised with."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.3, 3.0)
    return model.eval()


def main():
    torch.set_default_dtype(torch.float64)
    arrays = {"versions": np.array([f"{name}=={version(name)}" for name in ("nngeometry", "torch", "numpy")])}
    for seed, (name, (make, shape)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = perturb(make())
        both = torch.randn(NUM_EXAMPLES + NUM_OTHER, *shape)
        blocks = GramMatrix(model, (both.clone(),)).to_torch().detach().permute(1, 0, 3, 2)  # (i, c, j, d)
        x, other = both.split((NUM_EXAMPLES, NUM_OTHER))
        for suffix, part in (("", blocks[:NUM_EXAMPLES, :, :NUM_EXAMPLES]), ("_cross", blocks[:NUM_EXAMPLES, :, NUM_EXAMPLES:])):
            arrays[f"{name}/full{suffix}"] = part.reshape(NUM_EXAMPLES * NUM_CLASSES, -1)
            arrays[f"{name}/trace{suffix}"] = torch.einsum("icjc->ij", part)
        arrays |= {f"{name}/x": x, f"{name}/other": other, f"{name}/outputs": model(x).detach()}
        arrays |= {f"{name}/weights/{key}": value for key, value in model.state_dict().items() if value.is_floating_point()}
    arrays = {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in arrays.items()}
    assert all(value.dtype == np.float64 for key, value in arrays.items() if key != "versions")
    np.savez_compressed(TARGET, **arrays)


if __name__ == "__main__":
    main()
