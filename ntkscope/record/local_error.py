"""How wrong the discretization is over two intervals: predictions with a snapshot in their middle against predictions without it.

Averages over an interval make the rule second order (theory.md section 4), so an interval of length h errs by c h³. Over lengths a and b
the two halves err by c (a³ + b³), one interval over both by c (a + b)³; the difference of the two predictions, times
(a² − ab + b²)/(3ab), which is a third for equal halves, estimates the error of the halves. What the run did in the end never enters:
minibatch noise is no error of placement.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope.dynamics.form import Form, is_softmax_like
from ntkscope.record.propagate import Linear, Propagated, propagate
from ntkscope.record.snapshot import Snapshot, unpack_upper

LOSS_FLOOR = 1e-3  # of the initial loss: what changes the loss by less has no energy error worth the name
GRADIENT_SHARE = 5.0  # a gradient may err by so many times the tolerance of energy, as the limits of theory.md section 4 do


def local_error(before: Snapshot, middle: Snapshot, after: Snapshot, *, initial_loss: float) -> float:
    """Estimate the relative error of two neighbouring intervals, by predictions alone.

    Args:
        before: A snapshot.
        middle: The next one, with the Hessian averaged since `before`.
        after: The next one, with the Hessian averaged since `middle`.
        initial_loss: Φ at the start of the run.

    Returns:
        The larger of the energy error over the energy, and a fifth of the gradient error over the gradient; 0 where no time passes.

    Source:
        Step doubling, as for Runge-Kutta methods; for unequal halves and for this rule ours.
    """
    assert middle.mean_hessian is not None
    assert after.mean_hessian is not None
    first, second = middle.time - before.time, after.time - middle.time
    if not (first > 0 and second > 0):
        return 0.0
    share = second / (first + second)
    mean = torch.lerp(middle.mean_hessian, after.mean_hessian, share)
    half = _step(before.gradient, before, middle, middle.mean_hessian, first)
    halves = _step(half.gradient, middle, after, after.mean_hessian, second)
    whole = _step(before.gradient, before, after, mean, first + second)
    energy = half.energy + halves.energy
    factor = (first**2 - first * second + second**2) / (3 * first * second)
    tiny = torch.finfo(torch.float64).tiny
    energy_error = abs(energy - whole.energy) / max(energy, LOSS_FLOOR * abs(initial_loss), tiny)
    gap = float(torch.linalg.vector_norm(halves.gradient - whole.gradient))
    gradient_error = gap / max(float(torch.linalg.vector_norm(halves.gradient)), tiny)
    return factor * max(energy_error, gradient_error / GRADIENT_SHARE)


def _step(gradient: Tensor, start: Snapshot, stop: Snapshot, hessian: Tensor, elapsed: float) -> Propagated:
    """Follow a gradient over one interval with the kernel averaged at its ends."""
    # Averaged while packed: one whole kernel at a time, in the precision in which it is stored.
    kernel = unpack_upper(0.5 * (start.kernel_upper + stop.kernel_upper))
    return propagate(gradient, kernel_product(kernel, gradient), hessian_product(hessian, len(kernel) != gradient.numel()), elapsed)


def kernel_product(kernel: Float[Tensor, "rows rows"], like: Float[Tensor, "examples classes"]) -> Linear:
    """Make the product with K, in either form.

    Args:
        kernel: One row per output, or in the trace form one per example.
        like: An array that it will be applied to.

    Returns:
        The product.
    """
    columns = 1 if len(kernel) == like.numel() else like.shape[1]

    def product(array: Tensor) -> Tensor:
        return (kernel @ array.to(kernel.dtype).reshape(len(kernel), columns)).to(array.dtype).view_as(array)

    return product


def hessian_product(blocks: Float[Tensor, "examples classes classes"], is_trace: bool) -> Linear:
    """Make the product with B.

    Args:
        blocks: B_i.
        is_trace: Whether the kernel is in the trace form, K_tr ⊗ 1 / C. B must then be a number per example times a matrix of classes that
            all share: 1 − 11ᵀ/C where rows sum to zero (softmax), else the identity.

    Returns:
        The product.
    """
    if not is_trace:
        return lambda array: torch.bmm(blocks, array[:, :, None])[:, :, 0]
    weights = Form(is_trace=True).blocks(blocks)[:, 0]
    if is_softmax_like(blocks):
        return lambda array: weights * (array - array.mean(dim=1, keepdim=True))
    return lambda array: weights * array
