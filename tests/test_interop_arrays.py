"""Kernels and analyses in numpy, SciPy, pandas and xarray: the numbers are those of the results, by name."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
import xarray
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gram as oracle_gram
from test_saved import RUNS
from torch import nn

import ntkscope
from ntkscope.interop import arrays

NUM_CLASSES = 3


def problem(num_examples=4, num_others=3):
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, NUM_CLASSES)).double()
    rows, columns = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (num_examples, num_others))
    return model, rows, columns


@pytest.fixture(scope="module", params=list(RUNS))
def found(request):
    return RUNS[request.param]()


# --- numpy and SciPy --------------------------------------------------------------------------------------------------------------


def test_a_kernel_is_an_array():
    model, rows, _ = problem()
    gram = ntkscope.ntk_gram(model, rows)
    assert_close(torch.from_numpy(np.asarray(gram)), oracle_gram(model, rows))
    assert np.asarray(gram).base is not None  # no copy
    assert np.asarray(gram, dtype=np.float32).dtype == np.float32
    assert np.shares_memory(np.asarray(gram, copy=False), gram.matrix.numpy())
    with pytest.raises(ValueError, match="Unable to avoid copy"):
        np.asarray(gram, dtype=np.float32, copy=False)
    copied = np.array(gram)
    copied[:] = 0.0
    assert bool((gram.matrix != 0).any())
    np.testing.assert_allclose(scipy.linalg.eigvalsh(gram), np.linalg.eigvalsh(gram.matrix.numpy()), atol=1e-12)
    product = scipy.sparse.linalg.aslinearoperator(np.asarray(gram)) @ np.ones(len(gram.matrix))
    np.testing.assert_allclose(product, gram.matrix.sum(dim=1).numpy(), rtol=1e-12)


def test_the_operator_works_in_scipys_solvers():
    model, rows, columns = problem(num_examples=9)
    dense = oracle_gram(model, rows).numpy()
    op = ntkscope.NTKOperator(model, rows)
    assert isinstance(op, scipy.sparse.linalg.LinearOperator)
    right = np.linspace(-1.0, 1.0, len(dense))
    ridge = op + scipy.sparse.linalg.aslinearoperator(np.eye(len(dense)))
    for solver in (scipy.sparse.linalg.cg, scipy.sparse.linalg.minres, scipy.sparse.linalg.gmres):
        solution, failure = solver(ridge, right, rtol=1e-10)
        assert failure == 0
        np.testing.assert_allclose(solution, np.linalg.solve(dense + np.eye(len(dense)), right), atol=1e-6)
    expected = np.linalg.eigvalsh(dense)[::-1][:3]
    np.testing.assert_allclose(np.sort(scipy.sparse.linalg.eigsh(op, k=3, return_eigenvectors=False))[::-1], expected, rtol=1e-8)
    start = np.random.default_rng(0).normal(size=(len(dense), 3))
    np.testing.assert_allclose(scipy.sparse.linalg.lobpcg(op, start, tol=1e-6, maxiter=200)[0], expected, rtol=1e-5)
    cross = ntkscope.NTKOperator(model, rows, columns)
    singular = np.linalg.svd(oracle_gram(model, rows, columns).numpy(), compute_uv=False)[:2]
    np.testing.assert_allclose(np.sort(scipy.sparse.linalg.svds(cross, k=2, return_singular_vectors=False))[::-1], singular, rtol=1e-8)


# --- xarray ---------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(i=st.integers(0, 3), j=st.integers(0, 2), c=st.integers(0, 2), d=st.integers(0, 2))
def test_entries_of_a_kernel_are_found_by_name(i, j, c, d):
    model, rows, columns = problem()
    gram = ntkscope.ntk_gram(model, rows, columns)
    kernel = gram.to_xarray(examples=list("wxyz"), others=[10, 20, 30]).kernel
    assert kernel.dims == ("example", "output", "example_", "output_")
    entry = kernel.sel(example="wxyz"[i], output=c, example_=10 * (j + 1), output_=d)
    assert float(entry) == float(gram.matrix[i * NUM_CLASSES + c, j * NUM_CLASSES + d])
    assert (kernel.attrs["outputs"], kernel.attrs["num_classes"]) == ("full", NUM_CLASSES)


def test_columns_are_named_as_rows_only_where_they_are_the_same():
    model, rows, columns = problem(num_others=4)
    names = list("wxyz")
    assert list(ntkscope.ntk_gram(model, rows).to_xarray(examples=names).example_.values) == names
    assert list(ntkscope.ntk_gram(model, rows, columns).to_xarray(examples=names).example_.values) == [0, 1, 2, 3]


@pytest.mark.parametrize("outputs", ["trace", "sum", "class=1", "loss"])
def test_other_kinds_have_one_row_per_example(outputs):
    model, rows, _ = problem()
    options = {"targets": torch.zeros(4, dtype=torch.long), "loss": "cross_entropy"} if outputs == "loss" else {}
    gram = ntkscope.ntk_gram(model, rows, outputs=outputs, **options)
    kernel = gram.to_xarray().kernel
    assert kernel.dims == ("example", "example_")
    assert float(kernel.sel(example=3, example_=1)) == float(gram.matrix[3, 1])


def test_the_trace_kernel_is_a_sum_over_a_named_dimension():
    model, rows, columns = problem()
    full = ntkscope.ntk_gram(model, rows, columns).to_xarray().kernel
    trace = ntkscope.ntk_gram(model, rows, columns, outputs="trace").to_xarray().kernel
    assert list(full.example_.values) == [0, 1, 2]
    diagonal = sum(full.sel(output=c, output_=c, drop=True) for c in range(NUM_CLASSES))
    xarray.testing.assert_allclose(diagonal, trace)


def test_layers_of_a_kernel_add_up():
    model, rows, _ = problem()
    gram = ntkscope.ntk_gram(model, rows, by_layer=True)
    dataset = gram.to_xarray()
    assert list(dataset.layer.values) == ["0", "2"]
    xarray.testing.assert_allclose(dataset.kernel_by_layer.sum("layer"), dataset.kernel)
    np.testing.assert_array_equal(dataset.kernel_by_layer.sel(layer="2").values.reshape(12, 12), gram.by_layer["2"].numpy())


def test_an_analysis_by_name(found):
    dataset, examples, history = found.to_xarray(), found.examples, found.history
    assert dataset.sizes["example"] == found.run.num_examples
    assert dataset.sizes["mode"] == found.channels.num_modes
    last = history.steps[-1]
    for i, name in enumerate(examples.ids):
        own = dataset.sel(example=name)
        assert float(own.half_time) == float(examples.half_time[i])
        assert float(own.example_loss) == float(examples.loss[i])
        assert float(own.example_residual.sel(step=last)) == float(history.example_residual[-1, i])
        assert int(own.label) == examples.labels[i]
    for j, step in enumerate(history.steps):
        own = dataset.sel(step=step)
        assert float(own.loss) == float(history.loss[j])
        assert float(own.time) == float(history.times[j])
        assert float(own.kernel_drift) == float(found.drift.relative[j])
        np.testing.assert_array_equal(own.eigvals_at_step.values, history.eigvals[j].numpy())
    np.testing.assert_array_equal(dataset.residual_energy.values, found.spectrum.residual_energy.numpy())
    np.testing.assert_array_equal(dataset.log_dissipation.values, found.spectrum.log_dissipation.numpy())
    basis = found.spectrum.eigvecs[:, torch.from_numpy(dataset.is_signal.values)]
    assert_close(basis @ basis.T, found.channels.signal_projector())
    assert list(dataset.rule.values) == list(found.cutoffs)
    for name, cutoff in found.cutoffs.items():
        rank = float(dataset.cutoff_rank.sel(rule=name))
        assert np.isnan(rank) if cutoff.rank is None else rank == cutoff.rank


def test_every_variable_says_what_it_is(found):
    dataset = found.to_xarray()
    assert not [name for name, variable in dataset.data_vars.items() if not variable.attrs["long_name"] or not variable.attrs["units"]]
    assert json.loads(json.dumps(dataset.attrs)) == dataset.attrs
    assert dataset.attrs["trustworthy"] == int(found.closure.trustworthy)
    assert dataset.attrs["energy_error"] == found.closure.energy_error
    assert dataset.attrs["source"] == found.run.source


def test_planted_noise_is_a_coordinate():
    planted = RUNS["plain"]()
    is_noise = torch.arange(planted.run.num_examples) == 2
    labels = planted.examples.labels
    noisy = ntkscope.Analysis(**{
        **vars(planted),
        "examples": type(planted.examples)(**{**vars(planted.examples), "is_noise": is_noise, "true_labels": labels}),
    })
    dataset = noisy.to_xarray()
    assert dataset.example_loss[dataset.is_noise.values].example.item() == 2
    assert list(dataset.true_label.values) == labels
    assert "is_noise" not in planted.to_xarray().coords


def test_a_dataset_survives_a_file(found, tmp_path):
    dataset = found.to_xarray()
    dataset.to_netcdf(tmp_path / "run.nc", engine="scipy")
    again = xarray.load_dataset(tmp_path / "run.nc", engine="scipy")
    xarray.testing.assert_equal(again, dataset)
    assert again.attrs.keys() == dataset.attrs.keys()
    assert again.attrs["window_reason"] == dataset.attrs["window_reason"]
    assert again.half_time.attrs["units"] == dataset.half_time.attrs["units"]


def test_bad_names_are_refused_and_a_missing_package_is_named(monkeypatch):
    model, rows, columns = problem()
    gram = ntkscope.ntk_gram(model, rows, columns)
    with pytest.raises(ntkscope.InputError, match="`examples` must name all 4 examples, got 2 names"):
        gram.to_xarray(examples=["a", "b"])
    with pytest.raises(ntkscope.InputError, match="`others` must name all 3 examples, got 4 names"):
        gram.to_xarray(others=range(4))
    monkeypatch.setattr(arrays, "xarray", None)
    with pytest.raises(ntkscope.UnsupportedError, match=r"xarray is not installed: pip install 'ntkscope\[interop\]'"):
        gram.to_xarray()


# --- pandas ---------------------------------------------------------------------------------------------------------------------------


def test_frames_hold_the_tables(found):
    frames = found.to_pandas()
    assert list(frames) == ["examples", "history", "spectrum", "cutoffs"]
    assert [frame.index.name for frame in frames.values()] == ["id", "step", "mode", "rule"]
    assert frames["examples"].equals(found.examples.to_pandas())
    assert frames["history"].equals(found.history.to_pandas())
    assert frames["spectrum"].equals(found.spectrum.to_pandas())
    assert list(frames["cutoffs"].index) == list(found.cutoffs)
    rank = frames["cutoffs"].loc["half", "rank"]
    assert rank == found.cutoffs["half"].rank
    for column, values in (("time", found.history.times), ("predicted_loss", found.history.predicted_loss)):
        assert frames["history"][column].tolist() == values.tolist()
    assert frames["history"]["is_refined"].tolist() == found.history.is_refined


def test_the_removed_loss_of_all_directions_is_the_dissipated_energy():
    """The oracle is the quadratic form of theory.md section 3 in the plain coordinates of outputs."""
    plain = RUNS["plain"]()
    assert plain.spectrum.to_pandas()["removed_loss"].sum() == pytest.approx(plain.closure.energy_predicted, rel=1e-9)


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "interop.md").read_text(encoding="utf-8")
    names: dict = {}
    with torch.random.fork_rng():
        for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
            exec(block, names)
    assert (tmp_path / "run.nc").exists()
    assert names["accuracy"] > 0.5
    assert names["failure"] == 0
    assert set(names["analysis"].to_xarray().data_vars) <= set(re.findall(r"`(\w+)`", page))
