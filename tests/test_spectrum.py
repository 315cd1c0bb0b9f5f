"""Ω, κ, cutoffs and channels against dense definitions."""

import math

import numpy as np
import pytest
import torch
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import dense, log_dissipation, omega

import ntkscope
from ntkscope._eigh import eigh
from ntkscope.dynamics.dissipation import accumulate, init
from ntkscope.spectrum.channels import example_energy, split_channels
from ntkscope.spectrum.cutoffs import Cutoff, apply_cutoff, parse_rule
from ntkscope.spectrum.eigen import Spectrum, dissipation_spectrum, whitened_gramian
from ntkscope.spectrum.examples import area_under_roc, best_score, class_labels, crossing_times, margins
from ntkscope.spectrum.whitening import whiten


def softmax_blocks(outputs):
    probabilities = outputs.softmax(dim=1)
    return (torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None, :]) / len(outputs)


@st.composite
def windows(draw):
    """A window of two intervals, with a Hessian that is constant (squared, or singular) or varies (softmax)."""
    num_examples, num_classes = draw(st.integers(1, 4)), draw(st.integers(2, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    num_outputs = num_examples * num_classes
    kind = draw(st.sampled_from(["squared", "softmax", "singular"]))
    if kind == "softmax":
        blocks = [softmax_blocks(normal(num_examples, num_classes)) for _ in range(3)]
    elif kind == "squared":
        blocks = [torch.eye(num_classes, dtype=torch.float64).expand(num_examples, -1, -1) / num_examples] * 3
    else:
        half = normal(num_examples, num_classes, 1)
        blocks = [half @ half.mT] * 3
    gradient = (dense(blocks[0]) @ normal(num_outputs)).flatten()
    state = init(gradient)
    for hessian in blocks[1:]:
        jacobian = normal(num_outputs, num_outputs + 1)
        state = accumulate(state, jacobian @ jacobian.T, hessian, draw(st.sampled_from([0.05, 0.5])))
    return state, blocks[0], gradient, kind


@settings(max_examples=60, deadline=None)
@given(windows())
def test_spectra_match_dense_definitions(window):
    state, hessian, gradient, kind = window
    spectrum = dissipation_spectrum(state, whiten(hessian), gradient)
    assert_close(spectrum.eigvals, omega(state.gramian, dense(hessian))[0], rtol=1e-9)
    expected = log_dissipation(state.propagator, dense(hessian))
    resolved = expected < 20
    assert_close(spectrum.log_dissipation.flip(0)[: int(resolved.sum())], expected.flip(0)[: int(resolved.sum())], rtol=1e-5)
    # h has the same length whatever the basis: gᵀ B† g.
    assert_close(spectrum.residual.square().sum(), gradient @ torch.linalg.pinv(dense(hessian), hermitian=True) @ gradient, rtol=1e-8)
    assert_close(spectrum.eigvecs.T @ spectrum.eigvecs, torch.eye(len(spectrum.eigvals), dtype=torch.float64))
    if kind != "softmax":  # constant B: Ω = I − P̃ᵀP̃, so ω < 1 and the energies are those of the window
        assert float(spectrum.eigvals.max()) <= 1 + 1e-9
        dissipated = 0.5 * spectrum.residual @ whitened_gramian(state, whiten(hessian)) @ spectrum.residual
        assert_close(dissipated, gradient @ state.gramian @ gradient, rtol=1e-8)


@settings(max_examples=40, deadline=None)
@given(windows(), st.integers(0, 12))
def test_channels_are_complementary_projectors(window, rank):
    state, hessian, gradient, _ = window
    spectrum = dissipation_spectrum(state, whiten(hessian), gradient)
    rank = min(rank, len(spectrum.eigvals))
    split = split_channels(spectrum, apply_cutoff(f"rank:{rank}", spectrum))
    projector = split.signal_projector()
    identity = torch.eye(split.num_modes, dtype=torch.float64)
    assert float((projector @ projector - projector).abs().max()) < 1e-12
    assert float((projector + split.reservoir_basis @ split.reservoir_basis.T - identity).abs().max()) < 1e-12
    assert split.signal_basis.shape[1] == rank
    # What is truncated dissipates at most (c/2)‖h_res‖² (theory.md section 5), c the largest ω left out.
    hidden = split.reservoir_part(spectrum.residual)
    largest = float(spectrum.eigvals[rank]) if rank < split.num_modes else 0.0
    lost = 0.5 * hidden @ whitened_gramian(state, whiten(hessian)) @ hidden
    assert float(lost) <= 0.5 * largest * float(hidden.square().sum()) + 1e-9
    energies = example_energy(hidden, spectrum.owner, len(hessian))
    assert_close(energies.sum(), hidden.square().sum()) if hidden.any() else None


def test_tied_directions_are_ordered_by_the_tie_breaker():
    """Where everything is dissipated Ω is the identity to rounding: its own eigenvectors would mean nothing."""
    kernel = torch.diag(torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)) * 1e3
    blocks = torch.eye(1, dtype=torch.float64).expand(3, 1, 1)
    gradient = torch.ones(3, dtype=torch.float64)
    state = accumulate(init(gradient), kernel, blocks, 1.0)
    spectrum = dissipation_spectrum(state, whiten(blocks), gradient, tie_breaker=kernel)
    assert_close(spectrum.eigvecs.abs(), torch.eye(3, dtype=torch.float64)[:, [0, 2, 1]])
    untied = dissipation_spectrum(accumulate(init(gradient), kernel, blocks, 1e-4), whiten(blocks), gradient, tie_breaker=-kernel)
    assert_close(untied.eigvecs.abs(), torch.eye(3, dtype=torch.float64)[:, [0, 2, 1]])  # what is resolved keeps its order


def test_saturated_softmax_keeps_every_direction():
    """The range of B is fixed: tiny eigenvalues of nearly certain examples still count."""
    outputs = torch.tensor([[25.0, 0.0, -3.0], [0.1, 0.2, 0.3]], dtype=torch.float64)
    assert whiten(softmax_blocks(outputs)).num_modes == 4


def test_a_gradient_outside_the_range_is_refused():
    hessian = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))[None]
    gradient = torch.tensor([1.0, 1.0], dtype=torch.float64)
    state = accumulate(init(gradient), torch.eye(2, dtype=torch.float64), hessian, 1.0)
    with pytest.raises(ntkscope.InputError, match="where the loss has no curvature"):
        dissipation_spectrum(state, whiten(hessian), gradient)
    with pytest.raises(ntkscope.InputError, match="no curvature at the start"):
        whiten(torch.zeros(2, 3, 3, dtype=torch.float64))


