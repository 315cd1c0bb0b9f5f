"""Gradient and Hessian blocks of losses against dense autograd."""

import pytest
import torch
from compare import assert_close
from oracles import loss_gradient, loss_hessian_blocks
from torch import nn

import ntkscope
from ntkscope._losses import squared
from ntkscope.dynamics.loss import bind_loss

torch.manual_seed(0)
OUTPUTS = torch.randn(4, 3, dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 1])
REAL = torch.randn(4, 3, dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)


def log_cosh(outputs, targets):
    return (outputs - targets).cosh().log().mean()


@pytest.mark.parametrize(
    ("loss", "function", "targets"),
    [
        ("squared", squared, REAL),
        ("mse", nn.functional.mse_loss, REAL),
        ("cross_entropy", nn.functional.cross_entropy, LABELS),
        ("cross_entropy", nn.functional.cross_entropy, REAL.softmax(dim=1)),
        (nn.CrossEntropyLoss(weight=WEIGHTS.float(), label_smoothing=0.1), nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1), LABELS),
        (nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(reduction="sum"), LABELS),
        (nn.HuberLoss(delta=10.0), nn.HuberLoss(delta=10.0), REAL),
        (nn.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss(), REAL.sigmoid()),
        (log_cosh, log_cosh, REAL),
    ],
)
def test_derivatives_match_dense_autograd(loss, function, targets):
    bound = bind_loss(loss, targets, OUTPUTS)
    assert bound.value(OUTPUTS) == pytest.approx(float(function(OUTPUTS, targets)), rel=1e-6)
    tolerance = 1e-6 if isinstance(loss, nn.CrossEntropyLoss) else 1e-12  # float32 class weights
    assert_close(bound.gradient(OUTPUTS), loss_gradient(function, OUTPUTS, targets), rtol=tolerance)
    assert_close(bound.hessian_blocks(OUTPUTS), loss_hessian_blocks(function, OUTPUTS, targets), rtol=tolerance)


def test_scales_are_the_users():
    """theory.md section 1: squared I/n, mse 2I/N, softmax (diag π − ππᵀ)/n."""
    eye = torch.eye(3, dtype=torch.float64).expand(4, 3, 3)
    assert_close(bind_loss("squared", REAL, OUTPUTS).hessian_blocks(OUTPUTS), eye / 4)
    assert_close(bind_loss("mse", REAL, OUTPUTS).hessian_blocks(OUTPUTS), 2 * eye / 12)
    probabilities = OUTPUTS.softmax(dim=1)
    expected = (torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None, :]) / 4
    assert_close(bind_loss("cross_entropy", LABELS, OUTPUTS).hessian_blocks(OUTPUTS), expected)


def test_mean_hessian_is_the_integral_along_the_way():
    bound = bind_loss("cross_entropy", LABELS, OUTPUTS)
    points = torch.linspace(0, 1, 2001, dtype=torch.float64)
    blocks = torch.stack([bound.hessian_blocks(torch.lerp(OUTPUTS, OUTPUTS + 0.3 * REAL, t)) for t in points])
    assert_close(bound.mean_hessian_blocks(OUTPUTS, OUTPUTS + 0.3 * REAL), torch.trapezoid(blocks, points, dim=0), rtol=1e-5)


def test_targets_may_be_flat_or_of_another_integer_type():
    column, flat = OUTPUTS[:, :1], torch.tensor([0.0, 1.0, 1.0, 0.0])
    expected = float(nn.BCEWithLogitsLoss()(column.flatten(), flat.double()))
    assert bind_loss(nn.BCEWithLogitsLoss(), flat, column).value(column) == pytest.approx(expected)
    assert bind_loss("cross_entropy", LABELS.int(), OUTPUTS).value(OUTPUTS) == bind_loss("cross_entropy", LABELS, OUTPUTS).value(OUTPUTS)


def test_the_users_module_is_not_changed():
    loss = nn.CrossEntropyLoss(weight=WEIGHTS.float())
    bind_loss(loss, LABELS, OUTPUTS.float())
    assert loss.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bind_loss("hinge", LABELS, OUTPUTS), "`loss` must be one of 'squared', 'mse', 'cross_entropy', got 'hinge'"),
        (lambda: bind_loss(3, LABELS, OUTPUTS), "a torch loss or a callable"),
        (lambda: bind_loss("squared", LABELS, OUTPUTS), "Encode class labels one-hot"),
        (lambda: bind_loss("squared", REAL[:3], OUTPUTS), "4 examples, targets of shape"),
        (lambda: bind_loss("cross_entropy", LABELS + 7, OUTPUTS), "failed: .*Mismatched probe and labels"),
        (lambda: bind_loss(nn.CrossEntropyLoss(reduction="none"), LABELS, OUTPUTS), "must return a scalar"),
        (lambda: bind_loss(lambda u, y: 1.0, LABELS, OUTPUTS), "must return a scalar tensor, got float"),
        (lambda: bind_loss("squared", REAL * torch.nan, OUTPUTS), "must be finite"),
        (lambda: bind_loss(lambda u, y: u.sum(0).square().sum(), LABELS, OUTPUTS).hessian_blocks(OUTPUTS), "couples examples"),
        (lambda: bind_loss(lambda u, y: -u.square().sum(), LABELS, OUTPUTS).hessian_blocks(OUTPUTS), "must be convex"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ntkscope.InputError, match=message):
        call()


def test_a_loss_without_curvature_has_zero_blocks():
    blocks = bind_loss(nn.L1Loss(), REAL, OUTPUTS).hessian_blocks(OUTPUTS)
    assert not blocks.any()
