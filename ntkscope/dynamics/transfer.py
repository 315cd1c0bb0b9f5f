"""From train to test: what the operators predict for held-out examples, beside simpler predictions (theory.md sections 3 and 5)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._checks import InputError
from ntkscope._display import Displayed


@dataclass(frozen=True)
class Fit(Displayed):
    """How well a prediction of the test motion fits.

    Attributes:
        relative_error: ‖predicted − observed‖ / ‖observed‖.
        correlation: Pearson's, over all query outputs; NaN if either is constant.
    """

    relative_error: float
    correlation: float


@dataclass(frozen=True)
class Transfer(Displayed):
    """Predictions of how far the query outputs moved in the window.

    Attributes:
        predicted: −G g_s, weight decay's motion included.
        observed: U_Q(T) − U_Q(s).
        fit: Of the prediction.
        predictor: A∘, the best linear map from train to test motion; apply it to stacked train motions.
        predictor_rank: Its rank.
        predictor_fit: Of A∘ (u_T − u_s), from the observed train motion.
        baselines: Of simpler predictions, by name: `frozen_kernel` (du/dτ = −K_0 g(u), true g: the linearized model trained alike),
            `linearized` (the model linearized at the first snapshot, at the real weights), `regression_start` and `regression_end`
            (K_QS K_SS† times the observed train motion, kernels of the window's start and end).
        missing: Why a baseline is not there, by name.
    """

    predicted: Float[Tensor, "queries classes"]
    observed: Float[Tensor, "queries classes"]
    fit: Fit
    predictor: Float[Tensor, "query_outputs outputs"]
    predictor_rank: int
    predictor_fit: Fit
    baselines: dict[str, Fit]
    missing: Mapping[str, str]


def fit_motion(predicted: Tensor, observed: Tensor) -> Fit:
    """Compare a predicted with the observed motion.

    Args:
        predicted: Any shape.
        observed: The same number of entries.

    Returns:
        Error and correlation.
    """
    a, b = predicted.double().flatten(), observed.double().flatten()
    norm = float(torch.linalg.vector_norm(b))
    gap = float(torch.linalg.vector_norm(a - b))
    error = gap / norm if norm > 0 else (0.0 if gap == 0 else float("inf"))
    x, y = a - a.mean(), b - b.mean()
    scale = float(torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y))
    return Fit(error, float(x @ y) / scale if scale > 0 else float("nan"))


def best_linear_predictor(
    displacement: Float[Tensor, "outputs outputs"],
    transfer: Float[Tensor, "query_outputs outputs"],
    *,
    gramian: Float[Tensor, "outputs outputs"] | None = None,
    relative_tolerance: float,
) -> tuple[Float[Tensor, "query_outputs outputs"], int]:
    """Compute A∘, the best linear map from train to test motion.

    Args:
        displacement: D.
        transfer: G.
        gramian: W. Without it A∘ = G D†, the better conditioned form where ker D = ker W (any constant loss Hessian); with it
            A∘ = G W† Dᵀ (D W† Dᵀ)†, least squares for g_s ~ N(0, W†).
        relative_tolerance: Singular values below this share of the largest count as zero: the precision of the stored kernels.

    Returns:
        A∘ and its rank.

    Raises:
        InputError: If shapes do not fit.

    Source:
        theory.md section 3, identity 7.
    """
    if displacement.shape[1] != transfer.shape[1]:
        raise InputError(f"`displacement` {tuple(displacement.shape)} and `transfer` {tuple(transfer.shape)} must have equal columns.")
    left, right = displacement, transfer
    if gramian is not None:
        # D W† Dᵀ = (D W^{†½}) (D W^{†½})ᵀ: the same least squares, in coordinates where the gradients are white.
        eigvals, eigvecs = torch.linalg.eigh(0.5 * (gramian + gramian.T))
        is_kept = eigvals > relative_tolerance * eigvals[-1]
        root = eigvecs[:, is_kept] / eigvals[is_kept].sqrt()
        left, right = displacement @ root, transfer @ root
    u, singular, vh = torch.linalg.svd(left, full_matrices=False)
    rank = int((singular > relative_tolerance * singular.max()).sum()) if len(singular) else 0
    inverse = vh[:rank].T / singular[:rank]
    return (right @ inverse) @ u[:, :rank].T, rank


def kernel_regression(
    kernel: Float[Tensor, "outputs outputs"],
    cross: Float[Tensor, "query_outputs outputs"],
    motion: Float[Tensor, "outputs ..."],
    *,
    relative_tolerance: float,
) -> Float[Tensor, "query_outputs ..."]:
    """Predict the test motion from the observed train motion by kernel regression, K_QS K_SS† (u_T − u_s).

    Args:
        kernel: K_SS.
        cross: K_QS.
        motion: Train motion.
        relative_tolerance: Eigenvalues of K_SS below this share of the largest count as zero.

    Returns:
        Predicted test motion.
    """
    eigvals, eigvecs = torch.linalg.eigh(0.5 * (kernel + kernel.T))
    is_kept = eigvals > relative_tolerance * eigvals[-1]
    basis = eigvecs[:, is_kept]
    columns = motion.reshape(len(motion), -1)
    solved = basis @ ((basis.T @ columns) / eigvals[is_kept, None])
    return (cross @ solved).reshape(len(cross), *motion.shape[1:])
