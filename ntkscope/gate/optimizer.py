"""GatedAdamW: AdamW that updates a parameter only as far as its mean gradient beats its noise."""

from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from ntkscope._checks import InputError, UnsupportedError, check_choice, check_number
from ntkscope._types import GateKind
from ntkscope.gate.step import Alpha, Center, current_gate, gated_adam_step, resolve_alpha

HALF_PRECISION = (torch.float16, torch.bfloat16)


class GatedAdamW(Optimizer):
    """A drop-in for torch.optim.AdamW with a gate on every parameter; every option can be set per parameter group.

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate η, `>= 0`; a one-element tensor is accepted.
        betas: β₁ and β₂ in [0, 1).
        eps: ε of the denominator, `>= 0`.
        weight_decay: Decoupled weight decay; it is not gated.
        rho: ρ of the gradient variance, in [0, 1).
        gate: "soft" (the paper's default), "hard", "snr", or "open": AdamW itself.
        alpha: Noise multiple that the squared mean gradient must beat; a number, "unbiased" or "finite" (see `resolve_alpha`).
        lambda_pop: Noise weight λ of the soft and snr gates.
        gate_warmup: Steps with an open gate; at the first step the statistics cannot tell signal from noise.
        center: "paper" or "corrected" (see `gated_adam_step`).
        batch_size: For alpha="finite".
        dataset_size: For alpha="finite".
        maximize: Ascend instead of descending.

    Raises:
        InputError: If an option is out of range.
        UnsupportedError: If a parameter is complex, or a gradient sparse.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = GatedAdamW([weight], lr=0.1)
        >>> weight.sum().backward()
        >>> optimizer.step()

    Source:
        theory.md section 6; Litman & Guo, Algorithm 1. Deviations: ε_q = 1e-30, and an open gate at the first step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rho: float = 0.99,
        gate: GateKind = "soft",
        alpha: Alpha = 1.0,
        lambda_pop: float = 1.0,
        gate_warmup: int = 1,
        center: Center = "paper",
        batch_size: int | None = None,
        dataset_size: int | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rho": rho,
            "gate": gate,
            "alpha": alpha,
            "lambda_pop": lambda_pop,
            "gate_warmup": gate_warmup,
            "center": center,
            "batch_size": batch_size,
            "dataset_size": dataset_size,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checking its options.

        Args:
            param_group: `params`, and the options that differ from the defaults.

        Raises:
            InputError: If an option is out of range.
            UnsupportedError: If a parameter is complex.
        """
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if any(parameter.is_complex() for parameter in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise UnsupportedError("GatedAdamW does not support complex parameters. View them as real (torch.view_as_real).")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            UnsupportedError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alpha = _alpha_of(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, alpha)
        return loss

    def gate_of(self, parameter: Tensor) -> Tensor:
        """Recompute the gate that the last step applied to a parameter.

        Args:
            parameter: One of the optimizer's.

        Returns:
            q in [0, 1], shaped as the parameter; ones before its first step.

        Raises:
            InputError: If the optimizer does not hold the parameter.
        """
        group, state = self._group_of(parameter), self.state.get(parameter)
        if not state:
            return torch.ones_like(parameter)
        return current_gate(
            state["exp_avg"],
            state["grad_var"],
            step=int(state["step"]),
            beta1=group["betas"][0],
            alpha=_alpha_of(group),
            **{name: group[name] for name in ("rho", "gate", "lambda_pop", "gate_warmup", "center")},
        )

    def preconditioner_of(self, parameter: Tensor) -> Tensor:
        """Compute 1/(√v̂ + ε), what the last step multiplied the ungated mean gradient with.

        Args:
            parameter: One of the optimizer's.

        Returns:
            M⁰, shaped as the parameter; zeros before its first step.

        Raises:
            InputError: If the optimizer does not hold the parameter.
        """
        group, state = self._group_of(parameter), self.state.get(parameter)
        if not state:
            return torch.zeros_like(parameter)
        correction = 1 - group["betas"][1] ** int(state["step"])
        return 1 / ((state["exp_avg_sq"] / correction).sqrt() + group["eps"])

    def mean_gradient_of(self, parameter: Tensor) -> Tensor:
        """Compute m̂, the bias-corrected mean gradient of the last step.

        Args:
            parameter: One of the optimizer's.

        Returns:
            m̂, shaped as the parameter; zeros before its first step.

        Raises:
            InputError: If the optimizer does not hold the parameter.
        """
        group, state = self._group_of(parameter), self.state.get(parameter)
        if not state:
            return torch.zeros_like(parameter)
        return state["exp_avg"] / (1 - group["betas"][0] ** int(state["step"]))

    def variance_of(self, parameter: Tensor) -> Tensor:
        """Compute ŝ, the bias-corrected variance that the gate of the last step used.

        Args:
            parameter: One of the optimizer's.

        Returns:
            ŝ, shaped as the parameter; zeros before its first step.

        Raises:
            InputError: If the optimizer does not hold the parameter.
        """
        group, state = self._group_of(parameter), self.state.get(parameter)
        if not state:
            return torch.zeros_like(parameter)
        samples = int(state["step"]) - (group["center"] == "corrected")
        return state["grad_var"] / (1 - group["rho"] ** samples) if samples else state["grad_var"].clone()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; averages keep the precision they were saved in (torch would cast them to a half-precision parameter's).

        Args:
            state_dict: From `state_dict()`.
        """
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, own, strict=True):
            if parameter.dtype in HALF_PRECISION and index in state_dict["state"]:
                for name in ("exp_avg", "exp_avg_sq", "grad_var"):
                    value: Tensor = state_dict["state"][index][name]
                    self.state[parameter][name] = value.to(parameter.device, copy=True)

    def _update(self, parameter: Tensor, group: dict[str, Any], alpha: float) -> None:
        """Step one parameter."""
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise UnsupportedError("GatedAdamW does not support sparse gradients. Use nn.Embedding(sparse=False).")
        is_half = parameter.dtype in HALF_PRECISION
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq", "grad_var"):
                state[name] = torch.zeros_like(parameter, dtype=torch.float32 if is_half else None)
        state["step"] += 1
        if group["maximize"]:
            gradient = -gradient
        weight = parameter.float() if is_half else parameter
        gated_adam_step(
            weight,
            gradient.float() if is_half else gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["grad_var"],
            step=int(state["step"]),
            lr=float(group["lr"]),
            betas=group["betas"],
            alpha=alpha,
            **{name: group[name] for name in ("eps", "weight_decay", "rho", "gate", "lambda_pop", "gate_warmup", "center")},
        )
        if is_half:
            parameter.copy_(weight)

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        """Find the group of a parameter."""
        for group in self.param_groups:
            if any(held is parameter for held in group["params"]):
                return group
        raise InputError("The optimizer does not hold this parameter.")


def _alpha_of(group: dict[str, Any]) -> float:
    """Resolve the group's α."""
    return resolve_alpha(group["alpha"], beta1=group["betas"][0], batch_size=group["batch_size"], dataset_size=group["dataset_size"])


def _check_options(options: dict[str, Any]) -> None:
    """Check all options of one group."""
    for name in ("lr", "eps", "weight_decay", "lambda_pop"):
        check_number(name, float(options[name]), low=0.0)
    for name, value in zip(("betas[0]", "betas[1]", "rho"), (*options["betas"], options["rho"]), strict=True):
        check_number(name, float(value), low=0.0, high=1.0, open_high=True)
    check_number("gate_warmup", options["gate_warmup"], low=0)
    check_choice("gate", options["gate"], get_args(GateKind))
    check_choice("center", options["center"], get_args(Center))
    _alpha_of(options)
