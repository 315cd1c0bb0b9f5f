"""How accurate the operators are along real runs: digits, n = 200, 20 % wrong labels. `python -m benchmarks.trajectory_accuracy [n]`."""

import sys
import time

from torch import nn

import ntkscope
from benchmarks.digits_runs import RunSpec, train

SPECS = (
    RunSpec("GD, squared, GELU", "gd", "squared", 0.2, 1000),
    RunSpec("GD, squared, ReLU", "gd", "squared", 0.2, 1000, nn.ReLU),
    RunSpec("GD, cross-entropy, GELU", "gd", "cross_entropy", 0.2, 160),
    RunSpec("SGD, squared, GELU", "sgd", "squared", 0.05, 1200),
    RunSpec("SGD, cross-entropy, GELU", "sgd", "cross_entropy", 0.1, 200),
    RunSpec("Adam, squared, GELU", "adam", "squared", 5e-4, 400),
    RunSpec("Adam, cross-entropy, GELU", "adam", "cross_entropy", 5e-4, 300),
    RunSpec("GD past the edge of stability", "gd", "squared", 1.5, 300),
    RunSpec("SGD past drift 5", "sgd", "cross_entropy", 0.2, 400),
)
# Minibatch noise, which no spacing removes, is the larger error there: fewer snapshots, and an analysis of two minutes less each.
TOLERANCE = {"gd": 0.02, "sgd": 0.05, "adam": 0.05}


def main() -> None:
    """Print one line a run; the window is the whole run."""
    num_examples = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    chosen = [spec for spec in SPECS if len(sys.argv) < 3 or sys.argv[2] in spec.name]
    for spec in chosen:
        start = time.perf_counter()
        trace = train(spec, num_examples, tolerance=TOLERANCE[spec.optimizer]).trace
        recorded = time.perf_counter() - start
        found = ntkscope.analyze(trace, window=(0, trace.steps[-1]))
        closure, transfer, summary = found.closure, found.transfer, found.summary()
        assert transfer is not None
        print(
            f"{spec.name:34s} loss {summary['loss']['start']:.3f} -> {summary['loss']['end']:.4f}  snapshots {len(trace):3d}  "
            f"drift {found.drift.max:5.2f}  stability {found.stability:.2f}  energy {closure.energy_error:7.2%}  "
            f"closure {closure.gradient_error:7.2%} (of start {closure.gradient_error_initial:.2%})  "
            f"test corr {transfer.fit.correlation:.4f} error {transfer.fit.relative_error:.4f}  "
            + "  ".join(f"{name} {fit.relative_error:.3f}" for name, fit in transfer.baselines.items())
            + f"  predictor {transfer.predictor_fit.relative_error:.4f}  refined {summary['refined_share']:.2f}  "
            f"trustworthy {closure.trustworthy}  {recorded:.0f} + {time.perf_counter() - start - recorded:.0f} s",
            flush=True,
        )
        for cause in closure.causes:
            print(f"    cause: {cause}", flush=True)


if __name__ == "__main__":
    main()
