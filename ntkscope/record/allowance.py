"""The time that recording may take, as a share of the time that training takes."""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from ntkscope._checks import check_number

DEFAULT_SHARE = 0.25
DEFAULT_SECONDS = 60.0  # short runs may be recorded densely, whatever share of their time that is


class Allowance:
    """Measures what training and recording take, and says what can be afforded.

    Args:
        max_overhead: Share of training time; the larger of 25 % and 60 seconds if not given.
        is_free: Whether recording may take what it takes unless `max_overhead` is given: for a schedule that the user wrote down.
    """

    def __init__(self, max_overhead: float | None, *, is_free: bool) -> None:
        if max_overhead is not None:
            check_number("max_overhead", max_overhead, low=0)
        self.max_overhead = max_overhead
        self.is_free = is_free and max_overhead is None
        self.training = 0.0  # seconds between our hooks
        self.spent = 0.0  # seconds in them
        self._costs: dict[str, float] = {}  # seconds that each kind of work took the last time
        self._left: float | None = None  # when the last hook ended
        self._now: Callable[[], float] = time.perf_counter

    @contextmanager
    def hook(self) -> Generator[None, None, None]:
        """Count the time since the last hook as training, and the time inside as ours."""
        start = self._now()
        if self._left is not None:
            self.training += start - self._left
        try:
            yield
        finally:
            self._left = self._now()
            self.spent += self._left - start

    @contextmanager
    def pricing(self, kind: str, wait: Callable[[], None]) -> Generator[None, None, None]:
        """Measure one piece of work inside a hook, so that the next of its kind can be priced.

        Args:
            kind: For example "snapshot".
            wait: Waits for the accelerator: for training's work before, for ours after.
        """
        asked = self._now()
        wait()
        start = self._now()
        self.training, self.spent = self.training + start - asked, self.spent - (start - asked)
        try:
            yield
        finally:
            wait()
            self._costs[kind] = self._now() - start

    def permits(self, kind: str, *, times: int = 1) -> bool:
        """Say whether another piece of work can be afforded.

        Args:
            kind: Priced by the last of its kind, at nothing before.
            times: How many of them, `>= 1`.

        Returns:
            Whether it fits into the time allowed.
        """
        if self.is_free:
            return True
        allowed = max(DEFAULT_SHARE * self.training, DEFAULT_SECONDS) if self.max_overhead is None else self.max_overhead * self.training
        return self.spent + times * self._costs.get(kind, 0.0) < allowed

    def describe(self) -> str:
        """Describe the bound for people.

        Returns:
            For example "25 % of training time".
        """
        if self.max_overhead is None:
            return f"{100 * DEFAULT_SHARE:g} % of training time (at least {DEFAULT_SECONDS:g} s)"
        return f"{100 * self.max_overhead:g} % of training time"

    def seconds(self) -> dict[str, float]:
        """List what was measured.

        Returns:
            Seconds of `training` and `recording` so far, and of the last of each kind of work.
        """
        return {"training": self.training, "recording": self.spent, **self._costs}

    def state_dict(self) -> dict[str, Any]:
        """Turn what was measured into plain containers.

        Returns:
            The state.
        """
        return {"training": self.training, "spent": self.spent, "costs": dict(self._costs)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what was measured before.

        Args:
            state: From `state_dict`.

        Raises:
            KeyError: If a field is missing.
            TypeError: If a field has the wrong type.
        """
        self.training, self.spent = float(state["training"]), float(state["spent"])
        self._costs = {str(kind): float(cost) for kind, cost in dict(state["costs"]).items()}
