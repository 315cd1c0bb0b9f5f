"""Which score finds wrong labels in windows that begin after most labels were learned: digits, 20 % wrong labels, n = 60.

python -m benchmarks.late_windows
"""

import statistics
from itertools import pairwise

import ntkscope
from benchmarks.digits_runs import RunSpec, train

SPECS = (
    RunSpec("GD, squared, GELU", "gd", "squared", 0.2, 800),
    RunSpec("GD, cross-entropy, GELU", "gd", "cross_entropy", 0.5, 800),
    RunSpec("Adam, cross-entropy, GELU", "adam", "cross_entropy", 1e-3, 800),
)
SEEDS = (0, 1, 2)
BOUNDS = (0, 50, 100, 200, 400, 800)
SHOWN = ("half_time", "reservoir_energy", "loss", "margin")


def main() -> None:
    """Print, for every run and window, the mean AUROC of the scores over seeds, and by what the tool ranks."""
    for spec in SPECS:
        traces = [train(spec, 60, seed).trace for seed in SEEDS]
        for window in pairwise(BOUNDS):
            found = [ntkscope.analyze(trace, window=window).examples for trace in traces]
            ranked = sorted({examples.ranked_by for examples in found})
            means = {name: statistics.mean(examples.auroc[name] for examples in found if examples.auroc) for name in SHOWN}
            print(
                f"{spec.name:28s} {window[0]:4d}:{window[1]:<4d} ranked by {' or '.join(ranked):18s} "
                + "  ".join(f"{name} {value:.3f}" for name, value in means.items()),
                flush=True,
            )


if __name__ == "__main__":
    main()
