"""The probe set: training examples whose outputs are followed, and the query set held out beside it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkscope._checks import InputError, InputTypeError, UserError
from ntkscope._types import ForwardFn, LossFn
from ntkscope.dynamics.loss import ProbeLoss, bind_loss
from ntkscope.kernel.batch import batch_tensors, count_examples, take, to_device
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.model import forward_rows
from ntkscope.record.pictures import make_pictures

FEW = 8


@dataclass(frozen=True)
class ProbeSet:
    """Checked inputs and targets.

    Attributes:
        inputs: Probe inputs, on the model's device.
        few: At most eight of them.
        targets: What the loss takes.
        clean_targets: True targets where noise was planted.
        query_inputs: Inputs held out.
        query_targets: Their targets.
        loss: The loss, bound to the targets.
        num_examples: n.
        num_classes: C.
        num_query: q.
        forward_fn: The model's call.
        hash: SHA-256 of inputs and targets.
        pictures: Small pictures of the inputs, where they are images.
    """

    inputs: Any
    few: Any
    targets: Tensor
    clean_targets: Tensor | None
    query_inputs: Any
    query_targets: Tensor | None
    loss: ProbeLoss
    num_examples: int
    num_classes: int
    num_query: int
    forward_fn: ForwardFn | None
    hash: str
    pictures: Tensor | None = None

    def tensors(self, *, with_inputs: bool = False) -> dict[str, Tensor]:
        """List what a trace keeps of the probe.

        Args:
            with_inputs: Whether to keep the inputs too, where they are one tensor.

        Returns:
            Targets by name, and pictures, on the CPU.
        """
        kept = {
            "targets": self.targets,
            "clean_targets": self.clean_targets,
            "query_targets": self.query_targets,
            "pictures": self.pictures,
        }
        if with_inputs and isinstance(self.inputs, Tensor):
            kept["inputs"] = self.inputs
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in kept.items() if tensor is not None}


def make_probe(
    model: nn.Module,
    probe: tuple[Any, Tensor],
    query: tuple[Any, Tensor] | None,
    *,
    loss: str | LossFn | nn.Module,
    forward_fn: ForwardFn | None,
    clean_targets: Tensor | None,
    image_shape: Sequence[int] | None = None,
) -> ProbeSet:
    """Check probe and query against the model and the loss.

    Args:
        model: The model.
        probe: Inputs and targets.
        query: Inputs and targets held out.
        loss: As for `bind_loss`.
        forward_fn: The model's call.
        clean_targets: Shaped as the targets.
        image_shape: Of an input, as for `make_pictures`.

    Returns:
        The probe set.

    Raises:
        InputError: If there are fewer than two examples, or shapes do not fit.
        InputTypeError: If probe or query is no pair.
    """
    inputs, targets = _pair("probe", probe)
    num_examples = count_examples(inputs)
    if num_examples < 2:
        raise InputError(f"The probe must hold at least 2 examples, got n = {num_examples}: one example has no spectrum to split.")
    first = next(iter(model.parameters()), None)
    if first is None:
        raise InputError("The model has no parameters, so it has no tangent kernel. Give the model that was trained.")
    device = first.device
    inputs = to_device(inputs, device)
    outputs, shape = _first_outputs("probe", model, inputs, forward_fn)
    _check_one_row_per_example(loss, targets, shape)
    bound = bind_loss(loss, targets.cpu(), outputs.cpu())
    if clean_targets is not None and clean_targets.shape != targets.shape:
        raise InputError(f"`clean_targets` must have the targets' shape {tuple(targets.shape)}, got {tuple(clean_targets.shape)}.")
    query_inputs = query_targets = None
    if query is not None:
        query_inputs, query_targets = _pair("query", query)
        if len(query_targets) != count_examples(query_inputs):
            raise InputError(
                f"`query` has {count_examples(query_inputs)} inputs and {len(query_targets)} targets. Give one target per input."
            )
        query_inputs = to_device(query_inputs, device)
        if len(query_targets):
            _first_outputs("query set", model, query_inputs, forward_fn)
    return ProbeSet(
        inputs=inputs,
        few=take(inputs, slice(0, FEW)),
        targets=targets,
        clean_targets=clean_targets,
        query_inputs=query_inputs,
        query_targets=query_targets,
        loss=bound,
        num_examples=num_examples,
        num_classes=outputs.shape[1],
        num_query=0 if query_targets is None else len(query_targets),
        forward_fn=forward_fn,
        hash=hash_of(inputs, targets),
        pictures=make_pictures(inputs, image_shape),
    )


def _check_one_row_per_example(loss: str | LossFn | nn.Module, targets: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse classes for a model that answers for many positions: seen as one row, all its scores would be taken for classes."""
    is_of_classes = (loss == "cross_entropy" or isinstance(loss, nn.CrossEntropyLoss)) and not targets.is_floating_point()
    if is_of_classes and sum(size > 1 for size in shape[1:]) > 1:
        raise InputError(
            f"The model gives outputs of shape {shape}, of which cross-entropy takes one row of class scores per example. Pick or join "
            "rows with `forward_fn(model, batch)` (--forward SPEC), for example model(batch)[:, -1] for the last position."
        )


def _first_outputs(name: str, model: nn.Module, inputs: Any, forward_fn: ForwardFn | None) -> tuple[Tensor, tuple[int, ...]]:
    """Run the model for the first time: what fails here is the input's fault. Gives its rows, and the shape they came in."""
    shape: tuple[int, ...] = ()

    def seen(module: nn.Module, batch: Any) -> Tensor:
        nonlocal shape
        found = module(batch) if forward_fn is None else forward_fn(module, batch)
        shape = tuple(getattr(found, "shape", ()))
        return found

    try:
        with undisturbed(model), torch.no_grad():
            outputs = forward_rows(model, inputs, seen)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"The model failed on the {name}: {type(error).__name__}: {reason}. Check the inputs' shape, dtype and device, or give the "
            "model's call as `forward_fn(model, batch)`."
        ) from error
    if not bool(torch.isfinite(outputs).all()):
        raise InputError(f"The model's outputs on the {name} are not finite. Check inputs and weights for NaN or infinity.")
    return outputs, shape


def _pair(name: str, value: object) -> tuple[Any, Tensor]:
    """Check that a probe or query is inputs and targets."""
    if not (isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[1], Tensor)):
        raise InputTypeError(
            f"`{name}` must be a pair (inputs, targets) with targets a tensor, got {type(value).__name__}. "
            "A data loader is not read: a shuffling one would give other rows each time. Collect the rows once."
        )
    return value[0], value[1]


def hash_of(inputs: Any, targets: Tensor) -> str:
    """Hash the content, so that a resumed run cannot mix probes.

    Args:
        inputs: Of the probe.
        targets: Of the probe.

    Returns:
        SHA-256.
    """
    digest = hashlib.sha256()
    for tensor in [*batch_tensors(inputs), targets]:
        digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
