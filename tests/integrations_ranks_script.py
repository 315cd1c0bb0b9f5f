"""One rank of a Trainer's job of two, started by tests/test_integrations_ranks.py: `integrations_ranks_script.py LIBRARY OUT`."""

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

import ntkscope

NUM_STEPS = 7


def lightning(out: Path):
    """A Lightning run under DDP, on digits of record_case."""
    from test_integrations_lightning import Module, callback_of, trainer_of

    module = Module()
    callback = callback_of(module, path=out / "trace")
    trainer = trainer_of(out, callback, max_steps=NUM_STEPS, max_epochs=-1, strategy="ddp", devices=2, use_distributed_sampler=False)
    whole = module.data().dataset
    own = torch.utils.data.Subset(whole, range(int(os.environ["RANK"]), len(whole), 2))
    trainer.fit(module, torch.utils.data.DataLoader(own, batch_size=2))
    trainer.save_checkpoint(out / "some.ckpt")
    return callback


def transformers(out: Path):
    """A Transformers run under DDP."""
    from test_integrations_transformers import Texts, callback_of, run

    callback = callback_of(Texts(), path=out / "trace")
    run(
        out, callback, max_steps=NUM_STEPS, per_device_train_batch_size=2, save_strategy="steps", save_steps=NUM_STEPS,
        average_tokens_across_devices=False, ddp_backend="gloo",
    )  # fmt: skip
    return callback


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    library, out = sys.argv[1], Path(sys.argv[2])
    recorder = {"lightning": lightning, "transformers": transformers}[library](out).recorder
    rank = dist.get_rank()
    (out / f"rank{rank}.txt").write_text(f"{recorder.is_helper} {recorder.is_attached}", encoding="utf-8")
    if rank == 0:
        assert ntkscope.analyze(recorder).run.num_steps == NUM_STEPS
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
