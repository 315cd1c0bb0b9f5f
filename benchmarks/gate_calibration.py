"""What gates remove, against chance, over alpha, batch size, beta1 and time: `python -m benchmarks.gate_calibration` (about 25 minutes).

AdamW on digits (n = 100, 20 % wrong labels, MLP 64-48-10, squared loss, 1,500 steps), audited counterfactually; then gated runs audited
as they are. Signal: omega > 1/2 in the window from step 0 to the audited step. z of precision (share of the removed motion in the
reservoir) and of advantage (recall minus collateral) against 100 permutations, mean over seeds with the smallest and largest.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch

import ntkscope
from benchmarks.gate_runs import Setting, audits, record

GATES = {
    "hard, alpha_U": {"gate": "hard", "alpha": "unbiased"},
    "hard, 1/4": {"gate": "hard", "alpha": 0.25},
    "hard, 1": {"gate": "hard", "alpha": 1.0},
    "soft, alpha_U = lambda": {"gate": "soft", "alpha": "unbiased"},
    "soft, 1": {"gate": "soft", "alpha": 1.0, "lambda_pop": 1.0},
}
BASE = Setting()
SETTINGS = {
    "base": (BASE, 5),
    "batch 5": (replace(BASE, batch_size=5), 3),
    "batch 80": (replace(BASE, batch_size=80), 3),
    "beta1 0": (replace(BASE, beta1=0.0), 3),
    "beta1 0.97": (replace(BASE, beta1=0.97), 3),
}
OWN = {
    "gated hard, 1": {"gate": "hard", "alpha": 1.0},
    "gated hard, alpha_U": {"gate": "hard", "alpha": "unbiased"},
}
NUM_AUDITED = 10
PHASES = ((3, 9), (10, 60), (61, 300), (301, 1500))

Rows = dict[str, list[tuple[int, int, float, float, float, float, float]]]


def measure(setting: Setting, own: dict | None) -> Rows:
    """One run: for every gate, rows of step, rank, open share, AUROC, precision, its z, z of the advantage."""
    torch.set_num_threads(1)
    recorder = record(setting, setting.num_steps, **({} if own is None else own))
    gates = GATES if own is None else {"own": {}}
    options = [ntkscope.AuditOptions(**gate, num_steps=NUM_AUDITED) for gate in gates.values()]  # pyright: ignore[reportArgumentType]
    found: Rows = {}
    for name, audit in zip(gates, audits(recorder, options), strict=True):
        found[name] = [
            (s.step, s.rank, s.open_share, s.figures["auroc"].observed, s.figures["precision"].observed, s.figures["precision"].z,
             s.figures["advantage"].z) for s in audit.steps
        ]  # fmt: skip
    return found


def show(name: str, runs: list[Rows]) -> None:
    """Print a table per gate."""
    for gate in runs[0]:
        print(f"\n### {name}: {gate} ({len(runs)} seeds)\n")
        print("| step | signal rank | open | AUROC | precision | z of precision (lowest, highest) | z of advantage (lowest, highest) |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for rows in zip(*(run[gate] for run in runs), strict=True):
            table = torch.tensor([row[1:] for row in rows], dtype=torch.float64)
            mean, low, high = table.nanmean(dim=0), table.amin(dim=0), table.amax(dim=0)
            print(
                f"| {rows[0][0]} | {mean[0]:.0f} | {mean[1]:.1%} | {mean[2]:.2f} | {mean[3]:.2g} "
                f"| {mean[4]:.1f} ({low[4]:.1f}, {high[4]:.1f}) | {mean[5]:.1f} ({low[5]:.1f}, {high[5]:.1f}) |", flush=True
            )  # fmt: skip


def summarize(jobs: dict[str, list[Rows]]) -> None:
    """Print one line per setting and gate: z of precision and of advantage, averaged over seeds and the steps of a phase."""
    print("\n### In short: z of precision / z of advantage\n")
    print("| setting | gate | seeds | " + " | ".join(f"steps {low} to {high}" for low, high in PHASES) + " |")
    print("| --- | --- | --- " + "| --- " * len(PHASES) + "|")
    for name, runs in jobs.items():
        for gate in runs[0]:
            cells = []
            for low, high in PHASES:
                rows = torch.tensor([row[5:] for run in runs for row in run[gate] if low <= row[0] <= high], dtype=torch.float64)
                cells.append(" / ".join(f"{value:.1f}" for value in rows.reshape(-1, 2).nanmean(dim=0).tolist()))
            print(f"| {name} | {gate} | {len(runs)} | {' | '.join(cells)} |")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print("AdamW on digits, counterfactual gates")
    with ProcessPoolExecutor(arguments.workers) as pool:
        jobs = {
            name: [pool.submit(measure, replace(setting, seed=seed), None) for seed in range(num)]
            for name, (setting, num) in SETTINGS.items()
        }
        jobs |= {name: [pool.submit(measure, replace(BASE, seed=seed), own) for seed in range(5)] for name, own in OWN.items()}
        found = {name: [future.result() for future in futures] for name, futures in jobs.items()}
    for name, runs in found.items():
        show(name, runs)
    summarize(found)


if __name__ == "__main__":
    main()
