"""The variance of the batch-mean gradient, three ways: exact, from microbatches, and streaming (theory.md, section 6).

All three estimate the same number for every parameter entry, Var ḡ for ḡ the mean gradient of a batch of b examples:

| backend | formula | needs |
| --- | --- | --- |
| exact | σ²/(b−1), σ² over the examples of one batch | per-example gradients (`kernel.moments`) |
| microbatch | Σ_j (g_j − ḡ)² / (k(k−1)), g_j of k equal parts of the batch | k backward passes instead of one |
| streaming | ŝ (1+β₁)/2, because E ŝ = 2/(1+β₁) Var ḡ where the gradient does not drift | nothing: the optimizer's state |

The first two are without bias for examples drawn independently, but noisy in single entries. The streaming one averages over 1/(1−ρ)
steps: it is smoother, but late where the noise grows or shrinks, and takes drift of the gradient in 1/(1−β₁) steps for noise.
Multiplied by 2/(1+β₁) each can take the place of ŝ in the gate.
"""

from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntkscope._checks import InputError, InputTypeError, check_choice, check_number
from ntkscope.gate.optimizer import GatedAdamW
from ntkscope.gate.step import Center
from ntkscope.kernel.moments import GradientMoments

Gradients = Mapping[str, Tensor]


def exact_variance(moments: GradientMoments, *, batch_size: int | None = None) -> dict[str, Float[Tensor, "..."]]:
    """Compute the variance of the batch-mean gradient from per-example gradients.

    Args:
        moments: Of the batch; or of a larger set of n examples from the same distribution, whose variance is known better.
        batch_size: b, examples of the batch that is meant; those of `moments` if not given.

    Returns:
        σ²/(b−1) by parameter name; in general σ² n/((n−1) b).

    Raises:
        InputError: If `batch_size` is below one.
    """
    if batch_size is None:
        return moments.variance_of_mean()
    check_number("batch_size", batch_size, low=1)
    return {name: own * (moments.num_examples / batch_size) for name, own in moments.variance_of_mean().items()}


