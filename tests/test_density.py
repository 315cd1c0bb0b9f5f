"""How many checkpoints are needed: the split of an error into what spacing makes and the rest, against paths that are known exactly."""

import dataclasses
import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_checkpoint_trajectory import OPTIMIZERS, problem, read, saved_run

import ntkscope
from ntkscope import window
from ntkscope.dynamics.density import Pair, SpacingError, Stage, judge_density, needed_snapshots, spacing_error
from ntkscope.dynamics.interval import factor_interval
from ntkscope.view.findings import verdict

# --- arithmetic on errors made by hand: e(K') = rest + spaced ((K - 1)/(K' - 1))^2 --------------------------------------------

numbers = st.floats(-2.0, 2.0).map(lambda value: round(value, 3))


def error(rest, spaced, num_snapshots, count):
    return float((rest + spaced * ((num_snapshots - 1) / (count - 1)) ** 2).norm())


@given(rest=st.lists(numbers, min_size=2, max_size=2), spaced=st.lists(numbers, min_size=2, max_size=2), num_snapshots=st.integers(4, 30))
def test_the_number_is_the_first_that_is_within_the_limit(rest, spaced, num_snapshots):
    """The oracle tries one number after another."""
    rest, spaced, limit = torch.tensor(rest, dtype=torch.float64), torch.tensor(spaced, dtype=torch.float64), 0.25
    found = needed_snapshots(rest, spaced, num_snapshots=num_snapshots, limit=limit)
    if error(rest, spaced, num_snapshots, num_snapshots) <= limit:
        assert found == num_snapshots
    elif float(rest.norm()) >= limit:
        assert found is None
    else:
        assert found is not None
        assert found > num_snapshots
        assert error(rest, spaced, num_snapshots, found) <= limit + 1e-9
        assert error(rest, spaced, num_snapshots, found - 1) > limit - 1e-9


@pytest.mark.parametrize(
    ("rest", "spaced", "needed"), [(0.0, 1.0, 21), (0.05, 0.8, 21), (0.05, 0.2, 11), (0.3, 0.1, None), (-0.05, 4.8, 41)]
)
def test_errors_of_the_form_rest_plus_square_are_recovered(rest, spaced, needed):
    found = needed_snapshots(*torch.tensor([[rest], [spaced]], dtype=torch.float64), num_snapshots=11, limit=0.25)
    assert found == needed


# --- the split, on a flow whose kernel moves ----------------------------------------------------------------------------------

HESSIAN = torch.eye(3, dtype=torch.float64)[None] / 2


def kernel(time):
    """Three outputs; positive definite, and not commuting with itself at other times."""
    root = torch.tensor([[1.0, 0.2, 0.0], [0.0, 0.8, 0.3], [0.1, 0.0, 0.6]], dtype=torch.float64)
    turned = torch.tensor([[0.0, 1.0, 0.5], [-1.0, 0.0, 0.3], [-0.5, -0.3, 0.0]], dtype=torch.float64)
    factor = root + time * turned
    return factor @ factor.T


def flow(gradient, start, stop, steps=2000):
    """The oracle: Runge-Kutta of dg/dt = -B K g, and the loss that it dissipates."""
    h, energy = (stop - start) / steps, 0.0
    for position in range(steps):
        t = start + position * h
        slopes, g = [], gradient
        for share in (0.0, 0.5, 0.5, 1.0):
            g = gradient if not slopes else gradient + share * h * slopes[-1]
            slopes.append(-HESSIAN[0] @ kernel(t + share * h) @ g)
        middle = gradient + h / 2 * slopes[1]
        after = gradient + h / 6 * (slopes[0] + 2 * slopes[1] + 2 * slopes[2] + slopes[3])
        rates = [float(g @ kernel(at) @ g) for g, at in ((gradient, t), (middle, t + h / 2), (after, t + h))]
        energy += h / 6 * (rates[0] + 4 * rates[1] + rates[2])
        gradient = after
    return gradient, energy


def split(times, kicks=None):
    """Observe the flow at some times, kicked there, and split the error of the trapezoid rule at the end."""
    gradient, decrease = torch.tensor([1.0, -0.5, 0.7], dtype=torch.float64), 0.0
    observed = [gradient]
    for position, (start, stop) in enumerate(itertools.pairwise(times)):
        gradient, energy = flow(gradient, start, stop, steps=200)
        decrease += energy
        if kicks is not None:
            gradient = gradient + kicks[position]
        observed.append(gradient)

    def stage(first, last):
        mean = 0.5 * (kernel(times[first]) + kernel(times[last]))
        return Stage(factor_interval(mean, HESSIAN, times[last] - times[first]), None, observed[first])

    count = len(times) - 1
    pairs = [Pair(stage(k, k + 1), stage(k + 1, k + 2), stage(k, k + 2)) for k in range(0, count - 1, 2)]
    if count % 2:
        pairs.append(Pair(stage(count - 2, count - 1), stage(count - 1, count), stage(count - 2, count), is_overlapping=True))
    return spacing_error(pairs, last_gradient=observed[-1], decrease=decrease), observed[-1]


