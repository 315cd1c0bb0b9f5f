"""Workers of the kernel comparison: nngeometry's Gram matrix, and the product of its Jacobian.

python -m benchmarks.peers_nngeometry mlp full 64 gram|jacobian
"""

import sys
from typing import Any

import numpy as np
import torch
from nngeometry.gram import GramMatrix
from nngeometry.jacobian import Jacobian

from benchmarks.peers_ours import MODELS
from benchmarks.peers_worker import serve


class NNGeometrySide:
    """nngeometry: "gram" is its NTK, contracted layer by layer for every pair of outputs; "jacobian" its dense J, multiplied by us.

    Args:
        model: Name of the model.
        num_examples: n.
        method: "gram" or "jacobian".
    """

    def __init__(self, model: str, num_examples: int, method: str) -> None:
        self.model, self.inputs = MODELS[model](num_examples)
        self.method = method

    def compute(self, inputs: torch.Tensor) -> torch.Tensor:
        """Compute the kernel of some inputs."""
        examples = (inputs.clone(),)  # it sets requires_grad on the batch
        if self.method == "gram":
            return GramMatrix(self.model, examples).to_torch()  # [C, n, C, n]
        jacobian = Jacobian(self.model, examples).to_torch().flatten(0, 1)  # [C n, p]
        return (jacobian @ jacobian.T).reshape(-1, len(inputs), len(jacobian) // len(inputs), len(inputs))

    def warm(self) -> dict[str, float]:
        """Call with two examples."""
        self.compute(self.inputs[:2])
        return {}

    def call(self) -> torch.Tensor:
        """Compute the kernel."""
        return self.compute(self.inputs)

    def export(self, result: Any) -> np.ndarray:
        """Exchange the order of outputs and examples."""
        rows = result.shape[0] * result.shape[1]
        return result.detach().permute(1, 0, 3, 2).reshape(rows, rows).numpy()


if __name__ == "__main__":
    serve(NNGeometrySide(sys.argv[1], int(sys.argv[3]), sys.argv[4]))
