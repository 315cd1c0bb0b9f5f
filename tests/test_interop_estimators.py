"""The NTK in scikit-learn: pipelines on digits, and closed forms of the estimators with kernels from dense Jacobians."""

import pickle
import subprocess
import sys

import numpy as np
import pandas
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gram as oracle_gram
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import KernelPCA
from sklearn.exceptions import NotFittedError
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, WhiteKernel
from sklearn.kernel_approximation import Nystroem
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import nn

import ntkscope
from ntkscope.interop import estimators
from ntkscope.interop.estimators import NTKFeatures, NTKKernel

RIDGE = 0.1


def network(num_inputs=64, num_classes=10, *, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(num_inputs, 16), nn.GELU(), nn.Linear(16, num_classes)).to(dtype)


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    return x[:150] / 16, y[:150]


@pytest.fixture(scope="module")
def small():
    """Twelve and five examples with numbers to predict, and their kernels from dense Jacobians."""
    generator = np.random.default_rng(0)
    train, test, targets = generator.normal(size=(12, 3)), generator.normal(size=(5, 3)), generator.normal(size=12)
    model = network(3, 2)
    rows, columns = torch.from_numpy(train), torch.from_numpy(test)
    own, cross = (oracle_gram(model, batch, rows, outputs="trace").numpy() for batch in (rows, columns))
    return model, train, test, targets, own, cross


def test_the_kernel_has_scikit_learns_orientation(small):
    model, train, test, _, own, cross = small
    kernel = NTKKernel(model)
    np.testing.assert_allclose(kernel(train), own, rtol=1e-10)
    np.testing.assert_allclose(kernel(test, train), cross, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(kernel.diag(np.tile(train, (12, 1))), np.tile(np.diag(own), 12), rtol=1e-10)
    features = NTKFeatures(kernel).fit(train)
    np.testing.assert_array_equal(features.transform(test), kernel(test, train))
    symmetric = NTKFeatures(kernel).fit_transform(train)
    np.testing.assert_array_equal(symmetric, symmetric.T)


def test_the_training_kernel_is_computed_as_a_symmetric_one(small, monkeypatch):
    model, train, test, *_ = small
    others = []

    def watched(model, inputs, other, **options):
        others.append(other)
        return ntkscope.ntk_gram(model, inputs, other, **options)

    monkeypatch.setattr(estimators, "ntk_gram", watched)
    SVC(kernel=NTKKernel(model)).fit(train, train[:, 0] > 0)
    features = NTKFeatures(NTKKernel(model))
    features.fit_transform(train)
    features.transform(test)
    assert [other is None for other in others] == [True, True, False]


def closed_form(own, cross, targets):
    return cross @ np.linalg.solve(own + RIDGE * np.eye(len(own)), targets)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), num_targets=st.integers(1, 3))
def test_kernel_ridge_is_the_closed_form(small, seed, num_targets):
    model, train, test, _, own, cross = small
    targets = np.random.default_rng(seed).normal(size=(12, num_targets))
    expected = closed_form(own, cross, targets)
    for estimator in (
        KernelRidge(alpha=RIDGE, kernel=NTKKernel(model)),
        make_pipeline(NTKFeatures(NTKKernel(model)), KernelRidge(alpha=RIDGE, kernel="precomputed")),
    ):
        np.testing.assert_allclose(estimator.fit(train, targets).predict(test), expected, rtol=1e-8, atol=1e-10)


def test_grams_go_straight_into_precomputed_estimators(small):
    model, train, test, targets, own, cross = small
    x, x_test = torch.from_numpy(train), torch.from_numpy(test)
    gram, other = ntkscope.ntk_gram(model, x, outputs="trace"), ntkscope.ntk_gram(model, x_test, x, outputs="trace")
    ridge = KernelRidge(alpha=RIDGE, kernel="precomputed").fit(gram, targets)
    np.testing.assert_allclose(ridge.predict(other), closed_form(own, cross, targets), rtol=1e-8, atol=1e-10)
    labels = (targets > 0).astype(int)
    machine = SVC(kernel="precomputed").fit(gram, labels)
    again = SVC(kernel=NTKKernel(model)).fit(train, labels)
    np.testing.assert_allclose(machine.decision_function(other), again.decision_function(test), atol=1e-6)


