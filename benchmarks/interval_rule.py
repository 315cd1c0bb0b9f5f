"""Error per snapshot of the trapezoid rule and of interpolated halves, on densely recorded runs that are thinned.

python -m benchmarks.interval_rule
"""

import math

import torch
from torch import Tensor, nn

from benchmarks.digits_runs import RunSpec, train
from ntkscope.course import Course, FactoredPiece, factor_leg
from ntkscope.dynamics.dissipation import take_step
from ntkscope.dynamics.interpolation import lagrange_weights
from ntkscope.dynamics.interval import factor_interval
from ntkscope.dynamics.loss import bind_loss
from ntkscope.record.trace import Trace

NUM_EXAMPLES = 50
STRIDES = (2, 4, 8, 16)
SPECS = (
    RunSpec("GD, squared, GELU, drift 1.9", "gd", "squared", 0.2, 1500),
    RunSpec("GD, cross-entropy, GELU, drift 7", "gd", "cross_entropy", 0.2, 150),
    RunSpec("GD, squared, ReLU", "gd", "squared", 0.2, 600, nn.ReLU),
    RunSpec("Adam on batches, squared, GELU", "adam", "squared", 1e-3, 400),
)
RULES = ("trapezoid", "halves", "magnus")


def log_steps(last: int, ratio: float) -> list[int]:
    """List steps, each `ratio` times the one before."""
    steps = [1]
    while steps[-1] < last:
        steps.append(min(last, max(steps[-1] + 1, math.floor(steps[-1] * ratio))))
    return steps


def thin(trace: Trace, stride: int) -> Trace:
    """Keep every so-manieth snapshot, and the last; Hessians averaged anew along the longer way."""
    loss = bind_loss(trace.facts.loss, trace.probe["targets"], trace[0].outputs)
    kept = sorted({*range(0, len(trace), stride), len(trace) - 1})
    thinned = Trace(trace.facts, trace.probe, trace.source)
    previous: Tensor | None = None
    for position in kept:
        snapshot = trace[position]
        mean = None if previous is None else loss.mean_hessian_blocks(previous, snapshot.outputs)
        thinned.append(type(snapshot)(**{**vars(snapshot), "mean_hessian": mean}))
        previous = snapshot.outputs
    return thinned


def magnus_pieces(course: Course, position: int) -> list[FactoredPiece] | None:
    """Take the commutator-free Magnus rule of fourth order on the same cubic; None at the ends, or where it is not positive."""
    if not course.start < position < course.stop - 1:
        return None
    moments = [course.moment(k) for k in range(position - 1, position + 3)]
    nodes = [moment.snapshot.time for moment in moments]
    start, elapsed = nodes[1], nodes[2] - nodes[1]
    offset = 3**0.5 / 6
    at = [lagrange_weights(nodes, start + elapsed * (0.5 + sign * offset)) for sign in (-1, 1)]
    loss = course.loss
    assert loss is not None
    mix = lambda tensors, weights: sum((w * t for t, w in zip(tensors, weights.tolist(), strict=True)), torch.zeros(()))  # ruff: ignore[lambda-assignment]
    hessians = [loss.hessian_blocks(mix([m.snapshot.outputs.double() for m in moments], weights)) for weights in at]
    pieces = []
    for near, far in ((0, 1), (1, 0)):
        weights = (0.5 + offset) * at[near] + (0.5 - offset) * at[far]
        blocks = (0.5 + offset) * hessians[near] + (0.5 - offset) * hessians[far]
        try:
            interval = factor_interval(mix([m.kernel for m in moments], weights), blocks, elapsed / 2, negative_tolerance=1e-3)
        except ValueError:
            return None
        pieces.append(FactoredPiece(interval, None, None, None))
    return pieces


def errors(trace: Trace, rule: str) -> tuple[float, float]:
    """Follow the gradient along a trace, and return energy and closure errors."""
    loss = bind_loss(trace.facts.loss, trace.probe["targets"], trace[0].outputs)
    course = Course(trace, 0, len(trace) - 1, loss=loss, is_refined=rule != "trapezoid")
    gradient, energy = course.moment(0).gradient, 0.0
    for position, leg in enumerate(course.legs()):
        pieces = (magnus_pieces(course, position) if rule == "magnus" and leg.halves else None) or factor_leg(leg)
        for piece in pieces:
            step = take_step(piece.interval, gradient)
            gradient, energy = step.gradient, energy + step.energy
    last, observed = course.read(len(trace) - 1), trace[0].loss - trace[-1].loss
    gap = float(torch.linalg.vector_norm(gradient - last.gradient) / torch.linalg.vector_norm(last.gradient))
    return abs(energy - observed) / abs(observed), gap


def main() -> None:
    """Print both errors for every run, spacing and rule."""
    for spec in SPECS:
        dense = RunSpec(spec.name, spec.optimizer, spec.loss, spec.lr, spec.steps, spec.activation, log_steps(spec.steps, 1.04))
        trace = train(dense, NUM_EXAMPLES, drift=None).trace
        for stride in STRIDES:
            thinned = thin(trace, stride)
            found = {rule: errors(thinned, rule) for rule in RULES}
            print(
                f"{spec.name:34s} {len(thinned):3d} snapshots  "
                + "  ".join(f"{rule}: energy {energy:.3%} closure {closure:.3%}" for rule, (energy, closure) in found.items())
                + f"  closure ratio trapezoid/halves {found['trapezoid'][1] / found['halves'][1]:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
