"""What an analysis concludes beside the spectrum: each function takes the walk and gives one result, or the reason why not."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope.course import Course, Leg, factor_leg
from ntkscope.dynamics.agreement import GradientAgreement, gradient_agreement
from ntkscope.dynamics.closure import ENERGY_LIMIT, GRADIENT_LIMIT, LOSS_FLOOR, Closure
from ntkscope.dynamics.density import MIN_SNAPSHOTS, Density, Pair, Stage, judge_density, spacing_error
from ntkscope.dynamics.diffusion import MIN_STEPS, Diffusion, measure_diffusion
from ntkscope.dynamics.dissipation import Dissipation
from ntkscope.dynamics.drift import Drift, frozen_query_motion
from ntkscope.dynamics.loss import ProbeLoss
from ntkscope.dynamics.transfer import Fit, Transfer, best_linear_predictor, fit_motion, kernel_regression
from ntkscope.record.snapshot import Snapshot
from ntkscope.record.trace import Trace
from ntkscope.spectrum.eigen import Spectrum, whiten_field
from ntkscope.spectrum.examples import class_labels
from ntkscope.spectrum.null import Null, shuffled_null
from ntkscope.spectrum.whitening import Whitening
from ntkscope.walk import Row, Walk

NUM_SHUFFLES = 200
NUM_DIFFUSING = 5  # leading directions whose drift and diffusion are measured
CONSTANT_HESSIAN = 1e-9  # relative change of B below which it counts as constant


def query_motion(first: Snapshot, last: Snapshot) -> Float[Tensor, "queries classes"] | None:
    """Compute how far the query outputs moved between two snapshots; None without a query set."""
    if first.query_outputs is None or last.query_outputs is None:
        return None
    return last.query_outputs.double() - first.query_outputs.double()


def has_query_path(last: Snapshot) -> bool:
    """Say whether all that moves the query outputs is recorded: schema 1 kept no weight decay of theirs."""
    return last.forcing is None or last.query_forcing is not None


def motions_by_example(
    state: Dissipation, whitening: Whitening, gradient: Float[Tensor, "outputs ..."], num_examples: int
) -> Float[Tensor, "modes examples ..."]:
    """Compute the whitened train motion that each example's own gradient causes, times n: their mean is the whole motion."""
    if gradient.ndim == 1:
        caused = (state.displacement * gradient).view(len(gradient), num_examples, -1).sum(dim=2)
        return whitening.motion(num_examples * caused)
    # Trace form: example a's gradient is row a, and moves every class by the same kernel.
    caused = num_examples * state.displacement[:, :, None] * gradient[None]
    return whitening.motion(caused.flatten(1)).view(-1, *caused.shape[1:])


def target_kernel(trace: Trace) -> Float[Tensor, "examples examples"] | None:
    """Compute y yᵀ, labels one-hot; None where targets are neither labels nor numbers."""
    targets, num_classes = trace.probe["targets"], trace.facts.num_classes
    labels = class_labels(targets, num_classes)
    if labels is not None and targets.ndim == 1:
        if not bool(((labels >= 0) & (labels < num_classes)).all()):
            return None  # ignored labels have no place in y
        table = torch.nn.functional.one_hot(labels, num_classes).double()
    elif targets.is_floating_point() and targets.numel():
        table = targets.double().reshape(len(targets), -1)
    else:
        return None
    return table @ table.T


def drift_of(walk: Walk, rows: list[Row], trace: Trace) -> Drift:
    """Collect how the kernel moved."""

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(row, name) for row in walk.history], dtype=torch.float64)

    return Drift(
        kernel="plain" if trace.facts.precond == "identity" else "realized",
        relative=column("kernel_drift"),
        max=max(row.kernel_drift for row in rows),
        final=rows[-1].kernel_drift,
        velocity=column("velocity"),
        alignment_start=column("alignment_start"),
        alignment_targets=column("alignment_targets"),
    )


def kernel_action(rows: list[Row]) -> float:
    """Integrate λ_max(K) over the window, by the larger end of every interval."""
    return sum(max(a.largest_eigval, b.largest_eigval) * (b.snapshot.time - a.snapshot.time) for a, b in pairwise(rows))


def agreement_of(rows: list[Row]) -> GradientAgreement | None:
    """Compare the gradients that the optimizer received with those of the loss on the probe; None where no step was audited."""
    audits = [row.snapshot.gradient_audit for row in rows if row.snapshot.gradient_audit is not None]
    table = torch.cat(audits) if audits else torch.zeros(0, 4, dtype=torch.float64)
    return gradient_agreement(table) if len(table) else None


def abstention(closure: Closure, stability: float) -> str:
    """Say why suspicious labels should not be named; empty where nothing speaks against it."""
    if closure.trustworthy:
        return ""
    return (
        f"the closure errors are too large (energy {closure.energy_error:.1%}, limit {ENERGY_LIMIT:.0%}; gradient "
        f"{closure.gradient_error:.1%}, limit {GRADIENT_LIMIT:.0%})" + (", past the edge of stability" if stability > 1 else "")
    )


