"""The delete-a-group jackknife: standard errors over examples from replicates that each leave one group out."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ntkscope._checks import InputError


def groups(num_examples: int, num_groups: int, *, labels: Int[Tensor, " examples"] | None = None, seed: int = 0) -> list[Tensor]:
    """Deal examples out into disjoint groups of nearly equal size.

    Args:
        num_examples: n.
        num_groups: G, from 2 to n.
        labels: Where given, every group gets nearly its share of each label.
        seed: Of the deal.

    Returns:
        Row indices of each group, ascending.

    Raises:
        InputError: If G is out of range.
    """
    if not 2 <= num_groups <= num_examples:
        raise InputError(f"`num_groups` must lie between 2 and the number of examples ({num_examples}), got {num_groups}.")
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))
    if labels is not None:
        order = order[labels.cpu()[order].argsort(stable=True)]  # like labels side by side, then dealt out in turn
    return [order[k::num_groups].sort().values for k in range(num_groups)]


def delete_group_jackknife(
    values: Float[Tensor, " groups"], *, sizes: Int[Tensor, " groups"], num_examples: int, extensive: bool = False
) -> float:
    """Estimate the standard error of a statistic.

    Args:
        values: The statistic without each group.
        sizes: Examples in each group.
        num_examples: n.
        extensive: Whether the statistic grows with the number of examples, as ranks do: each value is then multiplied by
            n / (n − size), so that replicates of unequal size compare.

    Returns:
        √((G − 1)/G Σ_g (θ_g − mean)²).

    Raises:
        InputError: If there are fewer than two groups, or sizes do not fit.

    Example:
        >>> delete_group_jackknife(torch.tensor([1.0, 3.0]), sizes=torch.tensor([1, 1]), num_examples=2)
        1.0

    Source:
        theory.md section 8; Shao and Tu (1995), "The Jackknife and Bootstrap", section 2.3.
    """
    count = len(values)
    if count < 2 or sizes.shape != values.shape:
        raise InputError(f"The jackknife needs at least two groups and a size for each, got {count} values and {len(sizes)} sizes.")
    replicates = values.double() * (num_examples / (num_examples - sizes.double()) if extensive else 1.0)
    return float(((count - 1) / count * (replicates - replicates.mean()).square().sum()).sqrt())


def example_standard_error(values: Float[Tensor, "groups examples"]) -> Float[Tensor, " examples"]:
    """Estimate the standard error of a number that each example has, from the G − 1 replicates that keep the example.

    Args:
        values: One row per replicate, NaN for examples that it leaves out.

    Returns:
        √(Σ_g (θ_g − mean)²) over those replicates: the jackknife's sum, scaled from G − 1 to G of them. NaN with fewer than two.
    """
    known = torch.isfinite(values)
    count = known.sum(dim=0)
    filled = torch.where(known, values, 0.0)
    mean = filled.sum(dim=0) / count.clamp(min=1)
    spread = torch.where(known, values - mean, 0.0).square().sum(dim=0)
    return torch.where(count >= 2, spread.sqrt(), torch.nan)
