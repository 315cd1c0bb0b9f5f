"""What an optimizer did, in the terms of the theory: time, diagonal preconditioner M, and weight decay as a forcing.

theory.md section 2, "Real optimizers". Time is what the optimizer did, not its asymptote: a step of SGD with momentum β and
dampening d adds lr * c_t with c_1 = 1, c_t = β c_{t−1} + (1 − d), Nesterov lr * (1 + β c_t); the Adam family adds lr.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam

from ntkscope._checks import UnsupportedError
from ntkscope.gate.optimizer import GatedAdamW
from ntkscope.gate.step import resolve_alpha
from ntkscope.record.diagonals import Diagonal, adam_diagonal, adamax_diagonal, nadam_diagonal, radam_diagonal

PrecondFn = Callable[[Optimizer, nn.Parameter], Tensor | float]
DIAGONALS: dict[type[Optimizer], Diagonal] = {
    Adam: adam_diagonal,
    AdamW: adam_diagonal,
    NAdam: nadam_diagonal,
    RAdam: radam_diagonal,
    Adamax: adamax_diagonal,
}
ADAMS = (*DIAGONALS, GatedAdamW)
NAMES = "SGD, Adam, AdamW, NAdam, RAdam, Adamax and GatedAdamW"


def check_supported(optimizer: Optimizer, precond: PrecondFn | None) -> None:
    """Check that M and the time of this optimizer are known.

    Args:
        optimizer: The user's.
        precond: A user's M.

    Raises:
        UnsupportedError: If they are not.
    """
    if precond is None and type(optimizer) not in (SGD, *ADAMS):
        raise UnsupportedError(
            f"{type(optimizer).__name__} is not among {NAMES}, so its preconditioner is unknown. "
            "Give it: attach(optimizer, precond=lambda optimizer, parameter: <diagonal of M, a tensor or number>)."
        )
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise UnsupportedError("The optimizer maximizes; the theory is about descent. Minimize the negated objective instead.")


def describe(optimizer: Optimizer) -> str:
    """Describe an optimizer for people.

    Args:
        optimizer: The user's.

    Returns:
        Class and the settings that are not at zero, for example `SGD(lr=0.5, momentum=0.9)`.
    """
    group = optimizer.param_groups[0]
    shown = ("lr", "momentum", "nesterov", "betas", "weight_decay", "gate", "alpha")
    settings = ", ".join(f"{key}={_plain(group[key])}" for key in shown if group.get(key))
    more = f", {len(optimizer.param_groups)} groups" if len(optimizer.param_groups) > 1 else ""
    # So is AdamW an Adam since torch 2.7, and when made again from a file.
    is_adamw = type(optimizer) is Adam and group.get("decoupled_weight_decay")
    return f"{'AdamW' if is_adamw else type(optimizer).__name__}({settings}{more})"


def stability_edge(optimizer: Optimizer) -> float | None:
    """Compute θ: training is stable while raw lr * λ_max(B^½ K B^½) < θ.

    Args:
        optimizer: The user's.

    Returns:
        θ of the first group; None for a user's own optimizer, and for NAdam, whose momentum grows along the run.
    """
    group = optimizer.param_groups[0]
    if isinstance(optimizer, NAdam):
        return None
    if isinstance(optimizer, ADAMS):
        beta = float(group["betas"][0])
        return 2 * (1 + beta) / (1 - beta)
    if not isinstance(optimizer, SGD):
        return None
    beta = float(group["momentum"])
    if group["nesterov"]:
        return 2 * (1 + beta) / (1 + 2 * beta)
    return 2 * (1 + beta) / (1 - float(group["dampening"])) if beta else 2.0


def gate_alpha(optimizer: Optimizer) -> float | None:
    """Read the gate's α.

    Args:
        optimizer: The user's.

    Returns:
        α of the first group as a number; None without a gate.
    """
    if not isinstance(optimizer, GatedAdamW):
        return None
    group = optimizer.param_groups[0]
    return resolve_alpha(group["alpha"], beta1=group["betas"][0], batch_size=group["batch_size"], dataset_size=group["dataset_size"])


def momentum_lag(optimizer: Optimizer) -> float:
    """Compute β/(1 − β), the steps by which momentum makes the flow lag.

    Args:
        optimizer: The user's.

    Returns:
        Steps, largest over groups.
    """
    betas = [float(group["betas"][0]) if "betas" in group else float(group.get("momentum", 0.0)) for group in optimizer.param_groups]
    return max(beta / (1 - beta) for beta in betas)


@dataclass
class Clock:
    """Optimizer time.

    Attributes:
        step: Steps taken.
        time: τ.
        buildup: c_t per group: how much of a constant gradient the momentum buffer holds.
        rates: Time that each group moved in the last step.
    """

    step: int = 0
    time: float = 0.0
    buildup: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def tick(self, optimizer: Optimizer) -> None:
        """Advance by the step that the optimizer has just taken.

        Args:
            optimizer: The user's.
        """
        groups = optimizer.param_groups
        self.buildup += [0.0] * (len(groups) - len(self.buildup))
        self.rates = []
        for index, group in enumerate(groups):
            rate, beta = float(group["lr"]), float(group.get("momentum", 0.0))
            if beta:
                started = self.buildup[index] > 0
                c = beta * self.buildup[index] + (1 - float(group["dampening"])) if started else 1.0
                self.buildup[index] = c
                rate *= 1 + beta * c if group["nesterov"] else c
            self.rates.append(rate)
        self.step += 1
        self.time += max(self.rates)

    def share(self, index: int) -> float:
        """Compute how fast a group moved beside the fastest one: M is scaled by it.

        Args:
            index: The group.

        Returns:
            In [0, 1].
        """
        fastest = max(self.rates)
        return self.rates[index] / fastest if fastest > 0 else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Turn into plain containers.

        Returns:
            The state.
        """
        return {"step": self.step, "time": self.time, "buildup": list(self.buildup), "rates": list(self.rates)}


