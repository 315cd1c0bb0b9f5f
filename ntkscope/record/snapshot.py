"""One moment of a run, with everything the analysis needs from it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._checks import InputError, check_finite
from ntkscope.record.fields import check_fields

NUMBERS = {"step", "time", "learning_rates", "loss"}
REQUIRED = {"outputs", "gradient", "hessian", "kernel_upper"}


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
        source = f"The snapshot at step {numbers.get('step')}"
        check_fields(Snapshot, numbers, source, names=NUMBERS)
        if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise InputError(f"{source} is damaged: its tensors are none. Record it again.")
        known = {field.name for field in fields(Snapshot)} - NUMBERS
        missing, unknown = sorted(REQUIRED - set(tensors)), sorted(set(tensors) - known)
        if missing or unknown:
            raise InputError(f"{source} is damaged: tensors missing {missing}, unknown {unknown}. Record it again.")
        shapes = _expected_shapes(tensors)
        wrong = [name for name, tensor in tensors.items() if name in shapes and tuple(tensor.shape) != shapes[name]]
        if wrong:
            raise InputError(f"{source} is damaged: {', '.join(wrong)} do not fit its outputs. Record it again.")
        rates = tuple(float(rate) for rate in numbers["learning_rates"])
        optional: dict[str, Any] = {name: tensors.get(name) for name in known - REQUIRED}
        snapshot = Snapshot(
            step=numbers["step"],
            time=float(numbers["time"]),
            learning_rates=rates,
            loss=float(numbers["loss"]),
            **{name: tensors[name] for name in REQUIRED},
            **optional,
        )
        for name, tensor in tensors.items():
            check_finite(f"`{name}` of the snapshot at step {snapshot.step}", tensor, "Choose a window that ends before it.")
        return snapshot


def _expected_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Derive every tensor's shape from the outputs (and the query outputs)."""
    outputs, query = tensors["outputs"], tensors.get("query_outputs")
    if outputs.ndim != 2 or outputs.numel() == 0:
        return {"outputs": (-1, -1)}
    num_examples, num_classes = outputs.shape
    num_outputs = num_examples * num_classes
    blocks = (num_examples, num_classes, num_classes)
    expected: dict[str, tuple[int, ...]] = {
        "gradient": (num_examples, num_classes),
        "hessian": blocks,
        "mean_hessian": blocks,
        "kernel_upper": (num_outputs * (num_outputs + 1) // 2,),
        "forcing": (num_examples, num_classes),
    }
    if query is not None:
        expected["query_outputs"] = (len(query) if query.ndim else 0, num_classes)
    expected["cross_kernel"] = (query.numel() if query is not None else -1, num_outputs)
    return expected


def pack_upper(kernel: Float[Tensor, "outputs outputs"]) -> Float[Tensor, " pairs"]:
    """Pack the upper triangle of a symmetric matrix, row by row.

    Args:
        kernel: Symmetric up to rounding.

    Returns:
        `N (N + 1) / 2` entries.
    """
    rows, columns = torch.triu_indices(*kernel.shape)
    return kernel[rows, columns]
