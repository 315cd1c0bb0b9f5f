"""Standard errors by leaving out groups of examples (theory.md section 8): the delete-a-group jackknife.

A statistic is computed once on all examples and once without each of G groups. The spread of the G replicates θ_(g) shows how much the
statistic owes to the examples it happened to see:

    standard error² = (G − 1)/G Σ_g (θ_(g) − mean)²,        bias = (G − 1) (mean − θ)

Exact for a mean over groups of equal size; consistent for smooth statistics, though not for quantiles and the like. It has G − 1 degrees
of freedom: a 95 % interval is ± t_{G−1} standard errors, 2.26 for 10 groups.

Extensive statistics grow with the number of examples (a sum, a trace, ranks while new examples bring new directions). Their replicates are
too small by their very size, and must be multiplied by n/(n − n_g) first; `extensive=True` does this. Left out, the standard error is too
small by (G − 1)/G, and the bias is nonsense. A statistic that only half grows is better left without bias correction.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ntkscope._checks import InputError, check_finite, check_number


class Jackknife(NamedTuple):
    """An estimate and its standard error.

    Attributes:
        estimate: On all examples; with the bias taken off if asked for.
        standard_error: Of the estimate, of the same shape.
    """

    estimate: Float[Tensor, "..."]
    standard_error: Float[Tensor, "..."]


def groups(num_examples: int, num_groups: int, *, labels: Int[Tensor, " examples"] | None = None, seed: int = 0) -> list[Tensor]:
    """Split examples into disjoint random groups of near equal size.

    Args:
        num_examples: n.
        num_groups: G, from 2 to n.
        labels: Class of each example; then every class is spread evenly too. The standard error is then that of a sample in which the
            classes have fixed shares.
        seed: Of the shuffle.

    Returns:
        Sorted indices of each group. Sizes differ by at most one, and so do a class's counts.

    Raises:
        InputError: If there are fewer than 2 groups or more than examples, or labels do not fit.

    Example:
        >>> [len(group) for group in groups(10, 3)]
        [4, 3, 3]
    """
    check_number("num_groups", num_groups, low=2, high=num_examples)
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))
    if labels is not None:
        if labels.shape != (num_examples,):
            raise InputError(f"`labels` must have one entry per example, shape {(num_examples,)}, got {tuple(labels.shape)}.")
        order = order[torch.argsort(labels.detach().cpu()[order], stable=True)]
    # Dealt like cards: neighbours in the order, and so members of a class, go to different groups.
    return [order[first::num_groups].sort().values for first in range(num_groups)]


def delete_group_jackknife(
    values: Float[Tensor, "groups ..."],
    whole: Float[Tensor, "..."],
    *,
    bias_corrected: bool = False,
    extensive: bool = False,
    group_sizes: Sequence[int] | None = None,
) -> Jackknife:
    """Estimate the standard error of a statistic from its values without each group.

    Args:
        values: θ_(g), the statistic without group g.
        whole: θ, the statistic on all examples.
        bias_corrected: Whether to take the bias off the estimate, G θ − (G − 1) mean; costs variance.
        extensive: Whether the statistic grows with the number of examples; replicates are then multiplied by n/(n − n_g).
        group_sizes: n_g, for `extensive`; None if groups are of equal size, a factor of G/(G − 1).

    Returns:
        Estimate and standard error, float64.

    Raises:
        InputError: If there are fewer than 2 groups, shapes or sizes do not fit, or a value is not finite.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0, 6.0])
        >>> without = (x.sum() - x) / 3
        >>> delete_group_jackknife(without, x.mean()).standard_error  # s / √n
        tensor(1.0801, dtype=torch.float64)

    Source:
        Quenouille 1956; Tukey 1958; for groups Efron 1982, The Jackknife, the Bootstrap and Other Resampling Plans, chapter 2.
    """
    replicates, theta = values.detach().to("cpu", torch.float64), whole.detach().to("cpu", torch.float64)
    if replicates.ndim == 0 or len(replicates) < 2 or replicates.shape[1:] != theta.shape:
        raise InputError(
            f"`values` must have shape (groups, ...) with at least 2 groups and `whole` (...), got {tuple(values.shape)} and "
            f"{tuple(whole.shape)}. Give the statistic without each group, stacked."
        )
    for name, tensor in (("`values`", replicates), ("`whole`", theta)):
        check_finite(name, tensor, "A statistic that is undefined without some group has no jackknife; take fewer groups.")
    if group_sizes is not None and not extensive:
        raise InputError("`group_sizes` rescales extensive statistics. Give `extensive=True` with it, or leave it out.")
    num_groups = len(replicates)
    if extensive:
        replicates = replicates * _rescaling(num_groups, group_sizes).view(-1, *(1 for _ in theta.shape))
    mean = replicates.mean(dim=0)
    standard_error = ((num_groups - 1) / num_groups * (replicates - mean).square().sum(dim=0)).sqrt()
    return Jackknife(num_groups * theta - (num_groups - 1) * mean if bias_corrected else theta, standard_error)


def per_example_jackknife(values: Float[Tensor, "groups examples"], left_out: Sequence[Int[Tensor, " left_out"]]) -> Jackknife:
    """Estimate the standard error of per-example values, each of which is missing where its example is left out.

    A value seen in the G − 1 replicates that keep its example: their mean, and as standard error² what the whole jackknife's would be on
    average, (G − 1)²/(G (G − 2)) Σ (θ_(g) − mean)² over those replicates. For a value that does not depend on its own example, the mean of
    this over the examples of equal groups is exactly that of the jackknife. What the own example alone contributes is not in it.

    Args:
        values: Value of every example without group g; ignored, and best NaN, where the example is in the group.
        left_out: Indices of the examples of each group, as from `groups`.

    Returns:
        Mean over the replicates, and standard error, for every example; float64.

    Raises:
        InputError: If there are fewer than 3 groups, they are not a partition of the examples, or a value that is needed is not finite.

    Example:
        >>> nan = float("nan")
        >>> values = torch.tensor([[nan, 1.0, 2.0], [4.0, nan, 2.0], [6.0, 3.0, nan]])
        >>> per_example_jackknife(values, list(torch.arange(3)[:, None])).estimate
        tensor([5., 2., 2.], dtype=torch.float64)

    Source:
        Ours: the jackknife's (G − 1)/G, times (G − 1)/(G − 2), the degrees of freedom of all replicates over those of the ones that count.
    """
    if values.ndim != 2 or len(values) < 3 or len(values) != len(left_out):
        raise InputError(
            f"`values` must have shape (groups, examples) with at least 3 groups, one for each of `left_out`, got {tuple(values.shape)} "
            f"and {len(left_out)} groups."
        )
    num_groups, num_examples = values.shape
    if not torch.equal(torch.cat([group.detach().cpu() for group in left_out]).sort().values, torch.arange(num_examples)):
        raise InputError(f"`left_out` must hold each of {num_examples} examples once. Make it with `groups`.")
    keeps = torch.ones(num_groups, num_examples, dtype=torch.bool)
    for row, group in zip(keeps, left_out, strict=True):
        row[group.detach().cpu()] = False
    kept = values.detach().to("cpu", torch.float64)
    check_finite("`values` of kept examples", kept[keeps], "Give the value of every example that a replicate keeps.")
    kept = torch.where(keeps, kept, 0.0)
    mean = kept.sum(dim=0) / (num_groups - 1)
    squares = torch.where(keeps, kept - mean, 0.0).square().sum(dim=0)
    return Jackknife(mean, ((num_groups - 1) ** 2 / (num_groups * (num_groups - 2)) * squares).sqrt())


def _rescaling(num_groups: int, group_sizes: Sequence[int] | None) -> Float[Tensor, " groups"]:
    """Factors n / (n − n_g) that bring replicates to the size of the whole."""
    if group_sizes is None:
        return torch.full((num_groups,), num_groups / (num_groups - 1), dtype=torch.float64)
    if len(group_sizes) != num_groups or min(group_sizes) < 1:
        raise InputError(f"`group_sizes` must be {num_groups} positive numbers, one per group, got {list(group_sizes)}.")
    sizes = torch.tensor(list(group_sizes), dtype=torch.float64)
    return sizes.sum() / (sizes.sum() - sizes)
