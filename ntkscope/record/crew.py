"""A recorder on several ranks: rank 0 records, and the others compute their share of its kernels.

Every rank attaches a recorder to its own optimizer. In the hook after a step the others wait for what rank 0 asks of them: what is
due depends on rank 0's clock and budget, so that only one may decide. Outside of steps rank 0 measures alone, since nobody listens.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ntkscope._checks import InputError, UserError
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.ranks import MEETING_TIMEOUT, RankError, Ranks
from ntkscope.record.beginning import State, copy_state, weights_of
from ntkscope.record.optimizers import Clock, was_skipped

LEADER = 0
ALONE = Ranks(0, 1)


class Job(IntEnum):
    """What rank 0 asks for."""

    DONE = 0  # with this step
    KERNEL = 1
    CROSS_KERNEL = 2


class Crew:
    """The ranks that share a record.

    Args:
        ranks: This one among its peers.
        group: Carries orders on the CPU: they must not wait for the accelerator.
    """

    def __init__(self, ranks: Ranks, group: Any) -> None:
        self.ranks = ranks
        self._group = group
        self._is_listening = False

    @staticmethod
    def meet(facts: Mapping[str, Any], clock: Clock) -> tuple["Crew | None", Clock]:
        """Gather the ranks of the process group, each of which must be about to record the same.

        Args:
            facts: What must be equal on all ranks, by name.
            clock: This rank's.

        Returns:
            The crew (None where there is one process only), and rank 0's clock.

        Raises:
            InputError: If ranks are about to record different things.
            RankError: If a rank does not come.
        """
        ranks = Ranks.here(enabled=True)
        if ranks.size == 1:
            return None, clock
        try:
            if dist.get_backend() == "gloo":
                dist.monitored_barrier(timeout=MEETING_TIMEOUT)
            group = dist.new_group(backend="gloo")
            every: list[Any] = [None] * ranks.size
            dist.all_gather_object(every, (dict(facts), clock.state_dict()), group=group)
        except (RuntimeError, dist.DistError) as error:
            raise RankError(
                "A rank did not come to Recorder.attach(). With distributed=True every rank makes a recorder with the same arguments and "
                f"attaches it; leave it out to record on one rank alone. ({str(error).strip().splitlines()[0]})"
            ) from error
        wrong = sorted({name for theirs, _ in every for name, value in theirs.items() if value != every[LEADER][0][name]})
        if wrong:
            raise InputError(
                f"The ranks are about to record different things: {', '.join(wrong)} differ. Give every rank's recorder the same "
                "arguments, the same rows of the probe among them."
            )
        return Crew(ranks, group), Clock(**every[LEADER][1])

    @property
    def is_leader(self) -> bool:
        """Whether this rank records."""
        return self.ranks.index == LEADER

    @contextmanager
    def listening(self) -> Generator[None, None, None]:
        """On rank 0, inside the hook after a step: the others wait, and are released whatever happens."""
        self._is_listening = True
        try:
            yield
        finally:
            self._is_listening = False
            self._tell(Job.DONE, at_start=False)

    def ask(self, job: Job, model: nn.Module, *, at_start: bool) -> Ranks:
        """On rank 0: call the others to a job, if they listen.

        Args:
            job: What to compute.
            model: Has the buffers that all ranks are to compute with.
            at_start: Whether at the weights before the first step.

        Returns:
            The ranks that compute: this one alone outside of steps.
        """
        if not self._is_listening:
            return ALONE
        self._tell(job, at_start=at_start)
        self._share_buffers(model)
        return self.ranks

    def next_job(self) -> tuple[Job, bool]:
        """On other ranks: wait for rank 0.

        Returns:
            The job, and whether it is at the weights before the first step.
        """
        job, at_start = self._tell(Job.DONE, at_start=False).tolist()
        return Job(job), bool(at_start)

    def join(self, model: nn.Module) -> Ranks:
        """On other ranks: take over rank 0's buffers, inside `undisturbed`, for a job.

        Args:
            model: Whose running statistics are this rank's own.

        Returns:
            The ranks that compute.
        """
        self._share_buffers(model)
        return self.ranks

    def _tell(self, job: Job, *, at_start: bool) -> Tensor:
        """Send an order, or on other ranks receive one."""
        order = torch.tensor([int(job), int(at_start)])
        dist.broadcast(order, src=LEADER, group=self._group)
        return order

    def _share_buffers(self, model: nn.Module) -> None:
        """Send the model's buffers: after a step running statistics differ from rank to rank."""
        with torch.no_grad():
            for buffer in model.buffers():
                dist.broadcast(buffer, src=LEADER)


class Helper:
    """A rank that computes its share of the kernels that rank 0 records.

    Args:
        model: The model.
        crew: The ranks.
        clock: Rank 0's, at the beginning.
        compute: Computes this rank's share of a job; called inside `undisturbed`.
    """

    def __init__(self, model: nn.Module, crew: Crew, clock: Clock, *, compute: Callable[[Job, Clock, Ranks], object]) -> None:
        self._model = model
        self._crew = crew
        self._clock = clock
        self._compute = compute
        self._beginning: State | None = None

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Keep the weights of step 0: rank 0 asks for their kernel after the first step.

        Args:
            optimizer: The user's.
            args: Of its step.
            kwargs: Of its step.
        """
        if not self._clock.step and not was_skipped(optimizer):
            self._beginning = copy_state(self._model)

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Do what rank 0 asks for, until it is done with this step.

        Args:
            optimizer: The user's.
            args: Of its step.
            kwargs: Of its step.
        """
        if not was_skipped(optimizer):
            self._clock.tick(optimizer)
        while True:
            job, at_start = self._crew.next_job()
            if job is Job.DONE:
                self._beginning = None
                return
            assert not at_start or self._beginning is not None
            with weights_of(self._model, self._beginning or {}) if at_start else nullcontext(), undisturbed(self._model):
                ranks = self._crew.join(self._model)
                try:
                    self._compute(job, self._clock, ranks)
                except UserError:
                    continue  # rank 0 fails together with us, and says so once