UNEVEN = [2 * (1.4**k - 1) / (1.4**8 - 1) for k in range(9)]


@pytest.mark.parametrize(
    ("times", "tolerance"),
    [(torch.linspace(0, 2, 9).tolist(), 0.1), (torch.linspace(0, 2, 8).tolist(), 0.1), (UNEVEN, 0.3)],
    ids=["even", "odd", "uneven"],
)
def test_without_noise_the_whole_error_is_that_of_spacing(times, tolerance):
    found, last = split(times)
    assert 1e-3 < float(found.gradient.norm() / last.norm()) < 0.5
    assert float((found.gradient - found.gradient_spacing).norm()) < tolerance * float(found.gradient.norm())
    assert found.energy_spacing == pytest.approx(found.energy, rel=tolerance)


def test_the_spacing_error_falls_with_the_square_of_the_spacing():
    coarse, fine = (split(torch.linspace(0, 2, count).tolist())[0] for count in (9, 17))
    assert float(coarse.gradient_spacing.norm() / fine.gradient_spacing.norm()) == pytest.approx(4.0, rel=0.1)
    assert coarse.energy_spacing / fine.energy_spacing == pytest.approx(4.0, rel=0.1)


def test_kicks_are_no_error_of_spacing():
    """What noise leaves at the end: every kick, carried on by the flow; the oracle integrates each alone."""
    times = torch.linspace(0, 2, 9).tolist()
    kicks = 0.05 * torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, _ = split(times, kicks)
    left = torch.zeros(3, dtype=torch.float64)
    for time, kick in zip(times[1:], kicks, strict=True):
        left = left + (flow(kick, time, 2.0, steps=200)[0] if time < 2.0 else kick)
    assert float(left.norm()) > 5 * float(found.gradient_spacing.norm())
    torch.testing.assert_close(found.gradient - found.gradient_spacing, -left, rtol=0.05, atol=0.05 * float(left.norm()))


def test_constant_kernels_leave_nothing_to_spacing():
    """An interval of a constant kernel is exact at any length."""
    stage = [Stage(factor_interval(kernel(0.0), HESSIAN, length), None, torch.ones(3).double()) for length in (0.3, 0.5, 0.8)]
    found = spacing_error([Pair(*stage)], last_gradient=torch.zeros(3).double(), decrease=0.0)
    assert float(found.gradient_spacing.norm()) < 1e-13
    assert abs(found.energy_spacing) < 1e-13


# --- the verdict --------------------------------------------------------------------------------------------------------------


def judge(rest, spaced, *, energy=(0.0, 0.0), is_close=False, largest_kernel_step=0.2, num_snapshots=11, steps=(100, 1100)):
    found = SpacingError(torch.tensor([rest + spaced]).double(), torch.tensor([spaced]).double(), sum(energy), energy[1])
    return judge_density(
        found,
        is_close=is_close,
        last_gradient=torch.ones(1).double(),
        decrease=1.0,
        steps=steps,
        num_snapshots=num_snapshots,
        largest_kernel_step=largest_kernel_step,
    )


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "needed", "sentence"),
    [
        ((0.1, 0.6), {}, "more", 21, r"makes 60\.0% of error .*, everything else 10\.0%\. About 10 more are needed, one every 50 steps\."),
        ((0.1, 0.6), {"steps": (0, 10)}, "more", 21, r"About 10 more are needed\.$"),
        ((0.0, 0.0), {"energy": (0.0, 0.2)}, "more", 21, r"About 10 more are needed"),
        ((0.1, 0.1), {"is_close": True}, "dense enough", None, r"from step 100 to 1,100 are dense enough; spacing makes"),
        ((0.6, 0.1), {}, "more would not help", None, r"would not help: spacing makes 10\.0% .* minibatch noise, kinks, momentum"),
        ((0.0, 0.3), {"energy": (0.06, 0.0)}, "more would not help", None, r"of the loss decrease 0\.0% and 6\.0%"),
        ((0.6, 0.1), {"largest_kernel_step": 0.8}, "at least", 21, r"changed by 80% .* at least 10 more, one every 50 steps"),
        ((0.6, 4.0), {"largest_kernel_step": 0.8}, "at least", 41, r"Give at least 30 more, one every 25 steps"),
        ((0.1, 0.1), {}, "at least", 21, r"Give at least 10 more"),
    ],
)
def test_verdicts(arguments, options, kind, needed, sentence):
    found = judge(*arguments, **options)
    assert (found.verdict, found.needed) == (kind, needed)
    assert re.search(sentence, found.sentence), found.sentence
    assert repr(found).startswith(f"Density(verdict='{kind}'")


