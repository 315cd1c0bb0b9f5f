"""Mean and variance over examples of per-example loss gradients, exactly, without forming these gradients all at once.

The readout is one number per example, u_a · c_a with c_a the gradient of its loss in its outputs, held fixed; so one backward pass gives
the factors of every example's gradient, g_a = d_a a_aᵀ (`kernel.factor`). Per parameter, with n examples and T positions:

| form | mean and squares | formed at once |
| --- | --- | --- |
| T = 1 | dᵀ a and (d²)ᵀ (a²), two products | nothing; entries where the difference cancels are formed, and centered |
| T > 1, rows, or several factors on the same rows of a parameter | form g_a (`kernel.columns`), center, square | a chunk of columns |
| tokens | sum each example's own tokens, center, square; all other examples have zero there | a chunk of columns |

A parameter that is used twice has the sum of both uses as its gradient: it is formed before it is squared. Blocks of examples are joined
by the pairwise formula, Q = Q₁ + Q₂ + (μ₂ − μ₁)² n₁n₂/(n₁ + n₂), so that nothing cancels between blocks either. Sums are in float64.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ntkscope._checks import InputError, check_finite, check_memory
from ntkscope._display import Displayed
from ntkscope._losses import NAMED_LOSSES
from ntkscope._types import ForwardFn, LossFn
from ntkscope.kernel.batch import count_examples, take, to_device
from ntkscope.kernel.blocks import DEFAULT_MEMORY, as_rows
from ntkscope.kernel.capture import batch_norm_statistics, full_precision, undisturbed
from ntkscope.kernel.columns import columns_of
from ntkscope.kernel.contract import CACHE_BYTES
from ntkscope.kernel.coverage import Coverage, probe_routes
from ntkscope.kernel.factor import FactoredJacobian, OuterFactor
from ntkscope.kernel.jacobian import compute_jacobian
from ntkscope.kernel.model import check_module, forward_rows
from ntkscope.kernel.readout import make_readout
from ntkscope.kernel.routes import Routes, UnlikeProbe
from ntkscope.kernel.rows import first_rows, saved_bytes

CANCELLED = 1e-6  # of Σ g²: where Σ (g − μ)² is smaller, their difference has lost too many digits
DOUBLE = 8  # bytes of a float64
MEAN_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of output gradients, relative
HALF_TOLERANCE = 0.1
NOT_A_MEAN = (
    "`loss` must be the mean over examples of a per-example loss. On these {num} examples the gradient of loss(model(inputs), targets) "
    "in the outputs differs from the mean of per-example gradients by {gap:.1%} of its norm (tolerance {tol:.0e}); it is {ratio:.4g} "
    "times as large along it. {advice}"
)
TRY_MEAN = "Is it reduction='sum'? Take reduction='mean'."
TRY_ALONE = (
    "Likely causes: class weights, ignore_index or masks (each batch then has its own normalizer), or a loss that compares examples. "
    "Give a loss of which the mean over examples is what you train with."
)


@dataclass(frozen=True)
class GradientMoments(Displayed):
    """Moments over examples of per-example loss gradients g_a, in float64 (theory.md, section 6).

    Attributes:
        mean: μ = Σ_a g_a / b by parameter name, shaped as the parameter [loss per parameter unit]; zero where it reaches no output.
        variance: σ² = Σ_a (g_a − μ)² / b, elementwise, `>= 0` [square of that].
        num_examples: b.
    """

    mean: dict[str, Float[Tensor, "..."]]
    variance: dict[str, Float[Tensor, "..."]]
    num_examples: int

    def variance_of_mean(self) -> dict[str, Float[Tensor, "..."]]:
        """Estimate the variance of μ without bias, for examples drawn independently.

        Returns:
            σ²/(b−1) by parameter name.
        """
        return {name: variance / (self.num_examples - 1) for name, variance in self.variance.items()}

    def signal_to_noise(self) -> dict[str, Float[Tensor, "..."]]:
        """Compare squared mean and variance of one example's gradient.

        Returns:
            μ²/σ² by parameter name; 0 where both vanish, infinite where only the variance does.
        """
        ratios = {name: mean.square() / self.variance[name] for name, mean in self.mean.items()}
        return {name: torch.where(self.mean[name] == 0, 0.0, ratio) for name, ratio in ratios.items()}


def gradient_moments(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    *,
    loss: str | LossFn | nn.Module,
    params: Iterable[str] | None = None,
    forward_fn: ForwardFn | None = None,
    max_memory: int | None = None,
) -> GradientMoments:
    """Compute mean and variance of per-example loss gradients exactly.

    The model is run in evaluation mode and left as found: parameters, buffers, modes, `.grad` and random state bit for bit.

    Args:
        model: Any module whose output rows depend on their own input row only.
        inputs: Batch of b >= 2 examples: a tensor, or tuples, lists and dicts of tensors, examples on the first axis.
        targets: Their targets, examples on the first axis.
        loss: "squared", "mse", "cross_entropy", or a callable `(outputs, targets) -> scalar` that is a mean over examples.
        params: Names of the parameters to take; all with `requires_grad` if not given.
        forward_fn: The model's call, `forward_fn(model, batch)`, where it is not `model(batch)`.
        max_memory: Bytes for factors of the gradients and all that is formed of them; 2 GiB if not given. With less, examples are taken
            in smaller blocks, at the least one. The result, 16 bytes per entry of a parameter, and all outputs come on top.

    Returns:
        The moments.

    Raises:
        InputError: If there are fewer than two examples, rows depend on one another, a weight or gradient is not finite, or the loss is
            not the mean over examples of a per-example loss.
        InputTypeError: If the model's output is no floating-point tensor, or the loss is no callable.
        UnsupportedError: If no trained parameter reaches the loss.

    Example:
        >>> model, inputs = torch.nn.Linear(1, 1, bias=False), torch.ones(2, 1)
        >>> targets = model(inputs).detach() + torch.tensor([[1.0], [3.0]])
        >>> found = gradient_moments(model, inputs, targets, loss="squared")  # of gradients -1 and -3
        >>> f"{found.mean['weight'].item():.3f} {found.variance['weight'].item():.3f}"
        '-2.000 1.000'

    Source:
        theory.md section 6.
    """
    check_module(model)
    budget = check_memory(max_memory, DEFAULT_MEMORY)
    num_examples = count_examples(inputs)
    if count_examples(targets) != num_examples:
        raise InputError(f"`targets` must have one entry per example, got {count_examples(targets)} for {num_examples} examples.")
    _check_enough(num_examples)
    home = next((parameter.device for parameter in model.parameters()), None)
    batch = (inputs, targets) if home is None else to_device((inputs, targets), home)
    readout = make_readout("loss", forward_fn=forward_fn, loss=loss)
    with full_precision(), batch_norm_statistics(model, "eval", lambda: readout(model, batch)):
        with undisturbed(model):
            pulls, is_direct = loss_pulls(model, batch, loss=loss, forward_fn=forward_fn, budget=budget)
        if not is_direct:  # else the loss reads parameters itself, and is differentiated example by example
            readout, batch = make_pulled_readout(forward_fn), (batch[0], pulls)
        routes, coverage = probe_routes(model, batch, params=params, forward_fn=readout)
        with undisturbed(model):
            return moments_of(model, batch, routes, coverage, budget=budget)


def make_pulled_readout(forward_fn: ForwardFn | None = None) -> ForwardFn:
    """Make the readout whose gradients are those of per-example losses, without a call of the loss per example.

    Args:
        forward_fn: The model's call, where it is not `model(batch)`.

    Returns:
        `readout(model, (inputs, pulls))`, of shape `(n, 1)`: u_a · c_a. The pulls c_a are the gradients of per-example losses in the
        outputs, `(n, C)`: from `loss_pulls`, or n ∇Φ(u) for a loss Φ that is known to be a mean over examples.
    """

    def read(model: nn.Module, batch: Any) -> Tensor:
        inputs, pulls = batch
        return (forward_rows(model, inputs, forward_fn) * pulls).sum(dim=1, keepdim=True)

    return read


def moments_of(model: nn.Module, batch: Any, routes: Routes, coverage: Coverage, *, budget: int = DEFAULT_MEMORY) -> GradientMoments:
    """Compute moments of per-example gradients of a readout that was probed before; the core of `gradient_moments`.

    Args:
        model: The model, inside `undisturbed`.
        batch: What the readout takes, two examples at least: `(inputs, pulls)` for `make_pulled_readout`, which is fast;
            `(inputs, targets)` for `make_readout("loss", ...)`.
        routes: From `probe_routes` with a readout of one number per example.
        coverage: From the same call.
        budget: Bytes, as `max_memory` of `gradient_moments`.

    Returns:
        The moments, for all parameters of the routes.

    Raises:
        InputError: If there is one example, the readout has more than one number per example, or a gradient is not finite.
        UnlikeProbe: If some examples take another way through the model even where autograd differentiates every example.
    """
    num_examples = count_examples(batch)
    _check_enough(num_examples)
    if coverage.num_classes != 1:
        raise InputError(
            f"Moments are those of one number per example, but the readout gives {coverage.num_classes}. Take make_readout('loss', ...)."
        )
    while True:
        try:
            found = _add_blocks(model, batch, routes, coverage, num_examples, budget)
            break
        except UnlikeProbe:
            # Data-dependent models: what the probe learned on two examples does not hold for all, so autograd takes over.
            if not routes.ruled:
                raise
            routes, coverage = routes.left_to_autograd(), as_rows(coverage, routes)
    for name, mean in found.mean.items():
        advice = "The weights are finite, so activations overflow: check inputs and targets, or use float64."
        check_finite(f"The mean gradient in `{name}`", mean, advice)
        check_finite(f"The gradient variance in `{name}`", found.variance[name], advice)
    return found


def loss_pulls(
    model: nn.Module, batch: Any, *, loss: str | LossFn | nn.Module, forward_fn: ForwardFn | None = None, budget: int = DEFAULT_MEMORY
) -> tuple[Float[Tensor, "examples classes"], bool]:
    """Differentiate every example's loss in its outputs, and check that the loss of the batch is the mean of these losses.

    Args:
        model: The model, inside `undisturbed`.
        batch: The pair `(inputs, targets)`.
        loss: As for `gradient_moments`.
        forward_fn: As there.
        budget: Bytes for the activations of examples that are run at once.

    Returns:
        Gradients, and whether the loss depends on parameters of the model other than by the outputs.

    Raises:
        InputError: If the loss is not a mean over examples, not finite, or no number.
    """
    inputs, targets = batch
    num = count_examples(inputs)

    def run(examples: Any) -> Tensor:
        return forward_rows(model, examples, forward_fn)

    few = take(inputs, torch.tensor([0, num - 1]))
    first_rows(few, run)  # fails with advice
    step = max(1, budget // 2 // saved_bytes(model, few, run))
    with torch.no_grad():
        outputs = torch.cat([run(take(inputs, slice(start, start + step))).detach() for start in range(0, num, step)])
    outputs.requires_grad_()
    alone = make_readout("loss", forward_fn=lambda _, rows: rows, loss=loss)(model, (outputs, targets))
    together = (NAMED_LOSSES[loss] if isinstance(loss, str) else loss)(outputs, targets)
    if together.numel() != 1:
        raise InputError(f"`loss` must return one number for a batch, got shape {tuple(together.shape)}. Take reduction='mean'.")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pulls, found = (torch.autograd.grad(value, outputs, retain_graph=True)[0] for value in (alone.sum(), together.sum()))
    direct = torch.autograd.grad(together.sum(), parameters, allow_unused=True)
    _check_is_mean(found.double(), pulls.double() / num, outputs.dtype)
    return pulls, any(grad is not None for grad in direct)


def _check_is_mean(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare the gradient of a batch's loss in its outputs with the mean of those of its examples."""
    num = len(expected)
    if not bool(torch.isfinite(expected).all()):
        bad = int((~torch.isfinite(expected)).any(dim=1).nonzero()[0])
        raise InputError(f"The loss of example {bad} alone has a gradient that is not finite (all of its targets ignored?). Leave it out.")
    tolerance = MEAN_TOLERANCE.get(dtype, HALF_TOLERANCE)
    norm, gap = float(expected.norm()), float((found - expected).norm())
    # Softmax subtracts labels from probabilities: its rounding is relative to one, not to their difference.
    rounding = 64 * torch.finfo(dtype).eps * expected.numel() ** 0.5 / num
    if not gap <= tolerance * norm + rounding:
        ratio = float((found * expected).sum()) / norm**2 if norm else float("inf")
        advice = TRY_MEAN if abs(ratio - num) < 0.01 * num else TRY_ALONE
        raise InputError(NOT_A_MEAN.format(num=num, gap=gap / norm if norm else float("inf"), tol=tolerance, ratio=ratio, advice=advice))


