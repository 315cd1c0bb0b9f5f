"""Recording a loop of one's own under Accelerate: `Recorder` takes the model and the optimizer that `accelerator.prepare` gives back.

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    recorder = ntkscope.Recorder(model, probe=(x, y), loss="cross_entropy", distributed=accelerator.num_processes > 1)
    recorder.attach(optimizer)

Only mixed precision needs more, `forward_fn=without_autocast`.
"""

from typing import Any

from torch import Tensor, nn


def without_autocast(model: nn.Module, batch: Any) -> Tensor:
    """Call a model as it was before Accelerate wrapped its forward in autocast: a `forward_fn` for the kernels of its stored weights.

    Args:
        model: Prepared by Accelerate.
        batch: Its inputs.

    Returns:
        Its outputs.
    """
    return getattr(model, "_original_forward", model)(batch)
