"""Half of what `make bench` asks of ntk_gram's time and memory, against torch.func's contraction, by the benchmark's own functions.

Only ratios are asserted, never seconds. The bench prints the full figures.
"""

import subprocess
import sys

import jaxtyping
import pytest
import torch
from torch import nn

from benchmarks.kernel_cases import BY_NAME, CASES, contract_jacobian, random_precond, read_kind
from benchmarks.kernel_rate import achieved_rate, matmul_rate, time_dominant_contraction
from benchmarks.measure import ROOT, STATUS, measure_side, time_sides

TIMED = [case for case in CASES if case.asked_speed is not None]
COMPARED = [case for case in CASES if case.asked_share is not None]
SLOW = 50  # asked to be this many times faster: one call tells, and the contraction takes long
pytestmark = pytest.mark.alone
linux = pytest.mark.skipif(not STATUS.exists(), reason="resident memory is read from /proc")


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """Users run without jaxtyping's checks; so do the timed calls."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("case", TIMED, ids=lambda case: case.name)
def test_faster_than_the_contraction(case):
    is_far = case.asked_speed >= SLOW
    times = time_sides(case, repeats=1 if is_far else 3, num_warm_up=8)
    assert times.ratio >= case.asked_speed / 2


@linux
@pytest.mark.parametrize("case", COMPARED, ids=lambda case: case.name)
def test_smaller_than_the_contraction(case):
    ours, contraction = measure_side(case, "ours"), measure_side(case, "contraction")
    assert ours.growth <= 2 * case.asked_share * contraction.growth


@linux
@pytest.mark.parametrize("num_mib", [64, 256])
def test_memory_of_a_known_allocation_is_measured(num_mib):
    # An earlier and larger peak must not count; what is freed before the call is over must. As in the bench, in a fresh process.
    program = (
        "import torch; from benchmarks.measure import measure_call; held = torch.ones(320 * 2**18); del held; "
        f"print(measure_call(lambda: torch.ones({num_mib} * 2**18)).growth)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) / 2**20 == pytest.approx(num_mib, rel=0.05)


def test_contraction_is_the_kernel_of_a_linear_model():
    model, inputs = nn.Linear(3, 10, bias=False), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    precond = random_precond(model)
    weight = precond["weight"]  # K[(i,c),(j,d)] = sum over k of x_ik M_ck x_jk where c = d, else 0
    expected = torch.einsum("ik,ck,jk,cd->icjd", inputs, weight, inputs, torch.eye(10))
    kernel = contract_jacobian(model, inputs, precond)
    torch.testing.assert_close(kernel, expected.reshape(40, 40))
    torch.testing.assert_close(read_kind(kernel, "class=3"), expected[:, 3, :, 3])
    torch.testing.assert_close(read_kind(kernel, "trace"), sum(expected[:, c, :, c] for c in range(10)))


def test_disagreeing_sides_are_refused(monkeypatch):
    monkeypatch.setattr("benchmarks.kernel_cases.contract_jacobian", lambda *_: torch.eye(80))
    with pytest.raises(ArithmeticError, match="'mlp' disagree"):
        time_sides(BY_NAME["mlp"], repeats=1, num_warm_up=8)


@pytest.mark.parametrize("case", [case for case in CASES if case.rate], ids=lambda case: case.name)
def test_contraction_reaches_half_of_the_rate_asked(case):
    name, flops, seconds = time_dominant_contraction(case)
    rows = case.num_examples * 10
    plain = matmul_rate(rows, case.make(2)[0].get_parameter(name).numel(), rows)
    assert achieved_rate(flops, seconds) >= 0.3 * plain


def test_rate_is_per_second():
    assert achieved_rate(3e9, 2.0) == 1.5
