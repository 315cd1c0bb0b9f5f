"""What must hold of a model's output rows before its kernel means anything, and what a forward pass keeps in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ntkscope._checks import InputError, UnsupportedError
from ntkscope.kernel.batch import take

UNKNOWN_BYTES = 2**40  # of one example, where they cannot be counted: it is then taken alone


def check_rows_are_functions(model: nn.Module, pair: Any, outputs: Tensor, run: Callable[[Any], Tensor]) -> None:
    """Check that an output row is a function of its own input row and of the parameters, and of nothing else.

    Args:
        model: Any module, inside `undisturbed`.
        pair: One or two examples.
        outputs: Their rows, in the autograd graph.
        run: From a batch to its rows.

    Raises:
        UnsupportedError: If the rows depend on no parameter.
        InputError: If they are random, or one changes when another does.
    """
    if not outputs.requires_grad:
        raise UnsupportedError(
            "The model's output depends on none of its trained parameters (a torch.no_grad or detach inside the model?), "
            "so its tangent kernel is zero. Check the forward pass."
        )
    first = outputs.detach()
    tolerance = (1e-8 if first.dtype == torch.float64 else 1e-3) * max(float(first.abs().max()), torch.finfo(first.dtype).tiny)
    with torch.no_grad():
        again = run(pair).detach()
        repeated = run(take(pair, torch.tensor([0, 0]))).detach()
    gap = float((again - first).abs().max())
    if gap > tolerance:
        raise InputError(
            f"The model gives another output every time it is called, also in evaluation mode (by {gap:.1e}): its kernel is a random "
            "number. Switch its randomness off (dropout called as a function needs training=self.training), or fix its seed."
        )
    gap = float((repeated[0] - first[0]).abs().max())
    if gap > tolerance:
        norms = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and not module.track_running_stats
        ]
        culprit = f"BatchNorm without running statistics: {', '.join(norms)}" if norms else "batch statistics or a contrastive head?"
        raise InputError(
            f"Output rows must depend on their own input row only, but row 0 changed by {gap:.1e} when another row did ({culprit}). "
            "The kernel between examples is not defined then. Use a layer without batch statistics, or take the outputs before it."
        )


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
