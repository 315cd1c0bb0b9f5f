"""What must hold of a model's output rows before its kernel means anything, and what a forward pass keeps in memory."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ntkscope._checks import InputError, UnsupportedError, UserError
from ntkscope.kernel.batch import batch_tensors, take

UNKNOWN_BYTES = 2**40  # of one example, where they cannot be counted: it is then taken alone


def first_rows(batch: Any, run: Callable[[Any], Tensor]) -> Tensor:
    """Run the model for the first time: what fails here is the input's fault.

    Args:
        batch: A few examples.
        run: From a batch to its rows.

    Returns:
        Rows, in the autograd graph.

    Raises:
        InputError: If the model raises, or its outputs are not finite.
        UserError: As the model's readout raises it.
        UnsupportedError: If the rows depend on no parameter, or on some in a way that gradients cannot be taken of.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("Inside torch.inference_mode() nothing can be differentiated. Call this outside of it.")
    try:
        outputs = run(batch)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"The model failed on the first examples of the batch: {type(error).__name__}: {reason}. Check the inputs' shape, dtype and "
            "device, or give the model's call as `forward_fn(model, batch)`."
        ) from error
    if not outputs.requires_grad:
        raise UnsupportedError(
            "The model's output depends on none of its trained parameters (a torch.no_grad or detach inside the model?), "
            "so its tangent kernel is zero. Check the forward pass."
        )
    if not bool(torch.isfinite(outputs).all()):
        is_input = any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in batch_tensors(batch))
        culprit = "The inputs hold NaN" if is_input else "Weights are finite, so activations overflow"
        raise InputError(
            f"The model's outputs must be finite, but those of the first examples are not. {culprit}: clean them, or use float64."
        )
    if any(type(node).__name__ == "CheckpointFunctionBackward" for node in _graph(outputs)):
        raise UnsupportedError(
            "The model uses torch.utils.checkpoint with use_reentrant=True, which hides parameters from torch.autograd.grad. "
            "Set use_reentrant=False."
        )
    return outputs


def check_rows_are_functions(model: nn.Module, batch: Any, outputs: Tensor, run: Callable[[Any], Tensor]) -> None:
    """Check that an output row is a function of its own input row and of the parameters, and of nothing else.

    Args:
        model: Any module, inside `undisturbed`.
        batch: A few examples.
        outputs: Their rows.
        run: From a batch to its rows.

    Raises:
        InputError: If rows are random, or depend on their neighbours or their place.
    """
    rows = outputs.detach()
    tolerance = (1e-8 if rows.dtype == torch.float64 else 1e-3) * max(float(rows.abs().max()), torch.finfo(rows.dtype).tiny)
    backwards = torch.arange(len(rows) - 1, -1, -1)
    with torch.no_grad():
        # In another place; and beside itself only, which are other neighbours.
        gaps = [float((run(take(batch, backwards)).detach().flip(0) - rows).abs().max())]
        gaps += [float((run(take(batch, torch.tensor([i, i]))).detach() - rows[i]).abs().max()) for i in (0, len(rows) - 1)]
        if not max(gaps) > tolerance:
            return
        gap = float((run(batch).detach() - rows).abs().max())
    if gap > tolerance:
        raise InputError(
            f"The model gives another output every time it is called, also in evaluation mode (by {gap:.1e}): its kernel is a random "
            "number. Switch its randomness off (dropout called as a function needs training=self.training), or fix its seed."
        )
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and not module.track_running_stats
    ]
    culprit = f"BatchNorm without running statistics: {', '.join(norms)}" if norms else "batch statistics or a contrastive head?"
    raise InputError(
        f"Output rows must depend on their own input row only, but a row changed by {max(gaps):.1e} when its neighbours did ({culprit}). "
        "The kernel between examples is not defined then. Use a layer without batch statistics, or take the outputs before it."
    )


def _graph(outputs: Tensor) -> Iterator[object]:
    """Iterate over the nodes of an autograd graph."""
    seen: set[object] = set()
    waiting = [outputs.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            yield node


def saved_bytes(model: nn.Module, batch: Any, run: Callable[[Any], Tensor]) -> int:
    """Count the bytes that the graph of a forward pass keeps for one example, parameters and buffers apart.

    Args:
        model: Any module, inside `undisturbed`.
        batch: A few examples.
        run: From a batch to its rows.

    Returns:
        Bytes per example; `UNKNOWN_BYTES` where the model itself uses torch.func, which forbids to look.
    """
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            rows = run(batch)
    except RuntimeError:
        return UNKNOWN_BYTES
    for tensor in [*model.parameters(), *model.buffers()]:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return (sum(kept.values()) + rows.numel() * rows.element_size()) // len(rows) + 1
