"""What an analysis returns."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from ntkscope._display import Displayed, Plots, write_report
from ntkscope.dynamics.closure import Closure
from ntkscope.dynamics.dissipation import Dissipation
from ntkscope.dynamics.drift import Drift
from ntkscope.spectrum.channels import ChannelSplit
from ntkscope.spectrum.cutoffs import Cutoff
from ntkscope.spectrum.eigen import Spectrum
from ntkscope.spectrum.examples import Examples

SCHEMA = "ntkscope.summary/1"


@dataclass(frozen=True)
class RunInfo(Displayed):
    """What was analyzed.

    Attributes:
        source: File, folder or object.
        num_examples: n.
        num_classes: C.
        num_outputs: N = n C.
        num_params: p.
        num_snapshots: In the whole trace.
        num_query: q, 0 without a query set.
        num_steps: Optimizer steps of the whole trace.
        loss: Name of the loss.
        optimizer: Class and settings.
        precond: Kind of M.
    """

    source: str
    num_examples: int
    num_classes: int
    num_outputs: int
    num_params: int
    num_snapshots: int
    num_query: int
    num_steps: int
    loss: str
    optimizer: str
    precond: str


@dataclass(frozen=True)
class Window:
    """The part of the run that was analyzed.

    Attributes:
        start_step: Optimizer step at its start.
        stop_step: At its end.
        start: Snapshot index of the start.
        stop: Of the end, inclusive.
        reason: Why this window, in a sentence.
    """

    start_step: int
    stop_step: int
    start: int
    stop: int
    reason: str


@dataclass(frozen=True)
class History(Displayed):
    """One row per snapshot from the window's start; it may run beyond the window's end.

    Attributes:
        steps: Optimizer steps.
        times: Optimizer time since the window's start.
        loss: Φ, observed.
        predicted_loss: Φ at the start minus the dissipated energy.
        gradient_error: ‖predicted g − g‖ / ‖g‖.
        eigvals: ω, descending; zero at the start.
        leading_modes: The (at most three) modes of the window's end along which training removed the most loss, most first.
        leading: Coordinate of example i along such a mode: the part of its residual that is gone there, ⟨v_k[i], (h − P̃h)_i⟩ / ‖h_i‖.
        example_residual: Share of each example's squared residual that is left, by the propagator.
        signal_share: hᵀ Ω h / hᵀ h, share of the squared residual that was dissipated.
    """

    steps: list[int]
    times: Float[Tensor, " snapshots"]
    loss: Float[Tensor, " snapshots"]
    predicted_loss: Float[Tensor, " snapshots"]
    gradient_error: Float[Tensor, " snapshots"]
    eigvals: Float[Tensor, "snapshots modes"]
    leading_modes: list[int]
    leading: Float[Tensor, "snapshots examples axes"]
    example_residual: Float[Tensor, "snapshots examples"]
    signal_share: Float[Tensor, " snapshots"]


@dataclass(frozen=True)
class GateStats(Displayed):
    """How open the gate was at the snapshots of a gated run.

    Attributes:
        kind: "soft", "hard", "snr" or "open".
        steps: Steps of the snapshots.
        open_share: Share of parameters with q > ½.
        by_parameter: The same for each parameter tensor.
    """

    kind: str
    steps: list[int]
    open_share: Float[Tensor, " snapshots"]
    by_parameter: dict[str, Tensor]


@dataclass(frozen=True)
class Analysis(Displayed):
    """Everything that was found out about one window of one run.

    Attributes:
        run: What was analyzed.
        window: The part of it.
        dissipation: Operators W, P, D, G.
        spectrum: ω, κ and the directions.
        channels: Signal channel and reservoir.
        cutoffs: Every rule's verdict, by rule.
        closure: How far the numbers can be trusted.
        drift: Kernel drift.
        stability: lr * sharpness over its stable limit, largest in the window; NaN if unknown.
        regime: Lazy or feature learning.
        gate: Gate statistics; None without a gate.
        gate_reason: Why there are none.
        examples: One row per example.
        history: One row per snapshot.
        warnings: What a reader must know.
    """

    run: RunInfo
    window: Window
    dissipation: Dissipation
    spectrum: Spectrum
    channels: ChannelSplit
    cutoffs: dict[str, Cutoff]
    closure: Closure
    drift: Drift
    stability: float
    regime: str
    regime_reason: str
    gate: GateStats | None
    gate_reason: str
    examples: Examples
    history: History
    warnings: tuple[str, ...]

    @property
    def plot(self) -> Plots:
        """Figures, for example `analysis.plot.spectrum()`; needs plotly."""
        return Plots(self)

    def report(self, path: str | Path) -> None:
        """Write the report: one HTML file that needs no network.

        Args:
            path: The file.
        """
        write_report(self, Path(path))

    def summary(self) -> dict[str, Any]:
        """Put the findings into plain containers, as in summary.json (docs/summary.md).

        Returns:
            JSON-able values; what is infinite or undefined is null.
        """
        closure = self.closure
        rows = zip(
            self.examples.ids,
            *(getattr(self.examples, name).tolist() for name in _EXAMPLE_COLUMNS),
            strict=True,
        )
        labels, truth, noise = self.examples.labels, self.examples.true_labels, self.examples.is_noise
        examples = []
        for position, row in enumerate(rows):
            entry: dict[str, Any] = dict(zip(("id", *_EXAMPLE_COLUMNS), row, strict=True))
            entry["label"] = None if labels is None else labels[position]
            if noise is not None:
                entry |= {"true_label": None if truth is None else truth[position], "is_noise": bool(noise[position])}
            examples.append(entry)
        gate = None
        if self.gate is not None:
            gate = {
                "kind": self.gate.kind,
                "open_share": dict(zip(self.gate.steps, self.gate.open_share.tolist(), strict=True)),
                "final_by_parameter": {name: float(share[-1]) for name, share in self.gate.by_parameter.items()},
            }
        return _jsonable({
            "schema": SCHEMA,
            **asdict(self.run),
            "window": asdict(self.window),
            "loss_name": self.run.loss,
            "loss": {"start": float(self.history.loss[0]), "end": float(self.history.loss[self.window.stop - self.window.start])},
            "energy_balance": {
                "predicted": closure.energy_predicted,
                "observed": closure.energy_observed,
                "relative_error": closure.energy_error,
            },
            "gradient_closure": closure.gradient_error,
            "gradient_closure_initial": closure.gradient_error_initial,
            "query_closure": closure.query_error,
            "forcing_share": closure.forcing_share,
            "trustworthy": closure.trustworthy,
            "causes": list(closure.causes),
            "kernel_drift": {"kernel": self.drift.kernel, "max": self.drift.max, "final": self.drift.final},
            "stability": self.stability,
            "cutoff": {"rule": self.channels.rule, "value": self.channels.threshold},
            "num_modes": self.channels.num_modes,
            "signal_rank": self.channels.signal_rank,
            "signal_share": float(self.history.signal_share[self.window.stop - self.window.start]),
            "effective_rank": self.spectrum.effective_rank,
            "stable_rank": self.spectrum.stable_rank,
            "cutoffs": {rule: cutoff.rank for rule, cutoff in self.cutoffs.items()},
            "regime": self.regime,
            "regime_reason": self.regime_reason,
            "gate": gate,
            "gate_reason": self.gate_reason,
            "auroc": self.examples.auroc,
            "examples": examples,
            "warnings": list(self.warnings),
        })

    def tensors(self) -> dict[str, Tensor]:
        """List all arrays, by the name they have in results.safetensors.

        Returns:
            Tensors; float64 unless they are indices.
        """
        named = {
            "dissipation/gramian": self.dissipation.gramian,
            "dissipation/propagator": self.dissipation.propagator,
            "dissipation/displacement": self.dissipation.displacement,
            "dissipation/transfer": self.dissipation.transfer,
            "spectrum/eigvals": self.spectrum.eigvals,
            "spectrum/eigvecs": self.spectrum.eigvecs,
            "spectrum/log_dissipation": self.spectrum.log_dissipation,
            "spectrum/residual": self.spectrum.residual,
            "spectrum/owner": self.spectrum.owner,
            "drift/relative": self.drift.relative,
            "history/steps": torch.tensor(self.history.steps),
        }
        named |= {f"examples/{name}": getattr(self.examples, name) for name in _EXAMPLE_COLUMNS}
        named |= {f"history/{name}": getattr(self.history, name) for name in _HISTORY_COLUMNS}
        return {name: tensor.contiguous() for name, tensor in named.items() if tensor is not None}

    def save(self, folder: str | Path, *, report: bool = True) -> Path:
        """Write summary.json, results.safetensors and report.html, all of them or none.

        Args:
            folder: Made if it does not exist.
            report: Whether to write the report.

        Returns:
            The folder.
        """
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # All files are finished beside their place before the first is put there: an interrupted save leaves what was there before.
        with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
            finished = Path(name)
            save_file(self.tensors(), finished / "results.safetensors", metadata={"schema": SCHEMA})
            if report:
                self.report(finished / "report.html")
            (finished / "summary.json").write_text(json.dumps(self.summary(), indent=1), encoding="utf-8")
            folder.mkdir(exist_ok=True)
            for path in sorted(finished.iterdir()):
                path.replace(folder / path.name)
        return folder


_EXAMPLE_COLUMNS = (
    "reservoir_energy",
    "reservoir_share",
    "loss",
    "margin",
    "area_under_margin",
    "self_influence",
    "half_time",
    "quarter_time",
)
_HISTORY_COLUMNS = (
    "times",
    "loss",
    "predicted_loss",
    "gradient_error",
    "eigvals",
    "leading",
    "example_residual",
    "signal_share",
)


def _jsonable(value: Any) -> Any:
    """Replace what JSON has no word for (NaN, infinity) by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(part) for part in value]
    return value
