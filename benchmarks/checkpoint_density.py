"""How good the advice on the number of checkpoints is: few snapshots of densely recorded runs, and how many it takes to close.

python -m benchmarks.checkpoint_density
"""

import math

import numpy as np
from torch import Tensor, nn

import ntkscope
from benchmarks.digits_runs import RunSpec, train
from benchmarks.interval_rule import errors
from ntkscope.dynamics.closure import ENERGY_LIMIT, GRADIENT_LIMIT
from ntkscope.dynamics.loss import bind_loss
from ntkscope.record.trace import Trace

NUM_EXAMPLES, DENSEST = 30, 129
COUNTS = (5, 9, 17, 33, 65)  # checkpoints that somebody has
TRIED = (3, 4, 5, 6, 7, 9, 11, 13, 15, 17, 20, 24, 28, 33, 40, 50, 65, 90, DENSEST)


def spec_of(name: str, optimizer: str, loss: str, lr: float, steps: int, activation: type[nn.Module]) -> RunSpec:
    """Make a run with evenly spaced snapshots."""
    return RunSpec(name, optimizer, loss, lr, steps, activation, [round(steps * k / (DENSEST - 1)) for k in range(DENSEST)])


SPECS = (
    spec_of("GD, cross-entropy, GELU", "gd", "cross_entropy", 0.2, 256, nn.GELU),
    spec_of("GD, cross-entropy, Tanh, to drift 12", "gd", "cross_entropy", 0.2, 640, nn.Tanh),
    spec_of("GD, cross-entropy, GELU, to drift 20", "gd", "cross_entropy", 0.2, 768, nn.GELU),
    spec_of("GD, squared, GELU", "gd", "squared", 0.4, 2048, nn.GELU),
    spec_of("GD, squared, ReLU", "gd", "squared", 0.2, 1024, nn.ReLU),
    spec_of("GD, cross-entropy, ReLU, to drift 20", "gd", "cross_entropy", 0.2, 768, nn.ReLU),
    spec_of("SGD, cross-entropy, GELU", "sgd", "cross_entropy", 0.2, 640, nn.GELU),
    spec_of("Adam on batches, cross-entropy, GELU", "adam", "cross_entropy", 1e-3, 384, nn.GELU),
)


def checkpoints(trace: Trace, count: int) -> Trace:
    """Keep so many snapshots, evenly spread, as if they were checkpoints: Hessians averaged anew along the longer way."""
    loss = bind_loss(trace.facts.loss, trace.probe["targets"], trace[0].outputs)
    kept = Trace(trace.facts, trace.probe, trace.source, is_from_checkpoints=True)
    previous: Tensor | None = None
    for position in np.unique(np.linspace(0, len(trace) - 1, count).round().astype(int)).tolist():
        snapshot = trace[position]
        mean = None if previous is None else loss.mean_hessian_blocks(previous, snapshot.outputs)
        kept.append(type(snapshot)(**{**vars(snapshot), "mean_hessian": mean}))
        previous = snapshot.outputs
    return kept


def smallest(trace: Trace) -> float:
    """Find from how many checkpoints on both errors stay within their limits."""
    found = math.inf
    for count in reversed(TRIED):
        energy, gradient = errors(checkpoints(trace, count), "halves")
        if energy > ENERGY_LIMIT or gradient > GRADIENT_LIMIT:
            return found
        found = count
    return found


def main() -> None:
    """Print one line a run and number of checkpoints; the window is the whole run."""
    for spec in SPECS:
        trace = train(spec, NUM_EXAMPLES, drift=None, max_overhead=1e9).trace
        truth = smallest(trace)
        for count in COUNTS:
            found = ntkscope.analyze(checkpoints(trace, count), window=(0, trace.steps[-1]), audit=False)
            density, closure = found.density, found.closure
            assert density is not None
            print(
                f"{spec.name:38s} {count:2d} checkpoints  energy {closure.energy_error:7.1%}  gradient {closure.gradient_error:7.1%} "
                f"(by spacing {density.gradient_spacing:6.1%}, rest {density.gradient_rest:6.1%})  "
                f"kernel step {density.largest_kernel_step:5.2f}  "
                f"verdict: {density.verdict}{'' if density.needed is None else f' {density.needed}'}  truth: {truth}",
                flush=True,
            )
            if density.verdict == "dense enough":
                break


if __name__ == "__main__":
    main()
