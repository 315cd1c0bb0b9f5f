"""Freeze empirical NTKs of neural-tangents 0.6.5 (JAX) in neural_tangents.npz, which tests/test_frozen_peers.py reads.

The test suite never runs this. To make the file again, in a virtual environment of its own (JAX 0.4.30 needs an old numpy):

    python3 -m venv /tmp/venv-nt
    /tmp/venv-nt/bin/pip install neural-tangents==0.6.5 jax==0.4.30 jaxlib==0.4.30 "numpy<2" "scipy<1.13"
    /tmp/venv-nt/bin/python tests/frozen/make_neural_tangents.py

The networks are plain functions of given weights, so no parametrization of `stax` enters: this is the standard one. Everything is
float64. Weights have PyTorch's names and layout. Kernels are converted to ours: `full` (n C, n' C) with row i * C + c, `trace`
(n, n') the sum over c; neural-tangents divides its own trace kernel by C, which is undone here. Frozen is JACOBIAN_CONTRACTION, the
default implementation; NTK_VECTOR_PRODUCTS is run beside it and must agree. STRUCTURED_DERIVATIVES cannot run: it reads
`jax.interpreters.ad.source_info_util` and `.config`, which JAX 0.4.30 no longer has.
"""

from importlib.metadata import version
from pathlib import Path

import jax
import neural_tangents as nt
import numpy as np
from jax import lax
from jax import numpy as jnp

jax.config.update("jax_enable_x64", True)

NUM_EXAMPLES, NUM_OTHER, NUM_CLASSES = 5, 4, 3
TARGET = Path(__file__).with_name("neural_tangents.npz")


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def conv(weights, name, x, *, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    kernel = weights[f"{name}.weight"]
    dimensions = ("NCHW", "OIHW", "NCHW")
    pads = [(pad, pad) for pad in padding]
    y = lax.conv_general_dilated(x, kernel, stride, pads, rhs_dilation=dilation, dimension_numbers=dimensions, feature_group_count=groups)
    return y + weights[f"{name}.bias"][:, None, None]


def layer_norm(weights, name, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def mlp(weights, x):
    hidden = jnp.tanh(linear(weights, "0", x))
    return linear(weights, "4", jax.nn.relu(linear(weights, "2", hidden)))


def cnn(weights, x):
    x = jnp.tanh(conv(weights, "0", x, stride=(2, 1), padding=(1, 2)))
    x = jax.nn.relu(conv(weights, "2", x, padding=(2, 0), dilation=(2, 1), groups=2))
    x = lax.reduce_window(x, 0.0, lax.add, (1, 1, 2, 2), (1, 1, 2, 2), "VALID") / 4
    return linear(weights, "6", x.reshape(len(x), -1))


def sequence(weights, x):
    x = jax.nn.gelu(layer_norm(weights, "1", linear(weights, "0", x)), approximate=False)
    return linear(weights, "4", x.reshape(len(x), -1))


# name: (network, shape of one input, shapes of the weights)
NETWORKS = {
    "mlp": (
        mlp,
        (6,),
        {"0.weight": (8, 6), "0.bias": (8,), "2.weight": (7, 8), "2.bias": (7,), "4.weight": (3, 7), "4.bias": (3,)},
    ),
    "cnn": (
        cnn,
        (2, 8, 6),
        {"0.weight": (4, 2, 3, 3), "0.bias": (4,), "2.weight": (6, 2, 3, 2), "2.bias": (6,), "6.weight": (3, 36), "6.bias": (3,)},
    ),
    "sequence": (
        sequence,
        (4, 5),
        {"0.weight": (6, 5), "0.bias": (6,), "1.weight": (6,), "1.bias": (6,), "4.weight": (3, 24), "4.bias": (3,)},
    ),
}


def draw_weights(shapes, rng):
    """Unit gain for matrices and kernels; vectors far from the 0 and 1 they are initialised with."""
    scales = {name: 1 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.5 for name, shape in shapes.items()}
    means = {name: 1.0 if name.endswith("weight") and len(shape) == 1 else 0.0 for name, shape in shapes.items()}
    return {name: means[name] + scales[name] * rng.standard_normal(shape) for name, shape in shapes.items()}


def kernels(network, weights, x, other):
    """Full (n C, n' C) and trace (n, n') kernel of two batches, `other` None for a batch with itself."""
    found = []
    for implementation in (nt.NtkImplementation.JACOBIAN_CONTRACTION, nt.NtkImplementation.NTK_VECTOR_PRODUCTS):
        full = nt.empirical_ntk_fn(network, trace_axes=(), vmap_axes=0, implementation=implementation)(x, other, weights)
        mean = nt.empirical_ntk_fn(network, trace_axes=(-1,), vmap_axes=0, implementation=implementation)(x, other, weights)
        rows, columns = full.shape[0] * NUM_CLASSES, full.shape[1] * NUM_CLASSES
        found.append((np.asarray(full.transpose(0, 2, 1, 3).reshape(rows, columns)), np.asarray(NUM_CLASSES * mean)))
    for default, second in zip(*found, strict=True):
        np.testing.assert_allclose(second, default, rtol=0, atol=1e-13 * abs(default).max())
    return found[0]


def main():
    arrays = {"versions": np.array([f"{name}=={version(name)}" for name in ("neural-tangents", "jax", "jaxlib", "numpy")])}
    for seed, (name, (network, shape, weight_shapes)) in enumerate(NETWORKS.items()):
        rng = np.random.default_rng(seed)
        weights = draw_weights(weight_shapes, rng)
        x, other = (rng.standard_normal((num, *shape)) for num in (NUM_EXAMPLES, NUM_OTHER))
        full, trace = kernels(network, weights, x, None)
        full_cross, trace_cross = kernels(network, weights, x, other)
        results = {"full": full, "trace": trace, "full_cross": full_cross, "trace_cross": trace_cross}
        arrays |= {f"{name}/{key}": value for key, value in ({"x": x, "other": other, "outputs": network(weights, x)} | results).items()}
        arrays |= {f"{name}/weights/{key}": value for key, value in weights.items()}
    assert all(value.dtype == np.float64 for key, value in arrays.items() if key != "versions")
    np.savez_compressed(TARGET, **arrays)


if __name__ == "__main__":
    main()