def test_few_snapshots_tell_nothing():
    options = {"last_gradient": torch.ones(1).double(), "decrease": 1.0, "steps": (0, 10), "num_snapshots": 3, "largest_kernel_step": 0.1}
    found = judge_density(None, is_close=False, **options)
    assert found.verdict == "cannot tell"
    assert found.sentence.startswith("3 checkpoints from step 0 to 10 are too few to tell how many are needed: give at least 5 of this")
    assert judge_density(None, is_close=True, **options).sentence == "The 3 checkpoints from step 0 to 10 are dense enough."


# --- in an analysis -----------------------------------------------------------------------------------------------------------


def analyze(paths, **options):
    model, inputs, targets = problem()
    return ntkscope.analyze(paths, model=model, data=(inputs, targets), loss="cross_entropy", **options)


def test_sparse_checkpoints_ask_for_more_and_the_number_they_ask_for_is_enough(tmp_path):
    """Full-batch descent of a smooth network, in small steps: more and more checkpoints, as the verdict says, until there are enough."""
    last, counts = 240, []
    paths, _ = saved_run(tmp_path, lambda p: torch.optim.SGD(p, lr=0.1), steps=range(0, last + 1, 4))
    needed = 6
    while needed is not None:
        stride = max(size for size in (1, 2, 3, 4, 5, 6, 10, 12) if 60 // size + 1 >= needed)
        found = analyze(paths[::stride], window=(0, last))
        counts.append(found.run.num_snapshots)
        needed = found.density.needed
        if len(counts) == 1:
            assert not found.closure.trustworthy
            assert any(cause.startswith("Too few checkpoints: ") and "Give more of them" in cause for cause in found.closure.causes)
    assert found.closure.trustworthy
    assert found.density.verdict == "dense enough"
    assert counts == [6, 11]


@pytest.mark.parametrize("steps", [(10, 40, 70, 100), (0, 40, 70, 100)])
def test_sparse_checkpoints_of_adam_are_all_in_the_default_window(steps, tmp_path, monkeypatch):
    """They predict far more decrease than there was, as the first steps of Adam do, but because they are few, not early."""
    paths, _ = saved_run(tmp_path, lambda p: torch.optim.AdamW(p, lr=0.05), steps=steps)
    found = analyze(paths)
    assert (found.window.start_step, found.window.stop_step) == (steps[0], 100)
    assert "first steps" not in found.window.reason
    assert found.density.verdict == "at least"
    monkeypatch.setattr(window, "MAX_UNSETTLED", 1000)
    assert analyze(paths).window.start_step > steps[0]


def test_density_is_saved_summed_up_and_shown(tmp_path):
    paths, recorder = saved_run(tmp_path, OPTIMIZERS["momentum"], steps=range(2, 21, 2), recorded=True)
    found = analyze(paths)
    loaded = ntkscope.load_analysis(found.save(tmp_path / "out", report=False))
    assert loaded.density == found.density
    assert found.summary()["density"] == dataclasses.asdict(found.density) | {"sentence": found.density.sentence}
    assert found.density.sentence in verdict(found.closure, found.density).sentences
    recorded = ntkscope.analyze(recorder)
    assert recorded.density is None
    assert recorded.summary()["density"] is None


def test_a_window_of_few_snapshots_is_judged_with_the_whole_walk(tmp_path):
    paths, _ = saved_run(tmp_path, OPTIMIZERS["sgd"], steps=range(0, 21, 2))
    trace = read(paths)
    found = ntkscope.analyze(trace, window=(0, 4)).density
    assert (found.num_snapshots, found.start_step, found.stop_step) == (3, 0, 4)
    whole = ntkscope.findings.density_of(ntkscope.walk.walk_trajectory(
        ntkscope.course.Course(trace, 0, 10, loss=None), target_kernel=None, device=None, progress=None
    ), 2, device=None)  # fmt: skip
    assert (whole.num_snapshots, whole.start_step, whole.stop_step) == (11, 0, 20)
