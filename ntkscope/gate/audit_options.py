"""How a run is audited."""

from dataclasses import dataclass
from typing import Literal, get_args

from ntkscope._checks import check_choice, check_number
from ntkscope._types import GateKind
from ntkscope.gate.step import Alpha, resolve_alpha

VarianceKind = Literal["streaming", "exact"]


@dataclass(frozen=True)
class AuditOptions:
    """Which gate to audit, and how.

    Attributes:
        gate: Kind of the gate; the run's own if not given, "soft" for a run without one.
        alpha: Its α; the run's own if not given, "unbiased" for a run without a gate.
        lambda_pop: Its λ; the run's own if not given, for a run without a gate the number that α is.
        variance: "streaming": ŝ as recorded. "exact": from the gradients of all probe examples at the audited weights.
        batch_size: b of the training batches: needed for "exact", and used by the spectral gate.
        num_steps: Audited steps, at most; evenly over the recorded ones.
        num_permutations: Of the gates, for the null.
        seed: Of the permutations.

    Raises:
        InputError: If a choice is unknown or a number out of range.
    """

    gate: GateKind | None = None
    alpha: Alpha | None = None
    lambda_pop: float | None = None
    variance: VarianceKind = "streaming"
    batch_size: int | None = None
    num_steps: int = 10
    num_permutations: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gate is not None:
            check_choice("gate", self.gate, get_args(GateKind))
        check_choice("variance", self.variance, get_args(VarianceKind))
        if self.alpha is not None:
            resolve_alpha(self.alpha, beta1=0.9, batch_size=1, dataset_size=2)
        if self.lambda_pop is not None:
            check_number("lambda_pop", self.lambda_pop, low=0.0)
        if self.batch_size is not None or self.variance == "exact":
            check_number("batch_size", 0 if self.batch_size is None else self.batch_size, low=1)
        check_number("num_steps", self.num_steps, low=1)
        check_number("num_permutations", self.num_permutations, low=2)

    @property
    def is_own(self) -> bool:
        """Whether the run's own gate is meant."""
        return self.gate is None and self.alpha is None and self.lambda_pop is None and self.variance == "streaming"