def diagonal_spectrum(*eigvals, residual=None):
    values = torch.tensor(eigvals, dtype=torch.float64)
    residual = torch.ones(len(values), dtype=torch.float64) if residual is None else torch.tensor(residual, dtype=torch.float64)
    return Spectrum(values, torch.eye(len(values), dtype=torch.float64), -values, residual, torch.arange(len(values)), 1.0, 1.0)


@pytest.mark.parametrize(
    ("rule", "eigvals", "rank"),
    [
        ("half", (0.9, 0.5, 0.1), 1),  # equality is reservoir
        ("fixed:0.1", (0.9, 0.5, 0.1), 2),
        ("fixed:2", (0.9, 0.5, 0.1), 0),
        ("rank:2", (0.9, 0.5, 0.1), 2),
        ("energy:0.6", (0.9, 0.5, 0.1), 1),  # 0.9 of 1.5 is exactly 60 %
        ("energy:0.61", (0.9, 0.5, 0.1), 2),
        ("energy", (0.9, 0.5, 0.1), 3),
        ("gap", (0.9, 0.5, 1e-3, 9e-4), 2),
        ("rank", (0.9, 0.5, 1e-17), 2),
        ("mp", (0.9, 1e-3, 9e-4, 8e-4, 7e-4), 1),
        ("gd", (0.9, 1e-3, 9e-4, 8e-4, 7e-4), 1),
        ("mp", (0.9, 0.8, 0.7), None),
        ("gd", (0.9, 0.8, 0.7), None),
        ("risk", (0.9, 0.5), None),
    ],
)
def test_cutoff_rules(rule, eigvals, rank):
    assert apply_cutoff(rule, diagonal_spectrum(*eigvals)).rank == rank


def test_energy_rule_weighs_by_the_residual():
    assert apply_cutoff("energy:0.9", diagonal_spectrum(0.9, 0.5, residual=(0.0, 1.0))).rank == 2


def test_risk_rule_is_the_leave_one_out_rule():
    generator = torch.Generator().manual_seed(0)
    motions = torch.randn(3, 50, generator=generator, dtype=torch.float64) + torch.tensor([[0.0], [3.0], [0.0]], dtype=torch.float64)
    cutoff = apply_cutoff("risk", diagonal_spectrum(0.9, 0.5, 0.1), example_motions=motions)
    samples = motions.numpy()
    expected = samples.mean(axis=1) ** 2 > samples.var(axis=1) / 49
    assert np.array_equal(cutoff.selected.numpy(), expected)
    split = split_channels(diagonal_spectrum(0.9, 0.5, 0.1), cutoff)
    assert split.signal_rank == expected.sum()
    assert torch.equal(split.signal_basis, torch.eye(3, dtype=torch.float64)[:, torch.from_numpy(expected)])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("third", "Unknown cutoff rule 'third'"),
        ("half:1", "Unknown cutoff rule"),
        ("fixed", "Unknown cutoff rule"),
        ("fixed:x", "needs a number after the colon"),
        ("rank:1.5", "needs a number after the colon"),
        ("rank:-1", "needs a number in"),
        ("energy:2", r"needs a number in \[0, 1\]"),
        ("fixed:nan", "needs a number in"),
    ],
)
def test_bad_rules(rule, message):
    with pytest.raises(ntkscope.InputError, match=message):
        parse_rule(rule)