def is_hessian_constant(rows: list[Row]) -> bool:
    """Say whether the loss Hessian is the same at both ends of the window, as that of a squared loss is."""
    first, last = rows[0].snapshot.hessian, rows[-1].snapshot.hessian
    return float(torch.linalg.vector_norm(last - first)) <= CONSTANT_HESSIAN * float(torch.linalg.vector_norm(first))


def transfer_of(walk: Walk, rows: list[Row], state: Dissipation, trace: Trace, bound: ProbeLoss | None) -> tuple[Transfer | None, str]:
    """Compare predicted with observed test motion, the operators' beside simpler predictions."""
    first, last, form = rows[0].snapshot, rows[-1].snapshot, walk.form
    observed = query_motion(first, last)
    if observed is None or state.transfer is None or state.query_motion is None or walk.first.cross is None:
        return None, "no query set was recorded: give the Recorder `query=(inputs, targets)`, or --query with bare checkpoints"
    if not bool(observed.any()):
        return None, "the query outputs did not move"
    if not has_query_path(last):
        return None, "weight decay acts, and its motion of the query outputs is not in this record: record the run again with this version"
    precision = len(walk.first.kernel) * torch.finfo(first.kernel_upper.dtype).eps
    gramian = None if is_hessian_constant(rows) else state.gramian
    predictor, rank = best_linear_predictor(state.displacement, state.transfer, gramian=gramian, relative_tolerance=precision)
    moved = form.field(last.outputs.double() - first.outputs.double())
    baselines, missing = _baselines(walk, rows, state, trace, bound, moved, observed, precision)
    return (
        Transfer(
            predicted=state.query_motion.reshape(observed.shape),
            observed=observed,
            fit=fit_motion(state.query_motion, observed),
            predictor=predictor,
            predictor_rank=rank,
            predictor_fit=fit_motion((predictor @ moved.reshape(len(moved), -1)), observed),
            baselines=baselines,
            missing=missing,
        ),
        "",
    )


def _baselines(
    walk: Walk,
    rows: list[Row],
    state: Dissipation,
    trace: Trace,
    bound: ProbeLoss | None,
    moved: Tensor,
    observed: Tensor,
    precision: float,
) -> tuple[dict[str, Fit], dict[str, str]]:
    """Predict the test motion in simpler ways."""
    first, last = rows[0].snapshot, rows[-1].snapshot
    baselines: dict[str, Fit] = {}
    missing: dict[str, str] = {}
    cross = walk.first.cross
    assert cross is not None
    if trace.facts.precond != "identity":
        missing["frozen_kernel"] = "the optimizer's preconditioner moves by itself, so a frozen kernel is no baseline"
    elif bound is None:
        missing["frozen_kernel"] = f"the loss {trace.facts.loss!r} cannot be rebuilt from its name; give `loss=` to analyze"
    else:
        baselines["frozen_kernel"] = fit_motion(
            frozen_query_motion(walk.first.kernel, cross, first.outputs, bound.gradient, state.elapsed), observed
        )
    if first.query_linearized is not None and last.query_linearized is not None:
        baselines["linearized"] = fit_motion(last.query_linearized.double() - first.query_linearized.double(), observed)
    else:
        missing["linearized"] = "the recorder kept no weights of step 0"
    end = walk.course.read(walk.course.start + len(rows) - 1)
    for name, kernel, across in (("regression_start", walk.first.kernel, cross), ("regression_end", end.kernel, end.cross)):
        assert across is not None
        baselines[name] = fit_motion(kernel_regression(kernel, across, moved, relative_tolerance=precision), observed)
    return baselines, missing


def clean_gradient(trace: Trace, walk: Walk, bound: ProbeLoss | None) -> Float[Tensor, "outputs ..."] | None:
    """Compute the output gradient at the start for the clean targets; None where they or the loss are unknown."""
    clean = trace.probe.get("clean_targets")
    if clean is None or bound is None:
        return None
    return walk.form.field(bound.rebind(clean).gradient(walk.first.snapshot.outputs))


def null_of(trace: Trace, walk: Walk, spectrum: Spectrum, bound: ProbeLoss | None) -> Null | None:
    """Compare the signal share with that of shuffled labels; None where the loss is unknown."""
    if bound is None:
        return None
    generator = torch.Generator().manual_seed(0)
    targets, outputs = trace.probe["targets"], walk.first.snapshot.outputs
    residuals = []
    for _ in range(NUM_SHUFFLES):
        order = torch.randperm(len(targets), generator=generator)
        residuals.append(whiten_field(walk.whitening, walk.form.field(bound.rebind(targets[order]).gradient(outputs))))
    return shuffled_null(spectrum, residuals)


