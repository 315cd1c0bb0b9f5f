"""Which score finds wrong labels after interpolation, without being told which they are: digits, 20 % wrong labels.

python -m benchmarks.noise_ranking [n, by default 100] [part of a run's name]
"""

import statistics
import sys

import torch
from torch import nn

import ntkscope
from benchmarks.digits_runs import RunSpec, train
from ntkscope.spectrum.examples import RECOMMENDED

SPECS = (
    RunSpec("GD, squared, ReLU", "gd", "squared", 0.2, 4000, nn.ReLU),
    RunSpec("GD, squared, GELU", "gd", "squared", 0.2, 4000),
    RunSpec("GD, cross-entropy, ReLU", "gd", "cross_entropy", 0.5, 6000, nn.ReLU),
    RunSpec("GD, cross-entropy, GELU", "gd", "cross_entropy", 0.5, 6000),
    RunSpec("Adam, squared, GELU", "adam", "squared", 1e-3, 6000),
    RunSpec("Adam, cross-entropy, GELU", "adam", "cross_entropy", 1e-3, 2500),
)
SHOWN = ("reservoir_energy", "half_time", "quarter_time", "loss", "margin", "area_under_margin", "self_influence")
SEEDS = (0, 1, 2)


def main() -> None:
    """Print, for every run: the scores in the default window, the final loss' score, and what the tool recommends."""
    num_examples = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    chosen = [spec for spec in SPECS if len(sys.argv) < 3 or sys.argv[2] in spec.name]
    for spec in chosen:
        recommended = []
        for seed in SEEDS:
            recorder = train(spec, num_examples, seed)
            trace = recorder.trace
            found = ntkscope.analyze(trace)
            scores = found.examples.auroc
            assert scores is not None
            last, targets = trace[-1], trace.probe["targets"]
            outputs = last.outputs.double()
            if spec.loss == "cross_entropy":
                losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
            else:
                losses = 0.5 * (outputs - targets).square().sum(dim=1)
            assert found.examples.is_noise is not None
            final = ntkscope.spectrum.examples.area_under_roc(losses, found.examples.is_noise)
            recommended.append(scores[RECOMMENDED])
            print(
                f"{spec.name:28s} seed {seed}  final loss {last.loss:.1e} ranks {final:.3f}  window 0:{found.window.stop_step}  "
                f"recommended {RECOMMENDED} {recommended[-1]:.3f}  | "
                + "  ".join(f"{name} {scores[name]:.3f}" for name in SHOWN)
                + f"  trustworthy {found.closure.trustworthy}",
                flush=True,
            )
        print(f"{spec.name:28s} mean of the recommended score {statistics.mean(recommended):.3f}", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
