"""Two processes against one, each with one thread: `ntk_gram` shared by `torch.distributed` (gloo), and the largest difference.

python -m benchmarks.kernel_ranks                # starts torchrun with one rank and with two
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import ntkscope
from benchmarks.kernel_cases import BY_NAME
from benchmarks.measure import ROOT, time_call

CASE = "transformer"
NUM_EXAMPLES = 128  # twice the case's own: every rank differentiates all examples, only contractions are shared
REPEATS = 3
ASKED = 1.5


def run_ranks(num_ranks: int) -> float:
    """Time the case on some ranks of one thread each.

    Args:
        num_ranks: Processes.

    Returns:
        Median seconds, on rank 0.

    Raises:
        RuntimeError: If a rank failed; its messages are included.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [*launcher, str(Path(__file__)), "rank"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return float(done.stdout.split()[-1])


def time_rank() -> None:
    """Be one rank: time the call, check it against the kernel that this rank computes alone, and print the median on rank 0."""
    dist.init_process_group("gloo")
    model, inputs = BY_NAME[CASE].make(NUM_EXAMPLES)
    shared = ntkscope.ntk_gram(model, inputs).matrix
    seconds = statistics.median(time_call(lambda: ntkscope.ntk_gram(model, inputs)) for _ in range(REPEATS))
    if dist.get_rank() == 0:
        alone = ntkscope.ntk_gram(model, inputs, distributed=False).matrix
        gap = float((shared - alone).abs().max() / alone.abs().max())
        if not gap <= 1e-6:
            raise ArithmeticError(f"Two ranks and one disagree by {gap:.1e} of the largest entry (tolerance 1e-06, float32).")
        print(seconds)
    dist.barrier()  # no rank leaves while another still computes alone
    dist.destroy_process_group()


def main() -> None:
    """Print the comparison."""
    if sys.argv[1:] == ["rank"]:
        time_rank()
        return
    case = BY_NAME[CASE]
    one, two = run_ranks(1), run_ranks(2)
    ratio = one / two
    print(f"{case.title}, n = {NUM_EXAMPLES}, full, float32, one thread a rank, median of {REPEATS}, torch {torch.__version__}")
    print(f"  one rank {one:.3f} s, two ranks {two:.3f} s: {ratio:.2f}x (asked: >={ASKED}x, {'met' if ratio >= ASKED else 'NOT met'})")


if __name__ == "__main__":
    main()
