"""What an analysis returns."""

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._display import Displayed, Plots, analysis_to_dataset, to_frame, write_comparison, write_report
from ntkscope.dynamics.agreement import GradientAgreement
from ntkscope.dynamics.closure import Closure
from ntkscope.dynamics.density import Density
from ntkscope.dynamics.diffusion import Diffusion
from ntkscope.dynamics.dissipation import Dissipation
from ntkscope.dynamics.drift import Drift
from ntkscope.dynamics.transfer import Transfer
from ntkscope.gate.verdict import GateAudit
from ntkscope.saved import FILE, read_result, split, write_result
from ntkscope.spectrum.cells import Cells
from ntkscope.spectrum.channels import ChannelSplit
from ntkscope.spectrum.cutoffs import Cutoff
from ntkscope.spectrum.eigen import Spectrum
from ntkscope.spectrum.examples import Examples
from ntkscope.spectrum.null import Null
from ntkscope.spectrum.sensitivity import Sensitivity
from ntkscope.spectrum.truncation import Truncation
from ntkscope.summary import summarize
from ntkscope.uncertainty import Uncertainty


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
        outputs: Form of the kernel, "full" or "trace".
        training_size: Size of the training set where the probe is a sample of it; None where it is the whole set, or unknown.
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
    outputs: str
    training_size: int | None


@dataclass(frozen=True)
class Window(Displayed):
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
        is_refined: Whether the way to the snapshot was integrated by interpolated halves (`dynamics.interpolation`) or by a trapezoid.
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
    is_refined: list[bool]

    def table(self) -> dict[str, list[Any]]:
        """List the snapshots, one row each.

        Returns:
            Columns by name: those that have one number per snapshot.
        """
        columns = {name: getattr(self, name).tolist() for name in ("loss", "predicted_loss", "gradient_error", "signal_share")}
        return {"step": self.steps, "time": self.times.tolist(), **columns, "is_refined": self.is_refined}

    def to_pandas(self) -> Any:
        """Turn the table into a `pandas.DataFrame`.

        Returns:
            The frame, indexed by step.
        """
        return to_frame(self.table(), index="step")


@dataclass(frozen=True)
class GateStats(Displayed):
    """How open the gate was at the snapshots of a gated run, or would have been at the audited ones of a run without a gate.

    Attributes:
        kind: "soft", "hard", "snr" or "open".
        steps: Steps of the snapshots.
        open_share: Share of parameters with q > ½.
        by_parameter: The same for each parameter tensor.
        audit: The gate's decisions against the spectral cutoff; None without audit data and a model.
        audit_reason: Why there is none.
        live: Steps audited while training went on, one row each: step, precision, recall, collateral, cosines of the gated and the ungated
            step with the signal direction; None if there were none.
    """

    kind: str
    steps: list[int]
    open_share: Float[Tensor, " snapshots"]
    by_parameter: dict[str, Tensor]
    audit: GateAudit | None = None
    audit_reason: str = ""
    live: Float[Tensor, "steps 6"] | None = None


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
        regime_reason: The number behind it.
        transfer: Predicted against observed test motion, with baselines; None without a query set.
        transfer_reason: Why there is none.
        truncation: What is lost when only r directions are kept, with bounds.
        cells: Test motion by clean labels and noise, signal channel and reservoir; None without a query set.
        null: Signal share against shuffled labels; None where the loss is unknown.
        sensitivity: The split under other cutoffs.
        uncertainty: Jackknife standard errors; None unless asked for.
        diffusion: Drift and diffusion along leading directions; None where outputs were not followed at every step.
        diffusion_reason: Why there is none.
        agreement: Gradients that the optimizer received against those of the loss on the probe; None where no step was audited.
        gate: Gate statistics and audit; None for a run without a gate that was not audited.
        gate_reason: Why there are none.
        examples: One row per example.
        history: One row per snapshot.
        warnings: What a reader must know.
        density: Of a run of bare checkpoints: whether there are enough, and how many more are needed; None for a recorded run.
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
    transfer: Transfer | None
    transfer_reason: str
    truncation: Truncation
    cells: Cells | None
    null: Null | None
    sensitivity: Sensitivity
    uncertainty: Uncertainty | None
    diffusion: Diffusion | None
    diffusion_reason: str
    agreement: GradientAgreement | None
    gate: GateStats | None
    gate_reason: str
    examples: Examples
    history: History
    warnings: tuple[str, ...]
    density: Density | None = None

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

    def compare(self, other: "Analysis", path: str | Path) -> None:
        """Write this result (A) and another (B) side by side: one HTML file that needs no network.

        Args:
            other: The other result.
            path: The file.
        """
        write_comparison(self, other, Path(path))

    def summary(self) -> dict[str, Any]:
        """Put the findings into plain containers, as in summary.json (docs/summary.md).

        Returns:
            JSON-able values; what is infinite or undefined is null.
        """
        return summarize(self)

    def to_pandas(self) -> dict[str, Any]:
        """Turn the tables into frames of pandas.

        Returns:
            "examples", one row per example; "history", one per snapshot; "spectrum", one per direction; "cutoffs", one per rule.

        Raises:
            UnsupportedError: If pandas is not installed.
        """
        names = ("rule", "threshold", "rank", "note")
        cutoffs = {name: [getattr(cutoff, name) for cutoff in self.cutoffs.values()] for name in names}
        frames = {"examples": self.examples, "history": self.history, "spectrum": self.spectrum}
        return {name: holder.to_pandas() for name, holder in frames.items()} | {"cutoffs": to_frame(cutoffs, index="rule")}

    def to_xarray(self) -> Any:
        """Turn what was found per example, direction and snapshot into an `xarray.Dataset`, which `to_netcdf` writes as it is.

        Returns:
            The dataset; operators and directions, which are N x N, are left out: see `tensors()`.

        Raises:
            UnsupportedError: If xarray is not installed.
        """
        return analysis_to_dataset(self)

    def tensors(self) -> dict[str, Tensor]:
        """List all arrays, by the name they have in results.safetensors.

        Returns:
            Tensors, by their attribute path; float64 unless they are indices, flags or pictures.
        """
        return split(self)[1] | self._also()

    def _also(self) -> dict[str, Tensor]:
        """List what is no tensor here but stands among the arrays."""
        return {"history/steps": torch.tensor(self.history.steps)}

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
            write_result(self, finished / FILE, also=self._also())
            if report:
                self.report(finished / "report.html")
            (finished / "summary.json").write_text(json.dumps(self.summary(), indent=1), encoding="utf-8")
            folder.mkdir(exist_ok=True)
            for path in sorted(finished.iterdir()):
                path.replace(folder / path.name)
        return folder


def load_analysis(path: str | Path) -> Analysis:
    """Load what `Analysis.save` wrote, or `ntkscope analyze`.

    Args:
        path: The folder, or its results.safetensors.

    Returns:
        An equal analysis.

    Raises:
        InputError: If there is none, or the file is truncated, damaged, foreign, or of another version: analyze again.
    """
    return read_result(path, Analysis)
