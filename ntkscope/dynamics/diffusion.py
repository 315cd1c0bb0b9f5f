"""Drift and diffusion of minibatch training along leading directions (theory.md section 8), and how its batches were drawn.

The motion of a step is its mean part, −Δτ K g, plus a centered part: what the batch added. A constant drift carries outputs like τ,
independent batches scatter them like √τ, and an epoch that visits every example once returns the centered sums near zero at its end.

Exponents are half the slope of the time-averaged mean squared displacement, log against log, over lags log-spaced up to a quarter of the
window. At long lags the average has few independent terms, and the logarithm of a noisy average is biased down: the bootstrap below
estimates this bias and takes it off.

Intervals come from a block bootstrap of the steps (circular blocks of about √steps; whole epochs where there are at least six, so that what
cancels within an epoch still does). Blocks keep what neighbouring steps have in common, need no model of the noise, and leave the spread
of the noise as it is. With few blocks intervals are widened as Student's t does for a mean. Measured coverage of 95 % intervals: 91 to
98 % for independent, autoregressive and heavy-tailed steps and for reshuffled epochs, from 32 steps or 6 epochs on (wide there); 88 %
where the noise dies by a factor of 20 within the window. Memory longer than a block is not seen: such intervals are too narrow.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._checks import InputError, check_finite, check_number
from ntkscope._display import Displayed

MIN_STEPS = 32
MIN_EPOCHS = 6
MIN_EPOCH_STEPS = 8
NUM_LAGS = 12
NUM_REPLICATES = 400
NUM_FLIPS = 1000
CHUNK = 2**17  # numbers that replicates hold at once
CONFIDENCE = 0.95
CONFIDENCE_OF_VERDICT = 0.99
FAR_BELOW = 0.25  # of the variance of independent batches: what an epoch's end may have left under reshuffling
HALF = 0.5  # of the same: reshuffled epochs cut at the wrong step reach this far
BOUNDED = 0.35  # exponent across epochs, 0 for a bounded sum and ½ for independent batches: where the interval must end to be the one,
GROWING = 0.15  # and where it must begin to be the other
ROUNDING = 1e-12  # of the mean motion: centered motion below it is none
SMALLEST_SQUARE = 1e-12  # of a mode's mean squared step: sums below it have not grown


_Resampler = tuple[Callable[[int], np.ndarray], int]  # draws steps for a number of replicates; blocks it draws for one


@dataclass(frozen=True)
class Growth(Displayed):
    """How root-mean-square displacement grows with time, mode by mode.

    Attributes:
        exponent: p of displacement ~ timeᵖ, bias removed; NaN where a mode does not move, or no time passes.
        low: Lower end of its 95 % interval.
        high: Upper end.
        times: Mean elapsed optimizer time of the lags that were fitted.
        displacement: Root-mean-square displacement at each.
    """

    exponent: Float[Tensor, " modes"]
    low: Float[Tensor, " modes"]
    high: Float[Tensor, " modes"]
    times: Float[Tensor, " lags"]
    displacement: Float[Tensor, "lags modes"]


@dataclass(frozen=True)
class Sampler(Displayed):
    """How batches were drawn, as the centered motion shows it.

    Attributes:
        name: "independent batches", "reshuffled epochs" or "unclear".
        ratio: Variance of the sums over epochs, over that of as many independent steps: 1 for independent batches, near 0 for reshuffled
            epochs; a mean over modes, NaN where it could not be measured.
        expected: Where independent batches with steps of the same sizes put the ratio 99 times of 100.
        exponent: Growth exponent of the centered motion across epochs, of all modes together.
        interval: Its 95 % interval.
        reason: One sentence with the number.
    """

    name: str
    ratio: float
    expected: tuple[float, float]
    exponent: float
    interval: tuple[float, float]
    reason: str


@dataclass(frozen=True)
class Diffusion(Displayed):
    """Drift and diffusion of a window along leading directions.

    Attributes:
        mean_growth: Of the cumulated mean motion; 1 for a constant drift.
        centered_growth: Of the cumulated centered motion; ½ for independent batches.
        within_epoch: The same within epochs, lags up to a quarter of an epoch; None with the reason. Under reshuffling below ½ already:
            without replacement, the scatter after a share x of the epoch is √(1 − x) times that of independent batches.
        within_epoch_reason: Why there is none, else empty.
        across_epochs: The same over lags of whole epochs; 0 for a bounded sum; None with the reason.
        across_epochs_reason: Why there is none, else empty.
        signal_to_noise_step: Root-mean-square mean motion over root-mean-square centered motion of a step; infinite without noise, NaN
            without motion.
        signal_to_noise_window: |sum of the mean motion| / √(sum of squared centered motion).
        sampler: How batches were drawn.
    """

    mean_growth: Growth
    centered_growth: Growth
    within_epoch: Growth | None
    within_epoch_reason: str
    across_epochs: Growth | None
    across_epochs_reason: str
    signal_to_noise_step: Float[Tensor, " modes"]
    signal_to_noise_window: Float[Tensor, " modes"]
    sampler: Sampler


def measure_diffusion(
    mean: Float[Tensor, "steps modes"],
    centered: Float[Tensor, "steps modes"],
    elapsed: Float[Tensor, " steps"],
    *,
    steps_per_epoch: int | None = None,
    first_epoch: int = 0,
    seed: int = 0,
) -> Diffusion:
    """Measure growth exponents and signal-to-noise ratios of a window, and name the sampler.

    Args:
        mean: Projected mean motion −Δτ K g of each step.
        centered: Projected centered motion u_{t+1} − u_t + Δτ K g.
        elapsed: Δτ of each step, `>= 0`.
        steps_per_epoch: Steps of one pass through the data, `>= 2`; None if unknown, and then the sampler stays unclear.
        first_epoch: Step of the window at which an epoch begins. With fewer than 12 epochs a wrong one can make reshuffled epochs pass for
            independent batches.
        seed: Of the bootstrap.

    Returns:
        The measurements; what fewer than 6 whole epochs cannot tell is None with the reason.

    Raises:
        InputError: If shapes do not fit, there are fewer than 32 steps or no modes, an entry is not finite, time runs backwards or
            stands still, or an option is out of range.

    Example:
        >>> steps = torch.ones(64, 1)
        >>> noise = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
        >>> measure_diffusion(-steps, noise, steps[:, 0]).mean_growth.exponent
        tensor([1.], dtype=torch.float64)

    Source:
        theory.md section 8. Bootstrap: Politis and Romano 1992 (circular blocks).
    """
    _check(mean, centered, elapsed, steps_per_epoch, first_epoch)
    means, noise, times = (tensor.detach().to("cpu", torch.float64).numpy() for tensor in (mean, centered, elapsed))
    mean_size, noise_size = _root_mean_square(means), _root_mean_square(noise)
    noise_size = np.where(noise_size <= ROUNDING * mean_size, 0.0, noise_size)
    generator = np.random.default_rng(seed)

    # Time first, then both motions in units of their step: exponents do not know units, squares must not overflow.
    steps = np.column_stack([times, _in_units(means, mean_size), _in_units(noise, noise_size)])
    num_modes = means.shape[1]
    epochs = _epochs(np.delete(steps, slice(1, 1 + num_modes), axis=1), steps_per_epoch, first_epoch)
    resampler = _resampler(len(steps), epochs, first_epoch, generator)
    growth = _fit(_replicate(steps, _log_spaced(len(steps) // 4), resampler), np.concatenate([mean_size, noise_size]))
    within, within_reason = _within(epochs, steps_per_epoch, generator)
    across, across_reason = _across(epochs, steps_per_epoch, generator)
    with np.errstate(divide="ignore", invalid="ignore"):
        per_step = mean_size / noise_size
        per_window = np.abs(means.sum(axis=0)) / (noise_size * np.sqrt(len(noise)))
    return Diffusion(
        mean_growth=_modes(growth, slice(None, num_modes)),
        centered_growth=_modes(growth, slice(num_modes, None)),
        within_epoch=None if within is None else _fit(within, noise_size),
        within_epoch_reason=within_reason,
        across_epochs=None if across is None else _fit(across, noise_size),
        across_epochs_reason=across_reason,
        signal_to_noise_step=torch.from_numpy(per_step),
        signal_to_noise_window=torch.from_numpy(per_window),
        sampler=_name_sampler(epochs, across, across_reason, generator),
    )


def _check(mean: Tensor, centered: Tensor, elapsed: Tensor, steps_per_epoch: int | None, first_epoch: int) -> None:
    """Check what `measure_diffusion` takes."""
    if mean.ndim != 2 or mean.shape != centered.shape or elapsed.shape != mean.shape[:1] or mean.shape[1] == 0:
        raise InputError(
            "`mean` and `centered` must have shape (steps, modes) with at least one mode, and `elapsed` (steps,), "
            f"got {tuple(mean.shape)}, {tuple(centered.shape)} and {tuple(elapsed.shape)}."
        )
    if len(mean) < MIN_STEPS:
        raise InputError(f"Growth exponents need at least {MIN_STEPS} steps, got {len(mean)}. Record every step of a longer window.")
    for name, tensor in (("`mean`", mean), ("`centered`", centered), ("`elapsed`", elapsed)):
        check_finite(name, tensor, "Did training diverge in this window? End it earlier.")
    if bool((elapsed < 0).any()) or not bool((elapsed > 0).any()):
        raise InputError(
            f"`elapsed` must be nonnegative and not zero throughout, got {float(elapsed.min()):g} to {float(elapsed.max()):g}. "
            "Give the optimizer time of each step, not its running sum."
        )
    if steps_per_epoch is not None:
        if isinstance(steps_per_epoch, bool) or not isinstance(steps_per_epoch, int) or steps_per_epoch < 2:
            raise InputError(
                f"`steps_per_epoch` must be a whole number from 2 up, got {steps_per_epoch!r}. Leave it out if it is unknown, "
                "or if every step sees all examples."
            )
        check_number("first_epoch", first_epoch, low=0, high=steps_per_epoch, open_high=True)


def _root_mean_square(motion: np.ndarray) -> np.ndarray:
    """Root-mean-square step of every mode, without overflow or underflow."""
    largest = np.abs(motion).max(axis=0)
    return largest * np.sqrt(np.square(motion / np.where(largest > 0, largest, 1.0)).mean(axis=0))


def _in_units(motion: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Divide every mode by its size; zero where that is zero."""
    return np.divide(motion, size, out=np.zeros_like(motion), where=size > 0)


