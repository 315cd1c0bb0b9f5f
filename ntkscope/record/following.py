"""The probe's outputs after every single step, for what lies between snapshots: drift and diffusion (theory.md section 8)."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._checks import format_bytes

MAX_BYTES = 512 * 2**20  # of outputs kept, over the whole run


class Following:
    """Collects outputs from one snapshot to the next; an interval is followed whole or not at all."""

    def __init__(self) -> None:
        self._stopped = ""
        self._num_skipped = 0
        self._outputs: list[Tensor] = []
        self._times: list[float] = []
        self._num_bytes = 0
        self._is_broken = False

    @property
    def is_on(self) -> bool:
        """Whether outputs of the next step are wanted."""
        return not self._is_broken and not self._stopped

    def notes(self, bound: str) -> list[str]:
        """Say what was not followed.

        Args:
            bound: The time that recording may take, in words.

        Returns:
            A sentence for each reason.
        """
        skipped = (
            f"{self._num_skipped} of the intervals between snapshots were not followed step by step: the budget of {bound} did not allow "
            "it; raise max_overhead."
        )
        return ([skipped] if self._num_skipped else []) + ([self._stopped] if self._stopped else [])

    def skip(self) -> None:
        """Give this interval up: there is no time to follow a step of it."""
        self._num_skipped += 1
        self._drop()

    def _drop(self) -> None:
        """Forget the steps since the last snapshot, and follow none until the next."""
        self._num_bytes -= sum(outputs.numel() * outputs.element_size() for outputs in self._outputs)
        self._outputs, self._times, self._is_broken = [], [], True

    def add(self, outputs: Float[Tensor, "examples classes"], time: float, step: int) -> None:
        """Keep the outputs after a step.

        Args:
            outputs: On the probe, on the CPU.
            time: τ.
            step: Of the optimizer, for the message.
        """
        size = outputs.numel() * outputs.element_size()
        if self._num_bytes + size > MAX_BYTES:
            self._stopped = (
                f"Outputs after every step are kept up to step {step - 1} only: they reached the bound of {format_bytes(MAX_BYTES)}. "
                "Record a smaller probe, or fewer steps, with every_step=True."
            )
            self._drop()
            return
        self._num_bytes += size
        self._outputs.append(outputs)
        self._times.append(time)

    def collect(self) -> tuple[Float[Tensor, "steps examples classes"] | None, Float[Tensor, " steps"] | None]:
        """Hand the steps over to a snapshot, and begin anew.

        Returns:
            Outputs and times; None if the interval was not followed whole.
        """
        outputs, times = self._outputs, self._times
        self._outputs, self._times, self._is_broken = [], [], False
        if not outputs:
            return None, None
        return torch.stack(outputs), torch.tensor(times, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """Turn what must survive a restart into plain containers.

        Returns:
            The state.
        """
        return {"num_bytes": self._num_bytes, "num_skipped": self._num_skipped, "stopped": self._stopped}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what was kept before.

        Args:
            state: From `state_dict`.

        Raises:
            KeyError: If a field is missing.
            TypeError: If a field has the wrong type.
        """
        self._num_bytes, self._num_skipped, self._stopped = int(state["num_bytes"]), int(state["num_skipped"]), str(state["stopped"])
