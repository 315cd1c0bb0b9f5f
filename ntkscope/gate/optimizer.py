"""GatedAdamW: AdamW that updates a parameter only as far as its mean gradient beats its noise."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from ntkscope._checks import InputError, UnsupportedError
from ntkscope._display import Displayed
from ntkscope._types import GateKind
from ntkscope.gate.adamw_state import HALF_PRECISION, adamw_of, check_adamw, gated_groups, gated_state
from ntkscope.gate.gate_statistics import OptimizerGateStatistics, new_counts, summarize_counts
from ntkscope.gate.options import LATER_OPTIONS, PATH_OPTIONS, alpha_of, check_options
from ntkscope.gate.step import Alpha, Center, Decay, current_gate
from ntkscope.gate.update import AVERAGES, Job, check_gradient, check_variances, local_part, new_state, prepare_jobs, run_jobs


class GatedAdamW(Displayed, Optimizer):
    """A drop-in for torch.optim.AdamW with a gate on every parameter; every option can be set per parameter group.

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate η, `>= 0`; a one-element tensor is accepted.
        betas: β₁ and β₂ in [0, 1).
        eps: ε of the denominator, `>= 0`.
        weight_decay: Decoupled weight decay λ_wd, `>= 0`.
        rho: ρ of the gradient variance, in [0, 1).
        gate: "soft" (the paper's default), "hard", "snr", or "open": AdamW itself.
        alpha: Noise multiple that the squared mean gradient must beat; a number, "unbiased" or "finite" (see `resolve_alpha`).
        lambda_pop: Noise weight λ of the soft and snr gates.
        gate_warmup: Steps with an open gate; at the first step the statistics cannot tell signal from noise.
        center: "paper" or "corrected" (see `gated_adam_step`).
        batch_size: For alpha="finite".
        dataset_size: For alpha="finite".
        maximize: Ascend instead of descending.
        decay: "plain": decay acts behind closed gates too, as in the paper; "gated": the gate multiplies it.
        foreach: One call per operation for all tensors; None: on CUDA only.
        fused: One compiled pass over memory (torch.compile; needs a compiler). Excludes `foreach`.
        capturable: Keep the count of steps on the device and read nothing back, for CUDA graphs; give a tensor `lr` to change it there.
        gate_stats: Count what the gate lets through, for `gate_statistics`.

    Raises:
        InputError: If an option is out of range.
        UnsupportedError: If a parameter is complex, a gradient sparse, or `fused` finds no compiler.

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
        decay: Decay = "plain",
        foreach: bool | None = None,
        fused: bool = False,
        capturable: bool = False,
        gate_stats: bool = False,
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
            "decay": decay,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "gate_stats": gate_stats,
        }
        self._counts: dict[Tensor, Tensor] = {}
        super().__init__(params, defaults)

    def __repr__(self) -> str:
        return Optimizer.__repr__(self)  # what every optimizer prints: its groups

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_counts", {})
        for group in self.param_groups:
            for name, value in LATER_OPTIONS.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checking its options.

        Args:
            param_group: `params`, and the options that differ from the defaults.

        Raises:
            InputError: If an option is out of range.
            UnsupportedError: If a parameter is complex.
        """
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if any(parameter.is_complex() for parameter in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise UnsupportedError("GatedAdamW does not support complex parameters. View them as real (torch.view_as_real).")

    @classmethod
    def from_adamw(cls, optimizer: Optimizer, **options: Any) -> "GatedAdamW":
        """Go on from a torch.optim.AdamW, on the same parameters.

        m, v, t and the groups' settings are taken over, as copies. The variance that AdamW never kept starts at ŝ = max(v̂ − m̂², 0),
        which looks back as far as v does, 1/(1−β₂) steps, and is forgotten at rate ρ.

        Args:
            optimizer: An AdamW without amsgrad.
            options: Keywords of GatedAdamW for all groups, in place of AdamW's where both have them; `fused` is never taken over.

        Returns:
            The gated optimizer. Use it in place of the other, not beside it.

        Raises:
            UnsupportedError: If the optimizer is another one, or uses amsgrad.
            InputError: If an option is out of range.

        Example:
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> GatedAdamW.from_adamw(torch.optim.AdamW([weight], lr=0.1), alpha="unbiased").param_groups[0]["lr"]
            0.1
        """
        check_adamw(optimizer)
        assert isinstance(optimizer, AdamW)
        if options.get("fused"):
            options = {"foreach": None} | options
        made = cls([group | options for group in gated_groups(optimizer)], **options)
        for group in made.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter)
                if state:
                    made.state[parameter] = gated_state(state, group)
        return made

    def to_adamw(self, **options: Any) -> AdamW:
        """Go on with a torch.optim.AdamW, on the same parameters.

        Args:
            options: Keywords of AdamW for all groups, in place of those taken over; `fused` is never taken over.

        Returns:
            AdamW with copies of m, v and t; the variance is dropped.
        """
        return adamw_of(self.param_groups, self.state, options)

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], Any] | None = None, *, variance: Mapping[Tensor, Tensor] | None = None
    ) -> Any:
        """Take one step.

        Args:
            closure: Evaluates the model again and returns the loss.
            variance: By parameter, the variance of the batch's mean gradient. It is this step's ŝ in place of the streaming estimate,
                which goes on from it. Parameters that are not named keep theirs; one without a gradient is left alone.

        Returns:
            What the closure returned, or None.

        Raises:
            InputError: If a variance belongs to no parameter, has another shape, or is negative or not finite (with `capturable` values
                are not looked at, which would read them back).
            UnsupportedError: If a gradient is sparse, or `fused` finds no compiler.
        """
        if torch.cuda.is_available():
            self._cuda_graph_capture_health_check()
        given = check_variances(variance or {}, self.param_groups)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                check_gradient(parameter)
        work = [
            ([self._job(held, group, given.get(held)) for held in group["params"] if held.grad is not None], group)
            for group in self.param_groups
        ]
        for jobs, group in work:
            prepare_jobs(jobs, group)
        for jobs, group in work:
            run_jobs(jobs, group)
        return loss

    def gate_statistics(self) -> OptimizerGateStatistics:
        """Read what the gate let through since the start, or the last reset; the one read from the device.

        Counts are not part of `state_dict`, nor of copies.

        Returns:
            The statistics.

        Raises:
            InputError: If no group has `gate_stats=True`.
        """
        if not any(group["gate_stats"] for group in self.param_groups):
            raise InputError("No group counts its gates. Make the optimizer with gate_stats=True.")
        places = [((g, i), held) for g, group in enumerate(self.param_groups) for i, held in enumerate(group["params"])]
        counted = {place: held for place, held in places if held in self._counts}
        sizes = {place: local_part(held).numel() for place, held in counted.items()}
        return summarize_counts({place: self._counts[held] for place, held in counted.items()}, sizes)

    def reset_gate_statistics(self) -> None:
        """Start counting afresh."""
        for counts in self._counts.values():
            counts.zero_()

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
            alpha=alpha_of(group),
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
        """Load a state, of any path and of older versions.

        `foreach`, `fused`, `capturable` and `gate_stats` stay this optimizer's: they say how to compute, not what. Averages keep the
        precision they were saved in (torch would cast them to a half-precision parameter's).

        Args:
            state_dict: From `state_dict()`.
        """
        own_options = [{name: group[name] for name in PATH_OPTIONS} for group in self.param_groups]
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, own, strict=True):
            if parameter.dtype in HALF_PRECISION and index in state_dict["state"]:
                for name in AVERAGES:
                    value: Tensor = state_dict["state"][index][name]
                    self.state[parameter][name] = value.to(parameter.device, copy=True)
        for group, options in zip(self.param_groups, own_options, strict=True):
            group.update(options)
            for parameter in group["params"]:
                if self.state.get(parameter):
                    step = torch.as_tensor(self.state[parameter]["step"], dtype=torch.float32)
                    self.state[parameter]["step"] = step.to(parameter.device if group["capturable"] else "cpu")

    def _job(self, parameter: Tensor, group: dict[str, Any], variance: Tensor | None) -> Job:
        """Collect what the step of one parameter needs, with a new state at its first step."""
        state = self.state[parameter]
        if not state:
            state.update(new_state(parameter, capturable=group["capturable"]))
        counts = None
        if group["gate_stats"]:
            counts = self._counts.setdefault(parameter, new_counts(parameter.device))
        return Job.of(parameter, state, variance=variance, counts=counts)

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        """Find the group of a parameter."""
        for group in self.param_groups:
            if any(held is parameter for held in group["params"]):
                return group
        raise InputError("The optimizer does not hold this parameter.")
