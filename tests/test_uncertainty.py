"""Standard errors of an analysis: what the jackknife's replicates are, and how they are asked for."""

import itertools

import pytest
import torch
from compare import assert_close
from test_findings import trained

import ntkscope
from ntkscope.course import Course
from ntkscope.dynamics.dissipation import accumulate, init
from ntkscope.dynamics.jackknife import delete_group_jackknife, groups, per_example_jackknife
from ntkscope.spectrum.channels import example_energy, split_channels
from ntkscope.spectrum.cutoffs import apply_cutoff
from ntkscope.spectrum.eigen import dissipation_spectrum
from ntkscope.spectrum.whitening import whiten
from ntkscope.uncertainty import MAX_LEGS, estimate_uncertainty


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
    sizes = [len(group) for group in dealt]
    for name, values in (("signal_rank", ranks), ("effective_rank", effective)):
        replicates = torch.tensor(values, dtype=torch.float64)
        expected = delete_group_jackknife(replicates, replicates.mean(), extensive=True, group_sizes=sizes).standard_error
        assert getattr(found, name) == pytest.approx(float(expected), rel=1e-6)
    assert_close(found.reservoir_energy, per_example_jackknife(energies, dealt).standard_error, 1e-6)


def test_analyze_reports_standard_errors_on_request():
    trace = trained(steps=60).trace
    found = ntkscope.analyze(trace, jackknife=6)
    assert found.uncertainty.num_groups == 6
    assert 0 < found.uncertainty.effective_rank < found.spectrum.effective_rank
    assert found.summary()["uncertainty"]["effective_rank"] == found.uncertainty.effective_rank
    assert "uncertainty/reservoir_energy" in found.tensors()
    assert ntkscope.analyze(trace).uncertainty is None


@pytest.mark.parametrize("num_groups", [2, 13])
def test_a_senseless_number_of_groups_is_refused(num_groups):
    with pytest.raises(ntkscope.InputError, match="`jackknife` must lie between 3 and half the examples"):
        ntkscope.analyze(trained(steps=10), jackknife=num_groups)
