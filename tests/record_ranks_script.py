"""One rank of a recorded job of two, started by tests/test_record_ranks.py: `record_ranks_script.py MODE OUT`."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from record_ranks_case import BATCH, NUM_STEPS, build, train
from torch.nn.parallel import DistributedDataParallel

import ntkscope
from ntkscope.record import crew


def recorder_of(model, data, **options):
    inputs, targets, query = data
    return ntkscope.Recorder(model, probe=(inputs, targets), query=query, loss="cross_entropy", schedule=3, drift=None, **options)


def main() -> None:
    mode, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    crew.MEETING_TIMEOUT = timedelta(seconds=5)
    rank = dist.get_rank()
    model, make_optimizer, data = build("norm" if mode.startswith("norm") else "plain")
    ddp = DistributedDataParallel(model)
    optimizer = make_optimizer(ddp.parameters())
    own = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    try:
        if mode in ("one", "norm_one"):  # recorded on rank 0 alone: the other knows nothing of it
            if rank == 0:
                recorder = recorder_of(ddp, data, path=out / "trace")
                recorder.attach(optimizer)
            train(ddp, optimizer, data, range(NUM_STEPS), own)
            if rank == 0:
                torch.save(recorder.state_dict(), out / "state.pt")
        elif mode in ("shared", "norm"):
            recorder = recorder_of(ddp, data, path=out / "trace", distributed=True)
            recorder.attach(optimizer)
            seen = []
            compute = ntkscope.record.instrument.blockwise_grams

            def counted(*args, **kwargs):
                seen.append(kwargs["part"])
                return compute(*args, **kwargs)

            ntkscope.record.instrument.blockwise_grams = counted
            train(ddp, optimizer, data, range(NUM_STEPS), own)
            buffers = [buffer.clone() for buffer in model.buffers()]
            recorder.detach()
            torch.save({"seen": seen, "buffers": buffers, "is_helper": recorder.is_helper}, out / f"rank{rank}.pt")
            if rank == 0:
                torch.save(recorder.state_dict(), out / "state.pt")
            else:
                try:
                    _ = recorder.trace
                except ntkscope.InputError as error:
                    (out / "rank1.txt").write_text(str(error), encoding="utf-8")
        elif mode == "resumed":
            recorder = recorder_of(ddp, data, path=out / "trace", distributed=True)
            recorder.attach(optimizer)
            train(ddp, optimizer, data, range(7), own)
            recorder.detach()
            again = recorder_of(ddp, data, path=out / "trace", distributed=True)
            if rank == 0:  # the only one that has the state
                again.load_state_dict(recorder.state_dict())
            again.attach(optimizer)
            train(ddp, optimizer, data, range(7, NUM_STEPS), own)
            again.detach()
            if rank == 0:
                torch.save(again.state_dict(), out / "state.pt")
        else:
            fails(mode, rank, ddp, model, optimizer, data, own, out)
        dist.barrier()
        dist.destroy_process_group()
    except ntkscope.UserError as error:
        (out / f"rank{rank}.txt").write_text(str(error), encoding="utf-8")
        os._exit(3)


def fails(mode, rank, ddp, model, optimizer, data, own, out) -> None:
    inputs, targets, query = data
    if mode == "absent" and rank == 1:
        dist.barrier()
    if mode == "different" and rank == 1:
        data = (inputs + 1, targets, query)
    path = out / "trace" if mode == "folder" else None
    recorder = recorder_of(ddp, data, distributed=mode != "folder", path=path)
    if mode == "folder":
        dist.barrier()
        if rank == 0:
            recorder.attach(optimizer)
            dist.barrier()
            return
        dist.barrier()
    recorder.attach(optimizer)
    if mode == "alone":  # without DistributedDataParallel ranks drift apart
        train(model, optimizer, (data[0] + rank, *data[1:]), range(NUM_STEPS), own)
        (out / f"rank{rank}.txt").write_text("" if rank else recorder.trace.facts.stopped, encoding="utf-8")
    if mode == "broken":  # on rank 1 the kernel fails

        def fail(*args, **kwargs):
            raise ntkscope.InputError("out of luck")

        if rank == 1:
            ntkscope.record.instrument.blockwise_grams = fail
        train(ddp, optimizer, data, range(NUM_STEPS), own)
        (out / f"rank{rank}.txt").write_text("" if rank else recorder.trace.facts.stopped, encoding="utf-8")


if __name__ == "__main__":
    main()
