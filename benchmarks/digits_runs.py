"""Recorded runs on digits with 20 % planted wrong labels, for the benchmarks of trajectories."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ntkscope
from ntkscope._losses import NAMED_LOSSES
from ntkscope.experiments.demo import NUM_CLASSES, NUM_PIXELS, OUTPUT_SCALE, load_digits_data

BATCH_SIZE = 20
WIDTH = 48


@dataclass(frozen=True)
class RunSpec:
    """One run.

    Attributes:
        name: For people.
        optimizer: "gd" (full batch), "sgd" or "adam" (batches of 20, with replacement).
        loss: Its name.
        lr: Learning rate.
        steps: Optimizer steps.
        activation: Smooth or with kinks.
        schedule: As for `Recorder`.
    """

    name: str
    optimizer: str
    loss: str
    lr: float
    steps: int
    activation: type[nn.Module] = nn.GELU
    schedule: str | int | Sequence[int] = "log"


def encode(labels: Tensor, loss: str) -> Tensor:
    """Encode labels as the loss takes them."""
    return labels if loss == "cross_entropy" else nn.functional.one_hot(labels, NUM_CLASSES).float()


def train(spec: RunSpec, num_examples: int, seed: int = 0, **recording: object) -> ntkscope.Recorder:
    """Train and record an MLP 64-48-10 whose output layer starts small."""
    data = load_digits_data(num_examples, 0.2, seed)
    targets = encode(data.labels, spec.loss)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(NUM_PIXELS, WIDTH), spec.activation(), nn.Linear(WIDTH, NUM_CLASSES))
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter.mul_(OUTPUT_SCALE)
    recorder = ntkscope.Recorder(
        model,
        probe=(data.inputs, targets),
        query=(data.query_inputs, encode(data.query_labels, spec.loss)),
        loss=spec.loss,
        clean_targets=encode(data.clean_labels, spec.loss),
        schedule=spec.schedule,  # pyright: ignore[reportArgumentType]
        **recording,  # pyright: ignore[reportArgumentType]
    )
    kinds = {"gd": torch.optim.SGD, "sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    optimizer = kinds[spec.optimizer](model.parameters(), lr=spec.lr)
    recorder.attach(optimizer)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(spec.steps):
        batch = slice(None) if spec.optimizer == "gd" else torch.randint(num_examples, (BATCH_SIZE,), generator=generator)
        optimizer.zero_grad()
        NAMED_LOSSES[spec.loss](model(data.inputs[batch]), targets[batch]).backward()
        optimizer.step()
    return recorder
