"""Callbacks under DDP: two ranks share the kernels, and rank 0 has the record of one process on the whole batches."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_close
from integrations_ranks_script import NUM_STEPS
from test_integrations_lightning import Module, callback_of, trainer_of
from test_integrations_lightning import pytestmark as quiet
from test_integrations_transformers import Texts, run
from test_integrations_transformers import callback_of as transformers_callback

import ntkscope
from ntkscope.record.trace import load_trace

SCRIPT = Path(__file__).parent / "integrations_ranks_script.py"
pytestmark = quiet


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_one_process(library, folder):
    if library == "lightning":
        module = Module()
        callback = callback_of(module)
        loader = torch.utils.data.DataLoader(module.data().dataset, batch_size=4)
        trainer_of(folder, callback, max_steps=NUM_STEPS, max_epochs=-1).fit(module, loader)
    else:
        callback = transformers_callback(Texts())
        run(folder, callback, max_steps=NUM_STEPS, per_device_train_batch_size=4)
    return callback.recorder.trace


@pytest.mark.parametrize(
    ("library", "tolerance", "saved"),
    [("lightning", 1e-7, "some.ckpt"), ("transformers", 1e-2, f"checkpoint-{NUM_STEPS}/ntkscope.pt")],  # float32 there
)
def test_two_ranks_give_the_record_of_one_process(tmp_path, library, tolerance, saved):
    out = tmp_path / "two"
    out.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run(
        [*launcher, str(SCRIPT), library, str(out)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, expected = load_trace(out / "trace"), in_one_process(library, tmp_path / "one")
    assert found.steps == expected.steps == [0, 3, 6, NUM_STEPS]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.time == pytest.approx(theirs.time)
        assert_close(mine.kernel_upper, theirs.kernel_upper, tolerance, name=f"K at step {mine.step}")
        assert_close(mine.outputs, theirs.outputs, tolerance, name=f"u at step {mine.step}")
    assert [(out / f"rank{rank}.txt").read_text(encoding="utf-8") for rank in range(2)] == ["False False", "True False"]
    assert ntkscope.analyze(out / saved).run.num_snapshots == 4
