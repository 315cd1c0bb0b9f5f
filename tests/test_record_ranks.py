"""A run under DistributedDataParallel has the record of one process on the whole batches, and ranks that disagree are told so."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_close
from record_ranks_case import BATCH, NUM_STEPS, build, train

import ntkscope
from ntkscope.record.trace import load_trace, trace_from_state

SCRIPT = Path(__file__).parent / "record_ranks_script.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_two(mode: str, out: Path) -> list[int]:
    """Start two ranks and return their exit codes; the test fails if one hangs."""
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, str(SCRIPT), mode, str(out)], env=env | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        return [rank.wait(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            print(rank.communicate()[1][-3000:])


def alone(**options):
    model, make_optimizer, data = build("plain")
    inputs, targets, query = data
    recorder = ntkscope.Recorder(model, probe=(inputs, targets), query=query, loss="cross_entropy", schedule=3, drift=None, **options)
    optimizer = make_optimizer(model.parameters())
    recorder.attach(optimizer)
    train(model, optimizer, data, range(NUM_STEPS), slice(0, BATCH))
    return recorder.trace


def assert_same_record(found, expected):
    assert found.steps == expected.steps == [0, 3, 6, 9, 12, 14]
    assert found.facts == expected.facts
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.time == pytest.approx(theirs.time)
        for name in ("outputs", "gradient", "kernel_upper", "cross_kernel", "query_outputs", "forcing", "linearized", "query_linearized"):
            assert_close(getattr(mine, name), getattr(theirs, name), 1e-7, name=f"{name} at step {mine.step}")  # K, in the order of sums


@pytest.mark.parametrize("mode", ["one", "shared"])
def test_two_ranks_give_the_record_of_one_process(tmp_path, mode):
    assert run_two(mode, tmp_path) == [0, 0]
    expected = alone()
    for found in (load_trace(tmp_path / "trace"), trace_from_state(torch.load(tmp_path / "state.pt"), "test")):
        assert_same_record(found, expected)
    assert ntkscope.analyze(tmp_path / "trace").closure.energy_error == pytest.approx(
        ntkscope.analyze(expected).closure.energy_error, rel=1e-4
    )
    if mode == "shared":
        first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
        # K and K_QS of five snapshots by both; that of step 14 is asked for outside of a step, by rank 0 alone.
        assert second["seen"] == [(1, 2)] * 10
        assert first["seen"] == [(0, 2)] * 10 + [(0, 1)] * 2
        assert (first["is_helper"], second["is_helper"]) == (False, True)
        assert "This rank computes for rank 0, which has the record" in (tmp_path / "rank1.txt").read_text(encoding="utf-8")


def test_kernels_are_of_rank_0s_running_statistics(tmp_path):
    """After a step every rank has its own, and rank 1 gets them back: shared kernels are those that rank 0 computes alone."""
    traces = []
    for mode in ("norm", "norm_one"):
        (tmp_path / mode).mkdir()
        assert run_two(mode, tmp_path / mode) == [0, 0]
        traces.append(load_trace(tmp_path / mode / "trace"))
    first, second = (torch.load(tmp_path / "norm" / f"rank{rank}.pt")["buffers"] for rank in range(2))
    assert not torch.equal(first[0], second[0])
    assert_same_record(*traces)


def test_a_resumed_run_goes_on_with_the_state_of_rank_0_alone(tmp_path):
    assert run_two("resumed", tmp_path) == [0, 0]
    found, expected = load_trace(tmp_path / "trace"), alone()
    assert set(found.steps) >= {0, 3, 6, 7, 14}
    for step in set(found.steps) & set(expected.steps):
        mine, theirs = (trace[trace.steps.index(step)] for trace in (found, expected))
        assert mine.time == pytest.approx(theirs.time)
        assert_close(mine.kernel_upper, theirs.kernel_upper, 1e-7, name=f"K at step {step}")


@pytest.mark.parametrize(
    ("mode", "codes", "rank", "message"),
    [
        ("different", [3, 3], 0, "about to record different things: the probe differ"),
        ("absent", None, 0, r"A rank did not come to Recorder.attach"),
        ("folder", None, 1, "This is rank 1 of 2, and every rank would write to"),
        ("alone", [0, 0], 0, "Recording stopped at step 3: Rank 0 and ranks [1] hold different weights or inputs"),
        (
            "broken",
            [0, 0],
            0,
            "Recording stopped at step 1: The kernel is incomplete, because another rank failed (rank 1: InputError",
        ),
    ],
)
def test_ranks_that_disagree_are_told_so(tmp_path, mode, codes, rank, message):
    found = run_two(mode, tmp_path)
    assert codes is None or found == codes
    assert message in (tmp_path / f"rank{rank}.txt").read_text(encoding="utf-8")
