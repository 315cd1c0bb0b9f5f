"""`make bench`: time and memory of ntk_gram against the contraction of torch.func's Jacobian, beside what is asked of them.

python -m benchmarks.kernel_speed                   # all cases (kernel_cases.py), about a quarter of an hour
python -m benchmarks.kernel_speed cnn transformer   # some of them
"""

import argparse
from collections.abc import Iterable, Sequence

import torch

from benchmarks.kernel_cases import BY_NAME, CASES, Case
from benchmarks.kernel_models import NUM_CLASSES
from benchmarks.measure import Times, Usage, achieved_rate, matmul_rate, measure_side, time_sides

TIME_HEADER = ("case", "model", "n", "kind", "ours [s]", "contraction [s]", "faster", "asked", "met", "difference")
MEMORY_HEADER = ("case", "side", "n", "before [MiB]", "peak [MiB]", "growth [MiB]", "share", "asked", "met", "one call [s]")
RATE_HEADER = ("case", "N", "parameters", "equivalent", "matmul", "share", "shape of the matmul")
TIME_WIDTHS = (18, 20, 4, 8, 9, 16, 8, 7, 4, 11)
MEMORY_WIDTHS = (18, 12, 4, 13, 11, 13, 8, 8, 4, 13)
RATE_WIDTHS = (18, 6, 11, 11, 7, 6, 20)
GIB, MIB = 2**30, 2**20


def print_row(cells: Iterable[str], widths: Sequence[int]) -> None:
    """Print one row at once: two columns of words to the left, the rest to the right."""
    columns = enumerate(zip(cells, widths, strict=True))
    print(" ".join(f"{cell:<{width}}" if index < 2 else f"{cell:>{width}}" for index, (cell, width) in columns).rstrip(), flush=True)


def is_met(passes: bool) -> str:
    """Say whether what was asked is met."""
    return "yes" if passes else "NO"


def compare_times(cases: Sequence[Case]) -> dict[str, Times]:
    """Print the table of times of the cases that have a contraction, and return them by case."""
    found: dict[str, Times] = {}
    cases = [case for case in cases if case.asked_speed is not None]
    if not cases:
        return found
    print(f"Time: median of 3 after one warm-up, sides alternating in one process, float32, {torch.get_num_threads()} threads.")
    print_row(TIME_HEADER, TIME_WIDTHS)
    for case in cases:
        assert case.asked_speed is not None
        times = found[case.name] = time_sides(case)
        cells = (f"{times.ours:.4f}", f"{times.contraction:.4f}", f"{times.ratio:.2f}x", f">={case.asked_speed:g}x")
        met = is_met(times.ratio >= case.asked_speed)
        print_row((case.name, case.title, str(case.num_examples), case.outputs, *cells, met, f"{times.gap:.1e}"), TIME_WIDTHS)
    return found


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


def compare_rates(cases: Sequence[Case], times: dict[str, Times]) -> None:
    """Print, for the cases that N² p operations bound, the whole call's rate beside that of one plain matrix product."""
    cases = [case for case in cases if case.rate]
    if not cases:
        return
    print("\nRate [GFLOP/s]: `equivalent` is 2 N² p operations over our whole call, derivatives included; `matmul` is torch's, float32.")
    print_row(RATE_HEADER, RATE_WIDTHS)
    for case in cases:
        model, _ = case.make(2)
        sizes = [parameter.numel() for parameter in model.parameters()]
        rows, depth = case.num_examples * NUM_CLASSES, max(sizes)
        achieved, plain = achieved_rate(2 * rows**2 * sum(sizes), times[case.name].ours), matmul_rate(rows, depth, rows)
        shape = f"{rows} x {depth} x {rows}"
        print_row((case.name, str(rows), str(sum(sizes)), f"{achieved:.0f}", f"{plain:.0f}", f"{achieved / plain:.2f}", shape), RATE_WIDTHS)


def main() -> None:
    """Print the tables of the named cases, of all if none is named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_speed", description=main.__doc__)
    parser.add_argument("cases", nargs="*", metavar="case", help=", ".join(BY_NAME))
    names = parser.parse_args().cases
    if unknown := [name for name in names if name not in BY_NAME]:
        parser.error(f"no case called {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    cases = [case for case in CASES if not names or case.name in names]
    times = compare_times(cases)
    compare_memory(cases)
    compare_rates(cases, times)


if __name__ == "__main__":
    main()
