"""Symmetric eigendecomposition that says when it failed.

Always float64, symmetrized, with the residual checked; falls back from the device asked for to the CPU, and there to another
LAPACK driver. No jitter is ever added.
"""

import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._checks import check_finite

# LAPACK's divide and conquer needs 2 N² + 6 N + 1 words of workspace, counted in 32 bits.
LARGEST_DIVIDE_AND_CONQUER = 32_000
RESIDUAL_TOLERANCE = 1e-10
SMALL = 64  # rows up to which a dense decomposition is quicker than Lanczos


def eigh(
    matrix: Float[Tensor, "rows rows"], *, device: torch.device | str | None = None
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows rows"]]:
    """Decompose a symmetric matrix.

    Args:
        matrix: Symmetric up to rounding; its symmetric part is taken.
        device: Where to work; the matrix's own device if not given. float64 is not available on MPS: the CPU is used.

    Returns:
        Eigenvalues, descending, and orthonormal eigenvectors as columns, float64, on the CPU.

    Raises:
        InputError: If the matrix is not finite.
        RuntimeError: If no driver reaches a relative residual of 1e-10.
    """
    check_finite("A matrix to decompose", matrix, "Check the snapshots: the run may have diverged.")
    # Symmetrized on the device the matrix is on: MPS has no float64 at all, so it is cast on the CPU.
    home = matrix.cpu() if matrix.device.type == "mps" else matrix
    symmetric = home.to(torch.float64)
    symmetric = 0.5 * (symmetric + symmetric.T)
    target = torch.device(device) if device is not None else symmetric.device
    attempts = []
    if target.type not in ("cpu", "mps"):
        attempts.append(target)
    if len(symmetric) <= LARGEST_DIVIDE_AND_CONQUER:
        attempts.append(torch.device("cpu"))
    residuals: dict[str, str] = {}
    for attempt in attempts:
        try:
            eigvals, eigvecs = torch.linalg.eigh(symmetric.to(attempt))
        except RuntimeError as error:
            residuals[str(attempt)] = str(error)
            continue
        if _residual(symmetric.to(attempt), eigvals, eigvecs) <= RESIDUAL_TOLERANCE:
            return eigvals.flip(0).cpu(), eigvecs.flip(1).cpu()
        residuals[str(attempt)] = "residual too large"
    on_cpu = symmetric.cpu()
    values, vectors = scipy.linalg.eigh(on_cpu.numpy(), driver="evr")
    eigvals, eigvecs = torch.from_numpy(values), torch.from_numpy(vectors)
    residual = _residual(on_cpu, eigvals, eigvecs)
    if residual > RESIDUAL_TOLERANCE:
        raise RuntimeError(f"eigh failed on a {len(symmetric)} x {len(symmetric)} matrix: relative residual {residual:.1e}; {residuals}.")
    return eigvals.flip(0).contiguous(), eigvecs.flip(1).contiguous()


def eigvalsh(matrix: Float[Tensor, "rows rows"], *, device: torch.device | str | None = None) -> Float[Tensor, " rows"]:
    """Compute the eigenvalues of a symmetric matrix alone: a third of the time of `eigh`.

    Args:
        matrix: Symmetric up to rounding; its symmetric part is taken.
        device: Where to work, as for `eigh`.

    Returns:
        Eigenvalues, descending, float64, on the CPU.

    Raises:
        InputError: If the matrix is not finite.
    """
    check_finite("A matrix to decompose", matrix, "Check the snapshots: the run may have diverged.")
    home = matrix.cpu() if matrix.device.type == "mps" or str(device).startswith("mps") else matrix.to(device or matrix.device)
    symmetric = home.to(torch.float64)
    return torch.linalg.eigvalsh(0.5 * (symmetric + symmetric.T)).flip(0).cpu()


def largest_eigval(matrix: Float[Tensor, "rows rows"]) -> float:
    """Compute the largest eigenvalue of a symmetric positive semidefinite matrix by Lanczos iteration.

    Args:
        matrix: float64, on the CPU.

    Returns:
        The eigenvalue.
    """
    if len(matrix) <= SMALL:
        return float(torch.linalg.eigvalsh(matrix)[-1])
    start = torch.ones(len(matrix), dtype=matrix.dtype).numpy()  # a fixed start: the result must not depend on a random state
    return float(scipy.sparse.linalg.eigsh(matrix.numpy(), k=1, v0=start, return_eigenvectors=False)[0])


def _residual(matrix: Tensor, eigvals: Tensor, eigvecs: Tensor) -> float:
    """Measure ‖(A − V Λ Vᵀ) z‖ and ‖(V Vᵀ − I) z‖ on a few fixed random vectors: O(N²), where all of A V costs as much as a product."""
    if not len(matrix):
        return 0.0  # a kernel of zero has no range
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(len(matrix), 4, generator=generator, dtype=matrix.dtype).to(matrix.device)
    coordinates = eigvecs.T @ probes
    scale = float(eigvals.abs().max()) if len(eigvals) else 0.0
    size = float(torch.linalg.vector_norm(probes))
    unexplained = torch.linalg.vector_norm(matrix @ probes - eigvecs @ (eigvals[:, None] * coordinates))
    not_orthonormal = torch.linalg.vector_norm(eigvecs @ coordinates - probes)
    return max(float(unexplained) / (scale * size) if scale > 0 else float(unexplained), float(not_orthonormal) / size)
