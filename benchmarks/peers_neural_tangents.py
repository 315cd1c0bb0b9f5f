"""Workers of the kernel comparison: neural-tangents, in an environment of its own without torch.

python -m benchmarks.peers_neural_tangents mlp full 64 STRUCTURED_DERIVATIVES weights.npz

Its module for TensorFlow models is replaced by an empty one: it is not used here, and importing it takes 2 GB of TensorFlow.
"""

import sys
import time
import types
from typing import Any

import numpy as np

sys.modules["neural_tangents.experimental"] = types.ModuleType("neural_tangents.experimental")

import jax  # ruff: ignore[module-import-not-at-top-of-file]
import neural_tangents as nt  # ruff: ignore[module-import-not-at-top-of-file]

from benchmarks.peers_worker import serve  # ruff: ignore[module-import-not-at-top-of-file]

NUM_CLASSES = 10
Params = list[tuple[np.ndarray, np.ndarray]]


def apply_mlp(params: Params, x: Any) -> Any:
    """Map (n, 784) to (n, 10) as `make_mlp`'s model does."""
    for weight, bias in params[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    weight, bias = params[-1]
    return x @ weight + bias


def apply_cnn(params: Params, x: Any) -> Any:
    """Map (n, 28, 28, 1) to (n, 10) as `make_cnn`'s model does, channels last."""
    for index, (weight, bias) in enumerate(params[:-1]):
        if index:
            x = jax.lax.reduce_window(x, -np.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = jax.nn.relu(jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias)
    weight, bias = params[-1]
    return x.mean(axis=(1, 2)) @ weight + bias


def read_case(path: str) -> tuple[Params, np.ndarray]:
    """Read torch's weights and inputs, and bring them into the order that jax likes: (in, out) and channels last."""
    arrays = np.load(path)
    values = [arrays[f"p{index}"] for index in range(len(arrays) - 1)]
    weights = [value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0) for value in values[::2]]
    x = arrays["x"]
    if x.ndim == 4:
        x = x.transpose(0, 2, 3, 1)
    return [(np.ascontiguousarray(weight), bias) for weight, bias in zip(weights, values[1::2], strict=True)], np.ascontiguousarray(x)


class NeuralTangentsSide:
    """neural-tangents' empirical NTK, compiled.

    Args:
        model: Name of the model.
        kind: "full" or "trace".
        implementation: Name of neural-tangents' implementation.
        path: Weights and inputs.
    """

    def __init__(self, model: str, kind: str, implementation: str, path: str) -> None:
        self.kind = kind
        params, x = read_case(path)
        self.params, self.inputs = jax.device_put(params), jax.device_put(x)
        kernel = nt.empirical_ntk_fn(
            apply_mlp if model == "mlp" else apply_cnn,
            trace_axes=() if kind == "full" else (-1,),
            vmap_axes=0,  # examples do not interact: the fastest of its options here
            implementation=nt.NtkImplementation[implementation],
        )
        self.function = jax.jit(lambda params, x: kernel(x, None, params))

    def warm(self) -> dict[str, float]:
        """Call with two examples, and compile for all of them without calling."""
        self.function(self.params, self.inputs[:2]).block_until_ready()
        start = time.process_time()
        self.compiled = self.function.lower(self.params, self.inputs).compile()
        return {"compile": time.process_time() - start}

    def call(self) -> Any:
        """Compute the kernel."""
        return self.compiled(self.params, self.inputs).block_until_ready()

    def export(self, result: Any) -> np.ndarray:
        """Bring (n, n, C, C) to (n C, n C); the trace is divided by C there."""
        kernel = np.asarray(result)
        if self.kind == "trace":
            return kernel * NUM_CLASSES
        rows = len(kernel) * NUM_CLASSES
        return kernel.transpose(0, 2, 1, 3).reshape(rows, rows)


if __name__ == "__main__":
    serve(NeuralTangentsSide(sys.argv[1], sys.argv[2], sys.argv[4], sys.argv[5]))
