"""The demo's figures: errors, ranking of planted labels, time and memory; and the default window against a later one."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ntkscope
from ntkscope.results import Analysis

SEEDS = (0, 1, 2)
CLOSURE_LIMIT = 0.25
SCORES = ("reservoir_energy", "loss", "margin", "area_under_margin", "self_influence", "quarter_time")
VARIANTS = (
    {"loss": "mse"},
    {"loss": "cross_entropy"},
    {"optimizer": "adamw"},
    {"optimizer": "adamw", "loss": "cross_entropy"},
    {"optimizer": "gated"},
    {"optimizer": "gated", "loss": "cross_entropy"},
)


def run_demo(folder: Path, **options: object) -> tuple[dict, float, float]:
    """Run `ntkscope demo` as a user would; return its summary, the seconds it took, and its peak memory in GiB."""
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-c", "from ntkscope_cli import main; main()", "demo", "--out", str(folder), *flags]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{' '.join(command)} failed with status {status}")
    return json.loads((folder / "summary.json").read_text(encoding="utf-8")), seconds, usage.ru_maxrss / 2**20


def line(label: str, summary: dict, seconds: float, peak: float) -> str:
    """Format one run."""
    scores = " ".join(f"{name} {summary['auroc'][name]:.3f}" for name in SCORES)
    window, errors = summary["window"], summary["energy_balance"]
    return (
        f"{label:32s} {seconds:4.0f} s  {peak:.2f} GiB  window 0:{window['stop_step']:<4d} snapshots {summary['num_snapshots']:3d}  "
        f"energy {errors['relative_error']:.4f}  closure {summary['gradient_closure']:.4f}  "
        f"trustworthy {summary['trustworthy']}  AUROC: {scores}"
    )


def half_window(analysis: Analysis) -> Analysis:
    """Analyze again, up to the last snapshot at which half of the directions (not a quarter) have ω > ½."""
    history = analysis.history
    qualifies = [
        step
        for step, eigvals, error in zip(history.steps, history.eigvals, history.gradient_error, strict=True)
        if step > 0 and float((eigvals > 0.5).double().mean()) <= 0.5 and float(error) <= CLOSURE_LIMIT
    ]
    return ntkscope.analyze(analysis.run.source, window=(0, qualifies[-1]))


def main() -> None:
    """Print all figures."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        print("Default demo (n = 100, C = 10, full-batch SGD, squared loss):")
        quarter, half = [], []
        for seed in SEEDS:
            summary, seconds, peak = run_demo(base / f"seed{seed}", seed=seed)
            print(line(f"  seed {seed}", summary, seconds, peak), flush=True)
            quarter.append(summary["auroc"]["reservoir_energy"])
            later = half_window(ntkscope.analyze(base / f"seed{seed}" / "checkpoint.pt"))
            scores = later.examples.auroc
            assert scores is not None  # the demo plants noise
            half.append(scores["reservoir_energy"])
            print(f"    until half of the directions have omega > 1/2: step {later.window.stop_step}, AUROC {half[-1]:.3f}", flush=True)
        print(f"  mean AUROC of reservoir energy: default window {statistics.mean(quarter):.3f}, half {statistics.mean(half):.3f}")
        print("Other losses and optimizers (seed 0):")
        for options in VARIANTS:
            label = "  " + " ".join(options.values())
            print(line(label, *run_demo(base / "-".join(options.values()), **options)), flush=True)
        print("Twice the examples (seed 0):")
        print(line("  n = 200", *run_demo(base / "n200", examples=200)), flush=True)
        print(line("  n = 200, cross_entropy", *run_demo(base / "n200ce", examples=200, loss="cross_entropy")), flush=True)


if __name__ == "__main__":
    main()
