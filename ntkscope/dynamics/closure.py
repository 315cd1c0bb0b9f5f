"""How far a window's numbers can be trusted: what the operators predict against what the run did (theory.md section 4)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._display import Displayed
from ntkscope.dynamics.dissipation import Dissipation

ENERGY_LIMIT = 0.05
GRADIENT_LIMIT = 0.25
LOSS_FLOOR = 1e-3  # of the loss at the start: a window that changes the loss by less has no energy error worth the name
LARGE_STEP = 0.5  # kernel change between snapshots beyond which an average stands for nothing
SCALE_LIMIT = 0.1


@dataclass(frozen=True)
class Closure(Displayed):
    """Errors of one window.

    Attributes:
        energy_predicted: Loss that the operators say was dissipated.
        energy_observed: Φ(s) − Φ(T), measured.
        energy_error: |predicted − observed| / max(|observed|, 1e-3 Φ(s)).
        gradient_error: ‖predicted g_T − g_T‖ / ‖g_T‖.
        gradient_error_initial: The same over ‖g_s‖; after interpolation g_T vanishes and the first is no guide.
        query_error: ‖predicted − observed test motion‖ / ‖observed‖; None without a query set, or where weight decay acts and its motion
            of the query outputs was not recorded.
        forcing_share: Share of the dissipated loss that is due to weight decay.
        trustworthy: Energy error at most 5 % and gradient error at most 25 %.
        causes: Likely causes of errors that are too large, each with what to do; a loss of the wrong scale is named in any case, because
            a run that converged closes with any scale.
    """

    energy_predicted: float
    energy_observed: float
    energy_error: float
    gradient_error: float
    gradient_error_initial: float
    query_error: float | None
    forcing_share: float
    trustworthy: bool
    causes: tuple[str, ...]


@dataclass(frozen=True)
class Circumstances:
    """What is known of a run that may explain an error.

    Attributes:
        stability: Stability number, edge at 1; NaN if unknown.
        largest_kernel_step: Largest ‖K_{j+1} − K_j‖ / ‖K_j‖ in the window.
        scale_ratio: Observed loss decrease over the sum of what each interval predicts from the gradient observed at its start; 1 when
            the loss has the trained scale.
        momentum_lag: β/(1 − β), steps.
        train_only: Kinds of modules that act differently in training.
        training_size: Size of the training set where the probe is a part of it; None otherwise.
        kinked: Kinds of activations with kinks (ReLU): a kernel jumps where one crosses its kink, and no rule can follow that.
        is_trace: Whether classes share one kernel, an approximation.
        stated: What measurements of the received gradients say of scale and missing terms, as sentences; None where none were made.
        is_from_checkpoints: Whether snapshots are bare checkpoints, of which there may be more, and not a recorder's.
    """

    stability: float
    largest_kernel_step: float
    scale_ratio: float
    momentum_lag: float
    train_only: tuple[str, ...]
    training_size: int | None = None
    kinked: tuple[str, ...] = ()
    is_trace: bool = False
    stated: tuple[str, ...] | None = None
    is_from_checkpoints: bool = False


def measure_closure(
    state: Dissipation,
    *,
    losses: tuple[float, float],
    gradients: tuple[Float[Tensor, "outputs ..."], Float[Tensor, "outputs ..."]],
    query_motion: Float[Tensor, "query_outputs ..."] | None,
    circumstances: Circumstances,
) -> Closure:
    """Compare a window's predictions with what was observed at its end.

    Args:
        state: Operators of the window.
        losses: Φ at its start and end.
        gradients: g at its start and end.
        query_motion: Observed motion of the query outputs, where it can be compared.
        circumstances: What may explain an error.

    Returns:
        The errors, and if they are too large the likely causes.
    """
    observed = losses[0] - losses[1]
    energy_error = abs(state.energy - observed) / max(abs(observed), LOSS_FLOOR * abs(losses[0]), torch.finfo(torch.float64).tiny)
    gap = float(torch.linalg.vector_norm(state.gradient - gradients[1]))
    gradient_error = relative(gap, gradients[1])
    trustworthy = energy_error <= ENERGY_LIMIT and gradient_error <= GRADIENT_LIMIT
    query_error = None
    if query_motion is not None and state.query_motion is not None:
        query_error = relative(float(torch.linalg.vector_norm(state.query_motion - query_motion)), query_motion)
    return Closure(
        energy_predicted=state.energy,
        energy_observed=observed,
        energy_error=energy_error,
        gradient_error=gradient_error,
        gradient_error_initial=relative(gap, gradients[0]),
        query_error=query_error,
        forcing_share=(state.energy - state.homogeneous_energy) / state.energy if state.energy else 0.0,
        trustworthy=trustworthy,
        causes=_scale_cause(circumstances) if trustworthy else _likely_causes(circumstances),
    )


def relative(gap: float, reference: Tensor) -> float:
    """Divide a gap by a norm.

    Args:
        gap: Norm of a difference.
        reference: What it is compared with.

    Returns:
        gap / ‖reference‖; 0 when both vanish, infinite when only the reference does.
    """
    norm = float(torch.linalg.vector_norm(reference))
    if norm == 0.0:
        return 0.0 if gap == 0.0 else float("inf")
    return gap / norm


def _likely_causes(found: Circumstances) -> tuple[str, ...]:
    """Name what may be wrong, most telling first."""
    causes = []
    if found.stability > 1:
        causes.append(
            f"Edge of stability: lr * sharpness is {found.stability:.2f} of the stable limit, so outputs oscillate and gradient flow "
            "does not describe them. Lower the learning rate, or end the window earlier (--window)."
        )
    causes.extend(_scale_cause(found))
    if found.is_trace:
        causes.append(
            "Trace form: the classes share one kernel, an approximation of the full one. Record a smaller probe with outputs='full' to see "
            "how much of the error is its."
        )
    if found.largest_kernel_step > LARGE_STEP:
        what, remedy = ("checkpoints", "Give more of them") if found.is_from_checkpoints else (
            "snapshots", "Record with a smaller `tolerance` or `drift`"
        )  # fmt: skip
        causes.append(
            f"Too few {what}: between two of them the kernel moved by {found.largest_kernel_step:.0%} of its size. "
            f"{remedy}, or end the window earlier."
        )
    if found.momentum_lag > 1:
        causes.append(
            f"Momentum lag: the optimizer acts on gradients about {found.momentum_lag:.0f} steps old, which gradient flow leaves out. "
            "It shows most in short windows; take a longer one."
        )
    if found.train_only:
        causes.append(
            f"Training mode: {', '.join(found.train_only)} act differently in training, and the probe is followed in evaluation mode. "
            "Record the run with these layers frozen or left out, to see how much of the error is theirs."
        )
    if found.kinked:
        causes.append(
            f"Kinks: {', '.join(found.kinked)} switch units on and off, late in training some of them at every step, which no kernel at a "
            "snapshot shows. The error grows with the window's length: end it earlier. Smooth activations have none."
        )
    if found.training_size is not None:
        causes.append(
            f"Probe subset: the operators stand for {found.training_size} training examples by a random sample. A larger probe is closer."
        )
    causes.append(
        "Minibatch noise and examples beyond the probe: the operators follow the probe's own mean gradient. "
        "A larger probe or batch, or a smaller learning rate, brings the run closer to it."
    )
    return tuple(causes)


def _scale_cause(found: Circumstances) -> tuple[str, ...]:
    """Name a loss that is not at the scale that is trained, or a term that is missing."""
    if found.stated is not None:
        return found.stated
    if abs(found.scale_ratio - 1) <= SCALE_LIMIT:
        return ()
    return (
        f"Loss scale: from snapshot to snapshot the loss fell {found.scale_ratio:.2f} times as much as the gradients there predict. "
        f"Give the {'loss' if found.is_from_checkpoints else 'recorder the loss'} at the scale you train with, and check "
        f"{'--times, the learning rate, ' if found.is_from_checkpoints else ''}gradient clipping and loss scaling; "
        "few snapshots and minibatch noise can do the same.",
    )