def _log_spaced(longest: int) -> np.ndarray:
    """Whole lags from 1 to `longest`, evenly spaced in their logarithm."""
    return np.unique(np.round(np.geomspace(1, longest, NUM_LAGS)).astype(int))


def _epochs(steps: np.ndarray, steps_per_epoch: int | None, first_epoch: int) -> np.ndarray | None:
    """Cut out the whole epochs, [epochs, steps, 1 + modes]; None if there are too few."""
    if steps_per_epoch is None:
        return None
    num_epochs = (len(steps) - first_epoch) // steps_per_epoch
    if num_epochs < MIN_EPOCHS:
        return None
    return steps[first_epoch : first_epoch + num_epochs * steps_per_epoch].reshape(num_epochs, steps_per_epoch, -1)


def _resampler(num_steps: int, epochs: np.ndarray | None, first_epoch: int, generator: np.random.Generator) -> _Resampler:
    """Return a function that draws the steps of one replicate, and the number of blocks it draws."""
    if epochs is None:
        return _draw_blocks(0, num_steps, 1, round(np.sqrt(num_steps)), generator)
    num_epochs, length, _ = epochs.shape
    together = max(1, min(round(np.sqrt(num_epochs * length) / length), num_epochs // MIN_EPOCHS))
    return _draw_blocks(first_epoch, num_epochs, length, together, generator)


def _draw_blocks(offset: int, num_units: int, unit: int, together: int, generator: np.random.Generator) -> _Resampler:
    """Draw circular blocks of `together` units, each of `unit` steps, until there are as many as before."""
    num_blocks = -(-num_units // together)

    def draw(num_replicates: int) -> np.ndarray:
        first = generator.integers(0, num_units, (num_replicates, num_blocks, 1))
        units = ((first + np.arange(together)) % num_units).reshape(num_replicates, -1)[:, :num_units]
        return (offset + units[:, :, None] * unit + np.arange(unit)).reshape(num_replicates, -1)

    return draw, num_blocks


def _curves(steps: np.ndarray, lags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Elapsed time [..., lags] and squared displacement [..., lags, modes] of steps [..., steps, 1 + modes], averaged over all starts."""
    sums = np.zeros((*steps.shape[:-2], steps.shape[-2] + 1, steps.shape[-1]))
    np.cumsum(steps, axis=-2, out=sums[..., 1:, :])
    times, squares = [], []
    for lag in lags:
        moved = sums[..., lag:, :] - sums[..., :-lag, :]
        times.append(moved[..., 0].mean(axis=-1))
        squares.append(np.einsum("...sc,...sc->...c", moved[..., 1:], moved[..., 1:]) / moved.shape[-2])
    return np.stack(times, axis=-1), np.stack(squares, axis=-2)


@dataclass(frozen=True)
class _Curves:
    """Mean elapsed time and mean squared displacement over lags, measured and in every replicate."""

    times: np.ndarray  # [lags]
    squares: np.ndarray  # [lags, columns], in units of a mode's mean squared step
    replicate_times: np.ndarray  # [replicates, lags]
    replicate_squares: np.ndarray  # [replicates, lags, columns]
    num_blocks: int  # drawn for a replicate


def _replicate(steps: np.ndarray, lags: np.ndarray, resampler: _Resampler) -> _Curves:
    """Measure curves, and measure them again on replicates of the steps."""
    draw, num_blocks = resampler
    at_once = max(1, CHUNK // steps.size)
    counts = [min(at_once, NUM_REPLICATES - done) for done in range(0, NUM_REPLICATES, at_once)]
    times, squares = zip(*(_curves(steps[draw(count)], lags) for count in counts), strict=True)
    return _Curves(*_curves(steps, lags), np.concatenate(times), np.concatenate(squares), num_blocks)


def _within(epochs: np.ndarray | None, steps_per_epoch: int | None, generator: np.random.Generator) -> tuple[_Curves | None, str]:
    """Measure curves on pairs of steps of the same epoch; epochs are the blocks."""
    if epochs is None:
        return None, _no_epochs(steps_per_epoch)
    num_epochs, length, _ = epochs.shape
    if length < MIN_EPOCH_STEPS:
        return None, f"an epoch of {length} steps has fewer than two lags up to a quarter of it; it takes {MIN_EPOCH_STEPS} steps"
    times, squares = _curves(_in_local_units(epochs), _log_spaced(length // 4))  # [epochs, lags], [epochs, lags, modes]
    shares = generator.multinomial(num_epochs, np.full(num_epochs, 1 / num_epochs), size=NUM_REPLICATES) / num_epochs
    return _Curves(times.mean(axis=0), squares.mean(axis=0), shares @ times, np.tensordot(shares, squares, axes=1), num_epochs), ""


def _in_local_units(epochs: np.ndarray) -> np.ndarray:
    """Divide motion by its size in the epochs around: where the noise dies, the first epochs would else speak for all."""
    # A quarter of the window is around: an epoch's own size goes up and down with what it did, and would bias exponents.
    reach = max(1, len(epochs) // 8)
    around = [epochs[max(0, k - reach) : k + reach + 1, :, 1:] for k in range(len(epochs))]
    sizes = np.sqrt([np.square(part).mean(axis=(0, 1)) for part in around])
    motion = [_in_units(epoch[:, 1:], size) for epoch, size in zip(epochs, sizes, strict=True)]
    return np.concatenate([epochs[:, :, :1], motion], axis=2)


def _across(epochs: np.ndarray | None, steps_per_epoch: int | None, generator: np.random.Generator) -> tuple[_Curves | None, str]:
    """Measure curves at lags of whole epochs, from every start: at equal phase a bounded sum scatters equally at every lag."""
    if epochs is None:
        return None, _no_epochs(steps_per_epoch)
    num_epochs, length, columns = epochs.shape
    together = max(1, min(round(num_epochs ** (1 / 3)), num_epochs // MIN_EPOCHS))  # momentum carries motion from one into the next
    lags = length * _log_spaced(max(3, num_epochs // 4))
    return _replicate(epochs.reshape(-1, columns), lags, _draw_blocks(0, num_epochs, length, together, generator)), ""


def _no_epochs(steps_per_epoch: int | None) -> str:
    """Say why epochs cannot be looked at."""
    if steps_per_epoch is None:
        return "the number of steps per epoch is not known"
    return f"the window holds fewer than {MIN_EPOCHS} whole epochs of {steps_per_epoch} steps"


def _fit(curves: _Curves, sizes: np.ndarray) -> Growth:
    """Turn curves of modes of these sizes into exponents and intervals."""
    slopes = _exponent(curves.replicate_times, curves.replicate_squares)  # [replicates, columns]
    slopes = slopes[np.isfinite(slopes).all(axis=1)]  # a replicate of steps that took no time has none
    if not len(slopes):
        slopes = np.full((1, len(sizes)), np.nan)
    mean = slopes.mean(axis=0)
    # The replicates' world has a known exponent, that of its expected curve; what its fits miss it by on average is the bias.
    bias = mean - _exponent(curves.replicate_times.mean(axis=0), curves.replicate_squares.mean(axis=0))
    low, high = np.quantile(slopes - mean, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    student = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, curves.num_blocks - 1)
    widening = student / scipy.stats.norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt(curves.num_blocks / (curves.num_blocks - 1))
    exponent = np.where(sizes > 0, _exponent(curves.times, curves.squares) - bias, np.nan)
    arrays = exponent, exponent - widening * high, exponent - widening * low, curves.times, sizes * np.sqrt(curves.squares)
    return Growth(*(torch.from_numpy(array) for array in arrays))


def _exponent(times: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Half the least-squares slope of log squares [..., lags, columns] over log times [..., lags]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.log(times)
        x = x - x.mean(axis=-1, keepdims=True)
        weights = 0.5 * x / np.square(x).sum(axis=-1, keepdims=True)
    return (weights[..., None] * np.log(np.maximum(squares, SMALLEST_SQUARE))).sum(axis=-2)


def _modes(growth: Growth, columns: slice) -> Growth:
    """Keep some columns."""
    return Growth(growth.exponent[columns], growth.low[columns], growth.high[columns], growth.times, growth.displacement[:, columns])


def _name_sampler(epochs: np.ndarray | None, across: _Curves | None, why_not: str, generator: np.random.Generator) -> Sampler:
    """Compare the sums over epochs with those of the same steps under random signs: what independent batches would have done."""
    nothing = float("nan")
    moves = np.zeros(0, dtype=bool) if epochs is None else np.abs(epochs[:, :, 1:]).max(axis=(0, 1)) > 0
    if epochs is None or across is None or not moves.any():
        why_not = why_not or "the centered motion is zero: every step saw all examples"
        return Sampler("unclear", nothing, (nothing, nothing), nothing, (nothing, nothing), f"not judged: {why_not}.")
    noise = epochs[:, :, 1:][:, :, moves]
    variance = np.square(noise).sum(axis=(0, 1))
    ratio = float((np.square(noise.sum(axis=1)).sum(axis=0) / variance).mean())
    persistence = float(((noise[:, 1:] * noise[:, :-1]).sum(axis=(0, 1)) / variance).mean())

    # One sign for all modes of a step: they share its batch.
    squares = np.zeros((NUM_FLIPS, len(variance)))
    products = np.zeros_like(squares)
    for epoch in noise:
        signs = 2.0 * generator.integers(0, 2, (NUM_FLIPS, len(epoch)), dtype=np.int8) - 1.0
        squares += np.square(signs @ epoch)
        products += (signs[:, 1:] * signs[:, :-1]) @ (epoch[1:] * epoch[:-1])
    tails = [(1 - CONFIDENCE_OF_VERDICT) / 2, (1 + CONFIDENCE_OF_VERDICT) / 2]
    low, high = np.quantile((squares / variance).mean(axis=1), tails)
    persists = persistence > np.quantile((products / variance).mean(axis=1), tails[1])

    together = (curve.mean(axis=-1, keepdims=True) for curve in (across.squares, across.replicate_squares))
    pooled = _fit(_Curves(across.times, next(together), across.replicate_times, next(together), across.num_blocks), np.ones(1))
    exponent, least, most = (float(end) for end in (pooled.exponent, pooled.low, pooled.high))
    share = f"sums over epochs have {ratio:.2g} of the variance of as many independent steps, which give {low:.2g} to {high:.2g}"
    beyond = f"{share}, and across epochs they grow like time to the power {exponent:.2f} ({least:.2f} to {most:.2f})"
    if ratio < min(FAR_BELOW, low):
        name, reason = "reshuffled epochs", f"The centered motion returns at each epoch's end: {share}."
    elif most < BOUNDED:
        name, reason = "reshuffled epochs", f"The centered motion is bounded, though not at the epochs' ends (momentum lags): {beyond}."
    elif max(HALF, low) <= ratio <= high and not persists:
        name, reason = "independent batches", f"The centered motion keeps growing like √time across epochs: {share}."
    elif GROWING < least <= 0.5 <= most:
        name, reason = "independent batches", f"Steps persist (momentum does that), and the centered motion keeps growing: {beyond}."
    elif least > 0.5:
        cause = "momentum beyond an epoch, a probe that is not all that was trained on, or a wrong time step"
        name, reason = "unclear", f"The centered motion drifts ({cause}): {beyond}."
    else:
        name, reason = "unclear", f"More epochs are needed to tell: {beyond}."
    return Sampler(name, ratio, (float(low), float(high)), exponent, (least, most), reason)
