"""What training would do next from one bare checkpoint: a point is no trajectory, so a short one is made, and recorded as any other run."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from ntkscope._checks import InputError, check_finite
from ntkscope._types import ForwardFn, LossFn
from ntkscope.dynamics.interval import factor_interval
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.gram import ntk_gram
from ntkscope.kernel.model import forward_rows
from ntkscope.record.checkpoint import load_checkpoint
from ntkscope.record.probe import ProbeSet
from ntkscope.record.recorder import Recorder
from ntkscope.record.trace import Trace
from ntkscope.record.weights import load_weights, unwrap, weights_put_back

LOGGER = logging.getLogger("ntkscope")
UNBOUNDED = 1e9  # times the training time
STEP_SIZE = 0.1  # learning rate * sharpness; a step of plain descent then differs from gradient flow by at most 5 %


def continue_training(
    checkpoint: str | Path,
    model: nn.Module | None,
    data: tuple[Any, Tensor] | None,
    *,
    loss: str | LossFn | nn.Module | None,
    num_steps: int,
    query: tuple[Any, Tensor] | None = None,
    forward_fn: ForwardFn | None = None,
    allow_globals: Sequence[str] = (),
    unsafe: bool = False,
    max_memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Train on from a bare checkpoint by plain gradient descent, and record it.

    One checkpoint does not say how it was trained. What can be measured is what training on given data would learn next from there, and
    what it would merely store. All examples are one batch, layers act as in evaluation, and the learning rate is a tenth of 1 / sharpness
    at the start, so that the steps follow gradient flow.

    Args:
        checkpoint: A checkpoint with the weights.
        model: A model of that architecture; its own weights are put back afterwards.
        data: Inputs and targets to train on, which are also the probe.
        loss: As for `Recorder`.
        num_steps: Steps of gradient descent.
        query: Inputs and targets held out.
        forward_fn: The model's call.
        allow_globals: What the checkpoint may use beyond tensors and plain containers, see `load_checkpoint`.
        unsafe: Let the checkpoint run any code.
        max_memory: Bytes for the kernel computation.
        progress: Called with (steps done, steps in all).

    Returns:
        The record of these steps, for `analyze`.

    Raises:
        InputError: If something is not given, weights or data do not fit the model, there is nothing to learn, or training diverges.
    """
    if model is None or data is None or loss is None:
        raise InputError("Training on from a checkpoint needs all of `model`, `data` and `loss` (--model, --data, --loss).")
    if num_steps < 1:
        raise InputError(f"Continuing needs at least one step, got {num_steps}. 100 is usual (--continue 100).")
    found = unwrap(load_checkpoint(checkpoint, allow_globals=allow_globals, unsafe=unsafe), checkpoint, model=model)
    for sentence in found.sentences():
        LOGGER.info("%s", sentence)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    try:
        with weights_put_back(model), undisturbed(model):
            load_weights(model, found)
            # Recording may take what it takes: the run is made for it, and must not depend on how busy the machine is.
            recorder = Recorder(model, data, query, loss=loss, forward_fn=forward_fn, max_overhead=UNBOUNDED, max_memory=max_memory)
            rate = STEP_SIZE / _sharpness(model, recorder.probe, max_memory)
            optimizer = SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=rate)
            recorder.attach(optimizer)
            for step in range(num_steps):
                _step(model, recorder.probe, optimizer)
                if progress is not None:
                    progress(step + 1, num_steps)
            trace = recorder.trace
            recorder.detach(closing=False)
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
    note = (
        f"This run was made by ntkscope from {checkpoint}: {num_steps} steps of plain gradient descent on the given examples. It says what "
        "training on them would learn next from there, not how the checkpoint was trained."
    )
    trace.source = str(checkpoint)
    trace.facts = replace(trace.facts, notes=[note, *trace.facts.notes])
    return trace


def _step(model: nn.Module, probe: ProbeSet, optimizer: SGD) -> None:
    """Take one step of gradient descent on all examples."""
    optimizer.zero_grad()
    outputs = forward_rows(model, probe.inputs, probe.forward_fn)
    slope = probe.loss.gradient(outputs.detach().cpu())
    check_finite("The gradient of the loss", slope, "Training diverged: check the data, or give a smaller number of steps.")
    outputs.backward(slope.to(outputs))
    optimizer.step()


def _sharpness(model: nn.Module, probe: ProbeSet, max_memory: int | None) -> float:
    """Compute the largest eigenvalue of B^½ K B^½, the curvature that limits the learning rate."""
    kernel = ntk_gram(model, probe.inputs, forward_fn=probe.forward_fn, max_memory=max_memory, distributed=False).matrix
    with torch.no_grad():
        outputs = forward_rows(model, probe.inputs, probe.forward_fn).cpu()
    rates = factor_interval(kernel.cpu().double(), probe.loss.hessian_blocks(outputs), 1.0, negative_tolerance=1e-3).rates
    sharpness = float(rates.max()) if len(rates) else 0.0
    if not sharpness > 0:
        raise InputError(
            "Nothing can be learned from these examples at this checkpoint: the loss has no curvature along the kernel. "
            "Is the last layer trained (requires_grad), and do the targets fit the loss?"
        )
    return sharpness
