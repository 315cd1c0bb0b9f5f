"""Can training be skipped? Errors of jumps from four moments of a run, by how far they go. `python -m benchmarks.jumps`."""

import ntkscope
from benchmarks.digits_runs import RunSpec, train

NUM_EXAMPLES = 60
SPECS = (
    RunSpec("GD, squared, GELU", "gd", "squared", 0.2, 800),
    RunSpec("GD, cross-entropy, GELU", "gd", "cross_entropy", 0.2, 250),
    RunSpec("SGD, squared, GELU", "sgd", "squared", 0.05, 1200),
)
SHOWN = 5  # horizons printed per start


def main() -> None:
    """Print one line per start."""
    for spec in SPECS:
        study = ntkscope.jump_study(train(spec, NUM_EXAMPLES))
        for one in study.jumps:
            count = len(one.steps)
            chosen = sorted({round(k * (count - 1) / max(1, SHOWN - 1)) for k in range(SHOWN)})
            assert one.frozen_query is not None
            assert one.extrapolated_query is not None
            cells = [
                f"to {one.steps[k]}: {one.frozen[k]:.2f}/{one.extrapolated[k]:.2f} "
                f"(test {one.frozen_query[k]:.2f}/{one.extrapolated_query[k]:.2f})"
                for k in chosen
            ]
            print(f"{spec.name:26s} from step {one.start_step:4d}, frozen/extrapolated  " + "  ".join(cells), flush=True)
        print(
            f"{spec.name:26s} steps predicted to 10 %: frozen {study.reach()}, extrapolated {study.reach(kind='extrapolated')}", flush=True
        )


if __name__ == "__main__":
    main()