def test_gaussian_processes_have_mean_and_deviation_of_the_closed_form(small):
    model, train, test, targets, own, cross = small
    kernel = NTKKernel(model)
    noisy = GaussianProcessRegressor(kernel + WhiteKernel(RIDGE), optimizer=None).fit(train, targets)
    mean, deviation = noisy.predict(test, return_std=True)
    solved = np.linalg.solve(own + RIDGE * np.eye(len(own)), cross.T)
    prior = oracle_gram(model, torch.from_numpy(test), outputs="trace").numpy()
    np.testing.assert_allclose(mean, solved.T @ targets, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(deviation**2, np.diag(prior - cross @ solved) + RIDGE, rtol=1e-6)
    # Kernels composed with it have hyperparameters that are fitted.
    drawn = np.linalg.cholesky(own + RIDGE * np.eye(len(own))) @ targets
    start, bounds = ConstantKernel(0.05) * kernel + WhiteKernel(RIDGE), (1e-9, 1e9)
    composed = ConstantKernel(0.05, bounds) * kernel + WhiteKernel(RIDGE, bounds)
    fitted = GaussianProcessRegressor(composed).fit(train, drawn)
    unfitted = GaussianProcessRegressor(start, optimizer=None).fit(train, drawn)
    assert fitted.log_marginal_likelihood_value_ > unfitted.log_marginal_likelihood_value_ + 1e-3
    assert fitted.kernel_.k1.k2.model is model


def test_principal_components_are_those_of_the_centered_kernel(small):
    model, train, _, _, own, _ = small
    center = np.eye(12) - 1 / 12
    expected = np.linalg.eigvalsh(center @ own @ center)[::-1][:3]
    for components in (
        KernelPCA(3, kernel=NTKKernel(model)).fit(train),
        make_pipeline(NTKFeatures(NTKKernel(model)), KernelPCA(3, kernel="precomputed")).fit(train)[-1],
    ):
        np.testing.assert_allclose(components.eigenvalues_, expected, rtol=1e-8)
    landmarks = Nystroem(kernel=NTKKernel(model), n_components=12, random_state=0).fit_transform(train)
    np.testing.assert_allclose(landmarks @ landmarks.T, own, rtol=1e-6, atol=1e-8)


def test_cross_validation_splits_before_the_kernel(digits):
    x, y = digits
    model = network()
    folds = KFold(3)
    scores = cross_val_score(make_pipeline(NTKFeatures(NTKKernel(model)), SVC(kernel="precomputed")), x, y, cv=folds)
    full = NTKKernel(model)(x)
    expected = []
    for train, test in folds.split(x):
        machine = SVC(kernel="precomputed").fit(full[np.ix_(train, train)], y[train])
        expected.append(machine.score(full[np.ix_(test, train)], y[test]))
    assert scores.tolist() == expected
    assert cross_val_score(SVC(kernel=NTKKernel(model)), x, y, cv=folds).tolist() == expected
    assert min(scores) > 0.8


def test_grid_search_reaches_the_kernel(digits):
    x, y = digits[0][:60], digits[1][:60]
    model = network()
    pipeline = make_pipeline(NTKFeatures(NTKKernel(model)), SVC(kernel="precomputed"))
    search = GridSearchCV(pipeline, {"ntkfeatures__kernel__outputs": ["trace", "class=0"]}, cv=KFold(2)).fit(x, y)
    for outputs, score in zip(("trace", "class=0"), search.cv_results_["mean_test_score"], strict=True):
        assert score == cross_val_score(SVC(kernel=NTKKernel(model, outputs)), x, y, cv=KFold(2)).mean()
    assert search.best_estimator_[0].kernel.model is model


def test_copies_share_the_model_and_leave_it_alone(small):
    model, train, *_ = small
    kernel = NTKKernel(model, "sum", params=["0.weight"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copied = clone(NTKFeatures(kernel)).kernel
    assert copied is not kernel
    assert copied.model is model
    assert (copied.outputs, copied.params) == ("sum", ["0.weight"])
    np.testing.assert_array_equal(copied(train), kernel(train))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert repr(kernel) == "NTKKernel(Sequential, outputs='sum')"
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(kernel))(train), kernel(train))
    assert not kernel.is_stationary()
    assert kernel.theta.size == 0


def test_images_keep_their_shape():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 3))
    images = np.random.default_rng(0).random((6, 1, 8, 8))
    expected = oracle_gram(model.double(), torch.from_numpy(images), outputs="trace").numpy()
    model.float()
    flat = NTKKernel(model, shape=(1, 8, 8))(images.reshape(6, 64))
    assert flat.dtype == np.float64
    np.testing.assert_allclose(flat, expected, rtol=1e-4)
    np.testing.assert_array_equal(NTKFeatures(NTKKernel(model)).fit(images).transform(images[:2]), NTKKernel(model)(images[:2], images))


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("given", [pandas.DataFrame, lambda x: pandas.DataFrame(x).astype(object), read_only, np.ndarray.tolist])
def test_examples_come_as_users_and_workers_have_them(small, given):
    model, train, test, targets, own, cross = small
    rows, columns = given(train), given(test)
    kernel = NTKKernel(model)
    np.testing.assert_allclose(kernel(rows), own, rtol=1e-10)
    np.testing.assert_allclose(kernel.diag(rows), np.diag(own), rtol=1e-10)
    np.testing.assert_allclose(NTKFeatures(kernel).fit(rows).transform(columns), cross, rtol=1e-10, atol=1e-12)
    ridge = KernelRidge(alpha=RIDGE, kernel=kernel).fit(rows, targets)
    np.testing.assert_allclose(ridge.predict(columns), closed_form(own, cross, targets), rtol=1e-8, atol=1e-10)