def diffusion_of(walk: Walk, stop: int, spectrum: Spectrum, bound: ProbeLoss | None) -> tuple[Diffusion | None, str]:
    """Measure drift and diffusion along the directions that removed the most loss."""
    rows, start = walk.history, walk.first.snapshot
    if all(row.snapshot.step_outputs is None for row in rows):
        return None, "outputs were not followed at every step: give the Recorder `every_step=True`"
    if bound is None:
        return None, "the loss cannot be rebuilt from its name; give `loss=` to analyze"
    leading = (spectrum.eigvals * spectrum.residual_energy).argsort(descending=True)[:NUM_DIFFUSING]
    # Motions carry B^{+½}: a direction v of R reads a motion d as vᵀ B^½ d.
    readers = walk.whitening.gradient_back(spectrum.eigvecs[:, leading]).T  # vᵀ B^½, [modes, outputs]
    classes = (spectrum.eigvecs[:, leading].T @ spectrum.residual).reshape(len(leading), -1)
    norms = torch.linalg.vector_norm(classes, dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    classes = classes / norms  # trace form: along the residual's own classes

    def read(rows_of: Tensor, field: Tensor) -> Tensor:
        return ((rows_of @ field.reshape(len(field), -1)) * classes).sum(dim=1)

    mean, centered, elapsed = [], [], []
    previous, time = start.outputs.double(), start.time
    begin, action = start.time, readers @ walk.first.kernel
    for position in range(1, stop + 1):
        snapshot = rows[position].snapshot
        outputs, times = snapshot.step_outputs, snapshot.step_times
        if outputs is None or times is None or len(outputs) != snapshot.step - rows[position - 1].snapshot.step:
            break
        next_action = readers @ walk.course.read(walk.course.start + position).kernel
        length = snapshot.time - begin
        for current, moment in zip(outputs.double(), times.tolist(), strict=True):
            step, share = moment - time, (time - begin) / length if length > 0 else 0.0
            # K moves from snapshot to snapshot, linearly to first order.
            drift = -step * read(torch.lerp(action, next_action, share), walk.form.field(bound.gradient(previous)))
            mean.append(drift)
            centered.append(read(readers, walk.form.field(current - previous)) - drift)
            elapsed.append(step)
            previous, time = current, moment
        begin, action = snapshot.time, next_action
    if len(elapsed) < MIN_STEPS:
        return None, f"only {len(elapsed)} steps of the window were followed; {MIN_STEPS} are needed"
    epoch = walk.course.trace.facts.steps_per_epoch
    moved = measure_diffusion(
        torch.stack(mean),
        torch.stack(centered),
        torch.tensor(elapsed, dtype=torch.float64),
        steps_per_epoch=epoch,
        first_epoch=0 if epoch is None else -start.step % epoch,
    )
    return moved, ""


def density_of(walk: Walk, stop: int, *, device: torch.device | str | None) -> Density | None:
    """Say whether bare checkpoints are dense enough; where the window holds too few, those of the whole walk. None for a record."""
    trace, rows = walk.course.trace, walk.history
    if not trace.is_from_checkpoints:
        return None
    rows = rows if stop + 1 < MIN_SNAPSHOTS else rows[: stop + 1]
    first, last = rows[0].snapshot, rows[-1].snapshot
    gradient, decrease = walk.form.field(last.gradient), first.loss - last.loss
    energy_error = abs(rows[-1].state_energy - decrease) / max(abs(decrease), LOSS_FLOOR * abs(first.loss), torch.finfo(torch.float64).tiny)
    found = None
    if len(rows) >= MIN_SNAPSHOTS:
        course = Course(trace, walk.course.start, walk.course.start + len(rows) - 1, loss=None)
        found = spacing_error(_pairs(course, device), last_gradient=gradient, decrease=decrease)
    return judge_density(
        found,
        is_close=energy_error <= ENERGY_LIMIT and rows[-1].gradient_error <= GRADIENT_LIMIT,
        last_gradient=gradient,
        decrease=decrease,
        steps=(first.step, last.step),
        num_snapshots=len(rows),
        largest_kernel_step=max(row.kernel_step for row in rows),
    )


def _pairs(course: Course, device: torch.device | str | None) -> Iterator[Pair]:
    """Factor the intervals of a course two by two."""

    def stage(leg: Leg) -> Stage:
        (piece,) = factor_leg(leg, device=device)
        return Stage(piece.interval, piece.forcing, leg.start.gradient)

    before: Leg | None = None
    for position, leg in enumerate(course.legs()):
        is_overlapping = position % 2 == 0 and course.start + position + 1 == course.stop
        if before is not None and (position % 2 or is_overlapping):
            begin = course.start + position - 1
            yield Pair(stage(before), stage(leg), stage(course.span(before.start, begin, begin + 2)), is_overlapping)
        before = leg
