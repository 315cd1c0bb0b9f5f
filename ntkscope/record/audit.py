"""What an audit of the gate needs from a run: the step's ingredients at some snapshots, also where the optimizer has no gate."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntkscope.gate.optimizer import GatedAdamW
from ntkscope.gate.population_risk import population_risk, streaming_population_risk
from ntkscope.gate.variance import StreamingMoments
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.coverage import Coverage, probe_routes
from ntkscope.kernel.moments import make_pulled_readout, moments_of
from ntkscope.kernel.routes import Routes
from ntkscope.record.instrument import Instrument
from ntkscope.record.optimizers import Clock, received_gradients

GROWTH = 1.5  # an audit costs four tensors of the model's size, so that each comes half again as late as the one before
DEFAULT_BETA1 = 0.9  # of the mean gradient, for optimizers that keep none


class GateAudit:
    """Keeps m and s beside an optimizer without a gate, and collects what an audited snapshot holds."""

    def __init__(self) -> None:
        self._averages: list[StreamingMoments] = []  # by parameter group
        self._next = 1
        self._routes: tuple[Routes, Coverage] | None = None

    def look(self, optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> None:
        """Add the gradients of a step to the averages; a gated optimizer keeps its own.

        Args:
            optimizer: In its pre-step hook.
            parameters: Trained parameters, by name.
        """
        if isinstance(optimizer, GatedAdamW):
            return
        received = received_gradients(optimizer, parameters)
        for index, names in enumerate(_names_by_group(optimizer, parameters)):
            if index == len(self._averages):
                self._averages.append(StreamingMoments(beta1=mean_decay(optimizer, index)))
            if names:
                self._averages[index].add({name: received[name] for name in names})

    def is_due(self, step: int) -> bool:
        """Say whether a snapshot at this step is to be audited.

        Args:
            step: Optimizer steps so far.

        Returns:
            Whether the last audit is long enough ago.
        """
        return step >= self._next

    def collect(self, instrument: Instrument, clock: Clock, gradient: Tensor) -> dict[str, Tensor]:
        """Collect the fields of an audited snapshot.

        Args:
            instrument: What measures the run, after a step.
            clock: After that step.
            gradient: ∇Φ in the outputs of the probe.

        Returns:
            Fields of `Snapshot`, by name; empty where the averages are missing (resumed without them).
        """
        optimizer, parameters = instrument.optimizer, instrument.routes.parameters
        means, variances = self.moments(optimizer, parameters)
        if set(means) != set(parameters):
            return {}
        self._next = max(clock.step + 1, round(GROWTH * clock.step))
        state = instrument.mechanics(clock)
        steps = {name: state.precond[name] * means[name] for name in parameters}
        decay = [_square(value) for value in (state.decay or {}).values()]
        moved = [_square(steps[name] + (state.decay or {}).get(name, 0.0)) for name in parameters]
        buffers = [value.flatten().double() for value in instrument.model.buffers() if value.is_floating_point()]
        fields = {
            "audit_weights": torch.cat([parameter.detach().flatten() for parameter in parameters.values()]),
            "audit_mean": _flat(means, parameters),
            "audit_variance": _flat(variances, parameters),
            "audit_precond": _flat(state.ungated, parameters),
            "audit_decay": torch.tensor([sum(decay), sum(moved)], dtype=torch.float64),
            "audit_risk": self._risk(instrument, clock, gradient, state.ungated, means, variances),
        }
        if state.gates is not None:
            fields["audit_gate"] = _flat(state.gates, parameters)
        if buffers:
            fields["audit_buffers"] = torch.cat(buffers)
        return {name: value.detach().cpu() for name, value in fields.items()}

    def moments(self, optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Read m̂ and ŝ: the optimizer's own where it has a gate.

        Args:
            optimizer: After a step.
            parameters: Trained parameters, by name.

        Returns:
            Both, by name.
        """
        if isinstance(optimizer, GatedAdamW):
            return (
                {name: optimizer.mean_gradient_of(parameter) for name, parameter in parameters.items()},
                {name: optimizer.variance_of(parameter) for name, parameter in parameters.items()},
            )
        means: dict[str, Tensor] = {}
        variances: dict[str, Tensor] = {}
        for averages in self._averages:
            means |= averages.mean()
            variances |= averages.noise()
        return means, variances

    def _risk(
        self,
        instrument: Instrument,
        clock: Clock,
        gradient: Tensor,
        precond: dict[str, Tensor | float],
        means: dict[str, Tensor],
        variances: dict[str, Tensor],
    ) -> Tensor:
        """Compute the rates of population risk, by parameter: exact on the probe, of the training loss, and streaming."""
        probe, optimizer = instrument.probe, instrument.optimizer
        device = next(iter(instrument.routes.parameters.values())).device
        batch = (probe.inputs, (gradient * probe.num_examples).to(device, instrument.routes.dtype))
        if self._routes is None:
            self._routes = probe_routes(
                instrument.model, batch, params=list(instrument.routes.parameters), forward_fn=make_pulled_readout(probe.forward_fn)
            )
        with undisturbed(instrument.model):
            exact = population_risk(moments_of(instrument.model, batch, *self._routes, budget=instrument.budget), precond)
        streaming: dict[str, float] = {}
        for index, names in enumerate(_names_by_group(optimizer, instrument.routes.parameters)):
            beta1 = mean_decay(optimizer, index)
            if names:
                found = streaming_population_risk(
                    {name: means[name] for name in names},
                    {name: variances[name] * (1 + beta1) / 2 for name in names},
                    {name: precond[name] for name in names},
                    beta1=beta1,
                    step=clock.step,
                )
                streaming |= {name: rate.rate for name, rate in found.by_parameter.items()}
        rows = [[exact.by_parameter[name].rate, exact.by_parameter[name].training_rate, streaming[name]] for name in means]
        order = dict(zip(means, rows, strict=True))
        return torch.tensor([order[name] for name in instrument.routes.parameters], dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """Turn into plain containers and tensors.

        Returns:
            The state.
        """
        return {"next": self._next, "averages": [averages.state_dict() for averages in self._averages]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Args:
            state: From `state_dict`.

        Raises:
            KeyError: If a field is missing.
            TypeError: If a field has the wrong type.
        """
        self._next = int(state["next"])
        self._averages = [StreamingMoments.from_state(dict(averages)) for averages in state["averages"]]


def mean_decay(optimizer: Optimizer, index: int = 0) -> float:
    """Read β₁ of the mean gradient of a parameter group.

    Args:
        optimizer: Any.
        index: The group.

    Returns:
        β₁ of the Adam family; 0.9 for optimizers that keep no mean of gradients.
    """
    betas = optimizer.param_groups[index].get("betas")
    return DEFAULT_BETA1 if betas is None else float(betas[0])


def _names_by_group(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """List each group's trained parameters."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [[names[id(held)] for held in group["params"] if id(held) in names] for group in optimizer.param_groups]


def _flat(values: Mapping[str, Tensor | float], parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """Put tensors, or one number for all entries, side by side in the manifest's order, float32."""
    parts = [torch.as_tensor(values[name], dtype=torch.float32, device=own.device).expand(own.shape) for name, own in parameters.items()]
    return torch.cat([part.flatten() for part in parts])


def _square(value: Tensor) -> float:
    """Sum squares."""
    return float(value.double().square().sum())
