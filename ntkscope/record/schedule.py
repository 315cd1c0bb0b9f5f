"""When to take snapshots."""

import math
from collections.abc import Sequence
from typing import Literal

from ntkscope._checks import InputError

Schedule = Literal["log"] | int | Sequence[int]
LOG_RATIO = 1.2  # 2,000 steps take about 40 snapshots


def next_step(schedule: Schedule, step: int) -> int | None:
    """Compute the next step at which a snapshot is due.

    Args:
        schedule: "log" (each 1.2 times the last), an interval in steps, or the steps themselves.
        step: The current step.

    Returns:
        A later step, or None when the list is used up.

    Example:
        >>> [next_step("log", step) for step in (0, 1, 5, 100)], next_step(50, 120)
        ([1, 2, 6, 120], 150)
    """
    if schedule == "log":
        return max(step + 1, math.floor(step * LOG_RATIO))
    if isinstance(schedule, int):
        return (step // schedule + 1) * schedule
    return min((due for due in schedule if not isinstance(due, str) and due > step), default=None)


def check_schedule(schedule: object) -> None:
    """Check a schedule.

    Args:
        schedule: What the user gave.

    Raises:
        InputError: If it is none of the three forms.
    """
    is_interval = isinstance(schedule, int) and not isinstance(schedule, bool) and schedule >= 1
    is_list = isinstance(schedule, Sequence) and not isinstance(schedule, str) and all(isinstance(s, int) and s >= 0 for s in schedule)
    if not (schedule == "log" or is_interval or is_list):
        raise InputError(f"`schedule` must be 'log', an interval in steps (>= 1), or a list of steps, got {schedule!r}.")
