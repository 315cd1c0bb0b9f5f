"""What the step of one parameter needs, whichever path computes it."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Job(NamedTuple):
    """What the step of one parameter needs; of sharded ones, this rank's part.

    Attributes:
        weight: w.
        gradient: g.
        exp_avg: m.
        exp_avg_sq: v.
        grad_var: s.
        step: t − 1, on the device where the group is capturable.
        variance: ŝ from outside; None for the streaming one.
        counts: Of the gate; None where they are not asked for.
    """

    weight: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    grad_var: Tensor
    step: Tensor
    variance: Tensor | None
    counts: Tensor | None

    @staticmethod
    def of(parameter: Tensor, state: Mapping[str, Tensor], *, variance: Tensor | None, counts: Tensor | None) -> "Job":
        """Collect the parts.

        Args:
            parameter: With a gradient.
            state: Its state.
            variance: ŝ from outside, if any.
            counts: Of the gate, if any.

        Returns:
            The job.
        """
        assert parameter.grad is not None
        return Job(
            local_part(parameter.detach()),
            local_part(parameter.grad, like=parameter),
            local_part(state["exp_avg"]),
            local_part(state["exp_avg_sq"]),
            local_part(state["grad_var"]),
            state["step"],
            None if variance is None else local_part(variance, like=parameter),
            counts,
        )


def local_part(tensor: Tensor, *, like: Tensor | None = None) -> Tensor:
    """Look through a DTensor, whose operations are elementwise here: every rank steps its own part.

    Args:
        tensor: Any.
        like: A tensor as whose parts it must be laid out.

    Returns:
        The rank's part, sharing memory; other tensors as they are.
    """
    if type(tensor) is Tensor:
        return tensor
    placements = getattr(like, "placements", None)
    if placements is not None and getattr(tensor, "placements", placements) != placements:
        tensor = tensor.redistribute(placements=placements)  # pyright: ignore[reportAttributeAccessIssue]
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
