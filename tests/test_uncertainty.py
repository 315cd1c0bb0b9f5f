"""The jackknife: exact for a mean, right on average for a spectrum, and what its replicates are."""

import itertools

import numpy as np
import pytest
import torch
from compare import assert_close
from test_findings import trained

import ntkscope
from ntkscope.course import Course
from ntkscope.dynamics.dissipation import accumulate, init
from ntkscope.dynamics.jackknife import delete_group_jackknife, example_standard_error, groups
from ntkscope.spectrum.channels import example_energy, split_channels
from ntkscope.spectrum.cutoffs import apply_cutoff
from ntkscope.spectrum.eigen import dissipation_spectrum
from ntkscope.spectrum.whitening import whiten
from ntkscope.uncertainty import MAX_LEGS, estimate_uncertainty


def test_groups_are_disjoint_complete_and_stratified():
    labels = torch.tensor([0] * 14 + [1] * 6 + [2] * 3)
    dealt = groups(23, 5, labels=labels)
    assert sorted(torch.cat(dealt).tolist()) == list(range(23))
    assert {len(group) for group in dealt} <= {4, 5}
    counts = torch.stack([torch.bincount(labels[group], minlength=3) for group in dealt])
    assert bool((counts.amax(dim=0) - counts.amin(dim=0) <= 1).all())


def test_with_groups_of_one_the_error_of_a_mean_is_that_of_every_textbook():
    sample = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.stack([torch.cat([sample[:k], sample[k + 1 :]]).mean() for k in range(20)])
    expected = float(sample.std() / 20**0.5)
    assert delete_group_jackknife(values, sizes=torch.ones(20, dtype=torch.long), num_examples=20) == pytest.approx(expected)
    totals = torch.stack([torch.cat([sample[:k], sample[k + 1 :]]).sum() for k in range(20)])
    extensive = delete_group_jackknife(totals, sizes=torch.ones(20, dtype=torch.long), num_examples=20, extensive=True)
    assert extensive == pytest.approx(20 * expected)


def test_groups_estimate_the_spread_over_samples():
    """Ten groups: the mean estimated variance over many samples is the true one."""
    generator, estimates = torch.Generator().manual_seed(1), []
    for _ in range(400):
        sample = torch.randn(40, generator=generator, dtype=torch.float64)
        dealt = groups(40, 10, seed=3)
        values = torch.stack([sample[~torch.isin(torch.arange(40), group)].mean() for group in dealt])
        estimates.append(delete_group_jackknife(values, sizes=torch.full((10,), 4), num_examples=40) ** 2)
    assert np.mean(estimates) == pytest.approx(1 / 40, rel=0.1)


def test_the_error_of_an_example_is_scaled_from_the_replicates_that_keep_it():
    values = torch.tensor([[1.0, torch.nan], [2.0, 5.0], [torch.nan, 7.0]])
    assert_close(example_standard_error(values), torch.tensor([0.5**0.5, 2**0.5], dtype=torch.float64), 1e-6)
    assert bool(torch.isnan(example_standard_error(torch.tensor([[torch.nan], [1.0]]))).all())


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_replicates_are_the_run_seen_through_fewer_examples(loss):
    """Against explicit sub-blocks of the stored kernels, weights 1/n kept, composed by hand."""
    trace = trained(loss, steps=40, schedule=[5, 10, 20, 40], tolerance=None, drift=None).trace
    course = Course(trace, 0, len(trace) - 1, loss=None)
    found = estimate_uncertainty(course, cutoff="half", num_groups=4, device=None, progress=None)
    snapshots = list(trace)
    assert len(snapshots) - 1 <= MAX_LEGS
    ranks, effective, energies = [], [], torch.full((4, 24), torch.nan, dtype=torch.float64)
    labels = trace.probe["targets"].argmax(dim=1) if loss == "squared" else trace.probe["targets"]
    dealt = groups(24, 4, labels=labels)
    for k, group in enumerate(dealt):
        kept = [i for i in range(24) if i not in group.tolist()]
        rows = [3 * i + c for i in kept for c in range(3)]
        state = init(snapshots[0].gradient[kept].flatten())
        for before, after in itertools.pairwise(snapshots):
            kernel = 0.5 * (before.kernel() + after.kernel())
            state = accumulate(state, kernel[rows][:, rows], after.mean_hessian[kept], after.time - before.time)
        spectrum = dissipation_spectrum(state, whiten(snapshots[0].hessian[kept]), snapshots[0].gradient[kept].flatten())
        cutoff = apply_cutoff("half", spectrum)
        ranks.append(float(cutoff.rank))
        effective.append(spectrum.effective_rank)
        reservoir = split_channels(spectrum, cutoff).reservoir_part(spectrum.residual)
        energies[k, kept] = example_energy(reservoir, spectrum.owner, len(kept))
    sizes = torch.tensor([len(group) for group in dealt])
    for name, values in (("signal_rank", ranks), ("effective_rank", effective)):
        expected = delete_group_jackknife(torch.tensor(values), sizes=sizes, num_examples=24, extensive=True)
        assert getattr(found, name) == pytest.approx(expected, rel=1e-6)
    assert_close(found.reservoir_energy, example_standard_error(energies), 1e-6)


def test_analyze_reports_standard_errors_on_request():
    trace = trained(steps=60).trace
    found = ntkscope.analyze(trace, jackknife=6)
    assert found.uncertainty.num_groups == 6
    assert 0 < found.uncertainty.effective_rank < found.spectrum.effective_rank
    assert found.summary()["uncertainty"]["effective_rank"] == found.uncertainty.effective_rank
    assert "uncertainty/reservoir_energy" in found.tensors()
    assert ntkscope.analyze(trace).uncertainty is None


@pytest.mark.parametrize("num_groups", [1, 13])
def test_a_senseless_number_of_groups_is_refused(num_groups):
    with pytest.raises(ntkscope.InputError, match="`jackknife` must lie between 2 and half the examples"):
        ntkscope.analyze(trained(steps=10), jackknife=num_groups)


def test_bad_input():
    with pytest.raises(ntkscope.InputError, match="`num_groups` must lie between 2"):
        groups(3, 4)
    with pytest.raises(ntkscope.InputError, match="at least two groups"):
        delete_group_jackknife(torch.ones(1), sizes=torch.ones(1, dtype=torch.long), num_examples=3)
