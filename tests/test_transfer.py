"""Train to test: A∘, kernel regression, the four cells, truncation and the null, against dense definitions."""

import jaxtyping
import pytest
import torch
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import dense

import ntkscope
from ntkscope.dynamics.dissipation import accumulate, init
from ntkscope.dynamics.transfer import best_linear_predictor, fit_motion, kernel_regression
from ntkscope.spectrum.cells import CELLS, four_cells
from ntkscope.spectrum.channels import split_channels
from ntkscope.spectrum.cutoffs import apply_cutoff
from ntkscope.spectrum.eigen import dissipation_spectrum
from ntkscope.spectrum.null import shuffled_null, signal_share
from ntkscope.spectrum.truncation import truncate
from ntkscope.spectrum.whitening import whiten


@st.composite
def windows(draw):
    """Two intervals with a query set; squared loss, or a softmax whose Hessian moves."""
    num_examples, num_classes, num_query = draw(st.integers(2, 4)), draw(st.integers(2, 3)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    num_outputs, is_softmax = num_examples * num_classes, draw(st.booleans())
    blocks = []
    for _ in range(3):
        p = normal(num_examples, num_classes).softmax(dim=1)
        softmax = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / num_examples
        blocks.append(softmax if is_softmax else torch.eye(num_classes, dtype=torch.float64).repeat(num_examples, 1, 1) / num_examples)
    gradient = dense(blocks[0]) @ normal(num_outputs)
    state, action = init(gradient, num_query_outputs=num_query), 0.0
    for hessian in blocks[1:]:
        jacobian, query = normal(num_outputs, num_outputs + 2), normal(num_query, num_outputs + 2)
        kernel, elapsed = jacobian @ jacobian.T, draw(st.sampled_from([0.02, 0.3]))
        state = accumulate(state, kernel, hessian, elapsed, cross=query @ jacobian.T)
        action += elapsed * float(torch.linalg.matrix_norm(kernel, ord=2))
    return state, blocks[0], gradient, action, normal(num_outputs)


def parts_of(window):
    state, hessian, gradient, action, _ = window
    whitening = whiten(hessian)
    spectrum = dissipation_spectrum(state, whitening, gradient)
    rank = max(1, len(spectrum.eigvals) // 2)
    return state, whitening, spectrum, split_channels(spectrum, apply_cutoff(f"rank:{rank}", spectrum)), action


def plain_projector(hessian, whitening, basis):
    """B^½ Π B^{†½} of theory.md section 5, dense: the gradient projector in plain coordinates."""
    inside = whitening.gradient(torch.eye(len(dense(hessian)), dtype=torch.float64))  # B^{†½}, [modes, outputs]
    outward = torch.linalg.pinv(inside)  # its inverse on R
    return outward @ basis @ basis.T @ inside


@settings(max_examples=40, deadline=None)
@given(windows())
def test_truncation_matches_dense_projectors_and_keeps_its_bounds(window):
    state, whitening, spectrum, channels, action = parts_of(window)
    gradient = window[2]
    found = truncate(state, whitening, spectrum, channels, kernel_action=action)
    full_loss = float(gradient @ state.gramian @ gradient)
    for k, rank in enumerate(found.ranks.tolist()):
        dropped = spectrum.eigvecs[:, rank:]
        kept = plain_projector(window[1], whitening, spectrum.eigvecs[:, :rank]) @ gradient
        left = plain_projector(window[1], whitening, dropped) @ gradient
        # ω-orthogonal directions: losses of the two parts add up.
        assert float(found.loss_error[k]) == pytest.approx(full_loss - float(kept @ state.gramian @ kept), abs=1e-9 * full_loss)
        assert float(found.loss_error[k]) <= float(found.loss_bound[k]) * (1 + 1e-9) + 1e-300
        train = torch.linalg.vector_norm(state.displacement @ left) / torch.linalg.vector_norm(state.displacement @ gradient)
        assert float(found.train_error[k]) == pytest.approx(float(train), abs=1e-8)
        assert float(found.train_error[k]) <= float(found.train_bound[k]) * (1 + 1e-9)
        query = torch.linalg.vector_norm(state.transfer @ left) / torch.linalg.vector_norm(state.transfer @ gradient)
        assert float(found.query_error[k]) == pytest.approx(float(query), abs=1e-8)
    projector = plain_projector(window[1], whitening, channels.reservoir_basis)
    visible = torch.linalg.matrix_norm(state.transfer @ projector) / torch.linalg.matrix_norm(state.transfer)
    assert found.reservoir_visibility == pytest.approx(float(visible), abs=1e-8)
    assert_close(found.hankel.square(), spectrum.eigvals)


@settings(max_examples=40, deadline=None)
@given(windows())
def test_four_cells_add_up_and_match_dense_projectors(window):
    state, whitening, spectrum, channels, _ = parts_of(window)
    gradient, hessian = window[2], window[1]
    clean = dense(hessian) @ window[4]
    num_examples = len(hessian)
    motions = torch.randn(len(spectrum.eigvals), num_examples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = four_cells(state, whitening, spectrum, channels, clean_gradient=clean, example_motions=motions)
    estimated = four_cells(state, whitening, spectrum, channels, clean_gradient=None, example_motions=motions)
    for cells in (known, estimated):
        assert_close(sum(getattr(cells, name) for name in CELLS), -state.transfer @ gradient, rtol=1e-8)
    assert estimated.is_estimate
    assert not known.is_estimate
    signal = plain_projector(hessian, whitening, channels.signal_basis)
    scale = float((state.transfer.abs() @ (clean.abs() + gradient.abs())).max())
    assert float((known.signal_clean + state.transfer @ signal @ clean).abs().max()) <= 1e-8 * scale
    assert float((known.signal_noise + state.transfer @ signal @ (gradient - clean)).abs().max()) <= 1e-8 * scale
    assert (
        four_cells(accumulate_without_query(window), whitening, spectrum, channels, clean_gradient=clean, example_motions=motions) is None
    )


def accumulate_without_query(window):
    state = init(window[2])
    return accumulate(state, torch.eye(len(window[2]), dtype=torch.float64), window[1], 0.1)


@settings(max_examples=40, deadline=None)
@given(windows())
def test_the_predictor_is_least_squares(window):
    """A∘ minimizes E‖G g − A D g‖² over g ~ N(0, W†), and is G D† where ker D = ker W."""
    state, gradient = window[0], window[2]
    eigvals, eigvecs = torch.linalg.eigh(state.gramian)
    kept = eigvals > 1e-9 * eigvals[-1]
    samples = eigvecs[:, kept] / eigvals[kept].sqrt()  # columns with the covariance W†
    expected = (state.transfer @ samples) @ torch.linalg.pinv(state.displacement @ samples, rtol=1e-9)
    found, rank = best_linear_predictor(state.displacement, state.transfer, gramian=state.gramian, relative_tolerance=1e-9)
    assert rank == int(torch.linalg.matrix_rank(state.displacement @ samples, rtol=1e-9))
    assert_close(found, expected, rtol=1e-6)
    if torch.equal(window[1], torch.eye(window[1].shape[1], dtype=torch.float64).repeat(len(window[1]), 1, 1) / len(window[1])):
        direct, _ = best_linear_predictor(state.displacement, state.transfer, relative_tolerance=1e-12)
        # Identity 7: on the realized path the test motion is A∘ times the train motion.
        assert_close(direct @ (-state.displacement @ gradient), -state.transfer @ gradient, rtol=1e-6)


def test_kernel_regression_interpolates_and_ignores_what_the_kernel_does_not_see():
    generator = torch.Generator().manual_seed(0)
    jacobian, query = (torch.randn(rows, 4, generator=generator, dtype=torch.float64) for rows in (6, 3))
    weights = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    kernel, cross = jacobian @ jacobian.T, query @ jacobian.T
    predicted = kernel_regression(kernel, cross, jacobian @ weights, relative_tolerance=1e-10)
    assert_close(predicted, query @ weights, rtol=1e-9)


def test_fits_are_those_of_numpy():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 30, generator=generator, dtype=torch.float64)
    fit = fit_motion(a, b)
    assert fit.correlation == pytest.approx(float(torch.corrcoef(torch.stack([a, b]))[0, 1]))
    assert fit.relative_error == pytest.approx(float((a - b).norm() / b.norm()))
    assert fit_motion(torch.zeros(3), torch.zeros(3)).relative_error == 0.0


@settings(max_examples=30, deadline=None)
@given(windows())
def test_the_null_compares_shares_of_the_squared_residual(window):
    state, _, spectrum, _, _ = parts_of(window)
    gradient, generator = window[2], torch.Generator().manual_seed(2)
    share = float(gradient @ state.gramian @ gradient) * 2 / float(spectrum.residual.square().sum())
    assert signal_share(spectrum, spectrum.residual) == pytest.approx(share, rel=1e-8)
    others = [torch.randn(len(spectrum.residual), generator=generator, dtype=torch.float64) for _ in range(19)]
    null = shuffled_null(spectrum, others)
    shares = [signal_share(spectrum, other) for other in others]
    assert null.p == (1 + sum(value >= null.observed for value in shares)) / 20
    assert null.mean == pytest.approx(sum(shares) / 19)


def test_unequal_columns_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ntkscope.InputError, match="must have equal columns"):
        best_linear_predictor(torch.eye(3), torch.ones(2, 4), relative_tolerance=1e-9)
