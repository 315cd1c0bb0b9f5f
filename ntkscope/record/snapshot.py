"""One moment of a run, with everything the analysis needs from it."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._checks import InputError, check_finite


@dataclass(frozen=True)
class Snapshot:
    """One moment of a run.

    Attributes:
        step: Optimizer steps taken.
        time: Optimizer time τ (theory.md section 2).
        learning_rates: One per parameter group.
        loss: Φ on the probe, at the scale the user trains with.
        outputs: u, in the model's precision.
        gradient: g = ∇Φ, float64.
        hessian: Blocks of ∇²Φ, float64.
        mean_hessian: Average of the blocks over the way from the previous snapshot (three-point Gauss); None in the first.
        kernel_upper: Upper triangle of K = J M Jᵀ, row by row, in the model's precision.
        query_outputs: Outputs on the query set.
        cross_kernel: K_QS = J_Q M Jᵀ.
        forcing: r of du/dτ = −K g − r (weight decay); None without.
        gate_open: Share of open gates per parameter tensor, in the manifest's order; None without a gate.
    """

    step: int
    time: float
    learning_rates: tuple[float, ...]
    loss: float
    outputs: Float[Tensor, "examples classes"]
    gradient: Float[Tensor, "examples classes"]
    hessian: Float[Tensor, "examples classes classes"]
    mean_hessian: Float[Tensor, "examples classes classes"] | None
    kernel_upper: Float[Tensor, " pairs"]
    query_outputs: Float[Tensor, "queries classes"] | None = None
    cross_kernel: Float[Tensor, "query_outputs outputs"] | None = None
    forcing: Float[Tensor, "examples classes"] | None = None
    gate_open: Float[Tensor, " tensors"] | None = None

    @property
    def kernel_eps(self) -> float:
        """Negative eigenvalues of the stored kernel to expect from rounding, as a share of the largest (theory.md section 4)."""
        return 1e-10 if self.kernel_upper.dtype == torch.float64 else 1e-4

    def kernel(self) -> Float[Tensor, "outputs outputs"]:
        """Unpack K.

        Returns:
            The symmetric kernel, float64.
        """
        num_outputs = self.outputs.numel()
        rows, columns = torch.triu_indices(num_outputs, num_outputs)
        kernel = torch.zeros(num_outputs, num_outputs, dtype=torch.float64)
        kernel[rows, columns] = self.kernel_upper.double()
        kernel[columns, rows] = self.kernel_upper.double()
        return kernel

    def split(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Separate numbers from tensors, for a file.

        Returns:
            JSON-able numbers, and tensors by name.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value.contiguous() for name, value in values.items() if isinstance(value, Tensor)}
        numbers = {name: value for name, value in values.items() if value is not None and name not in tensors}
        return numbers | {"learning_rates": list(self.learning_rates)}, tensors

    @staticmethod
    def join(numbers: dict[str, Any], tensors: dict[str, Tensor]) -> "Snapshot":
        """Rebuild from `split`, checking that nothing is missing or damaged.

        Args:
            numbers: JSON-able numbers.
            tensors: Tensors by name.

        Returns:
            The snapshot.

        Raises:
            InputError: If a field is missing or unknown, a shape does not fit, or an entry is not finite.
        """
        try:
            values = {**numbers, **tensors, "learning_rates": tuple(float(rate) for rate in numbers["learning_rates"])}
            snapshot = Snapshot(mean_hessian=values.pop("mean_hessian", None), **values)
            num_outputs = snapshot.outputs.numel()
            is_sound = (
                snapshot.gradient.shape == snapshot.outputs.shape
                and snapshot.hessian.shape == (*snapshot.outputs.shape, snapshot.outputs.shape[1])
                and snapshot.kernel_upper.shape == (num_outputs * (num_outputs + 1) // 2,)
            )
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise InputError(f"A snapshot is not in the format of this version: {error}. Record it again.") from error
        if not is_sound:
            raise InputError(f"The snapshot at step {snapshot.step} is damaged: its tensors do not fit one another. Record it again.")
        for name, tensor in tensors.items():
            check_finite(f"`{name}` of the snapshot at step {snapshot.step}", tensor, "Choose a window that ends before it.")
        return snapshot


def pack_upper(kernel: Float[Tensor, "outputs outputs"]) -> Float[Tensor, " pairs"]:
    """Pack the upper triangle of a symmetric matrix, row by row.

    Args:
        kernel: Symmetric up to rounding.

    Returns:
        `N (N + 1) / 2` entries.
    """
    rows, columns = torch.triu_indices(*kernel.shape)
    return kernel[rows, columns]
