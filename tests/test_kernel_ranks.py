"""Several processes share one kernel, and a lost one ends the job with an error."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import BY_NAME
from compare import assert_close
from oracles import gram as oracle_gram

from ntkscope.kernel.tiles import Tile, deal

TESTS = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_two(mode: str, out: Path) -> list[int]:
    """Start two ranks and return their exit codes; the test fails if one hangs."""
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "ranks_script.py"), mode, str(out)]
    ranks = [subprocess.Popen(command, env=env | {"RANK": str(rank)}, stderr=subprocess.PIPE) for rank in range(2)]
    try:
        return [rank.wait(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_torchrun_gives_every_rank_the_same_matrix(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run([*launcher, str(TESTS / "ranks_script.py"), "plain", str(tmp_path)], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    model, inputs = BY_NAME["cnn"].build(torch.float64, num_examples=9)
    _, query = BY_NAME["cnn"].build(torch.float64, draw=1, num_examples=4)
    full, cross = oracle_gram(model, inputs), oracle_gram(model, query, inputs, outputs="trace")
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for mine in found:
        for name in ("full", "alone", "layers"):
            assert_close(mine[name], full, 1e-12, name=name)
        assert_close(mine["cross"], cross, 1e-12, name="cross")
    assert torch.equal(found[0]["full"], found[1]["full"])


def test_a_killed_rank_is_an_error(tmp_path):
    first, second = run_two("killed", tmp_path)
    assert second == -signal.SIGKILL
    assert first == 3
    assert "A rank was lost while the kernel was computed" in (tmp_path / "rank0.txt").read_text(encoding="utf-8")


def test_a_failing_rank_is_an_error_on_all(tmp_path):
    assert run_two("failing", tmp_path) == [3, 4]
    assert "rank 1: ValueError: out of luck" in (tmp_path / "rank0.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(("mode", "message"), [("different", "hold different weights or inputs"), ("absent", "before the job began")])
def test_ranks_that_do_not_make_the_same_call(tmp_path, mode, message):
    assert run_two(mode, tmp_path)[0] == 3
    assert message in (tmp_path / "rank0.txt").read_text(encoding="utf-8")


def test_tiles_are_dealt_evenly_and_all_of_them():
    blocks = [slice(start, start + 4) for start in range(0, 32, 4)]
    tiles = tuple(Tile(rows, columns, rows == columns) for rows in blocks for columns in blocks if columns.start <= rows.start)
    for num_parts in (1, 2, 3, 5):
        parts = [deal(tiles, (index, num_parts)) for index in range(num_parts)]
        assert sorted((t.rows.start, t.columns.start) for part in parts for t in part) == sorted(
            (t.rows.start, t.columns.start) for t in tiles
        )
        loads = [sum(0.5 if tile.is_diagonal else 1.0 for tile in part) for part in parts]
        assert max(loads) - min(loads) <= 1.0
