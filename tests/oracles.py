"""Slow, obvious, dense float64 definitions of theory.md; no import of ntkscope.

Conventions: stacked outputs have index (i, c) -> i * C + c (section 1); everything returned is a CPU float64 tensor; matrices
may be given as tensors or arrays. `Operators(P, W, D, G)` of one window: N x N, N x N, N x N, qC x N (`G` None without a query).
"""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.integrate
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Operators(NamedTuple):
    """Propagator, dissipation Gramian, train displacement, test transfer (theory.md, section 2)."""

    P: Tensor
    W: Tensor
    D: Tensor
    G: Tensor | None


# --- Jacobians and kernels (section 1) ---------------------------------------------------------------------------------------


def double(tree: Any) -> Any:
    """Floating tensors of a pytree as float64, the rest as it is."""
    return pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def _copy(model):
    return copy.deepcopy(model).double().eval()


def _outputs(model, inputs, forward_fn):
    inputs = double(inputs)
    return model(inputs) if forward_fn is None else forward_fn(model, inputs)


def jacobian(model: nn.Module, inputs: Any, forward_fn: Callable | None = None) -> dict[str, Tensor]:
    """J_S of section 1 by parameter: name -> (N, numel), eval mode, `requires_grad` only, tied parameters once (first name)."""
    model = _copy(model)
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    outputs = _outputs(model, inputs, forward_fn).flatten()
    rows = [torch.autograd.grad(u, list(params.values()), retain_graph=True, materialize_grads=True) for u in outputs]
    return {name: torch.stack(grads).reshape(len(rows), -1) for name, grads in zip(params, zip(*rows, strict=True), strict=True)}


def stacked_jacobian(model: nn.Module, inputs: Any, forward_fn: Callable | None = None) -> Tensor:
    """J_S as one (N, p) matrix, columns in the order of `model.named_parameters()`."""
    return torch.cat(list(jacobian(model, inputs, forward_fn).values()), dim=1)


