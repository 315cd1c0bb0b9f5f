"""Opening the trace of a run, new or resumed."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ntkscope._checks import InputError, check_number
from ntkscope.kernel.model import kinked_kinds, train_only_kinds
from ntkscope.record import optimizers
from ntkscope.record.audit import mean_decay
from ntkscope.record.facts import RunFacts
from ntkscope.record.files import TraceWriter
from ntkscope.record.instrument import Instrument
from ntkscope.record.probe import ProbeSet
from ntkscope.record.trace import Trace, load_trace, trace_from_state


def check_sizes(probe: ProbeSet, *, training_size: int | None, steps_per_epoch: int | None) -> dict[str, int | None]:
    """Check what the user says of the training set.

    Args:
        probe: What is followed of it.
        training_size: Examples in the whole of it.
        steps_per_epoch: Optimizer steps that pass over it once.

    Returns:
        The two, by name.

    Raises:
        InputError: If one is too small.
    """
    if training_size is not None:
        check_number("training_size", training_size, low=probe.num_examples)
    if steps_per_epoch is not None:
        check_number("steps_per_epoch", steps_per_epoch, low=1)
    return {"training_size": training_size, "steps_per_epoch": steps_per_epoch}


def describe_run(instrument: Instrument, *, training_size: int | None, steps_per_epoch: int | None) -> RunFacts:
    """Collect what does not change along a run.

    Args:
        instrument: What measures it.
        training_size: Examples in the whole training set.
        steps_per_epoch: Optimizer steps that pass over it once.

    Returns:
        The facts.
    """
    probe, optimizer, parameters = instrument.probe, instrument.optimizer, instrument.routes.parameters
    return RunFacts(
        num_examples=probe.num_examples,
        num_classes=probe.num_classes,
        num_params=sum(parameter.numel() for parameter in parameters.values()),
        num_query=probe.num_query,
        loss=probe.loss.name,
        optimizer=optimizers.describe(optimizer),
        precond=_precond_kind(optimizer, instrument.precond),
        stability_edge=optimizers.stability_edge(optimizer),
        momentum_lag=optimizers.momentum_lag(optimizer),
        parameters=list(parameters),
        parameter_sizes=[parameter.numel() for parameter in parameters.values()],
        gate=str(optimizer.param_groups[0]["gate"]) if isinstance(optimizer, optimizers.GatedAdamW) else None,
        probe_hash=probe.hash,
        train_only=train_only_kinds(instrument.model),
        kinked=kinked_kinds(instrument.model, probe.few, probe.forward_fn),
        outputs=instrument.form,
        training_size=training_size,
        steps_per_epoch=steps_per_epoch,
        beta1=mean_decay(optimizer),
        alpha=optimizers.gate_alpha(optimizer),
        lambda_pop=float(optimizer.param_groups[0]["lambda_pop"]) if isinstance(optimizer, optimizers.GatedAdamW) else None,
    )


def open_trace(facts: RunFacts, probe: dict[str, Tensor], resumed: Trace | None, writer: TraceWriter | None, step: int) -> Trace:
    """Begin a trace, or go on with one; on disk as well.

    Args:
        facts: Of the run.
        probe: What is kept of the probe set.
        resumed: What was recorded before, if anything.
        writer: Of the trace folder; None in memory.
        step: Optimizer steps so far: what the folder holds beyond it is dropped.

    Returns:
        The trace.

    Raises:
        InputError: If what was recorded is of another model or optimizer, or the folder is taken.
    """
    if resumed is None:
        if writer is not None and (writer.folder / "manifest.json").exists():
            raise InputError(
                f"{writer.folder} holds a trace already. Choose another path, or resume it with load_state_dict() before attach()."
            )
        if writer is not None:
            writer.begin(facts, probe)
        return Trace(facts, probe, "recorder" if writer is None else str(writer.folder))
    if (resumed.facts.parameters, resumed.facts.precond) != (facts.parameters, facts.precond):
        raise InputError("The state was recorded with another model or optimizer. Resume with the same ones, or start a new trace.")
    resumed.facts = replace(facts, stopped=resumed.facts.stopped, notes=resumed.facts.notes)
    if writer is not None:
        writer.begin(resumed.facts, probe)
        writer.forget_after(step)
        on_disk = load_trace(writer.folder).entries
        for snapshot in list(resumed):
            resumed.entries[snapshot.step] = on_disk.get(snapshot.step) or writer.write(snapshot)
    return resumed


def resume_trace(state: Mapping[str, Any], probe: ProbeSet, outputs: str) -> Trace:
    """Rebuild the trace of a run to go on with.

    Args:
        state: A recorder's.
        probe: Of the new recorder.
        outputs: Its form of the kernel.

    Returns:
        The trace.

    Raises:
        InputError: If the state is damaged, or of another probe or form.
    """
    trace = trace_from_state(state, "the given state")
    if trace.facts.probe_hash != probe.hash:
        raise InputError("The state was recorded on another probe set (inputs or targets differ). Give the recorder the same probe.")
    if trace.facts.outputs != outputs:
        raise InputError(f"The state was recorded with outputs={trace.facts.outputs!r}, not {outputs!r}. Resume with the same.")
    return trace


def _precond_kind(optimizer: Optimizer, precond: optimizers.PrecondFn | None) -> str:
    """Name the kind of M."""
    if precond is not None:
        return "custom"
    if isinstance(optimizer, optimizers.GatedAdamW):
        return "gate"
    return "adam" if isinstance(optimizer, optimizers.ADAMS) else "identity"