def test_rank_beyond_the_spectrum():
    with pytest.raises(ntkscope.InputError, match="more directions than there are"):
        apply_cutoff("rank:3", diagonal_spectrum(0.9, 0.1))


def test_a_cutoff_without_an_answer_cannot_split():
    with pytest.raises(ValueError, match="has no rank"):
        split_channels(diagonal_spectrum(0.9), Cutoff("mp", None, None, "no bulk"))


def test_ranks_of_a_flat_spectrum():
    state = accumulate(
        init(torch.ones(4, dtype=torch.float64)), torch.eye(4, dtype=torch.float64), torch.eye(1, dtype=torch.float64).expand(4, 1, 1), 1.0
    )
    spectrum = dissipation_spectrum(state, whiten(torch.ones(4, 1, 1, dtype=torch.float64)), torch.ones(4, dtype=torch.float64))
    assert spectrum.effective_rank == pytest.approx(4)
    assert spectrum.stable_rank == pytest.approx(4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 12), st.integers(0, 2**16))
def test_eigh_reconstructs(size, seed):
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = matrix + matrix.T
    eigvals, eigvecs = eigh(matrix)
    assert_close(eigvecs @ torch.diag(eigvals) @ eigvecs.T, matrix, rtol=1e-12)
    assert bool((eigvals[:-1] >= eigvals[1:]).all())


def test_eigh_falls_back_when_a_driver_fails(monkeypatch):
    matrix = torch.diag(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64))
    calls = []

    def wrong(matrix):
        calls.append(1)
        return torch.ones(3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64)

    monkeypatch.setattr(torch.linalg, "eigh", wrong)
    assert eigh(matrix)[0].tolist() == pytest.approx([3.0, 2.0, 1.0])
    assert calls


def test_eigh_refuses_what_is_not_finite():
    with pytest.raises(ntkscope.InputError, match="must be finite"):
        eigh(torch.full((2, 2), torch.nan))


@pytest.mark.parametrize(
    ("labels", "right", "score"),
    [
        ([0, 1, 2, 3], 2, "half_time"),  # halfway from a quarter to all is 2.5 of 4
        ([0, 1, 2, 3], 3, "loss"),
        ([0, 0, 0, 1], 3, "half_time"),  # the largest class alone is no knowledge
        ([0, 0, 0, 1], 4, "loss"),
        ([0, 0, 0, 0], 4, "half_time"),  # nothing to tell apart
        ([0, 0, 0, 0, 1, 1, 1, 1], 5, "half_time"),
        ([0, 0, 0, 0, 1, 1, 1, 1], 6, "loss"),
    ],
)
def test_examples_are_ranked_by_loss_where_most_were_right_already(labels, right, score):
    margin = torch.tensor([1.0] * right + [-1.0] * (len(labels) - right))
    assert best_score(margin, torch.tensor(labels)) == score
    ignored = torch.tensor([*labels, -100])
    assert best_score(torch.cat([margin, torch.tensor([torch.nan])]), ignored) == score


def test_regression_is_ranked_by_half_time():
    assert best_score(torch.full((4,), torch.nan), None) == "half_time"
    assert best_score(torch.full((2,), torch.nan), torch.tensor([-100, -100])) == "half_time"


def test_margins_and_labels():
    outputs = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]])
    assert margins(outputs, torch.tensor([1, 0])).tolist() == [1.0, -5.0]
    assert margins(outputs, torch.tensor([-100, 2])).isnan().tolist() == [True, False]
    assert class_labels(torch.eye(3)[[2, 0]], 3).tolist() == [2, 0]
    assert class_labels(torch.tensor([2, 0]), 3).tolist() == [2, 0]
    assert class_labels(torch.randn(4, 1), 1) is None
    assert class_labels(torch.tensor([[-1.0, 0.5], [0.2, 0.1]]), 2) is None  # regression targets are no labels


def test_crossing_times_are_linear_in_log_time():
    shares = torch.tensor([[1.0, 1.0, 1.0], [0.75, 0.4, 1.0], [0.25, 0.1, 0.9]], dtype=torch.float64)
    found = crossing_times(shares, [0.0, 1.0, 4.0], 0.5)
    assert found.tolist() == pytest.approx([2.0, 5 / 6, math.inf])


def test_area_under_roc_counts_pairs():
    scores, noise = torch.tensor([1.0, 2.0, 2.0, 0.0, math.inf]), torch.tensor([False, True, False, False, True])
    wins = sum((a > b) + 0.5 * (a == b) for a in scores[noise] for b in scores[~noise]) / 6
    assert area_under_roc(scores, noise) == pytest.approx(float(wins))
