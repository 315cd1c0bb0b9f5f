"""Which examples are the same in two results, and what each of them says of those."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope.view.words import AnalysisLike, counted

SAME_PROBE = 0.5  # Cohen's kappa of labels in equal rows, from which on the rows are taken for the same examples


@dataclass(frozen=True)
class Matching:
    """The examples that two results have in common.

    Attributes:
        first: Their positions in the first.
        second: In the second, in the same order.
        sentence: What was matched and how, or why nothing was.
    """

    first: list[int]
    second: list[int]
    sentence: str

    def __len__(self) -> int:
        return len(self.first)


def match_examples(first: AnalysisLike, second: AnalysisLike) -> Matching:
    """Find the examples of two results that have equal ids and equal given labels.

    An id is a row of the probe, so that two probes of other examples share ids as well. Their labels then agree as chance would have
    it, and nothing is matched.

    Args:
        first: Result A.
        second: Result B.

    Returns:
        The matching.
    """
    a, b = first.examples, second.examples
    place = {name: i for i, name in enumerate(b.ids)}
    rows = [(i, place[name]) for i, name in enumerate(a.ids) if name in place]
    if (a.labels is None) != (b.labels is None):
        return Matching([], [], "No examples are compared one by one: one run has labels, and the other has none.")
    if not rows:
        return Matching([], [], "No examples are compared one by one: no row of the probe is in both runs.")
    if a.labels is None:
        sentence = (
            f"{counted(len(rows), 'example')} in both runs are compared by their row in the probe alone: without labels nothing tells "
            "whether both runs followed the same ones."
        )
        return Matching([i for i, _ in rows], [j for _, j in rows], sentence)
    # What an example is shows in its true label, where noise was planted.
    names, others = (a.labels, b.labels) if a.true_labels is None or b.true_labels is None else (a.true_labels, b.true_labels)
    if _kappa([names[i] for i, _ in rows], [others[j] for _, j in rows]) < SAME_PROBE:
        equal = sum(names[i] == others[j] for i, j in rows)
        sentence = (
            f"No examples are compared one by one: of {counted(len(rows), 'row')} in both runs only {equal:,} have the same label, so that "
            "the runs followed other examples."
        )
        return Matching([], [], sentence)
    same = [(i, j) for i, j in rows if a.labels[i] == b.labels[j]]
    left = len(rows) - len(same)
    others_left = f" ({counted(left, 'more row')} {'has another label' if left == 1 else 'have other labels'})" if left else ""
    sentence = (
        f"{counted(len(same), 'example')} of {len(a.ids):,} in A and {len(b.ids):,} in B are compared one by one: the same row of the "
        f"probe and the same given label{others_left}. The results do not hold the inputs, so that this is likely, not certain."
    )
    return Matching([i for i, _ in same], [j for _, j in same], sentence)


def half_steps(analysis: AnalysisLike) -> Float[Tensor, " examples"]:
    """Turn half-times into training steps since the window's start: optimizer times of two optimizers have no common unit.

    Args:
        analysis: The result.

    Returns:
        Steps, linear in optimizer time between snapshots; infinite where never reached.
    """
    times, history = analysis.examples.half_time.double(), analysis.history
    steps = np.interp(times.nan_to_num(0.0, 0.0).numpy(), history.times.numpy(), np.array(history.steps, dtype=float) - history.steps[0])
    return torch.where(torch.isfinite(times), torch.from_numpy(steps), times)


def common_rankings(first: AnalysisLike, second: AnalysisLike, matching: Matching) -> tuple[list[int], list[int], str]:
    """Rank the matched examples in both results by the same score.

    Args:
        first: Result A.
        second: Result B.
        matching: Their common examples.

    Returns:
        Positions in the matching, most suspicious first, by A and by B, without examples that lack a number in either; and the score.
    """
    own = {"loss" if analysis.examples.abstains else analysis.examples.ranked_by for analysis in (first, second)}
    by = own.pop() if len(own) == 1 else "loss"
    columns = [getattr(first.examples, by)[matching.first], getattr(second.examples, by)[matching.second]]
    known = ~torch.isnan(torch.stack(columns)).any(dim=0) if matching else torch.zeros(0, dtype=torch.bool)
    rankings = []
    for analysis, positions in ((first, matching.first), (second, matching.second)):
        place = {position: k for k, position in enumerate(positions) if known[k]}
        rankings.append([place[i] for i in analysis.examples.ranking(by) if i in place])
    return rankings[0], rankings[1], by


def _kappa(names: Sequence[object], others: Sequence[object]) -> float:
    """Compute Cohen's kappa: agreement beyond chance over what is possible; 1 where all labels are one and the same."""
    total = len(names)
    agreement = sum(name == other for name, other in zip(names, others, strict=True)) / total
    chance = sum(names.count(name) * others.count(name) for name in set(names)) / total**2
    return (agreement - chance) / (1 - chance) if chance < 1 else 1.0
