"""One moment of a run, with everything the analysis needs from it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._checks import InputError, check_finite
from ntkscope._display import Displayed
from ntkscope.record.fields import check_fields

NUMBERS = {"step", "time", "learning_rates", "loss"}
OPTIONAL_NUMBERS = {"probe_hash"}
REQUIRED = {"outputs", "gradient", "hessian", "kernel_upper"}


@dataclass(frozen=True)
class Snapshot(Displayed):
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
        kernel_upper: Upper triangle of K = J M Jᵀ, row by row, in the model's precision; in the trace form of K_tr / C.
        query_outputs: Outputs on the query set.
        cross_kernel: K_QS = J_Q M Jᵀ; in the trace form one entry per pair of examples.
        forcing: r of du/dτ = −K g − r (weight decay); None without.
        gate_open: Share of open gates per parameter tensor, in the manifest's order; None without a gate.
        query_forcing: r on the query set; None without decay or query set.
        linearized: Outputs of the model linearized at step 0, u_0 + J(w_0)(w − w_0); None without a query set.
        query_linearized: The same on the query set.
        gradient_audit: One row per audited step since the previous snapshot: ⟨p.grad, ∇Φ⟩, ‖∇Φ‖², ‖p.grad‖², and the cosine between
            what ∇Φ does not explain now and at the audit before (NaN for the first); float64. None if no step was audited.
        step_outputs: u after every step since the previous snapshot, the snapshot's own last; None if steps are not followed.
        step_times: τ there.
        probe_hash: SHA-256 of probe inputs and targets; None in old records.
        audit_weights: Of an audited snapshot: the trained weights, side by side in the manifest's order. None in others.
        audit_buffers: The model's floating-point buffers (running statistics), side by side, float64; None without any.
        audit_mean: m̂ of the step that led here, float32; of the recorder's own averages where the optimizer has no gate.
        audit_variance: ŝ, likewise.
        audit_precond: M⁰, the learning rate's share of the group included, float32.
        audit_gate: q that was applied, float32; None without a gate.
        audit_decay: Squared norms of weight decay and of the whole step, without the learning rate, float64.
        audit_risk: By parameter tensor: decrease of the population risk per unit of time on the probe, decrease of the training loss, and
            the first from the streaming averages (theory.md section 6), float64.
        live_audit: One row per step audited live since the previous snapshot: step, precision, recall, collateral, cosines of the gated and
            the ungated step with the signal direction, float64; NaN where a figure is 0/0. None if there were none.
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
    cross_kernel: Float[Tensor, "cross_rows cross_columns"] | None = None
    forcing: Float[Tensor, "examples classes"] | None = None
    gate_open: Float[Tensor, " tensors"] | None = None
    query_forcing: Float[Tensor, "queries classes"] | None = None
    linearized: Float[Tensor, "examples classes"] | None = None
    query_linearized: Float[Tensor, "queries classes"] | None = None
    gradient_audit: Float[Tensor, "audits 4"] | None = None
    step_outputs: Float[Tensor, "steps examples classes"] | None = None
    step_times: Float[Tensor, " steps"] | None = None
    probe_hash: str | None = None
    audit_weights: Float[Tensor, " entries"] | None = None
    audit_buffers: Float[Tensor, " buffers"] | None = None
    audit_mean: Float[Tensor, " entries"] | None = None
    audit_variance: Float[Tensor, " entries"] | None = None
    audit_precond: Float[Tensor, " entries"] | None = None
    audit_gate: Float[Tensor, " entries"] | None = None
    audit_decay: Float[Tensor, "2"] | None = None
    audit_risk: Float[Tensor, "tensors 3"] | None = None
    live_audit: Float[Tensor, "live 6"] | None = None

    @property
    def kernel_eps(self) -> float:
        """Negative eigenvalues of the stored kernel to expect from rounding, as a share of the largest (theory.md section 4)."""
        return 1e-10 if self.kernel_upper.dtype == torch.float64 else 1e-4

    def kernel(self) -> Float[Tensor, "outputs outputs"]:
        """Unpack K, whichever form is stored.

        Returns:
            The symmetric kernel, float64: one row per output, or in the trace form one row per example.
        """
        return unpack_upper(self.kernel_upper.double())

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
        check_fields(Snapshot, numbers, source, names=NUMBERS | (OPTIONAL_NUMBERS & set(numbers)))
        if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise InputError(f"{source} is damaged: its tensors are none. Record it again.")
        known = {field.name for field in fields(Snapshot)} - NUMBERS - OPTIONAL_NUMBERS
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
            probe_hash=numbers.get("probe_hash"),
            **{name: tensors[name] for name in REQUIRED},
            **optional,
        )
        for name, tensor in tensors.items():
            # The first audit of a run has no cosine with one before.
            checked = tensor[:, :3] if name == "gradient_audit" else tensor[:, :1] if name == "live_audit" else tensor
            check_finite(f"`{name}` of the snapshot at step {snapshot.step}", checked, "Choose a window that ends before it.")
        return snapshot


def _expected_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Derive every tensor's shape from the outputs (and the query outputs)."""
    outputs, query = tensors["outputs"], tensors.get("query_outputs")
    if outputs.ndim != 2 or outputs.numel() == 0:
        return {"outputs": (-1, -1)}
    num_examples, num_classes = outputs.shape
    num_query = -1 if query is None else len(query) if query.ndim else 0
    audits, steps = tensors.get("gradient_audit"), tensors.get("step_times")
    num_steps = steps.numel() if steps is not None else -1
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(("gradient", "forcing", "linearized"), (num_examples, num_classes))
    expected |= dict.fromkeys(("query_outputs", "query_forcing", "query_linearized"), (num_query, num_classes))
    expected |= dict.fromkeys(("hessian", "mean_hessian"), (num_examples, num_classes, num_classes))
    # Kernels come in two forms: one row per output, or one per example. The cross kernel has the form of the kernel beside it.
    is_trace = tensors["kernel_upper"].numel() == num_examples * (num_examples + 1) // 2
    width = 1 if is_trace else num_classes
    size = num_examples * width
    expected["kernel_upper"] = (size * (size + 1) // 2,)
    expected["cross_kernel"] = (num_query * width, size)
    weights, risk = tensors.get("audit_weights"), tensors.get("audit_risk")
    num_entries = -1 if weights is None else weights.numel()
    expected |= dict.fromkeys(("audit_weights", "audit_mean", "audit_variance", "audit_precond", "audit_gate"), (num_entries,))
    expected["audit_decay"] = (2,)
    live = tensors.get("live_audit")
    expected["live_audit"] = (len(live) if live is not None and live.ndim else -1, 6)
    expected["audit_risk"] = (len(risk) if risk is not None and risk.ndim else -1, 3)
    expected["gradient_audit"] = (len(audits) if audits is not None and audits.ndim else -1, 4)
    expected["step_times"] = (num_steps,)
    expected["step_outputs"] = (num_steps, num_examples, num_classes)
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


def unpack_upper(packed: Float[Tensor, " pairs"]) -> Float[Tensor, "outputs outputs"]:
    """Undo `pack_upper`.

    Args:
        packed: `N (N + 1) / 2` entries.

    Returns:
        The symmetric matrix, in their precision.

    Example:
        >>> unpack_upper(torch.tensor([1.0, 2.0, 3.0]))
        tensor([[1., 2.],
                [2., 3.]])
    """
    size = (math.isqrt(8 * packed.numel() + 1) - 1) // 2
    rows, columns = torch.triu_indices(size, size)
    matrix = packed.new_zeros(size, size)
    matrix[rows, columns] = packed
    matrix[columns, rows] = packed
    return matrix
