"""`make bench`: time and memory of ntk_gram against the contraction of torch.func's Jacobian, beside what is asked of them.

python -m benchmarks.kernel_speed                   # all cases (kernel_cases.py), about a quarter of an hour
python -m benchmarks.kernel_speed cnn transformer   # some of them
"""

import argparse
from collections.abc import Iterable, Sequence

import torch

from benchmarks.kernel_cases import BY_NAME, CASES, Case
from benchmarks.kernel_models import NUM_CLASSES
from benchmarks.kernel_rate import achieved_rate, matmul_rate, time_dominant_contraction
from benchmarks.measure import Usage, measure_side, time_sides

TIME_HEADER = ("case", "model", "n", "kind", "ours [s]", "contraction [s]", "faster", "asked", "met", "difference")
MEMORY_HEADER = ("case", "side", "n", "before [MiB]", "peak [MiB]", "growth [MiB]", "share", "asked", "met", "one call [s]")
RATE_HEADER = ("case", "parameter", "N", "achieved", "matmul", "share", "asked", "met", "shape of the matmul")
TIME_WIDTHS = (18, 20, 4, 8, 9, 16, 8, 7, 4, 11)
MEMORY_WIDTHS = (18, 12, 4, 13, 11, 13, 8, 8, 4, 13)
RATE_WIDTHS = (18, 34, 5, 9, 7, 6, 6, 4, 20)
ASKED_RATE = 0.6  # of a plain float32 product of the same shapes
GIB, MIB = 2**30, 2**20


def print_row(cells: Iterable[str], widths: Sequence[int]) -> None:
    """Print one row at once: two columns of words to the left, the rest to the right."""
    columns = enumerate(zip(cells, widths, strict=True))
    print(" ".join(f"{cell:<{width}}" if index < 2 else f"{cell:>{width}}" for index, (cell, width) in columns).rstrip(), flush=True)


def is_met(passes: bool) -> str:
    """Say whether what was asked is met."""
    return "yes" if passes else "NO"


def compare_times(cases: Sequence[Case]) -> None:
    """Print the table of times of the cases that have a contraction."""
    cases = [case for case in cases if case.asked_speed is not None]
    if not cases:
        return
    print(f"Time: median of 3 after one warm-up, sides alternating in one process, float32, {torch.get_num_threads()} threads.")
    print_row(TIME_HEADER, TIME_WIDTHS)
    for case in cases:
        assert case.asked_speed is not None
        times = time_sides(case)
        cells = (f"{times.ours:.4f}", f"{times.contraction:.4f}", f"{times.ratio:.2f}x", f">={case.asked_speed:g}x")
        met = is_met(times.ratio >= case.asked_speed)
        print_row((case.name, case.title, str(case.num_examples), case.outputs, *cells, met, f"{times.gap:.1e}"), TIME_WIDTHS)


def memory_row(case: Case, side: str, usage: Usage, verdict: tuple[str, str, str]) -> tuple[str, ...]:
    """Format a row of the table of memory; `verdict` is share, asked and met."""
    sizes = (f"{size / MIB:.1f}" for size in (usage.before, usage.peak, usage.growth))
    return (case.name, side, str(case.num_examples), *sizes, *verdict, f"{usage.seconds:.2f}")


def compare_memory(cases: Sequence[Case]) -> None:
    """Print the table of memory of the cases that ask for some; a case that cannot run says why."""
    cases = [case for case in cases if case.asked_share is not None or case.asked_peak is not None]
    if not cases:
        return
    print("\nMemory: resident memory before the call and its peak, one call in a fresh process per side, after one with 2 examples.")
    print_row(MEMORY_HEADER, MEMORY_WIDTHS)
    for case in cases:
        try:
            ours = measure_side(case, "ours")
        except RuntimeError as err:
            print(f"{case.name:<{MEMORY_WIDTHS[0]}} not run: {str(err).splitlines()[-1]}", flush=True)
            continue
        if case.asked_peak is not None:
            verdict = ("", f"<{case.asked_peak:g} GiB", is_met(ours.peak < case.asked_peak * GIB))
        if case.asked_share is not None:
            contraction = measure_side(case, "contraction")
            print_row(memory_row(case, "contraction", contraction, ("", "", "")), MEMORY_WIDTHS)
            share = ours.growth / contraction.growth
            verdict = (f"1/{1 / share:.1f}", f"<=1/{1 / case.asked_share:g}", is_met(share <= case.asked_share))
        print_row(memory_row(case, "ours", ours, verdict), MEMORY_WIDTHS)


def compare_rates(cases: Sequence[Case]) -> None:
    """Print, for the cases that N² p operations bound, the rate of the dominant contraction beside that of one plain matrix product.

    The dominant contraction is that of the largest weight whose gradients are formed and multiplied. Its operations are those done: the
    blocks on and below the diagonal of the product, and the forming of the gradients.
    """
    cases = [case for case in cases if case.rate]
    if not cases:
        return
    print(
        "\nRate [GFLOP/s] of the dominant contraction, forming the gradients included, and of torch's float32 product of the same shapes."
    )
    print_row(RATE_HEADER, RATE_WIDTHS)
    for case in cases:
        name, flops, seconds = time_dominant_contraction(case)
        rows, depth = case.num_examples * NUM_CLASSES, case.make(2)[0].get_parameter(name).numel()
        achieved, plain = achieved_rate(flops, seconds), matmul_rate(rows, depth, rows)
        share = achieved / plain
        cells = (str(rows), f"{achieved:.0f}", f"{plain:.0f}", f"{share:.2f}", f">={ASKED_RATE}", is_met(share >= ASKED_RATE))
        print_row((case.name, name, *cells, f"{rows} x {depth} x {rows}"), RATE_WIDTHS)


def main() -> None:
    """Print the tables of the named cases, of all if none is named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_speed", description=main.__doc__)
    parser.add_argument("cases", nargs="*", metavar="case", help=", ".join(BY_NAME))
    names = parser.parse_args().cases
    if unknown := [name for name in names if name not in BY_NAME]:
        parser.error(f"no case called {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    cases = [case for case in CASES if not names or case.name in names]
    compare_times(cases)
    compare_memory(cases)
    compare_rates(cases)


if __name__ == "__main__":
    main()
