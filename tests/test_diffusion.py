"""Growth exponents, their intervals and the sampler's name: on noise of known kind, and on minibatch runs of a linear regression."""

import numpy as np
import pytest
import torch
from compare import assert_close

from ntkscope._checks import InputError
from ntkscope.dynamics.diffusion import measure_diffusion

STEPS, EPOCH, MANY = 320, 16, 100  # modes stand for seeds: each has noise of its own


def shape(white, kind, epoch=EPOCH):
    """Turn white steps into those of a kind; linear."""
    steps = white.copy()
    if kind in ("reshuffled", "reshuffled with momentum"):
        by_epoch = steps.reshape(-1, epoch, steps.shape[1])
        steps = (by_epoch - by_epoch.mean(axis=1, keepdims=True)).reshape(steps.shape)
    if kind in ("persistent", "reshuffled with momentum"):
        for t in range(1, len(steps)):
            steps[t] += 0.8 * steps[t - 1]
    if kind == "dying":
        steps *= np.exp(-2 * np.arange(len(steps)) / len(steps))[:, None]
    return steps


def noise(kind, steps=STEPS, modes=MANY, seed=0, epoch=EPOCH):
    generator = np.random.default_rng(seed)
    white = generator.standard_t(3, (steps, modes)) if kind == "heavy-tailed" else generator.standard_normal((steps, modes))
    return torch.from_numpy(shape(white, kind, epoch))


def measured(centered, mean=None, **options):
    mean = torch.zeros_like(centered) if mean is None else mean
    return measure_diffusion(mean, centered, torch.full((len(centered),), 0.1, dtype=torch.float64), **options)


def expected_exponent(kind, lags, starts_of):
    """Half the slope of the expected mean squared displacement, from the covariance of the steps."""
    mixing = shape(np.eye(STEPS), kind)
    covariance = mixing @ mixing.T
    squares = [np.mean([covariance[s : s + lag, s : s + lag].sum() for s in starts_of(lag)]) for lag in lags]
    return 0.5 * np.polyfit(np.log(lags), np.log(squares), 1)[0]


def covered(growth, truth):
    return float(((growth.low <= truth) & (truth <= growth.high)).double().mean())


def lags_up_to(longest):
    return sorted({round(float(lag)) for lag in np.geomspace(1, longest, 12)})


