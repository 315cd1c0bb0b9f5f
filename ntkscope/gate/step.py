"""The one gated-Adam step (theory.md section 6; Litman & Guo, Algorithm 1).

s ← ρ s + (1−ρ)(g − m_{t−1})²          before m is updated
m ← β₁ m + (1−β₁) g        v ← β₂ v + (1−β₂) g²        m̂, v̂, ŝ bias-corrected
hard: q = 1[m̂² > α ŝ]
soft: q = d / (d + λ ŝ + ε_q),  d = max(m̂² − α ŝ, 0)
snr:  q = m̂² / (m̂² + λ ŝ + ε_q)
w ← w − η q ⊙ m̂ / (√v̂ + ε) − η λ_wd w          decay="gated": − η λ_wd q ⊙ w
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._checks import InputError, check_choice, check_number
from ntkscope._types import GateKind

Center = Literal["paper", "corrected"]
Alpha = float | Literal["unbiased", "finite"]
Decay = Literal["plain", "gated"]

# Decides 0/0 as closed. Larger, it would close the gates of small gradients: 1e-12 those below 1e-6.
GATE_EPS = 1e-30
# Keeps ε_q / (m̂/m)² a normal float32.
SMALLEST = 1e-37


def gate_values(
    m_hat: Float[Tensor, "*shape"],
    s_hat: Float[Tensor, "*shape"],
    *,
    kind: GateKind,
    alpha: float = 1.0,
    lambda_pop: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """Compute the gate q of every parameter from its mean gradient and the variance of its gradients.

    Args:
        m_hat: Bias-corrected mean gradient m̂.
        s_hat: Bias-corrected gradient variance ŝ, `>= 0`.
        kind: "hard" (open iff m̂² > α ŝ; equality is closed), "soft", "snr" or "open" (all ones).
        alpha: Noise multiple α that the squared mean must beat; "hard" and "soft".
        lambda_pop: Noise weight λ in the denominator; "soft" and "snr".

    Returns:
        q in [0, 1]; 0 where both m̂ and ŝ vanish, but for "open".

    Raises:
        InputError: If the kind is unknown, or a number is negative.

    Example:
        >>> gate_values(torch.tensor([1.0, 0.1]), torch.tensor([0.5, 0.5]), kind="hard")
        tensor([1., 0.])

    Source:
        theory.md section 6; the paper's Algorithm 1 ("soft" is its default).
    """
    check_choice("kind", kind, get_args(GateKind))
    check_number("alpha", alpha, low=0.0)
    check_number("lambda_pop", lambda_pop, low=0.0)
    if kind == "open":
        return torch.ones_like(m_hat)
    squared = m_hat.square()
    if kind == "hard":
        return (squared > alpha * s_hat).to(m_hat.dtype)
    excess = squared.sub_(s_hat, alpha=alpha).clamp_(min=0.0) if kind == "soft" else squared
    return excess.div_(torch.add(excess, s_hat, alpha=lambda_pop).add_(GATE_EPS))


def gated_adam_step(
    parameter: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    exp_avg: Float[Tensor, "*shape"],
    exp_avg_sq: Float[Tensor, "*shape"],
    grad_var: Float[Tensor, "*shape"],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    rho: float = 0.99,
    gate: GateKind = "soft",
    alpha: float = 1.0,
    lambda_pop: float = 1.0,
    gate_warmup: int = 1,
    center: Center = "paper",
    decay: Decay = "plain",
    variance: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Take one step, in place. With an open gate it is torch's AdamW, operation by operation.

    Args:
        parameter: w, updated.
        gradient: g of this step, in the dtype of the state.
        exp_avg: m, updated.
        exp_avg_sq: v, updated.
        grad_var: s, updated.
        step: t, this step's number, from 1.
        lr: η.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ_wd, decoupled.
        rho: ρ of the variance average.
        gate: As `kind` of `gate_values`.
        alpha: As for `gate_values`.
        lambda_pop: As for `gate_values`.
        gate_warmup: The gate is open while t is at most this: at t = 1 m̂² = ŝ identically, and rounding would decide.
        center: What g is compared with: "paper" m_{t−1}; "corrected" m̂_{t−1}, with s starting at t = 2.
        decay: "plain", or "gated": the gate multiplies the weight decay too.
        variance: ŝ of this step, in place of the streaming average, which goes on from it.

    Returns:
        The gate q that was applied.
    """
    previous_step = step - 1
    if variance is not None:
        grad_var.copy_(variance).mul_(_bias_correction(rho, step if center == "paper" else previous_step))
    elif center == "paper":
        deviation = gradient - exp_avg
        grad_var.mul_(rho).addcmul_(deviation, deviation, value=1 - rho)
    elif previous_step:
        deviation = gradient - exp_avg / (1 - betas[0] ** previous_step)
        grad_var.mul_(rho).addcmul_(deviation, deviation, value=1 - rho)
    exp_avg.lerp_(gradient, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    opened = current_gate(
        exp_avg,
        grad_var,
        step=step,
        beta1=betas[0],
        rho=rho,
        gate=gate,
        alpha=alpha,
        lambda_pop=lambda_pop,
        gate_warmup=gate_warmup,
        center=center,
    )
    # From here on the order of operations is that of torch.optim.AdamW.
    if decay == "gated":
        parameter.mul_(1 - lr * weight_decay * opened)
    else:
        parameter.mul_(1 - lr * weight_decay)
    denominator = (exp_avg_sq.sqrt() / (1 - betas[1] ** step) ** 0.5).add_(eps)
    parameter.addcdiv_(opened * exp_avg, denominator, value=-lr / (1 - betas[0] ** step))
    return opened


def current_gate(
    exp_avg: Float[Tensor, "*shape"],
    grad_var: Float[Tensor, "*shape"],
    *,
    step: int,
    beta1: float,
    rho: float,
    gate: GateKind,
    alpha: float,
    lambda_pop: float,
    gate_warmup: int,
    center: Center,
) -> Float[Tensor, "*shape"]:
    """Compute the gate of a step from the state after its averages were updated.

    Args:
        exp_avg: m.
        grad_var: s.
        step: t.
        beta1: β₁.
        rho: ρ.
        gate: As `kind` of `gate_values`.
        alpha: As for `gate_values`.
        lambda_pop: As for `gate_values`.
        gate_warmup: As for `gated_adam_step`.
        center: As for `gated_adam_step`.

    Returns:
        q.
    """
    if step <= gate_warmup:
        return torch.ones_like(exp_avg)
    samples = step if center == "paper" else step - 1
    s_hat = grad_var / _bias_correction(rho, samples)
    return gate_values(exp_avg / (1 - beta1**step), s_hat, kind=gate, alpha=alpha, lambda_pop=lambda_pop)


def resolve_alpha(alpha: Alpha, *, beta1: float, batch_size: int | None, dataset_size: int | None) -> float:
    """Turn a choice of α into a number.

    Args:
        alpha: A number; "unbiased", (1−β₁)/(1+β₁), the streaming counterpart of the U-statistic rule; or "finite", b/(n−b), for a
            finite training set sampled without replacement.
        beta1: β₁.
        batch_size: b, for "finite".
        dataset_size: n, for "finite".

    Returns:
        α.

    Raises:
        InputError: If the choice is unknown, a size is missing, or b is not smaller than n.

    Source:
        theory.md section 6: Var m̂ = (1−β₁)/(1+β₁) of the batch mean's variance, so α = 1 is a stricter rule (19 times at β₁ = 0.9).
    """
    if isinstance(alpha, int | float) and not isinstance(alpha, bool):
        check_number("alpha", alpha, low=0.0)
        return float(alpha)
    check_choice("alpha", alpha, ("unbiased", "finite"))
    if alpha == "unbiased":
        return (1 - beta1) / (1 + beta1)
    if batch_size is None or dataset_size is None:
        raise InputError("alpha='finite' needs `batch_size` and `dataset_size`. Give both, or a number for `alpha`.")
    if not 1 <= batch_size < dataset_size:
        raise InputError(
            f"alpha='finite' needs 1 <= batch_size < dataset_size, got {batch_size} and {dataset_size}: "
            "a full batch has no sampling noise to gate. Use gate='open'."
        )
    return batch_size / (dataset_size - batch_size)


class StepRow(NamedTuple):
    """The numbers of one step, for the paths that work on many elements or tensors at once.

    Floats or 0-d tensors; or lists of 0-d tensors, one per parameter. Bias corrections are folded into what multiplies m, v and s, which
    saves work on every element: the gate compares m² with s, and the move is `step_size` q m / (√v + `eps`).

    Attributes:
        center: What m_{t−1} is multiplied with before g is compared with it.
        keep: What s is multiplied with.
        new: Weight of (g − m_{t−1})² in s.
        mean_new: 1 − β₁.
        square_keep: β₂.
        square_new: 1 − β₂.
        mean_scale: m̂ / m.
        variance_scale: ŝ / s.
        step_size: η (m̂/m) / (√v̂/√v).
        decay: η λ_wd.
        eps: ε / (√v̂/√v).
        threshold: Of the gate: what multiple of s m² must beat, α (ŝ/s) / (m̂/m)².
        noise: Of the gate: λ (ŝ/s) / (m̂/m)².
        smallest: Of the gate: ε_q / (m̂/m)².
        warm: 1 while the gate is open because of `gate_warmup`, then 0.
    """

    center: Any
    keep: Any
    new: Any
    mean_new: Any
    square_keep: Any
    square_new: Any
    mean_scale: Any
    variance_scale: Any
    step_size: Any
    decay: Any
    eps: Any
    threshold: Any
    noise: Any
    smallest: Any
    warm: Any


def step_row(step: int | Float[Tensor, " parameters"], options: Mapping[str, Any], *, alpha: float, is_external: bool) -> StepRow:
    """Compute the numbers of a step; of a tensor of steps without reading it back from its device.

    Args:
        step: t, from 1; a tensor in float64 where the device has it.
        options: Of the parameter group.
        alpha: α as a number.
        is_external: Whether s was set from outside, so that it stays.

    Returns:
        Floats, or where they depend on a tensor of steps (or of a learning rate), tensors.
    """
    (beta1, beta2), rho, lr = options["betas"], options["rho"], options["lr"]
    if isinstance(lr, Tensor):
        lr = lr.to(step).reshape(()) if isinstance(step, Tensor) else float(lr)
    is_corrected = options["center"] == "corrected"
    samples = step - 1 if is_corrected else step
    has_none = samples == 0  # added as 1 where a correction would divide by 0
    has_some = samples - (samples - 1) * (samples > 1)  # min(samples, 1) of a number or a tensor, in its dtype
    mean_scale = 1 / (1 - beta1**step)
    variance_scale = 1 / (1 - rho**samples + has_none)
    root = (1 - beta2**step) ** 0.5  # √v / √v̂
    noise = variance_scale / mean_scale**2
    return StepRow(
        center=1 / (1 - beta1**samples + has_none) if is_corrected else 1.0,
        keep=1.0 if is_external else rho,
        new=0.0 if is_external else (1 - rho) * has_some,
        mean_new=1 - beta1,
        square_keep=beta2,
        square_new=1 - beta2,
        mean_scale=mean_scale,
        variance_scale=variance_scale,
        step_size=lr * mean_scale * root,
        decay=lr * options["weight_decay"],
        eps=options["eps"] * root,
        threshold=alpha * noise,
        noise=options["lambda_pop"] * noise,
        smallest=GATE_EPS / mean_scale**2 + SMALLEST,
        warm=(step <= options["gate_warmup"]) * 1.0,
    )


def stack_rows(row: StepRow, steps: Float[Tensor, " parameters"], dtype: torch.dtype) -> Float[Tensor, "parameters numbers"]:
    """Lay the numbers of a tensor of steps out as one row per parameter.

    Args:
        row: From `step_row`.
        steps: What it was computed from.
        dtype: Wanted.

    Returns:
        The table.
    """
    columns = [value.to(steps).expand_as(steps) if isinstance(value, Tensor) else torch.full_like(steps, value) for value in row]
    return torch.stack(columns, dim=1).to(dtype)


def _bias_correction(rate: float, samples: int) -> float:
    """Compute 1 − ρ^samples; 1 without a sample (t = 1, corrected), where no noise is known."""
    return 1 - rate**samples if samples else 1.0
