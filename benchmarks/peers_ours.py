"""Workers of the kernel comparison: ntkscope, and the plain contraction of torch.func's Jacobians.

python -m benchmarks.peers_ours mlp full 64 ours|contraction [file to write weights and inputs to]
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ntkscope
from benchmarks.kernel_cases import contract_jacobian, read_kind
from benchmarks.kernel_models import make_cnn, make_mlp
from benchmarks.peers_worker import serve

MODELS = {"mlp": make_mlp, "cnn": make_cnn}


class TorchSide:
    """ntkscope or the contraction.

    Args:
        model: Name of the model.
        kind: "full" or "trace".
        num_examples: n.
        method: "ours" or "contraction".
    """

    def __init__(self, model: str, kind: str, num_examples: int, method: str) -> None:
        self.model, self.inputs = MODELS[model](num_examples)
        self.kind, self.method = kind, method

    def compute(self, inputs: torch.Tensor) -> torch.Tensor:
        """Compute the kernel of some inputs."""
        if self.method == "ours":
            return ntkscope.ntk_gram(self.model, inputs, outputs=self.kind).matrix  # pyright: ignore[reportArgumentType]
        return read_kind(contract_jacobian(self.model, inputs, None), self.kind)

    def warm(self) -> dict[str, float]:
        """Call with two examples."""
        self.compute(self.inputs[:2])
        return {}

    def call(self) -> torch.Tensor:
        """Compute the kernel."""
        return self.compute(self.inputs)

    def export(self, result: Any) -> np.ndarray:
        """Return the array as it is."""
        return result.numpy()


def write_case(model: str, num_examples: int, path: Path) -> None:
    """Write weights and inputs for a worker without torch: arrays p0, p1, ... in the order of the parameters, and x."""
    module, inputs = MODELS[model](num_examples)
    arrays = {f"p{index}": parameter.detach().numpy() for index, parameter in enumerate(module.parameters())}
    np.savez(path, x=inputs.numpy(), **arrays)


if __name__ == "__main__":
    serve(TorchSide(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
