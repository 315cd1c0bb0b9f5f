"""What following a run costs: Cockpit's quantities and ntkscope's Recorder on the same small run, in one process.

python -m benchmarks.peers_cockpit [threads]

Digits MLP, batches of 20 of 1,000 examples, SGD, cross-entropy. Every way of following runs in turn with the plain loop, `ROUNDS` times.
"""

import statistics
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # cockpit and backpack use deprecated parts of setuptools and torch
    from backpack import extend
    from cockpit import Cockpit
    from cockpit.utils import schedules
    from cockpit.utils.configuration import configuration

import ntkscope
from benchmarks.peers_worker import choose_clock
from ntkscope.experiments.demo import NUM_CLASSES, NUM_PIXELS, load_digits_data

NUM_EXAMPLES, NUM_FOLLOWED, BATCH_SIZE, LEARNING_RATE = 1000, 100, 20, 0.1
ROUNDS = 3
NUM_THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else 1
CLOCK = choose_clock(NUM_THREADS)
MODELS = {"MLP 64-48-10": (48, 1000), "MLP 64-1024-10": (1024, 1000)}  # width of the hidden layer, steps
DATA = load_digits_data(NUM_EXAMPLES, 0.2, 0)


def make_model(width: int) -> nn.Sequential:
    """Make an MLP with one hidden layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(NUM_PIXELS, width), nn.ReLU(), nn.Linear(width, NUM_CLASSES))


def train(model: nn.Module, steps: int, backward: Callable[..., None] | None = None, attach: Callable[[Any], None] | None = None) -> float:
    """Train, and return the seconds it took.

    Args:
        model: To train.
        steps: How many.
        backward: Takes the place of the loss and its backward pass: (step, optimizer, inputs, labels).
        attach: Called with the optimizer before the first step.

    Returns:
        Seconds, `attach` included.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    start = CLOCK()
    if attach is not None:
        attach(optimizer)
    for step in range(steps):
        batch = torch.randint(NUM_EXAMPLES, (BATCH_SIZE,), generator=generator)
        inputs, labels = DATA.inputs[batch], DATA.labels[batch]
        optimizer.zero_grad()
        if backward is None:
            nn.functional.cross_entropy(model(inputs), labels).backward()
        else:
            backward(step, optimizer, inputs, labels)
        optimizer.step()
    return CLOCK() - start


def train_plain(width: int, steps: int) -> tuple[float, str]:
    """Train without being followed."""
    return train(make_model(width), steps), ""


def train_with_cockpit(width: int, steps: int, *, label: str, interval: int) -> tuple[float, str]:
    """Train with one of Cockpit's own sets of quantities, taken every so many steps; nothing is plotted."""
    model = extend(make_model(width))
    mean_loss, single_losses = extend(nn.CrossEntropyLoss()), extend(nn.CrossEntropyLoss(reduction="none"))
    cockpit = Cockpit(model.parameters(), quantities=configuration(label, track_schedule=schedules.linear(interval)))

    def backward(step: int, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        outputs = model(inputs)
        loss = mean_loss(outputs, labels)
        info = {"batch_size": len(labels), "individual_losses": single_losses(outputs, labels), "loss": loss, "optimizer": optimizer}
        with cockpit(step, info=info):
            loss.backward(create_graph=cockpit.create_graph(step))

    seconds = train(model, steps, backward)
    recorded = {name for values in cockpit.get_output().values() for name in values}
    return seconds, f"{len(recorded)} quantities"


def train_with_recorder(width: int, steps: int) -> tuple[float, str]:
    """Train with ntkscope's recorder as it is by default."""
    model = make_model(width)
    followed = slice(0, NUM_FOLLOWED)
    recorder = ntkscope.Recorder(model, probe=(DATA.inputs[followed], DATA.labels[followed]), loss="cross_entropy")
    seconds = train(model, steps, attach=recorder.attach)
    return seconds, f"{recorder.num_snapshots} snapshots of a kernel of {NUM_FOLLOWED * NUM_CLASSES} rows"


WAYS: dict[str, tuple[Callable[[int, int], tuple[float, str]], int]] = {
    "plain": (train_plain, 1),
    "Recorder, default": (train_with_recorder, 1),
    "Cockpit economy, every step": (lambda width, steps: train_with_cockpit(width, steps, label="economy", interval=1), 4),
    "Cockpit economy, every 100th": (lambda width, steps: train_with_cockpit(width, steps, label="economy", interval=100), 1),
    "Cockpit business, every step": (lambda width, steps: train_with_cockpit(width, steps, label="business", interval=1), 4),
    "Cockpit full, every step": (lambda width, steps: train_with_cockpit(width, steps, label="full", interval=1), 20),
    "Cockpit full, every 100th": (lambda width, steps: train_with_cockpit(width, steps, label="full", interval=100), 1),
}  # the number divides the steps: dear ways run shorter, and are scaled


def main() -> None:
    """Print milliseconds a step and the ratio to the plain loop, medians over rounds."""
    torch.set_num_threads(NUM_THREADS)
    warnings.simplefilter("ignore")
    for title, (width, steps) in MODELS.items():
        train_plain(width, 100)
        taken: dict[str, list[float]] = {name: [] for name in WAYS}
        told: dict[str, str] = {}
        for _ in range(ROUNDS):
            for name, (way, divisor) in WAYS.items():
                seconds, told[name] = way(width, steps // divisor)
                taken[name].append(seconds * divisor / steps * 1e3)
        for name, times in taken.items():
            ratio = statistics.median(mine / plain for mine, plain in zip(times, taken["plain"], strict=True))
            print(f"{title}, {steps} steps  {name:30s} {statistics.median(times):8.2f} ms a step  {ratio:6.1f}x  {told[name]}", flush=True)


if __name__ == "__main__":
    main()
