"""Does the jackknife's standard error match the spread over samples? Digits, one run per sample. `python -m benchmarks.uncertainty`."""

import statistics

import ntkscope
from benchmarks.digits_runs import RunSpec, train

NUM_EXAMPLES, NUM_SAMPLES, NUM_GROUPS, WINDOW = 50, 10, 10, (0, 150)
SPEC = RunSpec("GD, squared, GELU", "gd", "squared", 0.2, 150)


def main() -> None:
    """Print the spread of each statistic over samples, and the mean of its estimated standard errors."""
    values: dict[str, list[float]] = {"signal_rank": [], "effective_rank": [], "reservoir_share": []}
    errors: dict[str, list[float]] = {name: [] for name in values}
    for seed in range(NUM_SAMPLES):
        found = ntkscope.analyze(train(SPEC, NUM_EXAMPLES, seed), window=WINDOW, jackknife=NUM_GROUPS)
        assert found.uncertainty is not None
        share = next(row.reservoir_share for row in found.sensitivity.rows if row.rule == "half")
        for name, value in (
            ("signal_rank", float(found.channels.signal_rank)),
            ("effective_rank", found.spectrum.effective_rank),
            ("reservoir_share", share),
        ):
            values[name].append(value)
            errors[name].append(getattr(found.uncertainty, name))
    for name, seen in values.items():
        estimated = (sum(error**2 for error in errors[name]) / NUM_SAMPLES) ** 0.5
        print(
            f"{name:16s} mean {statistics.mean(seen):.3f}  spread over {NUM_SAMPLES} samples {statistics.stdev(seen):.3f}  "
            f"jackknife {estimated:.3f}  ratio {estimated / statistics.stdev(seen):.2f}"
        )


if __name__ == "__main__":
    main()
