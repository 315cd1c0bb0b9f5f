"""GatedAdamW under DDP and FSDP2 steps as one process on the whole batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_close
from gate_ranks_script import make_model, make_optimizer, train

SCRIPT = Path(__file__).parent / "gate_ranks_script.py"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_two(mode, path, out):
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), mode, json.dumps(path), str(out)]
    ranks = [subprocess.Popen(command, env=env | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        for rank in ranks:
            assert rank.wait(timeout=120) == 0, rank.stderr.read()
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    return [torch.load(out / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("path", [{}, {"foreach": True}, {"fused": True}], ids=["single", "foreach", "fused"])
def test_two_ranks_step_as_one_process(mode, path, tmp_path):
    model = make_model()
    optimizer = make_optimizer(model, {})
    train(model, optimizer, slice(None))
    both = run_two(mode, path, tmp_path)
    for rank in both:
        for name, parameter in model.named_parameters():
            found = rank["found"][name]
            assert_close(found["weight"], parameter, 1e-10, name=name)
            assert_close(found["gate"], optimizer.gate_of(parameter), 1e-8, name=name)
            assert_close(found["variance"], optimizer.variance_of(parameter), 1e-8, name=name)
            assert_close(found["mean"], optimizer.mean_gradient_of(parameter), 1e-8, name=name)
            assert_close(found["preconditioner"], optimizer.preconditioner_of(parameter), 1e-8, name=name)
    sizes = [sum(held) for held in zip(*(rank["sizes"] for rank in both), strict=True)]
    times = 2 if mode == "ddp" else 1  # DDP counts everything on every rank, FSDP2 each rank its part
    assert sizes == [times * parameter.numel() for parameter in model.parameters()]