def _check_enough(num_examples: int) -> None:
    """Check that there is a variance to estimate."""
    if num_examples < 2:
        raise InputError("The variance over examples needs at least two examples, got one. Give a larger batch.")


def _add_blocks(model: nn.Module, batch: Any, routes: Routes, coverage: Coverage, num_examples: int, budget: int) -> GradientMoments:
    """Add up blocks of examples that fit: factors, their copies in float64 and squares, and the activations they come from."""
    copies = 1 + 2 * DOUBLE * 8 // torch.finfo(routes.dtype).bits
    per_example = max(1, copies * coverage.bytes_per_example + coverage.working_bytes_per_example)
    step, chunk = max(1, budget * 3 // 4 // per_example), max(1, min(budget // 4, CACHE_BYTES))
    means: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for start in range(0, num_examples, step):
        jacobian = compute_jacobian(model, take(batch, slice(start, start + step)), routes)
        for name in routes.parameters:
            own = _block_moments(jacobian, name, chunk)
            if start:
                _merge(means[name], squares[name], start, *own, jacobian.num_examples)
            else:
                means[name], squares[name] = own
        del jacobian  # before the next one is there
    return GradientMoments(means, {name: total / num_examples for name, total in squares.items()}, num_examples)


def _merge(mean: Tensor, squares: Tensor, num_before: int, own_mean: Tensor, own_squares: Tensor, num_own: int) -> None:
    """Join a block's mean and sum of squared deviations to those before it, in place."""
    num = num_before + num_own
    gap = own_mean - mean
    mean.add_(gap, alpha=num_own / num)
    squares.add_(own_squares).addcmul_(gap, gap, value=num_before * num_own / num)


def _block_moments(jacobian: FactoredJacobian, name: str, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    """Compute mean and sum of squared deviations of one parameter over a block; zero where no example reaches it."""
    shape = jacobian.shapes[name]
    mean, squares = (torch.zeros(shape, dtype=torch.float64, device=jacobian.outputs.device) for _ in range(2))
    factors = jacobian.factors.get(name, [])
    if factors and not _share_rows(factors) and all(factor.is_token or _is_outer(factor) for factor in factors):
        for factor in factors:
            add = _token_moments if factor.is_token else _outer_moments
            add(factor, mean.view(len(mean), -1), squares.view(len(mean), -1), chunk_bytes)
        return mean, squares
    itemsize = jacobian.outputs.element_size()
    formed = max(1, chunk_bytes * itemsize // (2 * itemsize + 2 * DOUBLE))  # with its copies in float64
    for columns in columns_of(jacobian, name, chunk_bytes=formed):
        mean.view(-1)[columns.where], squares.view(-1)[columns.where] = _center(columns.values[:, 0])
    return mean, squares


def _is_outer(factor: OuterFactor) -> bool:
    """Say whether every example's gradient is one outer product."""
    return factor.has_modes and factor.patterns is None


def _share_rows(factors: Sequence[OuterFactor]) -> bool:
    """Say whether two factors add to the same rows of their parameter."""
    parts = sorted((factor.part.start, factor.part.stop) for factor in factors)
    return any(later[0] < earlier[1] for earlier, later in itertools.pairwise(parts))


def _outer_moments(
    factor: OuterFactor, mean: Float[Tensor, "rows columns"], squares: Float[Tensor, "rows columns"], chunk_bytes: int
) -> None:
    """One position: products of factors and of their squares; what cancels is formed entry by entry."""
    grads, inputs = factor.grads[:, 0, :, 0].double(), factor.inputs[:, 0].double()  # [examples, units], [examples, inputs]
    left, right = (inputs, grads) if factor.transposed else (grads, inputs)  # rows and columns of the parameter
    num, right_squares = len(left), right.square()
    for rows in _slices(left.shape[1], max(1, chunk_bytes // (5 * DOUBLE * right.shape[1]))):
        own, where = left[:, rows], slice(factor.part.start + rows.start, factor.part.start + rows.stop)
        total, power = own.T @ right, own.square().T @ right_squares
        mean[where], deviations = total / num, power - total.square() / num
        i, j = (deviations < CANCELLED * power).nonzero(as_tuple=True)
        for entries in _slices(len(i), max(1, chunk_bytes // (3 * DOUBLE * num))):
            at = i[entries], j[entries]
            _, deviations[at] = _center(own[:, at[0]] * right[:, at[1]])
        squares[where] = deviations


def _token_moments(
    factor: OuterFactor, mean: Float[Tensor, "tokens columns"], squares: Float[Tensor, "tokens columns"], chunk_bytes: int
) -> None:
    """Tokens: an example's gradient is zero but for its own tokens, whose positions are added up first."""
    num, vocabulary = len(factor.inputs), len(mean)
    owner = torch.arange(num, device=factor.inputs.device)[:, None]
    pairs, place = torch.unique(owner * vocabulary + factor.inputs, return_inverse=True)  # of example and token
    token: Int[Tensor, " pairs"] = pairs % vocabulary
    absent = (num - torch.bincount(token, minlength=vocabulary)).double()[:, None]  # examples without it
    for columns in _slices(mean.shape[1], max(1, chunk_bytes // (4 * DOUBLE * (place.numel() + vocabulary)))):
        grads = factor.grads[:, 0, columns].mT.double()  # [examples, positions, columns]
        own = grads.new_zeros(len(pairs), grads.shape[2]).index_add_(0, place.flatten(), grads.flatten(0, 1))
        center = grads.new_zeros(vocabulary, grads.shape[2]).index_add_(0, token, own).div_(num)
        mean[:, columns] = center
        squares[:, columns] = (absent * center.square()).index_add_(0, token, (own - center[token]).square_())


def _center(gradients: Float[Tensor, "examples ..."]) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Compute the mean over examples and the sum of squared deviations from it, in float64."""
    exact = gradients.double()
    mean = exact.mean(dim=0)
    return mean, (exact - mean).square_().sum(dim=0)


def _slices(length: int, step: int) -> list[slice]:
    """Cut `range(length)` into slices of `step`."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
