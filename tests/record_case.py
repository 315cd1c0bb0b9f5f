"""A small smooth run to record, and its closure errors composed by hand from the snapshots."""

import itertools

import torch
from torch import nn

import ntkscope
from ntkscope.dynamics.dissipation import take_step
from ntkscope.dynamics.interval import factor_interval

NUM_EXAMPLES, NUM_CLASSES = 8, 3


def problem(seed=0):
    """Random data and a smooth network: kinks of ReLU have a closure error of their own."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(NUM_EXAMPLES, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(NUM_CLASSES, (NUM_EXAMPLES,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        model = nn.Sequential(nn.Linear(4, 10), nn.GELU(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, NUM_CLASSES)).double()
    return model, inputs, targets


def cross_entropy(model, inputs, targets):
    return nn.functional.cross_entropy(model(inputs), targets)


def train(model, inputs, targets, optimizer, steps, *, before_step=None, after_step=None, loss=cross_entropy, batches=None):
    for step in range(steps):
        rows = slice(None) if batches is None else batches[step]
        optimizer.zero_grad()
        loss(model, inputs[rows], targets[rows]).backward()
        if before_step is not None:
            before_step()
        optimizer.step()
        if after_step is not None:
            after_step()


def record(make_optimizer, steps=200, *, schedule=5, setup=None, attach=None, query=False, drift=None, **options):
    """Record a run; `setup(model, optimizer)` gives further arguments of `train`."""
    model, inputs, targets = problem()
    training = {key: options.pop(key) for key in ("loss", "batches") if key in options}
    held_out = (inputs[:2] + 0.5, targets[:2]) if query else None
    recorder = ntkscope.Recorder(
        model, probe=(inputs, targets), query=held_out, loss="cross_entropy", schedule=schedule, drift=drift, **options
    )
    optimizer = make_optimizer(model)
    if attach is not None:
        attach(recorder)
    recorder.attach(optimizer)
    training |= {} if setup is None else setup(model, optimizer)
    train(model, inputs, targets, optimizer, steps, **training)
    return recorder


def mean(first, second):
    return None if first is None else 0.5 * (first.double() + second.double())


def closure(trace):
    """Gradient and energy errors at the end of the whole trace."""
    snapshots = list(trace)
    gradient, energy = snapshots[0].gradient.flatten(), 0.0
    for before, after in itertools.pairwise(snapshots):
        interval = factor_interval(mean(before.kernel(), after.kernel()), after.mean_hessian, after.time - before.time)
        forcing = mean(before.forcing, after.forcing)
        step = take_step(interval, gradient, None if forcing is None else forcing.flatten())
        gradient, energy = step.gradient, energy + step.energy
    last = snapshots[-1]
    gap = torch.linalg.vector_norm(gradient - last.gradient.flatten()) / torch.linalg.vector_norm(last.gradient)
    observed = snapshots[0].loss - last.loss
    return float(gap), abs(energy - observed) / abs(observed)
