"""A trajectory from bare checkpoints of one run: kernels are computed now, time comes from what the files say."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ntkscope._checks import InputError
from ntkscope._types import ForwardFn, LossFn
from ntkscope.kernel.blocks import DEFAULT_MEMORY, blockwise_gram
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.coverage import probe_routes
from ntkscope.kernel.model import forward_rows, kinked_kinds, select_parameters, train_only_kinds
from ntkscope.record.checkpoint import find_weights, load_checkpoint, stored_learning_rate, stored_step
from ntkscope.record.facts import RunFacts
from ntkscope.record.probe import ProbeSet, make_probe
from ntkscope.record.snapshot import Snapshot, pack_upper
from ntkscope.record.trace import Trace


def trace_from_checkpoints(
    paths: Sequence[str | Path],
    model: nn.Module,
    data: tuple[Any, Tensor],
    *,
    loss: str | LossFn,
    query: tuple[Any, Tensor] | None = None,
    times: Sequence[float] | None = None,
    forward_fn: ForwardFn | None = None,
    max_memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Build a trace from checkpoints of a run that was not recorded, as if plain gradient descent had made it (M = I).

    Args:
        paths: Two or more files, in any order.
        model: A model of the same architecture; its weights are put back afterwards.
        data: Inputs and targets of training examples to follow.
        loss: The loss of the run.
        query: Inputs and targets held out.
        times: Optimizer time of every file; else stored step times stored learning rate.
        forward_fn: The model's call.
        max_memory: Bytes for the kernel computation.
        progress: Called with (files done, files in all).

    Returns:
        The trace.

    Raises:
        InputError: If there are fewer than two files, their weights do not fit the model, or nothing says when they were saved.
    """
    files = [Path(path) for path in paths]
    if len(files) < 2:
        raise InputError(
            f"One bare checkpoint is a point, not a trajectory: give two or more of the same run (got {len(files)}), "
            "or record the run with ntkscope.Recorder."
        )
    if times is not None and len(times) != len(files):
        raise InputError(f"--times needs one time per checkpoint: {len(files)} files, {len(times)} times.")
    contents = [load_checkpoint(path) for path in files]
    moments = [
        _moment(content, path, None if times is None else times[k], k)
        for k, (content, path) in enumerate(zip(contents, files, strict=True))
    ]
    order = sorted(range(len(files)), key=lambda k: moments[k])
    own = {name: value.detach().clone() for name, value in model.state_dict().items()}
    probe = make_probe(model, data, query, loss=loss, forward_fn=forward_fn, clean_targets=None)
    parameters = select_parameters(model)
    facts = RunFacts(
        num_examples=probe.num_examples,
        num_classes=probe.num_classes,
        num_params=sum(parameter.numel() for parameter in parameters.values()),
        num_query=probe.num_query,
        loss=probe.loss.name,
        optimizer=f"unknown ({len(files)} bare checkpoints; plain gradient descent assumed)",
        precond="identity",
        stability_edge=None,
        momentum_lag=0.0,
        parameters=list(parameters),
        parameter_sizes=[parameter.numel() for parameter in parameters.values()],
        gate=None,
        probe_hash=probe.hash,
        train_only=train_only_kinds(model),
        kinked=kinked_kinds(model, probe.few, probe.forward_fn),
    )
    trace = Trace(facts, probe.tensors(), ", ".join(str(files[k]) for k in order))
    previous: Tensor | None = None
    try:
        for done, k in enumerate(order):
            load_weights(model, find_weights(contents[k], files[k]), files[k])
            time, step = moments[k]
            snapshot = _measure(model, probe, step, time, previous, DEFAULT_MEMORY if max_memory is None else max_memory)
            trace.append(snapshot)
            previous = snapshot.outputs
            if progress is not None:
                progress(done + 1, len(order))
    finally:
        model.load_state_dict(own)
    return trace


def _moment(content: Any, path: Path, time: float | None, position: int) -> tuple[float, int]:
    """Find time and step of a checkpoint."""
    step, rate = stored_step(content), stored_learning_rate(content)
    if time is not None:
        return float(time), position if step is None else step
    if step is None or rate is None:
        missing = " and ".join(name for name, value in (("step", step), ("learning rate", rate)) if value is None)
        raise InputError(
            f"{path} does not say its {missing}, so its optimizer time is unknown. Give --times t1,t2,... (learning rate * step)."
        )
    return step * rate, step


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load weights, saying what does not fit.

    Args:
        model: Any module.
        weights: Its state dict.
        path: Where they come from.

    Raises:
        InputError: If entries are missing, extra, or of another shape.
    """
    expected = model.state_dict()
    missing, extra = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    shapes = [name for name in expected if name in weights and expected[name].shape != weights[name].shape]
    if missing or extra or shapes:
        parts = [
            f"{kind} {', '.join(names)}" for kind, names in (("missing", missing), ("extra", extra), ("of another shape", shapes)) if names
        ]
        raise InputError(f"The weights in {path} do not fit the model: {'; '.join(parts)}. Is --model the model that was trained?")
    model.load_state_dict(weights)


def _measure(model: nn.Module, probe: ProbeSet, step: int, time: float, previous: Tensor | None, budget: int) -> Snapshot:
    """Take a snapshot of the model as it is."""
    routes, coverage = probe_routes(model, probe.inputs, forward_fn=probe.forward_fn)

    def kernel(inputs: Any, other: Any = None) -> Tensor:
        return blockwise_gram(
            model, inputs, other, routes=routes, coverage=coverage, outputs="full", precond=None, budget=budget, progress=None
        ).cpu()

    with undisturbed(model):
        with torch.no_grad():
            outputs = forward_rows(model, probe.inputs, probe.forward_fn).cpu()
            query = None if probe.query_inputs is None else forward_rows(model, probe.query_inputs, probe.forward_fn).cpu()
        return Snapshot(
            step=step,
            time=time,
            learning_rates=(),
            loss=probe.loss.value(outputs),
            outputs=outputs,
            gradient=probe.loss.gradient(outputs),
            hessian=probe.loss.hessian_blocks(outputs),
            mean_hessian=None if previous is None else probe.loss.mean_hessian_blocks(previous, outputs),
            kernel_upper=pack_upper(kernel(probe.inputs)),
            query_outputs=query,
            cross_kernel=None if probe.query_inputs is None else kernel(probe.query_inputs, probe.inputs),
            probe_hash=probe.hash,
        )