def gram(
    model: nn.Module,
    inputs: Any,
    other: Any = None,
    precond: dict[str, Tensor] | None = None,
    outputs: str = "full",
    *,
    num_outputs: int | None = None,
    forward_fn: Callable | None = None,
    loss: Callable | None = None,
    targets: Any = None,
    other_targets: Any = None,
) -> Tensor:
    """J M J'^T of section 1, rows `inputs`, columns `other` (default `inputs`).

    `outputs`: "full" (N, N'), "trace" (n, n') = sum_c K[(i,c), (j,c)], "sum" (n, n') = gradient of sum_c u_c, "class=k" (n, n'),
    "loss" (n, n') = gradients of loss(u_i[None], y_i[None]), with y of `targets` and of `other_targets` (for `other`).
    `precond` maps every parameter name to its diagonal M. `num_outputs` is C, by default the model's last output axis.
    """
    left = jacobian(model, inputs, forward_fn)
    right = left if other is None else jacobian(model, other, forward_fn)
    scale = {name: torch.ones(()) if precond is None else double(precond[name]).reshape(-1) for name in left}
    full = sum((left[name] * scale[name]) @ right[name].T for name in left)
    if outputs == "full":
        return full
    if outputs == "loss":
        g = _loss_gradients(model, inputs, targets, loss, forward_fn)
        g_other = g if other is None else _loss_gradients(model, other, other_targets, loss, forward_fn)
        return torch.einsum("ic,icjd,jd->ij", g, full.reshape(*g.shape, *g_other.shape), g_other)
    if num_outputs is None:
        with torch.no_grad():
            num_outputs = _outputs(_copy(model), inputs, forward_fn).shape[-1]
    blocks = full.reshape(full.shape[0] // num_outputs, num_outputs, full.shape[1] // num_outputs, num_outputs)
    if outputs == "trace":
        return torch.einsum("icjc->ij", blocks)
    if outputs == "sum":
        return blocks.sum(dim=(1, 3))
    index = int(outputs.removeprefix("class="))
    return blocks[:, index, :, index]


def _loss_gradients(model, inputs, targets, loss, forward_fn):
    """Gradient of loss(u_i[None], y_i[None]) with respect to u_i, (n, C)."""
    outputs = _outputs(_copy(model), inputs, forward_fn)
    pairs = ((u[None], pytree.tree_map(lambda y, i=i: y[i : i + 1], targets)) for i, u in enumerate(outputs))
    return torch.cat([loss_gradient(loss, u, y) for u, y in pairs]).flatten(1)


# --- The loss as a function of outputs (section 1) ---------------------------------------------------------------------------


def loss_gradient(loss_fn: Callable, outputs: Tensor, targets: Any) -> Tensor:
    """g = grad_u Phi of section 1, shape (n, C), from the whole loss."""
    return torch.func.grad(lambda u: loss_fn(u, double(targets)))(outputs.detach().double())


def loss_hessian_blocks(loss_fn: Callable, outputs: Tensor, targets: Any) -> Tensor:
    """Blocks (n, C, C) of B = grad^2_u Phi of section 1, from the whole loss; asserts that B is block diagonal."""
    outputs = outputs.detach().double()
    num, classes = outputs.shape
    # Reverse over reverse: `torch.func.hessian` is forward over reverse and warns of torch.jit.script in torch 2.13.
    whole = torch.func.jacrev(torch.func.grad(lambda u: loss_fn(u, double(targets))), chunk_size=1)(outputs)  # (n, C, n, C)
    same = torch.eye(num, dtype=torch.bool)[:, None, :, None]
    off = whole.masked_fill(same, 0.0).abs().max().item()
    assert off <= 1e-14 * max(whole.abs().max().item(), 1e-300), f"examples are coupled by the loss: off-diagonal block {off:.2e}"
    return whole[torch.arange(num), :, torch.arange(num), :].reshape(num, classes, classes)


def dense(blocks: Tensor) -> Tensor:
    """Blocks (n, C, C) as the dense block-diagonal (N, N)."""
    return torch.block_diag(*blocks.double())


# --- Operators of a window (sections 2 and 3) --------------------------------------------------------------------------------


def compose(first: Operators, second: Operators) -> Operators:
    """Identity 5: the window s..T from s..r (`first`) and r..T (`second`)."""
    return Operators(
        P=second.P @ first.P,
        W=first.W + first.P.T @ second.W @ first.P,
        D=first.D + second.D @ first.P,
        G=None if first.G is None else first.G + second.G @ first.P,
    )


def van_loan(K: Any, B: Any, K_query: Any, elapsed: float) -> Operators:
    """Operators for constant K and B by block exponentials on elapsed / 2^k, doubled by identity 5 (end of section 3)."""
    K, B, elapsed = _array(K), _array(B), float(elapsed)
    size = len(K)
    generator, zero = -B @ K, np.zeros((size, size))
    norm = elapsed * np.linalg.norm(generator, 2)
    doublings = max(0, math.ceil(math.log2(norm))) if norm > 1 else 0
    step = elapsed / 2**doublings
    scale = np.linalg.norm(K, 2) or 1.0  # W, D, G are linear in the outer K: keep the blocks of one size
    # Van Loan 1978: exp([[-A^T, K], [0, A]] t) = [[., X], [0, P]] and W = P^T X; exp([[0, K], [0, A]] t) = [[I, D], [0, P]]
    block = scipy.linalg.expm(np.block([[-generator.T, K / scale], [zero, generator]]) * step)
    P = block[size:, size:]
    W = scale * P.T @ block[:size, size:]

    def integral(outer):  # of outer e^{At}
        rows, scale = len(outer), np.linalg.norm(outer, 2) or 1.0
        whole = np.block([[np.zeros((rows, rows)), outer / scale], [np.zeros((size, rows)), generator]])
        return scale * scipy.linalg.expm(whole * step)[:rows, rows:]

    operators = _operators(P, (W + W.T) / 2, integral(K), None if K_query is None else integral(_array(K_query)))
    for _ in range(doublings):
        operators = compose(operators, operators)
    return operators


def quadrature(K: Any, B: Any, K_query: Any, elapsed: float, num: int | None = None) -> Operators:
    """Operators for constant K and B: 12-point Gauss-Legendre on `num` equal sub-intervals of e^{-tau B K} (section 2)."""
    K, B, elapsed = _array(K), _array(B), float(elapsed)
    query = np.zeros((0, len(K))) if K_query is None else _array(K_query)
    num = num or 1 + math.ceil(elapsed * np.linalg.norm(B @ K, 2))
    nodes, weights = np.polynomial.legendre.leggauss(12)
    width = elapsed / num
    W, E = np.zeros_like(K), np.zeros_like(K)
    for start in width * np.arange(num):
        for node, weight in zip(start + width * (nodes + 1) / 2, weights * width / 2, strict=True):
            P = scipy.linalg.expm(-node * B @ K)
            W, E = W + weight * P.T @ K @ P, E + weight * P
    return _operators(scipy.linalg.expm(-elapsed * B @ K), W, K @ E, None if K_query is None else query @ E)


def runge_kutta(
    K_of_tau: Callable[[float], Any],
    B_of_tau: Callable[[float], Any],
    K_query_of_tau: Callable[[float], Any] | None,
    elapsed: float,
    steps: int,
) -> Operators:
    """Classical RK4 on the matrix equations of section 2 with time-dependent K, B, K_query, from tau = 0 to `elapsed`."""
    size, step = len(_array(K_of_tau(0.0))), float(elapsed) / steps

    def at(tau):
        K, B = _array(K_of_tau(tau)), _array(B_of_tau(tau))
        return K, B, np.zeros((0, size)) if K_query_of_tau is None else _array(K_query_of_tau(tau))

    def slope(matrices, P):
        K, B, query = matrices
        return np.concatenate([-B @ K @ P, P.T @ K @ P, K @ P, query @ P])

    start = at(0.0)
    state = np.concatenate([np.eye(size), np.zeros((2 * size + len(start[2]), size))])
    for i in range(steps):
        middle, end = at((i + 0.5) * step), at((i + 1) * step)
        k1 = slope(start, state[:size])
        k2 = slope(middle, (state + step / 2 * k1)[:size])
        k3 = slope(middle, (state + step / 2 * k2)[:size])
        k4 = slope(end, (state + step * k3)[:size])
        state, start = state + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4), end
    P, W, D, G = state[:size], state[size : 2 * size], state[2 * size : 3 * size], state[3 * size :]
    return _operators(P, W, D, None if K_query_of_tau is None else G)


