"""Columns of the Jacobian, walked over in chunks, against the dense Jacobian of the definition."""

import pytest
import torch
from cases import BY_NAME, CASES
from compare import assert_close
from oracles import stacked_jacobian

import ntkscope
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.columns import columns_of, jacobian_bytes, whole_jacobian
from ntkscope.kernel.coverage import probe_routes


def dense_by_columns(model, inputs, chunk_bytes):
    """Put the chunks together: (n C, p), and how often each entry was visited."""
    routes, coverage = probe_routes(model, inputs)
    parts, visits = [], []
    with undisturbed(model):
        jacobian = whole_jacobian(model, inputs, routes=routes, coverage=coverage, budget=2**30)
        for name, parameter in routes.parameters.items():
            part = jacobian.outputs.new_zeros(*jacobian.outputs.shape, parameter.numel())
            visited = torch.zeros(parameter.numel())
            for columns in columns_of(jacobian, name, chunk_bytes=chunk_bytes):
                part[:, :, columns.where] += columns.values
                visited[columns.where] += 1
            parts.append(part)
            visits.append(visited)
    return torch.cat(parts, dim=2).flatten(0, 1), torch.cat(visits)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_columns_are_the_jacobian(case):
    model, inputs = case.build(torch.float64)
    expected = stacked_jacobian(model, inputs)
    actual, visits = dense_by_columns(model, inputs, chunk_bytes=400)
    assert_close(actual, expected, rtol=1e-10)
    assert visits.max() <= 1


def test_chunks_do_not_matter():
    model, inputs = BY_NAME["mlp"].build(torch.float64)
    small, _ = dense_by_columns(model, inputs, chunk_bytes=1)
    large, _ = dense_by_columns(model, inputs, chunk_bytes=2**30)
    assert_close(small, large, rtol=1e-12)


def test_too_little_memory_is_refused_with_numbers():
    model, inputs = CASES[0].build(torch.float64)
    routes, coverage = probe_routes(model, inputs)
    assert jacobian_bytes(coverage, 5) > 10
    with undisturbed(model), pytest.raises(ntkscope.InputError, match="Raise max_memory, or record a smaller probe"):
        whole_jacobian(model, inputs, routes=routes, coverage=coverage, budget=10)
