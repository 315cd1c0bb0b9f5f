"""Whether the snapshots of a window are dense enough, and if not how many there should be, or whether more would help at all.

The gradient that is predicted at the window's end misses the observed one by v = Σ_j P(T, τ_{j+1}) d_j, exactly: d_j is what the flow
over interval j, begun at the gradient observed there, misses at its end, and later intervals carry it on. Of each d_j the part that is due
to spacing is known without the run: two neighbouring intervals integrated as one err four times as much as the two, for a second-order
rule, so a third of the difference is the error of the two. Carried on in the same way these parts make s, what spacing does to the end. It
falls with the square of the spacing; the rest, v − s, is there at any spacing: minibatch noise, momentum, kinks, a wrong scale.

Comparing the whole window with itself at twice the spacing does not work: far from the limit both are wrong in their own way
(benchmarks/RESULTS.md, "Trajectories from checkpoints"). Here every interval begins at what was observed.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope._display import Displayed
from ntkscope.dynamics.closure import ENERGY_LIMIT, GRADIENT_LIMIT
from ntkscope.dynamics.dissipation import take_step
from ntkscope.dynamics.interval import Interval

MIN_SNAPSHOTS = 4
RESOLVED = 0.5  # change of the kernel between snapshots, of its size, up to which the estimate of what spacing cannot mend is believed


@dataclass(frozen=True)
class Density(Displayed):
    """How dense the checkpoints of a window are, and should be.

    Attributes:
        num_snapshots: In the window.
        start_step: First step of the window.
        stop_step: Its last.
        energy_spacing: Share of the loss decrease by which spacing makes the prediction too large; NaN where that is not known.
        energy_rest: The same of what no spacing removes.
        gradient_spacing: ‖s‖ / ‖g_T‖, the gradient's error at the window's end that is due to spacing.
        gradient_rest: ‖v − s‖ / ‖g_T‖, which no spacing removes.
        largest_kernel_step: Largest ‖K_{j+1} − K_j‖ / ‖K_j‖; above 50 % the split into spacing and rest is not believed.
        needed: Snapshots in this window with which both errors would be within their limits; with "at least", how many to try next; None
            where there are enough, or no number does.
        verdict: "dense enough", "more", "at least", "more would not help" or "cannot tell".
    """

    num_snapshots: int
    start_step: int
    stop_step: int
    energy_spacing: float
    energy_rest: float
    gradient_spacing: float
    gradient_rest: float
    largest_kernel_step: float
    needed: int | None
    verdict: str

    @property
    def sentence(self) -> str:
        """Whether there are enough checkpoints, and what to do if not."""
        where = f"from step {self.start_step:,} to {self.stop_step:,}"
        parts = f"spacing makes {self.gradient_spacing:.1%} of error in the gradient at the end, everything else {self.gradient_rest:.1%}"
        if self.verdict == "dense enough":
            known = "" if math.isnan(self.gradient_spacing) else f"; {parts}"
            return f"The {self.num_snapshots} checkpoints {where} are dense enough{known}."
        if self.verdict == "more would not help":
            return (
                f"More checkpoints {where} would not help: {parts}, and of the loss decrease {abs(self.energy_spacing):.1%} and "
                f"{abs(self.energy_rest):.1%}. What spacing does not make is there at any spacing: minibatch noise, kinks, momentum, "
                "large steps, or a time, M or loss scale that is not the run's."
            )
        if self.needed is None:
            return (
                f"{self.num_snapshots} checkpoints {where} are too few to tell how many are needed: give at least {MIN_SNAPSHOTS + 1} of "
                "this part of the run."
            )
        span, more = self.stop_step - self.start_step, self.needed - self.num_snapshots
        # Where files do not say their steps these are their numbers, which have nothing between them.
        every = f", one every {span // (self.needed - 1):,} steps" if span >= self.needed - 1 else ""
        if self.verdict == "more":
            return f"The {self.num_snapshots} checkpoints {where} are not dense enough: {parts}. About {more} more are needed{every}."
        return (
            f"The {self.num_snapshots} checkpoints {where} are not dense enough: between two of them the kernel changed by "
            f"{self.largest_kernel_step:.0%} of its size, too much to say how many are needed. Give at least {more} more{every}."
        )


@dataclass(frozen=True)
class Stage:
    """One interval between snapshots, as the trapezoid rule takes it.

    Attributes:
        interval: Factored.
        forcing: r; None without weight decay.
        gradient: g observed at its start.
    """

    interval: Interval
    forcing: Float[Tensor, "outputs ..."] | None
    gradient: Float[Tensor, "outputs ..."]


@dataclass(frozen=True)
class Pair:
    """Two neighbouring intervals, and both as one.

    Attributes:
        first: The earlier.
        second: The later.
        whole: Both by one trapezoid.
        is_overlapping: Whether the first is the second of the pair before: the last pair of an odd number of intervals.
    """

    first: Stage
    second: Stage
    whole: Stage
    is_overlapping: bool = False


@dataclass(frozen=True)
class SpacingError:
    """What spacing does to predictions at a window's end.

    Attributes:
        gradient: v, predicted minus observed.
        gradient_spacing: s, the part of it that is due to spacing.
        energy: Predicted minus observed decrease of the loss.
        energy_spacing: The part of it that is due to spacing.
    """

    gradient: Float[Tensor, "outputs ..."]
    gradient_spacing: Float[Tensor, "outputs ..."]
    energy: float
    energy_spacing: float


def spacing_error(pairs: Iterable[Pair], *, last_gradient: Float[Tensor, "outputs ..."], decrease: float) -> SpacingError:
    """Follow a gradient through a window, and beside it what spacing makes of it.

    Args:
        pairs: The intervals of the window, in order.
        last_gradient: g observed at the end.
        decrease: Φ at the start minus Φ at the end, observed.

    Returns:
        Errors at the end, and their parts due to spacing.

    Source:
        Step doubling as in `record.local_error`; carrying it to the window's end is ours.
    """
    gradient: Tensor | None = None
    spaced = torch.zeros_like(last_gradient)  # s
    energy = corrected = 0.0
    for pair in pairs:
        first, second, whole = pair.first, pair.second, pair.whole
        gradient = first.gradient if gradient is None else gradient
        for stage in (second,) if pair.is_overlapping else (first, second):
            step = take_step(stage.interval, gradient, stage.forcing)
            mended = take_step(stage.interval, gradient - spaced, stage.forcing)
            energy, corrected = energy + step.energy, corrected + mended.energy
            gradient, spaced = step.gradient, step.gradient - mended.gradient
        half = take_step(first.interval, first.gradient, first.forcing)
        halves = take_step(second.interval, half.gradient, second.forcing)
        double = take_step(whole.interval, first.gradient, whole.forcing)
        share = _share(first.interval.elapsed, second.interval.elapsed, is_overlapping=pair.is_overlapping)
        spaced = spaced + share * (double.gradient - halves.gradient)
        corrected -= share * (double.energy - half.energy - halves.energy)
    assert gradient is not None
    return SpacingError(gradient - last_gradient, spaced, energy - decrease, energy - corrected)


def judge_density(
    found: SpacingError | None,
    *,
    is_close: bool,
    last_gradient: Float[Tensor, "outputs ..."],
    decrease: float,
    steps: tuple[int, int],
    num_snapshots: int,
    largest_kernel_step: float,
) -> Density:
    """Say whether snapshots are dense enough.

    Args:
        found: Errors by the trapezoid rule; None where there are too few snapshots.
        is_close: Whether the analysis, by its better rule, is within the limits of both errors.
        last_gradient: g observed at the end.
        decrease: Φ at the start minus Φ at the end, observed.
        steps: First and last step of the window.
        num_snapshots: In the window.
        largest_kernel_step: Largest relative change of the kernel between two of them.

    Returns:
        The verdict.
    """
    start, stop = steps
    size, scale = float(torch.linalg.vector_norm(last_gradient)), abs(decrease)
    if found is None or not (size > 0 and scale > 0):
        verdict = "dense enough" if is_close else "cannot tell"
        return Density(num_snapshots, start, stop, math.nan, math.nan, math.nan, math.nan, largest_kernel_step, None, verdict)
    rest, spaced = (found.gradient - found.gradient_spacing).flatten() / size, found.gradient_spacing.flatten() / size
    energy = torch.tensor([[found.energy - found.energy_spacing], [found.energy_spacing]], dtype=torch.float64) / scale
    parts = ((rest, spaced, GRADIENT_LIMIT), (energy[0], energy[1], ENERGY_LIMIT))
    counts = [needed_snapshots(first, second, num_snapshots=num_snapshots, limit=limit) for first, second, limit in parts]
    known = [count for count in counts if count is not None]
    needed = None
    if is_close:
        verdict = "dense enough"
    elif len(known) == len(counts) and max(known) > num_snapshots:
        needed, verdict = max(known), "more"
    elif len(known) < len(counts) and largest_kernel_step <= RESOLVED:
        verdict = "more would not help"
    else:
        # By spacing alone; the rest is not to be believed yet.
        alone = [needed_snapshots(0 * part, part, num_snapshots=num_snapshots, limit=limit) or 0 for _, part, limit in parts]
        needed, verdict = max(2 * num_snapshots - 1, *alone), "at least"
    return Density(
        num_snapshots=num_snapshots,
        start_step=start,
        stop_step=stop,
        energy_spacing=float(energy[1]),
        energy_rest=float(energy[0]),
        gradient_spacing=float(torch.linalg.vector_norm(spaced)),
        gradient_rest=float(torch.linalg.vector_norm(rest)),
        largest_kernel_step=largest_kernel_step,
        needed=needed,
        verdict=verdict,
    )


def needed_snapshots(rest: Float[Tensor, " entries"], spaced: Float[Tensor, " entries"], *, num_snapshots: int, limit: float) -> int | None:
    """Count the snapshots with which an error rest + x² spaced, x the ratio of spacings, has norm `limit`.

    Args:
        rest: Part of the error that is there at any spacing.
        spaced: Part that falls with the square of the spacing, at the present one.
        num_snapshots: At the present spacing.
        limit: On the norm of the error, `>= 0`.

    Returns:
        At least `num_snapshots`; None if no spacing does.

    Example:
        >>> needed_snapshots(torch.tensor([0.125]), torch.tensor([0.5]), num_snapshots=11, limit=0.25)  # x² = 0.25
        21
    """
    square, mixed, constant = float(spaced @ spaced), float(rest @ spaced), float(rest @ rest) - limit**2
    if square + 2 * mixed + constant <= 0:
        return num_snapshots
    if constant >= 0:
        return None
    ratio = (math.sqrt(mixed**2 - square * constant) - mixed) / square  # x²
    # Rounded up, but not for rounding errors' sake.
    return math.ceil((num_snapshots - 1) / math.sqrt(ratio) - 1e-9) + 1


def _share(first: float, second: float, *, is_overlapping: bool) -> float:
    """Compute which share of (whole − halves) is the error of the halves, c (a³ + b³) of c ((a + b)³ − a³ − b³); or of the second alone."""
    own = second**3 if is_overlapping else first**3 + second**3
    return own / ((first + second) ** 3 - first**3 - second**3)
