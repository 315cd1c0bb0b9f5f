"""`make bench`: how time and memory of ntk_gram grow with the number of examples, n; theory says at most n²."""

import numpy as np
import torch

from benchmarks.kernel_cases import BY_NAME, Case, prepare
from benchmarks.measure import measure_side, time_alternating

NAMES = ("mlp", "cnn")
NUM_EXAMPLES = (64, 128, 256, 512)


def fit_exponent(sizes: tuple[int, ...], values: list[float]) -> float:
    """Fit the exponent a of values ~ sizes^a, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def time_ours(case: Case, num_examples: int) -> float:
    """Measure the median seconds of 3 calls, after one to warm up."""
    function, inputs = prepare(case, "ours", num_examples)
    function(inputs)
    (seconds,) = time_alternating([lambda: function(inputs)], 3)
    return seconds


def main() -> None:
    """Print one table per model, and the exponents."""
    print(f"ntk_gram, full kernel, float32, {torch.get_num_threads()} threads: median of 3; memory from one call in a fresh process.")
    for name in NAMES:
        case = BY_NAME[name]
        print(f"\n{case.title}\n{'n':>5} {'time [s]':>10} {'before [MiB]':>13} {'peak [MiB]':>11} {'growth [MiB]':>13}")
        seconds, growths = [], []
        for num in NUM_EXAMPLES:
            seconds.append(time_ours(case, num))
            usage = measure_side(case, "ours", num)
            growths.append(usage.growth / 2**20)
            print(f"{num:5d} {seconds[-1]:10.4f} {usage.before / 2**20:13.1f} {usage.peak / 2**20:11.1f} {growths[-1]:13.1f}", flush=True)
        print(f"time ~ n^{fit_exponent(NUM_EXAMPLES, seconds):.2f}, growth of memory ~ n^{fit_exponent(NUM_EXAMPLES, growths):.2f}")


if __name__ == "__main__":
    main()
