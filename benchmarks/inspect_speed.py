"""How long `ntkscope inspect` takes for checkpoints of 5 GiB, and how much memory; run as `python -m benchmarks.inspect_speed`.

The goal is under 2 s and 500 MB. What importing torch takes is measured beside it: no file can be inspected in less. This process stays
small, because the peak of a child's memory counts what it had of its parent's.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

GIB = 2**30
SIZE = 5 * GIB
REPEATS = 5
# The last two cannot be mapped: they are read into memory, and have no goal.
FILES = (("torch", "checkpoint.pt"), ("safetensors", "model.safetensors"), ("legacy", "before-1.6.pt"), ("distributed", "distributed"))
WRITE = """
import sys, torch
from safetensors.torch import save_file
kind, path, num = sys.argv[1], sys.argv[2], int(sys.argv[3])
shape = (1024, num // 16 // 3 // 1024)
parts = {f"layers.{k}.weight": torch.zeros(shape) for k in range(4)}
if kind == "safetensors":
    save_file({f"{copy}.{name}": torch.zeros(shape) for copy in range(3) for name in parts}, path)
else:
    state = {k: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)} for k in range(4)}
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "params": [0, 1, 2, 3]}
    content = {"model": {f"module.{k}": v for k, v in parts.items()}, "optimizer": {"state": state, "param_groups": [group]}}
    if kind == "distributed":
        from torch.distributed.checkpoint import save
        save(content, checkpoint_id=path, no_dist=True)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
"""


def timed(*command: str) -> tuple[float, float]:
    """Run a command.

    Args:
        command: Its words.

    Returns:
        Seconds, and the peak of its resident memory in MB.

    Raises:
        RuntimeError: If it fails.
    """
    start = time.perf_counter()
    # Compiled code is kept between runs, as it is where nobody forbids it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} failed with exit code {child.returncode}. Run it alone to see why.")
    return seconds, usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    """Write a file of every kind, inspect it, and print a table."""
    ntkscope = str(Path(sys.executable).with_name("ntkscope"))
    print(f"{'':28s} {'seconds':>8s} {'peak MB':>8s}   goal: 2 s, 500 MB", flush=True)
    imports = [timed(sys.executable, "-c", "import torch") for _ in range(REPEATS)]
    print(f"{'import torch':28s} {statistics.median(s for s, _ in imports):8.2f} {max(m for _, m in imports):8.0f}", flush=True)
    with TemporaryDirectory() as folder:
        for kind, name in FILES:
            path = Path(folder) / name
            subprocess.run([sys.executable, "-c", WRITE, kind, str(path), str(SIZE)], check=True)
            timed(ntkscope, "inspect", str(path))  # compiles what was not
            runs = [timed(ntkscope, "inspect", str(path)) for _ in range(REPEATS)]
            title = f"{name}, {SIZE / GIB:.1f} GiB"
            print(f"{title:28s} {statistics.median(s for s, _ in runs):8.2f} {max(m for _, m in runs):8.0f}", flush=True)
            shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main()
