"""The largest eigenpairs of a symmetric operator, from products alone."""

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse.linalg
import torch
from jaxtyping import Float
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator
from torch import Tensor

from ntkscope._checks import InputError, check_choice, check_number
from ntkscope._display import Displayed

EigSolver = Literal["eigsh", "lobpcg"]
SOLVERS: tuple[EigSolver, ...] = ("eigsh", "lobpcg")
MAX_ITERATIONS = 200  # restarts of ARPACK, blocks of LOBPCG
MAX_RESTARTS = 20  # of LOBPCG
BLOCKS = 5  # LOBPCG holds three blocks of k vectors; below five scipy forms the whole matrix


@dataclass(frozen=True)
class TopEigenpairs(Displayed):
    """The k largest eigenvalues of a kernel, with their eigenvectors.

    Attributes:
        eigvals: λ, descending, float64, on the CPU.
        eigvecs: Orthonormal v, as columns, float64, on the CPU.
        residuals: ‖K v − λ v‖ / λ_1, from one more product each; dimensionless.
        solver: "eigsh" or "lobpcg".
        num_products: Vectors that K was applied to.
    """

    eigvals: Float[Tensor, " k"]
    eigvecs: Float[Tensor, "outputs k"]
    residuals: Float[Tensor, " k"]
    solver: EigSolver
    num_products: int


def top_eigenpairs(
    operator: LinearOperator, k: int, *, solver: EigSolver = "eigsh", tolerance: float | None = None, seed: int = 0
) -> TopEigenpairs:
    """Find the k largest eigenpairs.

    Args:
        operator: Symmetric positive semidefinite, (N, N).
        k: How many. "eigsh" needs k < N, "lobpcg" 5 k <= N.
        solver: "eigsh" (ARPACK's restarted Lanczos) takes one vector at a time and needs the fewest products; "lobpcg" takes k at
            once, which costs a product little more than one.
        tolerance: Largest residual ‖K v − λ v‖ / λ_1; 1e-8 for float64 and 1e-4 for float32 if not given; not below
            the rounding of products, 1e-12 and 1e-5.
        seed: Of the starting vectors.

    Returns:
        The eigenpairs.

    Raises:
        InputError: If an argument does not fit, or the solver stops before the tolerance is reached.

    Source:
        Lehoucq, Sorensen, Yang 1998, ARPACK; Knyazev 2001, LOBPCG; both as in scipy. Deviation: eigenvalues descend, and
        residuals are measured afterwards, with products of their own.
    """
    check_choice("solver", solver, SOLVERS)
    num_rows = operator.shape[0]
    _check_count(k, num_rows, solver)
    single = operator.dtype == np.float32
    tolerance = (1e-4 if single else 1e-8) if tolerance is None else tolerance
    check_number("tolerance", tolerance, low=0.0)
    tolerance = max(tolerance, 1e-5 if single else 1e-12)  # the rounding of products
    counted = _Counted(operator)
    generator = np.random.default_rng(seed)
    solve = _solve_arpack if solver == "eigsh" else _solve_lobpcg
    eigvals, eigvecs = solve(counted, k, tolerance, generator)
    order = np.argsort(eigvals)[::-1]
    eigvals, eigvecs = eigvals[order], eigvecs[:, order]
    largest = eigvals[0] if eigvals[0] > 0 else 1.0
    residuals = np.linalg.norm(counted.matmat(eigvecs) - eigvecs * eigvals, axis=0) / largest
    if not residuals.max() <= tolerance:  # also NaN
        raise InputError(_not_converged(solver, int((residuals <= tolerance).sum()), k, tolerance))
    as_tensor = [torch.tensor(np.ascontiguousarray(array), dtype=torch.float64) for array in (eigvals, eigvecs, residuals)]
    return TopEigenpairs(*as_tensor, solver=solver, num_products=counted.num_products)


class _Counted(LinearOperator):
    """Counts vectors, and is float64 whatever the operator's own precision: the solvers' recurrences lose orthogonality first."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(np.dtype(np.float64), operator.shape)
        self.operator = operator
        self.num_products = 0

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        self.num_products += X.shape[1]
        return self.operator.matmat(X).astype(np.float64)


def _solve_arpack(operator: LinearOperator, k: int, tolerance: float, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    start = generator.standard_normal(operator.shape[0])
    if not operator.matvec(start).any():  # K = 0, which ARPACK refuses
        return np.zeros(k), np.linalg.qr(generator.standard_normal((operator.shape[0], k)))[0]
    try:
        return scipy.sparse.linalg.eigsh(operator, k, which="LA", v0=start, tol=tolerance, maxiter=MAX_ITERATIONS)  # pyright: ignore[reportArgumentType, reportReturnType]
    except ArpackNoConvergence as error:
        raise InputError(_not_converged("eigsh", len(error.eigenvalues), k, tolerance)) from error


def _solve_lobpcg(operator: LinearOperator, k: int, tolerance: float, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    start, _ = np.linalg.qr(generator.standard_normal((operator.shape[0], k)))
    image, _ = np.linalg.qr(operator.matmat(start))
    scale = np.linalg.norm(operator.matmat(image), 2)  # at most λ_1, and close; scipy's tolerance is absolute
    if scale == 0.0:
        return np.zeros(k), start
    eigvals, eigvecs = np.zeros(k), start
    for _ in range(MAX_RESTARTS):
        with warnings.catch_warnings():
            # Whether it converged is seen from the residuals.
            warnings.filterwarnings("ignore", message="Exited (at iteration|postprocessing)|Failed at iteration")
            eigvals, eigvecs = scipy.sparse.linalg.lobpcg(  # pyright: ignore[reportAssignmentType]
                operator, start, largest=True, tol=tolerance * scale, maxiter=MAX_ITERATIONS
            )
        residual = np.linalg.norm(operator.matmat(eigvecs) - eigvecs * eigvals, axis=0).max() / scale
        if residual <= tolerance:
            break
        # Where the rank of K is below 3 k, residuals become linearly dependent and LOBPCG breaks down: noise gives them directions again.
        start, _ = np.linalg.qr(eigvecs + 0.01 * residual * generator.standard_normal(eigvecs.shape))
    return eigvals, eigvecs


def _check_count(k: int, num_rows: int, solver: EigSolver) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"`k` must be a whole number of eigenpairs, at least 1, got {k!r}.")
    advice = "Take fewer, or decompose the whole kernel: torch.linalg.eigh(ntk_gram(...).matrix)."
    if solver == "eigsh" and k >= num_rows:
        raise InputError(f"`k` must be below the number of rows N = {num_rows} for solver='eigsh', got {k}. {advice}")
    if solver == "lobpcg" and BLOCKS * k > num_rows:
        raise InputError(f"`k` must be at most N / {BLOCKS} = {num_rows // BLOCKS} for solver='lobpcg' (N = {num_rows}), got {k}. {advice}")


def _not_converged(solver: str, num_converged: int, k: int, tolerance: float) -> str:
    return (
        f"solver={solver!r} stopped with {num_converged} of {k} eigenpairs at the tolerance {tolerance:.1e}. "
        "Raise `tolerance`, take a smaller `k`, or the other solver."
    )
