"""More than one process: the same call on every rank of `torch.distributed` computes its share of the tiles.

    torchrun --nproc-per-node 2 script.py        # script: torch.distributed.init_process_group("gloo"), then ntk_gram as always

Ranks first agree that they were asked the same thing, and before results are added up each tells the others whether it failed. A
process that dies closes its connections, which the others see; one that hangs runs into the group's own timeout.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ntkscope._checks import UserError
from ntkscope.kernel.batch import batch_tensors

MEETING_TIMEOUT = timedelta(seconds=120)  # for a rank that never makes the call


class RankError(UserError, RuntimeError):
    """Another rank failed, was lost, or was asked something else."""


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    index: int
    size: int

    @classmethod
    def here(cls, *, enabled: bool) -> "Ranks":
        """Look at the process group.

        Args:
            enabled: False stands alone whatever the group is.

        Returns:
            One rank of one where there is no group.
        """
        if not (enabled and dist.is_available() and dist.is_initialized()):
            return cls(0, 1)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def part(self) -> tuple[int, int]:
        """Our part, of how many."""
        return self.index, self.size

    def check_same_call(self, parameters: Mapping[str, nn.Parameter], inputs: Any, other: Any) -> None:
        """Check that all ranks hold the same weights and inputs.

        Args:
            parameters: Parameters of the kernel.
            inputs: Rows.
            other: Columns.

        Raises:
            RankError: If a rank does not come, or holds something else.
        """
        if self.size == 1:
            return
        tensors = [*parameters.values(), *batch_tensors(inputs), *(() if other is None else batch_tensors(other))]
        own = [(tuple(tensor.shape), float(tensor.detach().double().sum())) for tensor in tensors]
        with _failures_named("before the job began: does every rank call ntk_gram? Pass distributed=False where only one does"):
            if dist.get_backend() == "gloo":
                dist.monitored_barrier(timeout=MEETING_TIMEOUT)
            every: list[Any] = [None] * self.size
            dist.all_gather_object(every, own)
        different = [rank for rank, theirs in enumerate(every) if theirs != own]
        if different:
            raise RankError(
                f"Rank {self.index} and ranks {different} hold different weights or inputs. Every rank must make the same call on the same "
                "model and batch; broadcast them, or pass distributed=False."
            )

    @contextmanager
    def failing_together(self) -> Generator[None, None, None]:
        """End on all ranks when the block fails on one.

        Raises:
            RankError: If another rank failed.
        """
        if self.size == 1:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        every: list[Any] = [None] * self.size
        with _failures_named("while the kernel was computed"):
            dist.all_gather_object(every, None if own is None else f"{type(own).__name__}: {own}")
        if own is not None:
            raise own
        failed = [f"rank {rank}: {message}" for rank, message in enumerate(every) if message is not None]
        if failed:
            raise RankError(f"The kernel is incomplete, because another rank failed ({'; '.join(failed)}).")

    def add_up(self, total: Tensor) -> None:
        """Add the parts of all ranks, in place.

        Args:
            total: Our part; the whole afterwards.
        """
        if self.size > 1:
            with _failures_named("while results were added up"):
                dist.all_reduce(total)


@contextmanager
def _failures_named(when: str) -> Generator[None, None, None]:
    """Say what a broken connection means."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RankError(f"A rank was lost {when}: {reason}.") from error