def test_reversed_axes_are_copied(small):
    model, train, _, _, own, _ = small
    np.testing.assert_allclose(NTKKernel(model)(train[::-1]), own[::-1, ::-1], rtol=1e-10)


def test_features_are_named_in_data_frames(small):
    model, train, test, _, _, cross = small
    pipeline = make_pipeline(StandardScaler(with_mean=False, with_std=False), NTKFeatures(NTKKernel(model))).set_output(transform="pandas")
    frame = pipeline.fit(train).transform(test)
    np.testing.assert_allclose(frame.to_numpy(), cross, rtol=1e-10, atol=1e-12)
    assert list(frame.columns) == [f"ntkfeatures{i}" for i in range(12)]


def test_copies_of_a_subclass_are_of_the_subclass(small):
    class Halved(NTKKernel):
        def __call__(self, X, Y=None, eval_gradient=False):
            return super().__call__(X, Y, eval_gradient) / 2

    copied = clone(Halved(small[0]))
    np.testing.assert_allclose(copied(small[1]), small[4] / 2, rtol=1e-10)


def test_whole_numbers_stay_whole():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    tokens = np.array([[0, 1], [2, 3], [4, 0]])
    expected = oracle_gram(model, torch.from_numpy(tokens), outputs="trace").numpy()
    np.testing.assert_allclose(NTKKernel(model)(tokens), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: NTKKernel(network(3), "full")(np.ones((2, 3))), ntkscope.InputError, "one row per example.*got outputs='full'"),
        (lambda: NTKKernel(network(3), "loss")(np.ones((2, 3))), ntkscope.InputError, "one row per example.*got outputs='loss'"),
        (lambda: NTKKernel(network(3), "magic")(np.ones((2, 3))), ntkscope.InputError, "`outputs` must be 'full', 'trace'"),
        (lambda: NTKFeatures(NTKKernel(network(3))).transform(np.ones((2, 3))), NotFittedError, "is not fitted yet"),
        (lambda: NTKFeatures(network(3)).fit(np.ones((2, 3))), ntkscope.InputTypeError, r"got Sequential. Give NTKFeatures\(NTKKernel"),
        (lambda: NTKKernel("net")(np.ones((2, 3))), ntkscope.InputTypeError, "must be a torch.nn.Module, got str"),
        (lambda: NTKKernel(network(3))(scipy.sparse.eye(3)), ntkscope.InputTypeError, "sparse matrix.*toarray"),
        (lambda: NTKKernel(network(3)).diag(scipy.sparse.eye(3)), ntkscope.InputTypeError, "sparse matrix.*toarray"),
        (lambda: NTKKernel(network(3))(np.array([["a", "b", "c"]])), ntkscope.InputTypeError, "real numbers, got an array of <U1"),
        (lambda: NTKKernel(network(3))(np.array([[1, 2, "c"]], dtype=object)), ntkscope.InputTypeError, "must be numbers.*'c'.*Encode"),
        (
            lambda: NTKKernel(network(3), shape=(1, 2))(np.ones((2, 3))),
            ntkscope.InputError,
            r"shape \(3,\) cannot.*\(1, 2\): 3 numbers, not 2",
        ),
        (lambda: NTKKernel(network(3))(np.ones((0, 3))), ntkscope.InputError, "holds no example"),
        (lambda: NTKKernel(network(3)).diag(np.ones((0, 3))), ntkscope.InputError, "holds no example"),
    ],
)
def test_bad_calls_are_explained(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_missing_package_is_named():
    code = "import sys; sys.modules['sklearn'] = sys.modules['sklearn.base'] = None; import ntkscope.interop.estimators"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "needs scikit-learn: pip install 'ntkscope[interop]'" in done.stderr