class MicrobatchVariance:
    """Variance of the batch-mean gradient from mean gradients of its equally sized parts, one after the other.

    Only a mean and a sum are kept (Welford), never the gradients. Parts must be of equal size; each gradient is that of its own part's
    mean loss, so that `.grad` must be cleared before every backward pass.

    Example:
        >>> parts = MicrobatchVariance()
        >>> for gradient in (1.0, 3.0):
        ...     parts.add({"weight": torch.tensor([gradient])})
        >>> parts.mean()["weight"].item(), parts.variance()["weight"].item()
        (2.0, 1.0)

    Source:
        theory.md section 6; Welford 1962.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}

    @property
    def num_parts(self) -> int:
        """k, microbatches so far."""
        return self._count

    def add(self, gradients: Gradients | nn.Module) -> None:
        """Add the gradient of one microbatch.

        Args:
            gradients: Mean gradient by parameter name; or a model, whose `.grad` are taken.

        Raises:
            InputError: If names or shapes differ from those of the first microbatch, or there is no gradient.
            InputTypeError: If it is neither.
        """
        found = named_gradients(gradients)
        if not self._count:
            self._mean = {name: torch.zeros_like(gradient, dtype=torch.float64) for name, gradient in found.items()}
            self._squares = {name: total.clone() for name, total in self._mean.items()}
        check_same(found, self._mean, "the first microbatch")
        self._count += 1
        for name, gradient in found.items():
            exact, mean = gradient.double(), self._mean[name]
            gap = exact - mean
            mean.add_(gap, alpha=1 / self._count)
            self._squares[name].addcmul_(gap, exact - mean)

    def mean(self) -> dict[str, Float[Tensor, "..."]]:
        """Compute the mean gradient of the whole batch.

        Returns:
            ḡ by parameter name, in float64; empty before the first microbatch.
        """
        return {name: mean.clone() for name, mean in self._mean.items()}

    def variance(self) -> dict[str, Float[Tensor, "..."]]:
        """Compute the variance of that mean.

        Returns:
            Σ_j (g_j − ḡ)² / (k(k−1)) by parameter name, in float64.

        Raises:
            InputError: If there are fewer than two microbatches.
        """
        if self._count < 2:
            raise InputError(f"The variance over microbatches needs at least two of them, got {self._count}. Split the batch in parts.")
        return {name: squares / (self._count * (self._count - 1)) for name, squares in self._squares.items()}


def microbatch_variance(gradients: Iterable[Gradients]) -> dict[str, Float[Tensor, "..."]]:
    """Compute the variance of the batch-mean gradient from the mean gradients of k >= 2 equal parts of the batch.

    Args:
        gradients: One mapping of names to gradients per microbatch; a generator is consumed one by one.

    Returns:
        As `MicrobatchVariance.variance`.

    Raises:
        InputError: As there.
    """
    parts = MicrobatchVariance()
    for gradient in gradients:
        parts.add(gradient)
    return parts.variance()


class StreamingMoments:
    """The gate's running averages m and s beside any optimizer, from the gradients that it is shown.

    Args:
        beta1: β₁ of the mean, in [0, 1).
        rho: ρ of the variance, in [0, 1).
        center: What a gradient is compared with: "paper" m_{t−1}; "corrected" m̂_{t−1}, with s starting at t = 2.

    Attributes:
        beta1: As given.
        rho: As given.
        center: As given.

    Raises:
        InputError: If an option is out of range.

    Source:
        theory.md section 6; Litman & Guo, Algorithm 1.
    """

    def __init__(self, *, beta1: float = 0.9, rho: float = 0.99, center: Center = "paper") -> None:
        check_number("beta1", beta1, low=0.0, high=1.0, open_high=True)
        check_number("rho", rho, low=0.0, high=1.0, open_high=True)
        check_choice("center", center, get_args(Center))
        self.beta1, self.rho, self.center = beta1, rho, center
        self._step = 0
        self._exp_avg: dict[str, Tensor] = {}
        self._grad_var: dict[str, Tensor] = {}

    @property
    def num_steps(self) -> int:
        """t, gradients so far."""
        return self._step

    def add(self, gradients: Gradients | nn.Module) -> None:
        """Add the gradient of one step.

        Args:
            gradients: Gradient by parameter name; or a model, whose `.grad` are taken.

        Raises:
            InputError: If names or shapes differ from those of the first step, or there is no gradient.
            InputTypeError: If it is neither.
        """
        found = named_gradients(gradients)
        if not self._step:
            self._exp_avg = {name: torch.zeros_like(gradient, dtype=_at_least_float32(gradient)) for name, gradient in found.items()}
            self._grad_var = {name: total.clone() for name, total in self._exp_avg.items()}
        check_same(found, self._exp_avg, "the first step")
        self._step += 1
        for name, mean in self._exp_avg.items():
            gradient, spread = found[name].to(mean), self._grad_var[name]
            if self.center == "paper" or self._step > 1:  # before m is updated
                center = mean if self.center == "paper" else mean / (1 - self.beta1 ** (self._step - 1))
                gap = gradient - center
                spread.mul_(self.rho).addcmul_(gap, gap, value=1 - self.rho)
            mean.lerp_(gradient, 1 - self.beta1)

    def mean(self) -> dict[str, Float[Tensor, "..."]]:
        """Compute the bias-corrected mean gradient.

        Returns:
            m̂ by parameter name; empty before the first step.
        """
        return {name: mean / (1 - self.beta1**self._step) for name, mean in self._exp_avg.items()}

    def noise(self) -> dict[str, Float[Tensor, "..."]]:
        """Compute the bias-corrected ŝ, as the gate uses it.

        Returns:
            ŝ by parameter name; empty before the first step; zero before the second with center="corrected".
        """
        samples = self._step if self.center == "paper" else self._step - 1
        return {name: total / (1 - self.rho**samples) if samples > 0 else total.clone() for name, total in self._grad_var.items()}

    def state_dict(self) -> dict[str, Any]:
        """Turn into plain containers and tensors.

        Returns:
            The state.
        """
        options = {"beta1": self.beta1, "rho": self.rho, "center": self.center}
        return options | {"step": self._step, "exp_avg": dict(self._exp_avg), "grad_var": dict(self._grad_var)}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> "StreamingMoments":
        """Go on from a saved state.

        Args:
            state: From `state_dict`.

        Returns:
            Averages that continue.

        Raises:
            KeyError: If a field is missing.
        """
        averages = StreamingMoments(beta1=state["beta1"], rho=state["rho"], center=state["center"])
        averages._step = int(state["step"])
        averages._exp_avg = {name: value.clone() for name, value in state["exp_avg"].items()}
        averages._grad_var = {name: value.clone() for name, value in state["grad_var"].items()}
        return averages

    def variance(self) -> dict[str, Float[Tensor, "..."]]:
        """Estimate the variance of the batch-mean gradient, as `exact_variance` does.

        Returns:
            ŝ (1+β₁)/2 by parameter name.
        """
        return {name: total * ((1 + self.beta1) / 2) for name, total in self.noise().items()}


def streaming_variance(optimizer: GatedAdamW, parameters: Gradients | nn.Module) -> dict[str, Float[Tensor, "..."]]:
    """Read the variance of the batch-mean gradient off the optimizer's state.

    Args:
        optimizer: After some steps. For any other optimizer, see `StreamingMoments`.
        parameters: Of the optimizer, by name; or the model, whose trained parameters are taken.

    Returns:
        ŝ (1+β₁)/2 by parameter name, with β₁ of the parameter's group.

    Raises:
        InputError: If the optimizer does not hold a parameter.
    """
    if isinstance(parameters, nn.Module):
        parameters = {name: parameter for name, parameter in parameters.named_parameters() if parameter.requires_grad}
    beta1 = {id(parameter): group["betas"][0] for group in optimizer.param_groups for parameter in group["params"]}
    missing = sorted(name for name, parameter in parameters.items() if id(parameter) not in beta1)
    if missing:
        raise InputError(f"The optimizer does not hold {', '.join(missing)}. Give the parameters that it steps.")
    return {name: optimizer.variance_of(parameter) * ((1 + beta1[id(parameter)]) / 2) for name, parameter in parameters.items()}


def named_gradients(gradients: Gradients | nn.Module) -> dict[str, Tensor]:
    """Name the gradients of a model, or check a mapping of them.

    Args:
        gradients: By parameter name; or a model, of whose trained parameters those with a `.grad` are taken.

    Returns:
        Detached, by name.

    Raises:
        InputError: If there is none, or one is not a real dense floating-point tensor.
        InputTypeError: If it is neither a mapping of names to tensors nor a model.
    """
    if isinstance(gradients, nn.Module):
        gradients = {name: parameter.grad for name, parameter in gradients.named_parameters() if parameter.grad is not None}
    if not isinstance(gradients, Mapping) or not all(isinstance(value, Tensor) for value in gradients.values()):
        raise InputTypeError(f"Gradients must be a model or a mapping of parameter names to tensors, got {type(gradients).__name__}.")
    if not gradients:
        raise InputError("There is no gradient. Call loss.backward() first, or name at least one parameter.")
    for name, gradient in gradients.items():
        if gradient.is_sparse or not gradient.is_floating_point():
            raise InputError(f"The gradient in `{name}` must be real and dense, got {gradient.dtype}, {gradient.layout}.")
    return {name: gradient.detach() for name, gradient in gradients.items()}


def check_same(found: Gradients, first: Gradients, whose: str, *, label: str = "the gradient") -> None:
    """Check that two mappings have the same names and shapes.

    Args:
        found: The one.
        first: The other.
        whose: What `first` is, for the message.
        label: What `found` is, for the message.

    Raises:
        InputError: If not.
    """
    if set(found) != set(first):
        differing = sorted(set(found) ^ set(first))
        raise InputError(f"{label} must name the same parameters as {whose}; they differ in {', '.join(differing)}.")
    for name, gradient in found.items():
        if gradient.shape != first[name].shape:
            raise InputError(
                f"{label} must have the shapes of {whose}: `{name}` is {tuple(gradient.shape)}, there it is {tuple(first[name].shape)}."
            )


def _at_least_float32(gradient: Tensor) -> torch.dtype:
    """Choose the dtype of averages: half precision would lose (1−ρ) of a square."""
    return torch.float64 if gradient.dtype == torch.float64 else torch.float32
