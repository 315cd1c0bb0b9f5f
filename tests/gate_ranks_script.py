"""One rank of a job of two that trains with GatedAdamW, started by tests/test_gate_ranks.py: `gate_ranks_script.py MODE PATH OUT`."""

import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ntkscope import GatedAdamW

STEPS, HALF = 5, 4


def make_model() -> nn.Module:
    """Widths that two ranks cannot share evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()


def batch(step: int) -> torch.Tensor:
    return torch.randn(2 * HALF, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def make_optimizer(model: nn.Module, path: dict) -> GatedAdamW:
    return GatedAdamW(model.parameters(), lr=0.05, alpha="unbiased", decay="gated", gate_stats=True, **path)


def train(model: nn.Module, optimizer: GatedAdamW, part: slice) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        (model(batch(step)[part]) - 1.0).square().mean().backward()
        variance = {next(iter(model.parameters())): torch.full_like(next(iter(model.parameters())), 0.01)} if step == 3 else None
        optimizer.step(variance=variance)


def main() -> None:
    mode, path, out = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    model = make_model()
    if mode == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = make_optimizer(model, path)
    train(model, optimizer, slice(rank * HALF, (rank + 1) * HALF))
    found = {}
    for name, parameter in model.named_parameters():
        values = {"weight": parameter.detach(), "gate": optimizer.gate_of(parameter), "variance": optimizer.variance_of(parameter)}
        values |= {"mean": optimizer.mean_gradient_of(parameter), "preconditioner": optimizer.preconditioner_of(parameter)}
        found[name.removeprefix("module.")] = {key: value.full_tensor() if mode == "fsdp" else value for key, value in values.items()}
    sizes = [share.num_elements for share in optimizer.gate_statistics().by_parameter.values()]
    dist.barrier()  # neither leaves while the other still talks
    dist.destroy_process_group()
    torch.save({"found": found, "sizes": sizes}, out / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
