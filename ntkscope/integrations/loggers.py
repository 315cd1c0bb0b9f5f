"""Numbers of a recording and of an analysis, for whatever keeps curves: one small protocol, and adapters for three libraries.

The adapters take the library's own object, so that nothing is imported here, and everything works offline if that object does.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ntkscope._eigh import largest_eigval
from ntkscope.dynamics.form import Form
from ntkscope.record.live_audit import COLUMNS
from ntkscope.record.recorder import Recorder
from ntkscope.record.snapshot import Snapshot
from ntkscope.results import Analysis
from ntkscope.spectrum.whitening import whiten

PREFIX = "ntkscope/"
STEP = f"{PREFIX}step"


@runtime_checkable
class Logger(Protocol):
    """What keeps numbers by step."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Keep some numbers.

        Args:
            metrics: By name.
            step: Of the optimizer.
        """
        ...


class TensorBoardLogger:
    """Logs to TensorBoard.

    Args:
        writer: A `torch.utils.tensorboard.SummaryWriter`, or that of tensorboardX.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write scalars.

        Args:
            metrics: By name.
            step: Of the optimizer.
        """
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)


class WandbLogger:
    """Logs to Weights & Biases, with a step axis of its own: W&B's counter goes on with whatever else is logged.

    Args:
        run: From `wandb.init(...)`; with mode="offline" nothing is sent.
    """

    def __init__(self, run: Any) -> None:
        self.run = run
        run.define_metric(STEP, hidden=True)
        run.define_metric(f"{PREFIX}*", step_metric=STEP)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log a row.

        Args:
            metrics: By name.
            step: Of the optimizer.
        """
        self.run.log({**metrics, STEP: step})


class MLflowLogger:
    """Logs to MLflow.

    Args:
        client: An `mlflow.MlflowClient`.
        run_id: Of the run, `run.info.run_id`.
    """

    def __init__(self, client: Any, run_id: str) -> None:
        self.client = client
        self.run_id = run_id

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log metrics.

        Args:
            metrics: By name.
            step: Of the optimizer.
        """
        for name, value in metrics.items():
            self.client.log_metric(self.run_id, name, value, step=step)


def log_recording(recorder: Recorder, *loggers: Logger, offset: int = 0) -> None:
    """Log while recording, at every snapshot.

    Logged are the loss on the probe, `kernel_drift` (‖K − K_0‖ / ‖K_0‖), `stability` (learning rate times λ_max(B^½ K B^½), edge at 1),
    `snapshot_seconds` and `recording_share` (of training time); the share of open gates and the rows of a live audit where there are any.

    Args:
        recorder: Before or after `attach`; on a rank that helps another nothing is logged.
        loggers: Where to.
        offset: Steps that were taken before the recorder's first.
    """
    course = _Course(recorder)

    def tell(snapshot: Snapshot) -> None:
        for step, metrics in (*_live_rows(snapshot), (snapshot.step, course.numbers(snapshot))):
            for logger in loggers:
                logger.log(_finite(metrics), step + offset)

    recorder.listen(tell)


def log_analysis(analysis: Analysis, *loggers: Logger, offset: int = 0) -> None:
    """Log the main numbers of an analysis, at the last step of its window.

    Args:
        analysis: From `ntkscope.analyze`.
        loggers: Where to.
        offset: Steps that were taken before the recorder's first.
    """
    for logger in loggers:
        logger.log(_finite(main_numbers(analysis)), analysis.window.stop_step + offset)


def main_numbers(analysis: Analysis) -> dict[str, float]:
    """Pick the main numbers of an analysis.

    Args:
        analysis: From `ntkscope.analyze`.

    Returns:
        By name; those that are not defined are NaN.
    """
    summary = analysis.summary()
    auroc = (summary["auroc"] or {}).get(summary["examples_ranked_by"])
    found = {
        "energy_error": summary["energy_balance"]["relative_error"],
        "gradient_closure": summary["gradient_closure"],
        "trustworthy": float(summary["trustworthy"]),
        "signal_rank": summary["signal_rank"],
        "signal_share": summary["signal_share"],
        "effective_rank": summary["effective_rank"],
        "num_modes": summary["num_modes"],
        "kernel_drift_max": summary["kernel_drift"]["max"],
        "stability_max": summary["stability"],
        "loss_start": summary["loss"]["start"],
        "loss_end": summary["loss"]["end"],
        "reservoir_query_share": summary["reservoir"]["query_share"],
        "label_noise_auroc": auroc,
    }
    return {f"{PREFIX}analysis/{name}": math.nan if value is None else float(value) for name, value in found.items()}


class _Course:
    """Remembers the first kernel of a record."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._first: Tensor | None = recorder.trace[0].kernel() if recorder.num_snapshots else None

    def numbers(self, snapshot: Snapshot) -> dict[str, float]:
        """Compute what is logged of a snapshot."""
        kernel, seconds = snapshot.kernel(), self._recorder.seconds
        self._first = kernel if self._first is None else self._first
        found = {
            "loss": snapshot.loss,
            "kernel_drift": float((kernel - self._first).norm() / self._first.norm()),
            "stability": self._stability(snapshot, kernel),
            "snapshot_seconds": seconds["snapshot"],
            "recording_share": seconds["recording"] / seconds["training"] if seconds["training"] > 0 else math.nan,
        }
        if snapshot.gate_open is not None:
            sizes = snapshot.gate_open.new_tensor(self._recorder.facts.parameter_sizes)
            found["gate_open"] = float((snapshot.gate_open * sizes).sum() / sizes.sum())
        return {PREFIX + name: value for name, value in found.items()}

    def _stability(self, snapshot: Snapshot, kernel: Tensor) -> float:
        """Compute lr λ_max(B^½ K B^½) / θ; NaN for an optimizer whose θ is unknown."""
        facts = self._recorder.facts
        edge = facts.stability_edge
        if edge is None:
            return math.nan
        whitening = whiten(Form(facts.outputs == "trace").blocks(snapshot.hessian))
        curvature = whitening.motion(whitening.motion(kernel).T.contiguous())
        return max(snapshot.learning_rates) * largest_eigval(curvature) / edge


def _live_rows(snapshot: Snapshot) -> list[tuple[int, dict[str, float]]]:
    """List the audited steps since the snapshot before."""
    rows = [] if snapshot.live_audit is None else snapshot.live_audit.tolist()
    names = [f"{PREFIX}live/{name}" for name in COLUMNS[1:]]
    return [(int(row[0]), dict(zip(names, row[1:], strict=True))) for row in rows]


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Leave out what is not defined."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
