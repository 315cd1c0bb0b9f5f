"""Standard errors over probe examples: the delete-group jackknife on sub-blocks of the stored kernels (theory.md section 8).

Leaving out a group keeps the other examples' kernel entries and their weights 1/n, so that a replicate is the same run seen through fewer
examples. Only spectra are replicated. A replicate needs no fine path: legs are merged to at most `MAX_LEGS`, and the
whole is taken along the same merged legs.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ntkscope._checks import InputError
from ntkscope._display import Displayed
from ntkscope.course import Course, factor_leg, output_rows
from ntkscope.dynamics.dissipation import Dissipation, init
from ntkscope.dynamics.jackknife import delete_group_jackknife, groups, per_example_jackknife
from ntkscope.findings import motions_by_example
from ntkscope.spectrum.channels import example_energy, split_channels
from ntkscope.spectrum.cutoffs import apply_cutoff
from ntkscope.spectrum.eigen import dissipation_spectrum
from ntkscope.spectrum.examples import class_labels
from ntkscope.spectrum.whitening import whiten
from ntkscope.walk import Progress

MAX_LEGS = 12


@dataclass(frozen=True)
class Uncertainty(Displayed):
    """Standard errors by the delete-group jackknife.

    Attributes:
        num_groups: G.
        signal_rank: Standard error of the signal rank.
        effective_rank: Of the effective rank.
        reservoir_share: Of the reservoir's share of the squared residual.
        reservoir_energy: Of every example's reservoir energy.
    """

    num_groups: int
    signal_rank: float
    effective_rank: float
    reservoir_share: float
    reservoir_energy: Float[Tensor, " examples"]


@dataclass(frozen=True)
class _Replicate:
    """What is read off one set of examples."""

    signal_rank: float
    effective_rank: float
    reservoir_share: float
    energy: Float[Tensor, " kept"]


def estimate_uncertainty(
    course: Course,
    *,
    cutoff: str,
    num_groups: int,
    device: torch.device | str | None,
    progress: Progress | None,
) -> Uncertainty:
    """Replicate the spectrum with each group of examples left out.

    Args:
        course: The window.
        cutoff: The chosen rule.
        num_groups: G, from 3 to half the number of examples.
        device: Where to decompose.
        progress: Called with (parts done, parts in all); a part is a leg of a replicate, or its decomposition.

    Returns:
        Standard errors.

    Raises:
        InputError: If there are too few or too many groups.
    """
    facts = course.trace.facts
    if not 3 <= num_groups <= facts.num_examples // 2:
        raise InputError(
            f"`jackknife` must lie between 3 and half the examples ({facts.num_examples // 2}), got {num_groups}. 10 groups are usual."
        )
    labels = class_labels(course.trace.probe["targets"], facts.num_classes)
    left_out = groups(facts.num_examples, num_groups, labels=labels)
    everyone = torch.arange(facts.num_examples)
    kept = [everyone[~torch.isin(everyone, group)] for group in left_out]
    states = [_start(course, examples) for examples in kept]
    done, total = 0, num_groups * (min(MAX_LEGS, course.stop - course.start) + 1)
    for leg in course.merged_legs(MAX_LEGS):
        for k, examples in enumerate(kept):
            for piece in factor_leg(leg, kept=examples, device=device):
                states[k] = piece.extend(states[k])
            done += 1
            if progress is not None:
                progress(done, total)
    replicates = []
    for state, examples in zip(states, kept, strict=True):
        replicates.append(_read(course, state, examples, cutoff, device))
        done += 1
        if progress is not None:
            progress(done, total)
    energies = torch.full((num_groups, facts.num_examples), torch.nan, dtype=torch.float64)
    for row, examples, replicate in zip(energies, kept, replicates, strict=True):
        row[examples] = replicate.energy

    def error(name: str, *, extensive: bool) -> float:
        values = torch.tensor([getattr(replicate, name) for replicate in replicates], dtype=torch.float64)
        sizes = [len(group) for group in left_out] if extensive else None
        return float(delete_group_jackknife(values, values.mean(), extensive=extensive, group_sizes=sizes).standard_error)

    return Uncertainty(
        num_groups=num_groups,
        signal_rank=error("signal_rank", extensive=True),
        effective_rank=error("effective_rank", extensive=True),
        reservoir_share=error("reservoir_share", extensive=False),
        reservoir_energy=per_example_jackknife(energies, left_out).standard_error,
    )


def _start(course: Course, examples: Int[Tensor, " kept"]) -> Dissipation:
    """Begin a window of some examples."""
    gradient = course.read(course.start).gradient
    return init(gradient[output_rows(examples, len(gradient) // course.trace.facts.num_examples)])


def _read(course: Course, state: Dissipation, examples: Int[Tensor, " kept"], cutoff: str, device: torch.device | str | None) -> _Replicate:
    """Decompose a replicate."""
    snapshot = course.trace[course.start]
    start = _start(course, examples).gradient
    whitening = whiten(course.form.blocks(snapshot.hessian)[examples])
    spectrum = dissipation_spectrum(state, whitening, start, device=device)
    verdict = apply_cutoff(cutoff, spectrum, example_motions=motions_by_example(state, whitening, start, len(examples)))
    if verdict.rank is None:
        raise InputError(
            f"Cutoff {cutoff!r} has no answer without some of the examples: {verdict.note}. Leave `jackknife` out, or use 'half'."
        )
    reservoir = split_channels(spectrum, verdict).reservoir_part(spectrum.residual)
    return _Replicate(
        signal_rank=float(verdict.rank),
        effective_rank=spectrum.effective_rank,
        reservoir_share=float(reservoir.square().sum() / spectrum.residual.square().sum()),
        energy=example_energy(reservoir, spectrum.owner, len(examples)),
    )
