"""Another optimizer time for a snapshot, for runs whose gradients were not those of the loss on the probe."""

from dataclasses import dataclass, replace
from typing import Any

from ntkscope.record.snapshot import Snapshot


@dataclass(frozen=True)
class Retiming:
    """Another time for one snapshot and for the interval that ends there: offset + factor * τ.

    Attributes:
        offset: Optimizer time.
        factor: By how much time runs faster there, `> 0`.
    """

    offset: float
    factor: float

    def of(self, snapshot: Snapshot) -> Snapshot:
        """Change a snapshot's time; what is per unit of time, weight decay, changes with it.

        Args:
            snapshot: As stored.

        Returns:
            A copy that shares all other tensors.
        """
        decays = {"forcing": snapshot.forcing, "query_forcing": snapshot.query_forcing}
        changed: dict[str, Any] = {name: None if decay is None else decay / self.factor for name, decay in decays.items()}
        if snapshot.step_times is not None:
            changed["step_times"] = self.offset + self.factor * snapshot.step_times
        rates = tuple(rate * self.factor for rate in snapshot.learning_rates)
        return replace(snapshot, time=self.offset + self.factor * snapshot.time, learning_rates=rates, **changed)
