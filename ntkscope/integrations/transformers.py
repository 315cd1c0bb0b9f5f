"""Recording a run of the Transformers `Trainer`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntkscope._atomic import replace_when_done
from ntkscope._checks import InputError, InputTypeError, UnsupportedError
from ntkscope._types import ForwardFn, LossFn
from ntkscope.integrations.loggers import Logger, log_recording
from ntkscope.record.checkpoint import load_checkpoint
from ntkscope.record.recorder import Recorder
from ntkscope.record.source import RECORD

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("ntkscope.integrations.transformers needs Transformers: pip install 'ntkscope[transformers]'.") from error

LABELS = ("labels", "label")


def logits_of(model: nn.Module, batch: Any) -> Tensor:
    """Call a Transformers model: the `forward_fn` of its kernels.

    Args:
        model: The model. Where Accelerate has wrapped its forward in autocast, what is inside is called.
        batch: `input_ids`, `attention_mask`, ..., without labels.

    Returns:
        The logits.

    Raises:
        InputTypeError: If the model returns none.
    """
    found = getattr(model, "_original_forward", model)(**batch)
    logits = found[0] if isinstance(found, tuple) else getattr(found, "logits", None)
    if not isinstance(logits, Tensor):
        raise InputTypeError(
            f"{type(model).__name__} returns no logits, but {type(found).__name__}. Give `forward_fn(model, batch)` that picks the outputs "
            "which the loss takes."
        )
    return logits


class NTKScopeCallback(TrainerCallback):
    """Records a run of `Trainer.train`; the record is saved as `ntkscope.pt` in every checkpoint folder, and found there on resuming.

        callback = NTKScopeCallback(probe=collate(train[:100]), query=collate(test[:50]), loss="cross_entropy")
        trainer.add_callback(callback)
        trainer.train()
        analysis = ntkscope.analyze(callback.recorder)      # or: ntkscope analyze output/checkpoint-500/ntkscope.pt

    Under DDP all ranks share the kernels, and rank 0 has the record. Steps are counted as the optimizer makes them, however many batches it
    accumulates; clipping (`max_grad_norm`, 1 by default) is part of what the optimizer received (see `Analysis.agreement` and
    `rescale_time`). With fp16 or bf16 kernels are those of the stored weights, without autocast.

    Args:
        probe: Training examples to follow, n >= 2: a collated batch with labels, or inputs and labels.
        query: Examples held out, likewise.
        loss: The loss that is trained, as for `Recorder`: "cross_entropy" for classification with one label, "mse" for regression.
        forward_fn: The model's call, where its logits are not the outputs that the loss takes.
        loggers: Where to log while recording.
        resume_from: A file or folder with the record to go on with, where it is not in the folder of the checkpoint that is resumed.
        options: Further arguments of `Recorder`: schedule, audit, path, ...

    Attributes:
        recorder: The recorder, from the start of training on; None before.
    """

    def __init__(
        self,
        probe: Any,
        query: Any = None,
        *,
        loss: str | LossFn | nn.Module,
        forward_fn: ForwardFn = logits_of,
        loggers: Sequence[Logger] = (),
        resume_from: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.recorder: Recorder | None = None
        self._data = {"probe": split_labels(probe), "query": None if query is None else split_labels(query)}
        self._options = {"loss": loss, "forward_fn": forward_fn, **options}
        self._loggers = loggers
        self._resume_from = resume_from

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Attach a recorder: model and optimizer are on their device, and a checkpoint is restored.

        Args:
            args: The Trainer's.
            state: The Trainer's.
            control: The Trainer's.
            model: Without wrappers.
            optimizer: As Accelerate wraps it.
            kwargs: Not used.

        Raises:
            InputError: If this callback has recorded a run already.
            UnsupportedError: If several runs are to be made (hyperparameter search).
        """
        if state.is_hyper_param_search:
            raise UnsupportedError(
                "A hyperparameter search trains many models, and a record is about one. Add the callback to the run you keep."
            )
        before = self.recorder
        if before is not None and before.num_steps and not state.global_step:
            raise InputError(
                "This callback has recorded a run already, and `train` starts another. Make a new callback for it, or go on with the old "
                "one by train(resume_from_checkpoint=...)."
            )
        if before is not None and before.is_attached:  # a run that ended in an exception
            before.detach(closing=False)
        assert model is not None
        assert optimizer is not None
        self.recorder = Recorder(model, **self._data, **self._options, distributed=args.world_size > 1)
        if state.global_step:
            self._resume(self.recorder, _folder(args, state))
        self.recorder.attach(optimizer)
        if self._loggers and not self.recorder.is_helper:
            log_recording(self.recorder, *self._loggers, offset=state.global_step - self.recorder.num_steps)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Detach once training is to stop: `load_best_model_at_end` restores other weights, in some versions early, before `on_train_end`.

        Args:
            args: The Trainer's.
            state: The Trainer's.
            control: Says whether training is to stop.
            kwargs: Not used.
        """
        self._end_if(control.should_training_stop)

    on_step_end = on_epoch_end = on_log

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Detach.

        Args:
            args: The Trainer's.
            state: The Trainer's.
            control: The Trainer's.
            kwargs: Not used.
        """
        self._end_if(True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the record beside the checkpoint.

        Args:
            args: The Trainer's.
            state: The Trainer's.
            control: The Trainer's.
            kwargs: Not used.
        """
        recorder = self.recorder
        if recorder is not None and not recorder.is_helper and recorder.num_snapshots and args.should_save:
            with replace_when_done(_folder(args, state) / RECORD) as temporary:
                torch.save(recorder.state_dict(), temporary)

    def _end_if(self, is_over: bool) -> None:
        """Take the last snapshot and detach, once."""
        if is_over and self.recorder is not None and self.recorder.is_attached:
            self.recorder.detach()

    def _resume(self, recorder: Recorder, folder: Path) -> None:
        """Load the record of the run that is resumed."""
        path = folder if self._resume_from is None else Path(self._resume_from)
        path = path / RECORD if path.is_dir() or path.suffix != ".pt" else path
        if self._resume_from is None and not path.exists():
            warn(
                f"Training is resumed, but there is no record in {path}: a new one begins here. If there is one elsewhere, give "
                "NTKScopeCallback(resume_from=...).",
                stacklevel=2,
            )
            return
        recorder.load_state_dict(load_checkpoint(path))


def split_labels(batch: Any) -> tuple[Any, Tensor]:
    """Separate labels from inputs.

    Args:
        batch: A collated batch with `labels`, or inputs and labels already.

    Returns:
        Inputs and labels.

    Raises:
        InputTypeError: If it has no labels.
    """
    if isinstance(batch, tuple | list):
        return tuple(batch)  # pyright: ignore[reportReturnType] - checked by the recorder
    found = [name for name in LABELS if isinstance(batch, Mapping) and isinstance(batch.get(name), Tensor)]
    if not found:
        raise InputTypeError(
            f"The probe must be a collated batch with `labels`, or a pair (inputs, labels), got {type(batch).__name__}"
            f"{f' of {sorted(batch)}' if isinstance(batch, Mapping) else ''}. For example: DataCollatorWithPadding(tokenizer)(examples)."
        )
    return {name: value for name, value in batch.items() if name != found[0]}, batch[found[0]]


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Name the checkpoint folder of the step that the Trainer is at."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