@dataclass(frozen=True)
class Mechanics:
    """What the optimizer applies to a gradient, by parameter name.

    Attributes:
        precond: Diagonal of M, a tensor or one number.
        decay: Direction of weight decay, M⊙λ⊙w, λ⊙w or, gated, q⊙λ⊙w; None where no group decays.
        gate_open: Share of open gates (q > ½) by parameter; None without a gate.
        ungated: Diagonal of M⁰, without the gate.
        gates: q; None without a gate.
    """

    precond: dict[str, Tensor | float]
    decay: dict[str, Tensor] | None
    gate_open: Tensor | None
    ungated: dict[str, Tensor | float]
    gates: dict[str, Tensor] | None


def mechanics(
    optimizer: Optimizer, parameters: dict[str, nn.Parameter], clock: Clock, *, at: dict[str, Tensor], precond: PrecondFn | None
) -> Mechanics:
    """Read M, weight decay and gate from the optimizer's state after its step.

    Args:
        optimizer: The user's.
        parameters: Trained parameters, by name.
        clock: After the tick of that step.
        at: Weights at which decay acts (those of the snapshot).
        precond: A user's M.

    Returns:
        The mechanics.
    """
    plain, gates = ungated_diagonals(optimizer, parameters, clock, precond=precond), current_gates(optimizer, parameters)
    diagonal = dict(plain)
    decay: dict[str, Tensor] = {}
    opened: dict[str, float] = {}
    for index, group, name, _ in _held(optimizer, parameters):
        if gates is not None:
            gate, ungated = gates[name], plain[name]
            opened[name] = float((gate > 0.5).double().mean())
            diagonal[name] = ungated * (gate.to(ungated) if isinstance(ungated, Tensor) else gate.to(torch.float32))
        strength = float(group.get("weight_decay", 0.0))
        if strength:
            weight = at[name].detach()
            if group.get("decay") == "gated" and gates is not None:
                weight = weight * gates[name].to(weight)
            decay[name] = strength * (weight * plain[name] if _is_coupled(optimizer, group) else clock.share(index) * weight)
    still = {name: torch.zeros_like(parameter) for name, parameter in parameters.items() if name not in decay}
    shares = torch.tensor([opened[name] for name in parameters], dtype=torch.float64) if opened else None
    return Mechanics(diagonal, decay | still if decay else None, shares, plain, gates)


def ungated_diagonals(
    optimizer: Optimizer, parameters: dict[str, nn.Parameter], clock: Clock, *, precond: PrecondFn | None
) -> dict[str, Tensor | float]:
    """Read the diagonal of M⁰ from the optimizer's state after its step.

    Args:
        optimizer: The user's.
        parameters: Trained parameters, by name.
        clock: After the tick of that step.
        precond: A user's M.

    Returns:
        By name, scaled by how fast the parameter's group moved.
    """
    found: dict[str, Tensor | float] = {}
    for index, group, name, parameter in _held(optimizer, parameters):
        own = precond(optimizer, parameter) if precond is not None else _ungated(optimizer, group, parameter)
        share = clock.share(index)
        found[name] = own if share == 1.0 else own * share
    return found


def current_gates(optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor] | None:
    """Read q from the optimizer's state after its step.

    Args:
        optimizer: The user's.
        parameters: Trained parameters, by name.

    Returns:
        By name; None without a gate.
    """
    if not isinstance(optimizer, GatedAdamW):
        return None
    return {name: optimizer.gate_of(parameter) for _, _, name, parameter in _held(optimizer, parameters)}


def _held(optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> Iterator[tuple[int, dict[str, Any], str, nn.Parameter]]:
    """Go through the trained parameters that an optimizer holds: number of the group, group, name, parameter."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) in names:
                yield index, group, names[id(parameter)], parameter


def was_skipped(optimizer: Optimizer) -> bool:
    """Say whether a fused optimizer skips this step, because `torch.amp.GradScaler` found infinite gradients.

    Other optimizers are not even called then.

    Args:
        optimizer: The user's, inside a step hook.

    Returns:
        Whether the weights stay as they are.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found > 0)


def received_gradients(optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Read the gradients as the optimizer's step uses them: after clipping, without the factor of `torch.amp.GradScaler`.

    Args:
        optimizer: The user's, inside its pre-step hook.
        parameters: Trained parameters, by name.

    Returns:
        Gradients by name; zero where there is none.
    """
    scale = getattr(optimizer, "grad_scale", None)  # set only for fused optimizers, which unscale gradients themselves
    grads = {name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for name, parameter in parameters.items()}
    return {name: grad.detach() if scale is None else grad.detach() / torch.as_tensor(scale).to(grad) for name, grad in grads.items()}


def _ungated(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> Tensor | float:
    """Compute M⁰: one for SGD, for the Adam family as in `diagonals`."""
    if isinstance(optimizer, GatedAdamW):
        return optimizer.preconditioner_of(parameter)
    diagonal = DIAGONALS.get(type(optimizer))
    if diagonal is None:
        return 1.0
    state = optimizer.state.get(parameter)
    # Without a gradient so far Adam has not moved it.
    return diagonal(group, state) if state else 0.0


def _is_coupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Say whether decay passes through M (Adam's L2 term) or not (AdamW); for SGD M is one."""
    if isinstance(optimizer, AdamW | GatedAdamW):
        return False
    return not group.get("decoupled_weight_decay")


def _plain(value: Any) -> Any:
    """Turn a tensor learning rate into a number."""
    return float(value) if isinstance(value, Tensor) else value
