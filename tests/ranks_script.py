"""One rank of a job of two, started by tests/test_kernel_ranks.py: `ranks_script.py MODE OUT`."""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from cases import BY_NAME

import ntkscope


def main() -> None:
    mode, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    model, inputs = BY_NAME["cnn"].build(torch.float64, num_examples=9)
    _, query = BY_NAME["cnn"].build(torch.float64, draw=1, num_examples=4)

    def stop(done: int, total: int) -> None:
        if rank == 1 and mode == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and mode == "failing":
            raise ValueError("out of luck")

    try:
        if mode == "different" and rank == 1:
            inputs = inputs + 1.0
        if mode == "absent" and rank == 1:
            return
        full = ntkscope.ntk_gram(model, inputs, progress=stop)
        cross = ntkscope.ntk_gram(model, query, inputs, outputs="trace")
        alone = ntkscope.ntk_gram(model, inputs, distributed=False)
        layers = ntkscope.ntk_gram(model, inputs, by_layer=True)
        total = sum(layers.by_layer.values())
        dist.barrier()  # neither leaves while the other still talks
        dist.destroy_process_group()
        torch.save({"full": full.matrix, "cross": cross.matrix, "alone": alone.matrix, "layers": total}, out / f"rank{rank}.pt")
    except ntkscope.RankError as error:
        (out / f"rank{rank}.txt").write_text(str(error), encoding="utf-8")
        os._exit(3)  # without waiting for a peer that is gone
    except ValueError as error:
        (out / f"rank{rank}.txt").write_text(str(error), encoding="utf-8")
        os._exit(4)


if __name__ == "__main__":
    main()
