"""How each parameter's share of the Jacobian is computed: what the probe decides and every block follows."""

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ntkscope._types import ForwardFn
from ntkscope.kernel.fallback import RowRoute
from ntkscope.kernel.layout import Layout
from ntkscope.kernel.storage import Storage


@dataclass(frozen=True)
class PlannedCall:
    """What the probe learned of one call."""

    name: str
    layout: Layout | None  # None: the call's output reaches no output of the model
    num_weights: int


@dataclass(frozen=True)
class Plan:
    """What the probe learned of the forward pass; later blocks must look the same."""

    calls: tuple[PlannedCall, ...] = ()
    decisions: tuple[bool, ...] = ()
    storage: dict[str, Storage] = field(default_factory=dict)  # of parameters with uses


@dataclass(frozen=True)
class Routes:
    """How each parameter's share of the Jacobian is computed."""

    parameters: dict[str, nn.Parameter]
    ruled: frozenset[str]  # parameters under rules; with a use, or reaching no output on the probe
    plan: Plan
    row_route: RowRoute  # for all others
    forward_fn: ForwardFn | None
    dtype: torch.dtype  # of the factors

    def with_dtype(self, dtype: torch.dtype) -> "Routes":
        """Contract in another precision.

        Args:
            dtype: Of the factors.

        Returns:
            New routes.
        """
        return replace(self, dtype=dtype)

    def left_to_autograd(self) -> "Routes":
        """Differentiate every output by autograd, in all parameters, one after the other: the way through the model depends on data.

        Returns:
            New routes.
        """
        return replace(without(self, self.ruled), row_route="loop")

    @property
    def ruled_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters under rules."""
        return {name: parameter for name, parameter in self.parameters.items() if name in self.ruled}

    @property
    def row_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters left to autograd."""
        return {name: parameter for name, parameter in self.parameters.items() if name not in self.ruled}

    @property
    def idle_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that reached no output on the probe."""
        return {name: parameter for name, parameter in self.ruled_parameters.items() if name not in self.plan.storage}


class UnlikeProbe(Exception):
    """A block takes another way through the model than the probe did, so what the probe learned does not hold."""


def without(routes: Routes, names: frozenset[str]) -> Routes:
    """Leave some parameters to autograd.

    Args:
        routes: Routes.
        names: Parameters.

    Returns:
        New routes, without a plan.
    """
    return replace(routes, ruled=routes.ruled - names, plan=Plan())
