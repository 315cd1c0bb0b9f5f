"""Recording a Lightning training run."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ntkscope._checks import InputError, UnsupportedError
from ntkscope._types import ForwardFn, LossFn
from ntkscope.integrations.loggers import Logger, log_recording
from ntkscope.record.recorder import Recorder

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError("ntkscope.integrations.lightning needs Lightning: pip install 'ntkscope[lightning]'.") from error

# By name, as Trainers are of any class: `lightning` and `pytorch_lightning` have each their own.
PRECISIONS = ("Precision", "MixedPrecision", "HalfPrecision", "DoublePrecision")


class NTKScopeCallback(Callback):  # pyright: ignore[reportGeneralTypeIssues] - of one package or the other
    """Records a run of `Trainer.fit`; the record goes into Lightning's checkpoints and comes back when one is resumed.

        callback = NTKScopeCallback(probe=(x, y), query=(x_test, y_test), loss="cross_entropy")
        Trainer(callbacks=[callback]).fit(module, loader)
        analysis = ntkscope.analyze(callback.recorder)      # or: ntkscope analyze lightning_logs/.../some.ckpt

    The module is run by its `forward`. Under DDP all ranks share the kernels, and rank 0 has the record. Steps are counted as the optimizer
    makes them, however many batches it accumulates; clipping is part of what the optimizer received (see `Analysis.agreement` and
    `rescale_time`). With mixed precision kernels are those of the stored weights, without autocast.

    Args:
        probe: Inputs and targets of the training examples to follow, n >= 2.
        query: Inputs and targets held out.
        loss: The loss that is trained, as for `Recorder`.
        forward_fn: The module's call, `forward_fn(module, batch)`, where `forward` does not return the outputs that the loss takes.
        loggers: Where to log while recording; the Trainer's own loggers if not given, `()` for nowhere.
        options: Further arguments of `Recorder`: schedule, audit, path, ...

    Attributes:
        recorder: The recorder, from the start of training on; None before.
    """

    def __init__(
        self,
        probe: tuple[Any, Tensor],
        query: tuple[Any, Tensor] | None = None,
        *,
        loss: str | LossFn | nn.Module,
        forward_fn: ForwardFn | None = None,
        loggers: Sequence[Logger] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.recorder: Recorder | None = None
        self._data = {"probe": probe, "query": query}
        self._options = {"loss": loss, "forward_fn": forward_fn, **options}
        self._loggers = loggers
        self._resumed: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Attach a recorder: the module is on its device, and a checkpoint is restored.

        Args:
            trainer: Lightning's.
            pl_module: The user's.

        Raises:
            InputError: If this callback has recorded a run already.
            UnsupportedError: If there is not one optimizer, or the precision plugin changes what weights are.
        """
        if self.recorder is not None and self._resumed is None:
            raise InputError(
                "This callback has recorded a run already, and `fit` starts another with a new optimizer. Make a new callback for it, or "
                "go on with the old one by fit(..., ckpt_path=...)."
            )
        _check_trainer(trainer)
        convert = trainer.precision_plugin.convert_input  # as the Trainer does with every batch
        data = {name: None if pair is None else (convert(pair[0]), pair[1]) for name, pair in self._data.items()}
        self.recorder = Recorder(pl_module, **data, **self._options, distributed=trainer.world_size > 1)
        if self._resumed is not None:
            self.recorder.load_state_dict(self._resumed)
            self._resumed = None
        self.recorder.attach(trainer.optimizers[0])
        loggers = [_Adapted(logger) for logger in trainer.loggers] if self._loggers is None else self._loggers
        if loggers and not self.recorder.is_helper:
            log_recording(self.recorder, *loggers, offset=trainer.global_step - self.recorder.num_steps)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Take the last snapshot, and detach.

        Args:
            trainer: Lightning's.
            pl_module: The user's.
        """
        if self.recorder is not None and self.recorder.is_attached:
            self.recorder.detach()

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Detach; what is recorded so far stays.

        Args:
            trainer: Lightning's.
            pl_module: The user's.
            exception: What ended training.
        """
        if self.recorder is not None and self.recorder.is_attached:
            self.recorder.detach(closing=False)

    def state_dict(self) -> dict[str, Any]:
        """Put the record into a checkpoint.

        Returns:
            The recorder's state; empty before the first step, and on ranks that help.
        """
        recorder = self.recorder
        return {} if recorder is None or recorder.is_helper or not recorder.num_snapshots else recorder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the record of a checkpoint, once training starts.

        Args:
            state_dict: From `state_dict`.
        """
        self._resumed = state_dict or None


class _Adapted:
    """One of the Trainer's loggers."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log metrics."""
        self._logger.log_metrics(metrics, step=step)


def _check_trainer(trainer: Any) -> None:
    """Refuse what would be recorded wrongly."""
    if len(trainer.optimizers) != 1:
        raise UnsupportedError(
            f"The module has {len(trainer.optimizers)} optimizers, and a record is about one. Record the part that one of them trains from "
            "the module's own `on_train_start`: Recorder(self.part, probe=...).attach(self.optimizers()[0])."
        )
    plugin = type(trainer.precision_plugin).__name__
    if plugin not in PRECISIONS:
        raise UnsupportedError(
            f"The precision plugin {plugin} replaces layers or weights, whose kernel is not known. Record with precision 32-true, 64-true, "
            "16-mixed, bf16-mixed, 16-true or bf16-true."
        )
