"""Does the gate help, and did the audit say so beforehand? `python -m benchmarks.gate_table` (about 15 minutes).

Digits (n = 100, squared loss, MLP 64-48-10, batches of 20) with 0, 10, 20 and 40 % wrong labels, 5 seeds. AdamW against GatedAdamW at the
paper's defaults (soft, alpha = lambda = 1) and at the unbiased rule (soft, alpha = lambda = 1/19). The audit looks at the AdamW run's
first quarter only; what happened is test accuracy on the 1,697 other digits at the end (and the best of 60 looks on the way: early
stopping by an oracle), and the share of wrong labels reproduced.
"""

import argparse
import itertools
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import torch
from sklearn.datasets import load_digits
from torch import nn

import ntkscope
from benchmarks.gate_runs import NUM_EXAMPLES, Setting, audits, make_optimizer, record, train
from ntkscope.experiments.demo import load_digits_data, make_model

NOISES, SEEDS, NUM_STEPS = (0.0, 0.1, 0.2, 0.4), range(5), 1500
GATES = {
    "paper": {"gate": "soft", "alpha": 1.0, "lambda_pop": 1.0},
    "unbiased": {"gate": "soft", "alpha": "unbiased", "lambda_pop": 1 / 19},
}


def measure(label_noise: float, seed: int) -> dict:
    """Accuracies and memorized shares of all optimizers, and the verdicts at a quarter of training."""
    torch.set_num_threads(1)
    setting = Setting(label_noise=label_noise, seed=seed, num_steps=NUM_STEPS)
    data = load_digits_data(NUM_EXAMPLES, label_noise, seed)
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    inputs = (pixels / 16).float()
    inputs = inputs - inputs.mean(dim=0)
    held_out = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[NUM_EXAMPLES:]
    found: dict = {}
    for name, gate in {"adamw": {}, **GATES}.items():
        model = make_model(seed)
        seen: list[float] = []

        def look(model: nn.Module = model, seen: list[float] = seen) -> None:
            with torch.no_grad():
                seen.append(float((model(inputs[held_out]).argmax(dim=1) == labels[held_out]).double().mean()))

        train(model, make_optimizer(model, setting, **gate), data, setting, NUM_STEPS, every=NUM_STEPS // 60, look=look)
        with torch.no_grad():
            memorized = (model(data.inputs).argmax(dim=1) == data.labels)[data.is_noise].double().mean()
        found[name] = (seen[-1], float(memorized), max(seen))
    options = [ntkscope.AuditOptions(**gate, num_steps=8) for gate in GATES.values()]  # pyright: ignore[reportArgumentType]
    recorder = record(setting, NUM_STEPS // 4)
    for name, audit in zip(GATES, audits(recorder, options), strict=True):
        found[f"verdict {name}"] = (audit.verdict.kind, audit.overall["advantage"].z, audit.overall["precision"].z)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(arguments.workers) as pool:
        cases = list(itertools.product(NOISES, SEEDS))
        results = dict(zip(cases, pool.map(measure, *zip(*cases, strict=True)), strict=True))
    print(
        "| noise | optimizer | test accuracy (5 seeds) | beats AdamW in | best on the way | beats AdamW's best in | wrong labels memorized "
        "| verdicts at 25 % | mean z of advantage |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for noise in NOISES:
        for name in ("adamw", *GATES):
            runs = [results[noise, seed] for seed in SEEDS]
            accuracy = torch.tensor([run[name][0] for run in runs])
            plain = torch.tensor([run["adamw"][0] for run in runs])
            memorized = torch.tensor([run[name][1] for run in runs]).nanmean()
            best, plain_best = (torch.tensor([run[key][2] for run in runs]) for key in (name, "adamw"))
            verdicts = z = wins = best_wins = "-"
            if name != "adamw":
                counted = Counter(run[f"verdict {name}"][0] for run in runs)
                verdicts = ", ".join(f"{kind} {count}" for kind, count in counted.most_common())
                z = f"{sum(run[f'verdict {name}'][1] for run in runs) / len(runs):.1f}"
                wins, best_wins = (f"{int((a > b).sum())} of {len(runs)}" for a, b in ((accuracy, plain), (best, plain_best)))
            print(
                f"| {noise:.0%} | {name} | {accuracy.mean():.3f} ± {accuracy.std():.3f} | {wins} | {best.mean():.3f} | {best_wins} "
                f"| {'-' if noise == 0 else f'{memorized:.0%}'} | {verdicts} | {z} |"
            )
    for name in GATES:
        pairs = [(run[f"verdict {name}"][1], run[name][0] - run["adamw"][0]) for run in results.values()]
        table = torch.tensor(pairs).T
        print(
            f"{name}: correlation of the audit's z with the gain in test accuracy over {len(pairs)} runs: {torch.corrcoef(table)[0, 1]:.2f}"
        )


if __name__ == "__main__":
    main()
