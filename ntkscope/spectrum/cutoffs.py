"""Where to cut: rules that turn a spectrum into a signal rank, side by side (theory.md section 5).

A direction is signal when its ω is strictly above the threshold; equality is reservoir.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ntkscope._checks import InputError
from ntkscope._display import Displayed
from ntkscope.spectrum.eigen import Spectrum, squared_rows

ALWAYS_SHOWN = ("half", "energy", "gap", "rank", "mp", "gd", "risk")
# Square matrix, unknown noise level: Marchenko–Pastur edge and Gavish–Donoho threshold over the median singular value.
MARCHENKO_PASTUR = 2.475
GAVISH_DONOHO = 2.858


@dataclass(frozen=True)
class Cutoff(Displayed):
    """One rule's verdict.

    Attributes:
        rule: The rule, with its parameter.
        threshold: ω above which a direction is signal; None where the rule is not a threshold, or has no answer.
        rank: Number of signal directions; None where the rule has no answer.
        note: Why there is none, or a caveat; empty otherwise.
        selected: Which directions are signal, where they need not be the leading ones; None where they are.
    """

    rule: str
    threshold: float | None
    rank: int | None
    note: str = ""
    selected: Bool[Tensor, " modes"] | None = None


def apply_cutoff(rule: str, spectrum: Spectrum, *, example_motions: Float[Tensor, "modes examples ..."] | None = None) -> Cutoff:
    """Apply one rule.

    Args:
        rule: "half", "fixed:X", "rank:R", "energy" or "energy:X", "gap", "rank", "mp", "gd" or "risk".
        spectrum: The spectrum.
        example_motions: Whitened train motion caused by each example's gradient; needed by "risk".

    Returns:
        The verdict.

    Raises:
        InputError: If the rule is unknown or its parameter out of range.

    Example:
        >>> from ntkscope.spectrum.cutoffs import parse_rule
        >>> parse_rule("energy:0.9")
        ('energy', 0.9)

    Source:
        theory.md section 5. "mp" and "gd" are heuristics: Ω is no sample covariance.
    """
    name, value = parse_rule(rule)
    eigvals = spectrum.eigvals
    if name == "half":
        return _above(rule, eigvals, 0.5)
    if name == "fixed":
        return _above(rule, eigvals, value)
    if name == "rank" and ":" in rule:
        rank = int(value)
        if rank > len(eigvals):
            raise InputError(f"Cutoff {rule!r} asks for more directions than there are ({len(eigvals)}).")
        return Cutoff(rule, None, rank)
    if name == "energy":
        return _energy(rule, spectrum, value)
    if name == "rank":
        return _above(rule, eigvals, len(eigvals) * torch.finfo(torch.float64).eps * float(eigvals[0]))
    if name == "gap":
        return _gap(rule, eigvals)
    if name == "risk":
        return _risk(rule, spectrum, example_motions)
    factor = MARCHENKO_PASTUR if name == "mp" else GAVISH_DONOHO
    threshold = (factor * float(eigvals.sqrt().median())) ** 2
    if threshold > float(eigvals[0]):
        return Cutoff(rule, threshold, None, "the threshold exceeds the largest ω: no bulk of noise to cut from")
    return _above(rule, eigvals, threshold, note="heuristic: Ω is no sample covariance")


def parse_rule(rule: str) -> tuple[str, float]:
    """Read a rule and its parameter.

    Args:
        rule: As for `apply_cutoff`.

    Returns:
        Name, and parameter (a default, or NaN where there is none).

    Raises:
        InputError: If the rule is unknown or its parameter out of range.
    """
    name, colon, text = rule.partition(":")
    limits: dict[str, tuple[float, float]] = {"fixed": (0.0, math.inf), "rank": (0.0, math.inf), "energy": (0.0, 1.0)}
    if name not in (*ALWAYS_SHOWN, "fixed") or (colon and name not in limits) or (name == "fixed" and not colon):
        raise InputError(f"Unknown cutoff rule {rule!r}. Choose half, fixed:X, rank:R, energy or energy:X, gap, rank, mp, gd or risk.")
    if not colon:
        return name, 0.95 if name == "energy" else math.nan
    try:
        value = float(int(text) if name == "rank" else float(text))
    except ValueError as error:
        raise InputError(f"Cutoff {rule!r} needs a number after the colon, got {text!r}.") from error
    low, high = limits[name]
    if not (low <= value <= high and math.isfinite(value)):
        raise InputError(f"Cutoff {rule!r} needs a number in [{low:g}, {high:g}] after the colon.")
    return name, value


def _above(rule: str, eigvals: Tensor, threshold: float, note: str = "") -> Cutoff:
    """Count the directions above a threshold."""
    return Cutoff(rule, threshold, int((eigvals > threshold).sum()), note)


def _energy(rule: str, spectrum: Spectrum, share: float) -> Cutoff:
    """Keep the fewest leading directions that explain a share of the dissipated loss."""
    energies = (spectrum.eigvals * spectrum.residual_energy).cumsum(0)
    if float(energies[-1]) == 0.0:
        return Cutoff(rule, None, None, "nothing was dissipated")
    return Cutoff(rule, None, int((energies < share * energies[-1]).sum()) + 1 if share > 0 else 0)


def _gap(rule: str, eigvals: Tensor) -> Cutoff:
    """Cut at the largest drop of log ω, above rounding."""
    floor = len(eigvals) * torch.finfo(torch.float64).eps * float(eigvals[0])
    logs = eigvals[eigvals > floor].log()
    if len(logs) < 2:
        return Cutoff(rule, None, None, "fewer than two directions above rounding")
    rank = int((logs[:-1] - logs[1:]).argmax()) + 1
    return Cutoff(rule, float(eigvals[rank]), rank)


def _risk(rule: str, spectrum: Spectrum, example_motions: Tensor | None) -> Cutoff:
    """Keep directions whose mean motion over examples beats its leave-one-out noise: mean² > var / (n − 1)."""
    if example_motions is None:
        return Cutoff(rule, None, None, "needs the motion that each example causes")
    mean, variance = risk_moments(spectrum.eigvecs, example_motions)
    is_signal = mean > variance / (example_motions.shape[1] - 1)
    return Cutoff(rule, None, int(is_signal.sum()), "directions that pass need not be the leading ones", is_signal)


def risk_moments(
    eigvecs: Float[Tensor, "modes modes"], example_motions: Float[Tensor, "modes examples ..."]
) -> tuple[Float[Tensor, " modes"], Float[Tensor, " modes"]]:
    """Compute squared mean and variance over examples of the motion along every direction.

    Args:
        eigvecs: Directions.
        example_motions: Whitened motion that each example's gradient causes, times n.

    Returns:
        Squared mean and variance (with 1/n), summed over columns.
    """
    return moments_over_examples(torch.tensordot(eigvecs.T, example_motions, dims=1))


def moments_over_examples(motions: Float[Tensor, "modes examples ..."]) -> tuple[Float[Tensor, " modes"], Float[Tensor, " modes"]]:
    """Compute squared mean and variance over examples.

    Args:
        motions: Motion along every direction that each example's gradient causes, times n.

    Returns:
        Squared mean and variance (with 1/n), summed over columns.
    """
    mean, variance = motions.mean(dim=1), motions.var(dim=1, correction=0)
    return squared_rows(mean), variance.reshape(len(variance), -1).sum(dim=1)