@pytest.mark.parametrize("kind", ["independent", "heavy-tailed", "persistent", "dying"])
def test_intervals_cover_the_exponent(kind):
    growth = measured(noise(kind)).centered_growth
    truth = expected_exponent(kind, lags_up_to(STEPS // 4), lambda lag: range(STEPS - lag + 1))
    assert {"independent": 0.49, "heavy-tailed": 0.48, "persistent": 0.65, "dying": 0.4}[kind] < truth
    assert truth < {"independent": 0.51, "heavy-tailed": 0.52, "persistent": 0.85, "dying": 0.5}[kind]
    assert covered(growth, truth) >= (0.84 if kind == "dying" else 0.9)
    assert float(growth.exponent.mean()) == pytest.approx(truth, abs=0.025)
    assert float((growth.high - growth.low).mean()) < 0.4


@pytest.mark.parametrize("kind", ["independent", "reshuffled", "dying"])
def test_intervals_cover_the_exponents_within_and_across_epochs(kind):
    diffusion = measured(noise(kind), steps_per_epoch=EPOCH)
    within = expected_exponent(kind, [1, 2, 3, 4], lambda lag: [t for t in range(STEPS - lag + 1) if t % EPOCH + lag <= EPOCH])
    across = expected_exponent(kind, [EPOCH * k for k in lags_up_to(5)], lambda lag: range(STEPS - lag + 1))
    assert within == pytest.approx({"independent": 0.5, "reshuffled": 0.43, "dying": 0.5}[kind], abs=0.02)  # log 3 / log 4 / 2 + ...
    assert across == pytest.approx({"independent": 0.5, "reshuffled": 0.0, "dying": 0.42}[kind], abs=0.04)
    if kind == "reshuffled":  # blocks of whole epochs keep what cancels in them; others would be three times as wide
        assert float((diffusion.centered_growth.high - diffusion.centered_growth.low).mean()) < 0.15
    assert covered(diffusion.within_epoch, within) >= 0.9
    assert covered(diffusion.across_epochs, across) >= (0.84 if kind == "dying" else 0.9)
    assert float(diffusion.within_epoch.exponent.mean()) == pytest.approx(within, abs=0.02)
    assert float(diffusion.across_epochs.exponent.mean()) == pytest.approx(across, abs=0.06)


def test_the_bias_of_short_windows_is_taken_off():
    growth = measured(noise("independent", 48, 500)).centered_growth
    as_fitted = [0.5 * np.polyfit(np.log(growth.times.numpy()), 2 * np.log(mode), 1)[0] for mode in growth.displacement.T.numpy()]
    assert np.mean(as_fitted) < 0.48
    assert float(growth.exponent.mean()) == pytest.approx(0.5, abs=0.01)


def test_a_constant_drift_grows_like_time():
    steps = torch.ones(64, 2, dtype=torch.float64) * torch.tensor([1.0, -3e-200], dtype=torch.float64)
    growth = measured(noise("independent", 64, 2), steps).mean_growth
    for exponent in (growth.exponent, growth.low, growth.high):
        assert_close(exponent, torch.ones(2))
    assert_close(growth.displacement[:, 1] * 1e200, 30 * growth.times)


def test_time_is_the_optimizers():
    """A rate that falls by a factor of 400: the drift stays 1 in optimizer time, though not in steps."""
    elapsed = torch.exp(-6 * torch.arange(200, dtype=torch.float64) / 200)
    growth = measure_diffusion(elapsed[:, None], elapsed[:, None] * noise("independent", 200, 1), elapsed).mean_growth
    assert float(growth.exponent[0]) == pytest.approx(1.0, abs=0.05)
    assert_close(growth.times[0], elapsed.mean())


def test_signal_to_noise():
    mean, centered = noise("independent", 40, 3, seed=2), noise("independent", 40, 3, seed=3)
    mean[:, 1:], centered[:, 2] = 0.0, 0.0
    mean[:, 2] = 1.0
    diffusion = measured(centered, mean)
    first = (mean[:, 0].square().mean() / centered[:, 0].square().mean()).sqrt()
    assert_close(diffusion.signal_to_noise_step, [first, 0.0, float("inf")])
    window = mean[:, 0].sum().abs() / centered[:, 0].square().sum().sqrt()
    assert_close(diffusion.signal_to_noise_window, [window, 0.0, float("inf")])


def test_scale_and_order_of_modes_do_not_matter():
    mean, centered = noise("persistent", 96, 3, seed=4), noise("reshuffled", 96, 3, seed=5)
    one = measured(centered, mean, steps_per_epoch=16)
    scale, order = torch.tensor([1e-180, 1.0, 1e150], dtype=torch.float64), [2, 0, 1]
    other = measured((scale * centered)[:, order], (scale * mean)[:, order], steps_per_epoch=16)
    for name in ("mean_growth", "centered_growth", "within_epoch", "across_epochs"):
        assert_close(getattr(other, name).low, getattr(one, name).low[order])
    assert_close(other.signal_to_noise_step, one.signal_to_noise_step[order])
    assert other.sampler.ratio == pytest.approx(one.sampler.ratio)


def test_standing_modes_are_nan_and_do_not_touch_the_others():
    mean, centered = noise("independent", 128, 3, seed=6), noise("reshuffled", 128, 3, seed=7)
    alone = measured(centered[:, :2], mean[:, :2], steps_per_epoch=16)
    mean[:, 2], centered[:, 2] = 0.0, 0.0
    diffusion = measured(centered, mean, steps_per_epoch=16)
    for name in ("mean_growth", "centered_growth", "within_epoch", "across_epochs"):
        growth = getattr(diffusion, name)
        assert_close(growth.low[:2], getattr(alone, name).low)
        assert bool(torch.isnan(torch.stack([growth.exponent[2], growth.low[2], growth.high[2]])).all())
        assert_close(growth.displacement[:, 2], torch.zeros(len(growth.times)))
    assert bool(torch.isnan(diffusion.signal_to_noise_step[2]))
    assert diffusion.sampler.ratio == pytest.approx(alone.sampler.ratio)
    assert diffusion.sampler.interval == pytest.approx(alone.sampler.interval)


def test_without_noise_the_sampler_is_unclear():
    drift = torch.ones(128, 1, dtype=torch.float64)
    for rest in (torch.zeros_like(drift), 1e-15 * noise("independent", 128, 1)):  # rounding is no noise
        sampler = measured(rest, drift, steps_per_epoch=16).sampler
        assert sampler.name == "unclear"
        assert "every step saw all examples" in sampler.reason


def test_what_happens_outside_whole_epochs_only():
    steps, elapsed = noise("independent", 101, 2), torch.zeros(101, dtype=torch.float64)
    steps[:96, 0], elapsed[96:] = 0.0, 1.0
    diffusion = measure_diffusion(steps, steps, elapsed, steps_per_epoch=16)
    assert diffusion.sampler.ratio > 0.1  # of the second mode
    assert bool(torch.isnan(diffusion.within_epoch.exponent).all())
    assert bool(torch.isnan(diffusion.across_epochs.low).all())
    steps[:96] = 0.0
    assert "every step saw all" in measure_diffusion(steps, steps, elapsed, steps_per_epoch=16).sampler.reason


def test_epochs_unknown_too_few_or_too_short_are_none_with_the_reason():
    steps = noise("independent", 100, 1)
    for steps_per_epoch, reason in (
        (None, "not known"),
        (17, "fewer than 6 whole epochs of 17"),
        (500, "fewer than 6 whole epochs of 500"),
    ):
        diffusion = measured(steps, steps_per_epoch=steps_per_epoch)
        assert diffusion.within_epoch is None
        assert diffusion.across_epochs is None
        assert reason in diffusion.within_epoch_reason
        assert reason in diffusion.across_epochs_reason
        assert diffusion.sampler.name == "unclear"
        assert reason in diffusion.sampler.reason
    short = measured(steps, steps_per_epoch=7)
    assert short.within_epoch is None
    assert "it takes 8" in short.within_epoch_reason
    assert short.across_epochs is not None
    assert short.across_epochs_reason == ""


def names(kind, epoch=EPOCH, num_epochs=20):
    runs = [noise(kind, num_epochs * epoch, 3, seed, epoch) for seed in range(5)]
    return [measured(run, steps_per_epoch=epoch).sampler.name for run in runs]


def test_the_sampler_is_named():
    for kind in ("independent", "heavy-tailed", "dying"):
        assert names(kind).count("independent batches") >= 4
    assert names("reshuffled").count("reshuffled epochs") == 5


def test_momentum_does_not_fool_the_sampler():
    """An epoch's sum is not zero then, and independent steps persist: it may stay unclear, but is not named wrongly."""
    persistent = names("persistent")
    assert persistent.count("independent batches") >= 2
    assert persistent.count("reshuffled epochs") == 0
    for epoch in (EPOCH, 2 * EPOCH):  # at the second the sums have just the variance of independent steps
        with_momentum = names("reshuffled with momentum", epoch)
        assert with_momentum.count("reshuffled epochs") >= 3
        assert with_momentum.count("independent batches") == 0
    assert names("reshuffled with momentum", 2 * EPOCH, num_epochs=7).count("independent batches") == 0


@pytest.mark.parametrize("drift", [1.0, 0.3])
def test_a_drift_in_the_centered_motion_is_not_diffusion(drift):
    sampler = measured(noise("independent", modes=2, seed=1) + drift, steps_per_epoch=EPOCH).sampler
    assert sampler.name == "unclear"
    assert "drifts" in sampler.reason


def test_epochs_that_begin_later():
    steps = torch.cat([noise("independent", 5, 2, seed=8), noise("reshuffled", 10 * EPOCH, 2, seed=9)])
    placed = measured(steps, steps_per_epoch=EPOCH, first_epoch=5).sampler
    assert placed.ratio < 1e-20
    assert measured(steps, steps_per_epoch=EPOCH).sampler.ratio > 0.1


@pytest.mark.parametrize("replacement", [True, False], ids=["with replacement", "reshuffled"])
def test_a_real_run(replacement):
    """Minibatch SGD on linear regression in float64: the split into mean and centered motion is exact."""
    generator = torch.Generator().manual_seed(0)
    num_examples, num_params, batch, lr, num_epochs = 48, 6, 4, 0.02, 30
    inputs = torch.randn(num_examples, num_params, generator=generator, dtype=torch.float64)
    targets = inputs.sum(dim=1) + torch.randn(num_examples, generator=generator, dtype=torch.float64)
    kernel = inputs @ inputs.T
    directions = torch.linalg.eigh(kernel).eigenvectors[:, -3:]
    weights = torch.zeros(num_params, dtype=torch.float64)
    means, centereds = [], []
    for _ in range(num_epochs):
        order = torch.randperm(num_examples, generator=generator)
        for step in range(num_examples // batch):
            drawn = torch.randint(num_examples, (batch,), generator=generator)
            rows = drawn if replacement else order[batch * step : batch * (step + 1)]
            before = inputs @ weights
            weights = weights - lr * inputs[rows].T @ (before[rows] - targets[rows]) / batch
            mean = -lr * kernel @ (before - targets) / num_examples
            means.append(directions.T @ mean)
            centereds.append(directions.T @ (inputs @ weights - before - mean))
    steps = len(means)
    elapsed = torch.full((steps,), lr, dtype=torch.float64)
    diffusion = measure_diffusion(torch.stack(means), torch.stack(centereds), elapsed, steps_per_epoch=num_examples // batch)
    sampler = diffusion.sampler
    if replacement:
        assert sampler.name == "independent batches", sampler.reason
        assert sampler.expected[0] < sampler.ratio < sampler.expected[1]
        assert covered(diffusion.centered_growth, 0.5) == 1.0
    else:
        assert sampler.name == "reshuffled epochs", sampler.reason
        assert sampler.ratio < 0.1
        assert float(diffusion.across_epochs.high.max()) < 0.4
    assert float(diffusion.within_epoch.exponent.mean()) == pytest.approx(0.5, abs=0.12)


BAD = [
    (lambda x, t: measure_diffusion(x[:20], x[:20], t[:20]), "at least 32 steps, got 20"),
    (lambda x, t: measure_diffusion(x, x[:, :1], t), r"shape \(steps, modes\).*got \(64, 2\), \(64, 1\) and \(64,\)"),
    (lambda x, t: measure_diffusion(x[:, :0], x[:, :0], t), "at least one mode"),
    (lambda x, t: measure_diffusion(x, x, t[:-1]), r"`elapsed` \(steps,\)"),
    (lambda x, t: measure_diffusion(x.log(), x, t), "`mean` must be finite, got .* NaN or infinite of 128 entries. Did training diverge"),
    (lambda x, t: measure_diffusion(x, x / 0, t), "`centered` must be finite"),
    (lambda x, t: measure_diffusion(x, x, -t), "nonnegative and not zero throughout, got -1 to -1. Give the optimizer time of each step"),
    (lambda x, t: measure_diffusion(x, x, 0 * t), "nonnegative and not zero throughout"),
    (lambda x, t: measure_diffusion(x, x, t, steps_per_epoch=1), "`steps_per_epoch` must be a whole number from 2 up, got 1. Leave it out"),
    (lambda x, t: measure_diffusion(x, x, t, steps_per_epoch=True), "from 2 up, got True"),
    (lambda x, t: measure_diffusion(x, x, t, steps_per_epoch=8, first_epoch=8), r"`first_epoch` must lie in \[0, 8\), got 8"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:24] for _, message in BAD])
def test_bad_input(call, message):
    steps = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(InputError, match=message):
        call(steps, torch.ones(64, dtype=torch.float64))