def frozen_squared(K: Any, n: int, elapsed: float) -> Tensor:
    """Identity 8: W for a frozen kernel and squared loss (B = I / n)."""
    eigvals, eigvecs = scipy.linalg.eigh(_array(K))
    return _tensor((eigvecs * (-n / 2 * np.expm1(-2 * eigvals * float(elapsed) / n))) @ eigvecs.T)


class Forced(NamedTuple):
    """End of a window with forcing: g_T, u_T - u_s, Phi_s - Phi_T (each from the ODE)."""

    gradient: Tensor
    displacement: Tensor
    energy: Tensor


def forced(K: Any, B: Any, forcing: Any, gradient: Any, elapsed: float) -> Forced:
    """du/dtau = -K g - r with g = g_s + B (u - u_s), constant K, B, r (sections 2 and 4), by DOP853 at rtol 1e-11."""
    K, B, forcing, gradient = (_array(value) for value in (K, B, forcing, gradient))
    elapsed = float(elapsed)

    def velocity(_tau, displacement):
        return -K @ (gradient + B @ displacement) - forcing

    if elapsed == 0 or not velocity(0.0, np.zeros(len(K))).any():
        displacement = np.zeros(len(K))
    else:
        scale = elapsed * np.abs(velocity(0.0, np.zeros(len(K)))).max()
        solution = scipy.integrate.solve_ivp(velocity, (0.0, elapsed), np.zeros(len(K)), method="DOP853", rtol=1e-11, atol=1e-15 * scale)
        assert solution.success, solution.message
        displacement = solution.y[:, -1]
    energy = -(gradient @ displacement + displacement @ B @ displacement / 2)  # Phi is quadratic: exact
    return Forced(_tensor(gradient + B @ displacement), _tensor(displacement), _tensor(energy))


# --- The spectrum that is reported (section 5) -------------------------------------------------------------------------------


def range_basis(B: Any) -> Tensor:
    """Orthonormal basis (N, r) of range B: eigenvectors of dense B above 1e-12 of the largest eigenvalue."""
    eigvals, eigvecs = scipy.linalg.eigh(_array(B))
    return _tensor(eigvecs[:, eigvals > 1e-12 * eigvals.max()])


def softmax_basis(n: int, classes: int) -> Tensor:
    """Orthonormal basis (N, n (C-1)) of the complement of 1 in every example: range B of softmax, without a tolerance."""
    return _tensor(np.kron(np.eye(n), scipy.linalg.null_space(np.ones((1, classes)))))


def omega(W: Any, B: Any, basis: Any = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues (r,) descending and eigenvectors (N, r), whitened coordinates, of 2 B^1/2 W B^1/2 on R = range B."""
    basis, root = _root(B, basis)
    inner = 2 * root @ basis.T @ _array(W) @ basis @ root
    eigvals, eigvecs = scipy.linalg.eigh((inner + inner.T) / 2)
    return _tensor(eigvals[::-1]), _tensor(basis @ eigvecs[:, ::-1])


def whitened_propagator(P: Any, B: Any, basis: Any = None) -> Tensor:
    """P~ = B^{+1/2} P B^{1/2} restricted to R, embedded in (N, N)."""
    basis, root = _root(B, basis)
    return _tensor(basis @ np.linalg.solve(root, basis.T @ _array(P) @ basis @ root) @ basis.T)


def log_dissipation(P: Any, B: Any, basis: Any = None) -> Tensor:
    """kappa = -log of the r = dim R singular values of P~, descending (the most dissipated first); (r,)."""
    basis, root = _root(B, basis)
    singular = scipy.linalg.svdvals(np.linalg.solve(root, basis.T @ _array(P) @ basis @ root))
    with np.errstate(divide="ignore"):
        return _tensor(-np.log(singular[::-1]))


def _root(B, basis):
    """Basis Z of range B and the positive definite (Z^T B Z)^1/2, so that B^1/2 = Z (Z^T B Z)^1/2 Z^T."""
    basis = _array(range_basis(B) if basis is None else basis)
    eigvals, eigvecs = scipy.linalg.eigh(basis.T @ _array(B) @ basis)
    return basis, (eigvecs * np.sqrt(eigvals)) @ eigvecs.T


def _array(value):
    return np.asarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value, dtype=np.float64)


def _tensor(value):
    return torch.tensor(np.array(value, order="C"), dtype=torch.float64)  # a copy: torch refuses negative strides


def _operators(P, W, D, G):
    return Operators(_tensor(P), _tensor(W), _tensor(D), None if G is None else _tensor(G))
