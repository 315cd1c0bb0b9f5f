"""What `price_gram` says beforehand, beside what the call then takes: seconds, and memory in a fresh process."""

import torch

import ntkscope
from benchmarks.kernel_cases import BY_NAME
from benchmarks.kernel_speed import print_row
from benchmarks.measure import measure_side

CASES = ("mlp", "mlp-adam", "cnn", "transformer", "transformer-trace", "resnet18")
HEADER = ("case", "kind", "priced [s]", "took [s]", "ratio", "priced [MiB]", "took [MiB]", "ratio")
WIDTHS = (18, 8, 10, 9, 6, 12, 11, 6)
MIB = 2**20


def main() -> None:
    """Print the table."""
    print(f"Prices from a block of 16 examples; took: one call after a small one, {torch.get_num_threads()} threads.")
    print_row(HEADER, WIDTHS)
    for name in CASES:
        case = BY_NAME[name]
        model, inputs = case.make(case.num_examples)
        price, _ = ntkscope.price_gram(model, inputs, outputs=case.outputs, weighted=case.weighted)
        usage = measure_side(case, "ours")
        took = usage.seconds
        print_row(
            (
                name,
                case.outputs,
                f"{price.seconds:.3f}",
                f"{took:.3f}",
                f"{price.seconds / took:.2f}",
                f"{price.peak_bytes / MIB:.0f}",
                f"{usage.growth / MIB:.0f}",
                f"{price.peak_bytes / max(1, usage.growth):.2f}",
            ),
            WIDTHS,
        )


if __name__ == "__main__":
    main()
