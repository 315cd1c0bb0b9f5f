"""The delete-a-group jackknife where the standard error is known, and its coverage."""

import math

import pytest
import scipy
import torch
from compare import assert_close

from ntkscope._checks import InputError
from ntkscope.dynamics.jackknife import delete_group_jackknife, groups, per_example_jackknife


def sample(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()


def replicates(statistic, x, left_out):
    """The statistic without each group, by leaving rows out one group at a time."""
    keep = [[row for row in range(len(x)) if row not in set(group.tolist())] for group in left_out]
    return torch.stack([statistic(x[rows]) for rows in keep])


@pytest.mark.parametrize(("n", "num_groups"), [(20, 20), (60, 10), (6, 2)])
def test_the_mean_has_its_textbook_standard_error(n, num_groups):
    x = sample(n)
    left_out = groups(n, num_groups)
    estimate, standard_error = delete_group_jackknife(replicates(torch.mean, x, left_out), x.mean())
    means = torch.stack([x[group].mean() for group in left_out])
    assert_close(estimate, x.mean())
    assert_close(standard_error, means.std(correction=1) / math.sqrt(num_groups))
    corrected = delete_group_jackknife(replicates(torch.mean, x, left_out), x.mean(), bias_corrected=True)
    assert_close(corrected.estimate, x.mean())


def test_values_of_any_shape():
    x = sample(12, 2, 3)
    left_out = groups(12, 4)
    result = delete_group_jackknife(replicates(lambda rows: rows.mean(dim=0), x, left_out), x.mean(dim=0))
    assert result.estimate.shape == result.standard_error.shape == (2, 3)
    one = delete_group_jackknife(replicates(torch.mean, x[:, 1, 2], left_out), x[:, 1, 2].mean())
    assert_close(result.standard_error[1, 2], one.standard_error)


def test_bias_correction_makes_the_variance_unbiased():
    """Leaving out one example: the correction of the plain variance is the one over n − 1, exactly."""
    x = sample(15)

    def plain(rows):
        return rows.var(correction=0)

    result = delete_group_jackknife(replicates(plain, x, groups(15, 15)), plain(x), bias_corrected=True)
    assert_close(result.estimate, x.var(correction=1))


@pytest.mark.parametrize(("n", "num_groups"), [(40, 10), (43, 10)], ids=["equal groups", "unequal groups"])
def test_extensive_statistics_are_rescaled(n, num_groups):
    x = sample(n)
    left_out = groups(n, num_groups)
    sizes = [len(group) for group in left_out]
    result = delete_group_jackknife(replicates(torch.sum, x, left_out), x.sum(), extensive=True, group_sizes=sizes, bias_corrected=True)
    mean = delete_group_jackknife(replicates(torch.mean, x, left_out), x.mean(), bias_corrected=True)
    assert_close(result.estimate, n * mean.estimate)
    assert_close(result.standard_error, n * mean.standard_error)
    if n % num_groups == 0:
        assert_close(
            delete_group_jackknife(replicates(torch.sum, x, left_out), x.sum(), extensive=True).standard_error, result.standard_error
        )


def test_single_precision_is_accumulated_in_double():
    x = (1e4 + sample(20)).float()
    result = delete_group_jackknife(x, x.mean())
    assert result.estimate.dtype == result.standard_error.dtype == torch.float64
    assert_close(result.standard_error, 19 * x.double().std() / math.sqrt(20))


def test_coverage_of_a_curved_statistic():
    """The logarithm of a sample variance, 10 groups of 20, intervals of Student's t with 9 degrees of freedom."""
    trials, n, num_groups = 400, 200, 10
    x = torch.randn(n, trials, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def log_variance(rows):
        return rows.var(dim=0).log()

    estimate, standard_error = delete_group_jackknife(
        replicates(log_variance, x, groups(n, num_groups)), log_variance(x), bias_corrected=True
    )
    reach = scipy.stats.t.ppf(0.975, num_groups - 1) * standard_error
    assert 0.92 <= float((estimate.abs() <= reach).double().mean()) <= 0.98
    assert float(standard_error.mean()) == pytest.approx(float(estimate.std()), rel=0.1)


@pytest.mark.parametrize(("n", "num_groups"), [(10, 3), (12, 12), (101, 7)])
def test_groups_are_a_near_equal_partition(n, num_groups):
    left_out = groups(n, num_groups)
    assert len(left_out) == num_groups
    assert sorted(int(row) for group in left_out for row in group) == list(range(n))
    assert max(map(len, left_out)) - min(map(len, left_out)) <= 1
    assert all(bool((group.diff() > 0).all()) for group in left_out)


def test_groups_are_random_and_seeded():
    assert all(torch.equal(a, b) for a, b in zip(groups(50, 5, seed=3), groups(50, 5, seed=3), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(groups(50, 5, seed=3), groups(50, 5, seed=4), strict=True))
    labels = torch.arange(50) // 10
    assert not torch.equal(groups(50, 5, labels=labels)[0], groups(50, 5, labels=labels, seed=1)[0])


def test_groups_are_stratified_by_label():
    labels = torch.tensor([2] * 31 + [0] * 7 + [5] * 24)
    left_out = groups(62, 10, labels=labels)
    assert sorted(int(row) for group in left_out for row in group) == list(range(62))
    for label in (0, 2, 5):
        counts = [int((labels[group] == label).sum()) for group in left_out]
        assert max(counts) - min(counts) <= 1
    sizes = [len(group) for group in left_out]
    assert max(sizes) - min(sizes) <= 1


def with_gaps(values, left_out):
    values = values.clone()
    for row, group in zip(values, left_out, strict=True):
        row[group] = float("nan")
    return values


def test_per_example_errors_average_to_the_jackknifes():
    x = sample(24)
    left_out = groups(24, 6)
    without = replicates(torch.mean, x, left_out)
    result = per_example_jackknife(with_gaps(without[:, None].expand(6, 24), left_out), left_out)
    whole = delete_group_jackknife(without, x.mean())
    assert_close(result.standard_error.square().mean(), whole.standard_error.square())
    for position, group in enumerate(left_out):
        others = torch.cat([without[:position], without[position + 1 :]])
        assert_close(result.estimate[group], others.mean().expand(4))
        assert_close(result.standard_error[group], (5 * 5 * 4 / (6 * 4) * others.var(correction=1)).sqrt().expand(4))


def test_coverage_per_example():
    """The value of example i is a fixed effect of its own times a mean over the sample: the error is the mean's."""
    trials, n, num_groups = 200, 60, 10
    left_out, effect = groups(n, num_groups), torch.linspace(1, 2, n, dtype=torch.float64)
    inside = 0
    for trial in range(trials):
        x = 5 + torch.randn(n, generator=torch.Generator().manual_seed(trial), dtype=torch.float64)
        values = replicates(torch.mean, x, left_out)[:, None] * effect
        _, standard_error = per_example_jackknife(with_gaps(values, left_out), left_out)
        reach = scipy.stats.t.ppf(0.975, num_groups - 2) * standard_error
        inside += int(((x.mean() - 5).abs() * effect <= reach).sum())
    assert 0.92 <= inside / (trials * n) <= 0.98


def test_what_a_left_out_example_is_given_does_not_matter():
    left_out = groups(9, 3)
    values = sample(3, 9)
    assert_close(per_example_jackknife(values, left_out).standard_error, per_example_jackknife(with_gaps(values, left_out), left_out)[1])


LEFT = [torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5])]
BAD = [
    (lambda: groups(5, 1), r"`num_groups` must lie in \[2, 5\], got 1"),
    (lambda: groups(5, 6), r"`num_groups` must lie in \[2, 5\], got 6"),
    (lambda: groups(5, 2, labels=torch.arange(4)), r"one entry per example, shape \(5,\), got \(4,\)"),
    (lambda: delete_group_jackknife(torch.ones(1), torch.tensor(1.0)), r"at least 2 groups and `whole` .*, got \(1,\) and \(\)"),
    (lambda: delete_group_jackknife(torch.ones(4, 2), torch.ones(3)), r"got \(4, 2\) and \(3,\). Give the statistic without each group"),
    (lambda: delete_group_jackknife(torch.tensor([1.0, float("nan")]), torch.tensor(1.0)), "`values` must be finite.*take fewer groups"),
    (lambda: delete_group_jackknife(torch.ones(2), torch.tensor(float("inf"))), "`whole` must be finite"),
    (lambda: delete_group_jackknife(torch.ones(2), torch.tensor(1.0), group_sizes=[1, 1]), "Give `extensive=True` with it"),
    (lambda: delete_group_jackknife(torch.ones(2), torch.tensor(1.0), extensive=True, group_sizes=[3]), r"2 positive numbers, .*got \[3\]"),
    (lambda: delete_group_jackknife(torch.ones(2), torch.tensor(1.0), extensive=True, group_sizes=[3, 0]), r"got \[3, 0\]"),
    (lambda: per_example_jackknife(torch.ones(2, 4), LEFT[:2]), r"at least 3 groups.*got \(2, 4\) and 2 groups"),
    (lambda: per_example_jackknife(torch.ones(4, 6), LEFT), r"got \(4, 6\) and 3 groups"),
    (lambda: per_example_jackknife(torch.ones(3, 7), LEFT), "each of 7 examples once. Make it with `groups`"),
    (lambda: per_example_jackknife(torch.ones(3, 6), [LEFT[0], LEFT[0], LEFT[2]]), "each of 6 examples once"),
    (lambda: per_example_jackknife(torch.full((3, 6), float("nan")), LEFT), "kept examples must be finite.*got 12 NaN.*of 12"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:24] for _, message in BAD])
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
