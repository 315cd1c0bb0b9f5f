"""The analytic jump: outputs at later times from one snapshot, with the kernel frozen, or with its last drift carried on.

    K(τ) = K + τ K̇,    du/dτ = −K(τ) g(u),    du_Q/dτ = −K_QS(τ) g(u),    τ from the snapshot on, with the true g.

The state is the motion u − u_s. Query outputs follow from a = ∫ g dτ and b = ∫ τ g dτ, integrated over the solver's own steps: they move by
−K_QS a − K̇_QS b. Carrying them, or a and b, in the state would double it, and the cost of an implicit step is its cube.

The problem is stiff: K's eigenvalues spread over decades, and the horizon is set by the slow ones. Evaluations of g to a relative tolerance
of 1e-5, and seconds on one core, for eigenvalues of K like i^−1.5 (extrapolated kernels take as many):

    outputs, λτ, loss        RK45            LSODA           BDF            BDF, Jacobian from C differences of g
    200,  2,000, squared      4,088, 0.21      2,404, 0.10     948, 0.09    339, 0.06
    200, 20,000, squared     42,266, 2.2       5,023, 0.20   1,096, 0.10    471, 0.08
    200, 20,000, softmax      3,314, 0.20      4,728, 0.26   2,257, 0.20    479, 0.10
    1,000, 2,000, softmax     2,498, 0.8      10,564, 3.1    3,386, 2.2     331, 1.2

Explicit steps are bound by stability, and general Jacobians cost a g per output. g of an example depends on this example only, so one
difference per class gives all blocks of B, and the Jacobian −K(τ) B. (LSODA with it is as good: 471, 725, 828 and 624 evaluations; BDF
reports failures without printing.) Error of u: 4e-7 to 6e-6. Where K(τ) has lost its positive eigenvalues error control follows the growth.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._checks import InputError, check_finite
from ntkscope._display import Displayed
from ntkscope.dynamics.closure import relative

NO_CHANGE = 1.0  # relative error of predicting that nothing moves, at any horizon
RELATIVE_TOLERANCE = 1e-5
ABSOLUTE_TOLERANCE = 1e-7  # of the scale of the motion
BLOW_UP = 1e3  # scales of the start
MAX_HALVINGS = 200
NODES, WEIGHTS = np.polynomial.legendre.leggauss(3)


@dataclass(frozen=True)
class Jump(Displayed):
    """Outputs predicted from one snapshot.

    Attributes:
        kind: "frozen" or "extrapolated".
        horizons: Optimizer time from the snapshot on.
        outputs: u at each; NaN from where the prediction broke off.
        query_motion: Motion of the query outputs since the snapshot; None without a cross kernel.
        reached: Time up to which the prediction went; the last horizon, unless it broke off.
        reason: Why it broke off, else empty.
        num_evaluations: Of g.
    """

    kind: str
    horizons: tuple[float, ...]
    outputs: Float[Tensor, "horizons examples classes"]
    query_motion: Float[Tensor, "horizons query_outputs"] | None
    reached: float
    reason: str
    num_evaluations: int


def jump(
    kernel: Float[Tensor, "outputs outputs"],
    cross: Float[Tensor, "query_outputs outputs"] | None,
    outputs: Float[Tensor, "examples classes"],
    gradient_of: Callable[[Tensor], Tensor],
    horizons: Sequence[float],
    *,
    kernel_rate: Float[Tensor, "outputs outputs"] | None = None,
    cross_rate: Float[Tensor, "query_outputs outputs"] | None = None,
) -> Jump:
    """Predict outputs at later times, with the kernel frozen or extrapolated.

    A positive semidefinite kernel and a convex loss keep outputs bounded. An extrapolated kernel loses this property far out, and then
    outputs grow without bound: the prediction breaks off where ‖u − u_s‖ exceeds 1,000 times the scale of the start, or where the solver
    fails, and is NaN from there on. The scale is ‖u_s‖, or the motion at the first velocity that changes g by half if that is larger.

    Args:
        kernel: K at the snapshot.
        cross: K_QS at the snapshot; None without a query set.
        outputs: u_s, outputs at the snapshot.
        gradient_of: g, from outputs of shape (examples, classes), float64.
        horizons: Optimizer times from the snapshot on, positive and ascending.
        kernel_rate: K̇, for instance (K_j − K_{j−1}) / (τ_j − τ_{j−1}); None freezes the kernel.
        cross_rate: The same of the cross kernel; needed if both `cross` and `kernel_rate` are given, and only then.

    Returns:
        The prediction, float64 on the CPU; the solver's errors are near 1e-6, at most 1e-5 of the motion.

    Raises:
        InputError: If shapes do not fit, an entry or g is not finite, horizons are not positive and ascending, or rates are
            given for one kernel only.

    Example:
        >>> one = torch.ones(1, 1)
        >>> jump(one, None, one, lambda u: u, [1.0]).outputs  # e⁻¹
        tensor([[[0.3679]]], dtype=torch.float64)
    """
    _check(kernel, cross, outputs, kernel_rate, cross_rate)
    times = _check_horizons(horizons)
    flow = _Flow(_double(outputs), gradient_of, (_double(kernel), _double(kernel_rate)), (_double(cross), _double(cross_rate)), times[-1])
    bound = BLOW_UP * max(flow.scale, float(torch.linalg.vector_norm(flow.start)))

    def margin(_: float, motion: np.ndarray) -> float:
        return bound - float(np.linalg.norm(motion))

    margin.terminal = True  # pyright: ignore[reportFunctionMemberAccess]
    with np.errstate(all="ignore"):  # what overflows on the way is given a reason below
        solution = scipy.integrate.solve_ivp(
            flow.velocity,
            (0.0, times[-1]),
            np.zeros(outputs.numel()),
            method="BDF",
            jac=flow.jacobian,
            dense_output=True,
            events=margin,
            rtol=RELATIVE_TOLERANCE,
            # `scale` is a norm, the tolerance is for one output.
            atol=max(ABSOLUTE_TOLERANCE * flow.scale / math.sqrt(outputs.numel()), np.finfo(np.float64).tiny),
        )
    reached = float(solution.t[-1])
    is_whole = solution.status == 0
    within = [time for time in times if is_whole or time < reached]
    motions = torch.full((len(times), outputs.numel()), float("nan"), dtype=torch.float64)
    if within:
        motions[: len(within)] = torch.from_numpy(solution.sol(within).T)
    query_motion = None
    if cross is not None:
        query_motion = torch.full((len(times), len(cross)), float("nan"), dtype=torch.float64)
        if within:
            query_motion[: len(within)] = flow.query_motion(solution, within)
    return Jump(
        kind="frozen" if kernel_rate is None else "extrapolated",
        horizons=times,
        outputs=flow.start + motions.view(len(times), *outputs.shape),
        query_motion=query_motion,
        reached=reached,
        reason="" if is_whole else _reason(solution.status, reached, kernel_rate is not None),
        num_evaluations=flow.num_evaluations,
    )


def jump_errors(
    predicted: Float[Tensor, "horizons ..."], observed: Float[Tensor, "horizons ..."], start: Float[Tensor, "..."]
) -> Float[Tensor, " horizons"]:
    """Compute ‖predicted − observed‖ / ‖observed − start‖ at every horizon.

    Predicting no change has an error of 1 at any horizon, by construction (`NO_CHANGE`): a jump above 1 is worse than none.

    Args:
        predicted: Outputs, or motions.
        observed: The same, measured.
        start: Outputs at the snapshot; zero for motions.

    Returns:
        Errors, float64. Where nothing moved 0 or infinite (`closure.relative`), NaN where the prediction is.

    Raises:
        InputError: If shapes do not fit.

    Example:
        >>> jump_errors(torch.tensor([[2.0], [2.0]]), torch.tensor([[3.0], [2.0]]), torch.tensor([1.0]))
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    if predicted.shape != observed.shape or predicted.shape[1:] != start.shape or predicted.ndim == 0:
        raise InputError(
            f"`predicted` and `observed` must have shape (horizons, ...) and `start` (...), got {tuple(predicted.shape)}, "
            f"{tuple(observed.shape)} and {tuple(start.shape)}. Observe at the horizons of the jump."
        )
    pairs = zip(predicted.double(), observed.double(), strict=True)
    errors = [relative(float(torch.linalg.vector_norm(guess - seen)), seen - start.double()) for guess, seen in pairs]
    return torch.tensor(errors, dtype=torch.float64)


@overload
def _double(tensor: Tensor) -> Tensor: ...
@overload
def _double(tensor: Tensor | None) -> Tensor | None: ...
def _double(tensor: Tensor | None) -> Tensor | None:
    """Bring a tensor to float64 on the CPU."""
    return None if tensor is None else tensor.detach().to("cpu", torch.float64)


class _Flow:
    """du/dτ = −K(τ) g(u) up to a horizon, counting evaluations of g."""

    def __init__(
        self,
        start: Tensor,
        gradient_of: Callable[[Tensor], Tensor],
        kernels: tuple[Tensor, Tensor | None],
        crosses: tuple[Tensor | None, Tensor | None],
        horizon: float,
    ) -> None:
        self.start = start
        self.kernel, self.kernel_rate = kernels
        self.cross, self.cross_rate = crosses
        self.num_evaluations = 0
        self._gradient_of = gradient_of
        self.first = self.gradient(np.zeros(start.numel()))
        check_finite("The output gradient at the snapshot", self.first, "Check the outputs, and that the loss takes them.")
        self.scale = self._scale(horizon)

    def gradient(self, motion: np.ndarray) -> Tensor:
        """Evaluate g."""
        self.num_evaluations += 1
        return self._gradient_of(self.start + torch.from_numpy(motion).view(self.start.shape)).detach().to("cpu", torch.float64).flatten()

    def velocity(self, time: float, motion: np.ndarray) -> np.ndarray:
        """Evaluate −K(τ) g(u)."""
        gradient = self.gradient(motion)
        moved = self.kernel @ gradient
        if self.kernel_rate is not None:
            moved = moved + time * (self.kernel_rate @ gradient)
        return -moved.numpy()

    def jacobian(self, time: float, motion: np.ndarray) -> np.ndarray:
        """Differentiate the velocity: −K(τ) B, with the blocks of B from one difference of g a class, for all examples at once."""
        outputs = self.start.numpy().ravel() + motion
        step = np.sqrt(np.finfo(np.float64).eps) * max(float(np.abs(outputs).max()), self.scale)
        first = self.gradient(motion)
        columns = []
        for direction in torch.eye(self.start.shape[1], dtype=torch.float64):
            moved = motion + step * direction.expand(self.start.shape).numpy().ravel()
            columns.append((self.gradient(moved) - first).view(self.start.shape) / step)
        blocks = torch.stack(columns, dim=2)  # [examples, classes, classes]
        kernel = self.kernel if self.kernel_rate is None else self.kernel + time * self.kernel_rate
        product = torch.einsum("ond,ndc->onc", kernel.view(-1, *self.start.shape), blocks)
        # The solver tries points far out. It rejects a velocity that is NaN and goes less far, but cannot factor such a Jacobian.
        return -np.nan_to_num(product.reshape(kernel.shape).numpy())

    def _scale(self, horizon: float) -> float:
        """Norm of the motion to expect: the first velocity for as long as it leaves half of the gradient as it was."""
        velocity = (-(self.kernel @ self.first)).numpy()
        half = 0.5 * float(torch.linalg.vector_norm(self.first))
        for _ in range(MAX_HALVINGS):
            if float(torch.linalg.vector_norm(self.gradient(horizon * velocity) - self.first)) <= half:
                break
            horizon /= 2
        return horizon * float(np.linalg.norm(velocity))

    def query_motion(self, solution: Any, times: list[float]) -> Tensor:
        """Integrate over the solver's own steps: −K_QS ∫ g dτ − K̇_QS ∫ τ g dτ, by three-point Gauss quadrature."""
        assert self.cross is not None
        marks = np.unique(np.concatenate([[0.0], solution.t[solution.t < times[-1]], times]))
        integral, moment = torch.zeros_like(self.first), torch.zeros_like(self.first)
        rows = []
        for left, right in itertools.pairwise(marks):
            nodes = 0.5 * (left + right) + 0.5 * (right - left) * NODES
            for time, weight, motion in zip(nodes, 0.5 * (right - left) * WEIGHTS, solution.sol(nodes).T, strict=True):
                gradient = float(weight) * self.gradient(motion)
                integral = integral + gradient
                moment = moment + float(time) * gradient
            if right in times:
                moved = self.cross @ integral
                rows.append(-moved if self.cross_rate is None else -moved - self.cross_rate @ moment)
        return torch.stack(rows)


def _reason(status: int, reached: float, is_extrapolated: bool) -> str:
    """Say why a prediction broke off."""
    what = f"outputs left {BLOW_UP:,.0f} times the scale of the start" if status == 1 else "the solver found no step that is short enough"
    why = "an extrapolated kernel may lose its positive eigenvalues" if is_extrapolated else "is the kernel positive semidefinite?"
    return f"{what} at time {reached:g}; {why}"


def _check(kernel: Tensor, cross: Tensor | None, outputs: Tensor, kernel_rate: Tensor | None, cross_rate: Tensor | None) -> None:
    """Check shapes and values."""
    num_outputs = outputs.numel()
    if outputs.ndim != 2 or num_outputs == 0:
        raise InputError(f"`outputs` must have shape (examples, classes), got {tuple(outputs.shape)}.")
    for name, matrix in (("kernel", kernel), ("kernel_rate", kernel_rate)):
        if matrix is not None and matrix.shape != (num_outputs, num_outputs):
            raise InputError(
                f"`{name}` must have shape {(num_outputs, num_outputs)} for outputs of shape {tuple(outputs.shape)}, "
                f"got {tuple(matrix.shape)}. Use the kernel kind 'full'."
            )
    if cross is not None and (cross.ndim != 2 or cross.shape[1] != num_outputs):
        raise InputError(f"`cross` must have shape (query_outputs, {num_outputs}), got {tuple(cross.shape)}.")
    if (cross_rate is not None) != (cross is not None and kernel_rate is not None):
        raise InputError(
            "`cross_rate` is needed if both `cross` and `kernel_rate` are given, and only then: a kernel frozen in one part and "
            "extrapolated in the other is of no network."
        )
    if cross is not None and cross_rate is not None and cross_rate.shape != cross.shape:
        raise InputError(f"`cross_rate` must have the shape of `cross`, {tuple(cross.shape)}, got {tuple(cross_rate.shape)}.")
    named = (("kernel", kernel), ("cross", cross), ("outputs", outputs), ("kernel_rate", kernel_rate), ("cross_rate", cross_rate))
    for name, tensor in named:
        if tensor is not None:
            check_finite(f"`{name}`", tensor, "Is the snapshot from before training diverged?")


def _check_horizons(horizons: Sequence[float]) -> tuple[float, ...]:
    """Check times to predict at."""
    times = tuple(float(time) for time in horizons)
    if not times or not all(math.isfinite(time) for time in times) or any(b <= a for a, b in itertools.pairwise((0.0, *times))):
        raise InputError(
            f"`horizons` must be at least one finite time, positive and ascending, got {list(times)}. They count from the snapshot on: "
            "subtract its time, and sort them."
        )
    return times
