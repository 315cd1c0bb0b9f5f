"""The demo: an MLP on scikit-learn's digits with planted wrong labels, recorded while it trains."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ntkscope._atomic import replace_when_done
from ntkscope._checks import InputError, check_choice, check_number
from ntkscope._losses import NAMED_LOSSES
from ntkscope.gate.optimizer import GatedAdamW
from ntkscope.record.pictures import make_pictures
from ntkscope.record.recorder import Recorder

DemoOptimizer = Literal["sgd", "adamw", "gated"]
OPTIMIZERS = ("sgd", "adamw", "gated")
NUM_CLASSES = 10
IMAGE_SHAPE = (8, 8)
NUM_PIXELS = 64
WIDTH = 48
NUM_QUERY = 50
BATCH_SIZE = 20  # of the Adam family; SGD takes the whole training set
# Small enough for gradient flow (lr * λ_max / 2 below 0.3) at the scale of each loss.
SGD_LEARNING_RATES = {"squared": 0.2, "mse": 1.0, "cross_entropy": 0.5}
ADAM_LEARNING_RATE = 1e-3
DEFAULT_STEPS = {"sgd": 1000, "adamw": 400, "gated": 400}
# The output layer starts small, so that the residual at the start is the labels and not the random initial outputs.
OUTPUT_SCALE = 0.1


@dataclass(frozen=True)
class DigitsData:
    """Training examples with some wrong labels, and held-out examples.

    Attributes:
        inputs: Pixels, centered, in [-1, 1].
        labels: Given labels, some of them wrong.
        clean_labels: True labels.
        is_noise: Where they differ.
        query_inputs: Held out.
        query_labels: Their true labels.
        pixels: Of the training examples, as they were before centering: ink from 0 to 1.
    """

    inputs: Float[Tensor, "examples pixels"]
    labels: Int[Tensor, " examples"]
    clean_labels: Int[Tensor, " examples"]
    is_noise: Bool[Tensor, " examples"]
    query_inputs: Float[Tensor, "queries pixels"]
    query_labels: Int[Tensor, " queries"]
    pixels: Float[Tensor, "examples pixels"]


def load_digits_data(num_examples: int, label_noise: float, seed: int) -> DigitsData:
    """Draw training and query examples from scikit-learn's digits, and plant wrong labels.

    Args:
        num_examples: n, training examples.
        label_noise: Share of them that gets a wrong label, in [0, 1].
        seed: Decides the draw.

    Returns:
        The data.

    Raises:
        InputError: If there are too few or too many examples, or scikit-learn is not installed.
    """
    check_number("label_noise", label_noise, low=0.0, high=1.0)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("The demo's data come with scikit-learn: pip install scikit-learn.") from error
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    if not 2 <= num_examples <= len(labels) - NUM_QUERY:
        raise InputError(f"`examples` must lie in [2, {len(labels) - NUM_QUERY}], got {num_examples}.")
    ink = (pixels / 16).float()
    inputs = ink - ink.mean(dim=0)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    train, query = order[:num_examples], order[-NUM_QUERY:]
    clean = labels[train].long()
    wrong = torch.randperm(num_examples, generator=generator)[: round(label_noise * num_examples)]
    given = clean.clone()
    given[wrong] = (clean[wrong] + torch.randint(1, NUM_CLASSES, (len(wrong),), generator=generator)) % NUM_CLASSES
    return DigitsData(inputs[train], given, clean, given != clean, inputs[query], labels[query].long(), ink[train])


@dataclass(frozen=True)
class DemoRun:
    """A finished demo run.

    Attributes:
        model: Trained.
        optimizer: Its optimizer.
        recorder: Holds the trace.
        data: What it was trained on.
        train_accuracy: On the given labels.
        query_accuracy: On held-out examples.
        memorized: Share of wrong labels that the model reproduces; NaN without any.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    recorder: Recorder
    data: DigitsData
    train_accuracy: float
    query_accuracy: float
    memorized: float


def train_demo(
    *,
    optimizer: str = "sgd",
    loss: str = "squared",
    label_noise: float = 0.2,
    num_examples: int = 100,
    num_steps: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> DemoRun:
    """Train and record an MLP (64-48-10, ReLU): full-batch SGD, or AdamW / GatedAdamW on minibatches.

    Args:
        optimizer: "sgd", "adamw" or "gated".
        loss: "squared", "mse" or "cross_entropy".
        label_noise: Share of wrong labels.
        num_examples: n.
        num_steps: Optimizer steps; a default that runs past interpolation if not given.
        seed: Decides data, initialization and batches.
        progress: Called with (steps done, steps in all).

    Returns:
        The run.

    Raises:
        InputError: If a choice is unknown or a number out of range.
    """
    check_choice("optimizer", optimizer, OPTIMIZERS)
    check_choice("loss", loss, NAMED_LOSSES)
    data = load_digits_data(num_examples, label_noise, seed)
    steps = DEFAULT_STEPS[optimizer] if num_steps is None else num_steps
    if steps < 1:
        raise InputError(f"`steps` must be at least 1, got {steps}.")
    encode = _encode if loss != "cross_entropy" else torch.Tensor.clone
    targets = encode(data.labels)
    generator = torch.Generator().manual_seed(seed)
    model = make_model(seed)
    recorder = Recorder(
        model,
        probe=(data.inputs, targets),
        query=(data.query_inputs, encode(data.query_labels)),
        loss=loss,
        clean_targets=encode(data.clean_labels),
        every_step=optimizer != "sgd",
        audit=optimizer != "sgd",
        steps_per_epoch=None if optimizer == "sgd" else max(2, num_examples // BATCH_SIZE),
    )
    # With the mean taken out of every pixel, digits are hard to recognise: show them as they were.
    recorder.probe = replace(recorder.probe, pictures=make_pictures(data.pixels, IMAGE_SHAPE))
    trainer = _make_optimizer(optimizer, loss, model)
    recorder.attach(trainer)
    for step in range(steps):
        batch = slice(None) if optimizer == "sgd" else torch.randint(num_examples, (BATCH_SIZE,), generator=generator)
        trainer.zero_grad()
        NAMED_LOSSES[loss](model(data.inputs[batch]), targets[batch]).backward()
        trainer.step()
        if progress is not None:
            progress(step + 1, steps)
    with torch.no_grad():
        predicted, query_predicted = model(data.inputs).argmax(dim=1), model(data.query_inputs).argmax(dim=1)
    return DemoRun(
        model=model,
        optimizer=trainer,
        recorder=recorder,
        data=data,
        train_accuracy=float((predicted == data.labels).double().mean()),
        query_accuracy=float((query_predicted == data.query_labels).double().mean()),
        memorized=float((predicted == data.labels)[data.is_noise].double().mean()),
    )


def save_checkpoint(run: DemoRun, path: Path) -> None:
    """Save model, optimizer and record as a training script would.

    Args:
        run: A finished run.
        path: The file; whole or not there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "ntkscope": run.recorder.state_dict()}
    with replace_when_done(path) as temporary:
        torch.save(state, temporary)


def make_model(seed: int = 0) -> nn.Sequential:
    """Make the MLP: also what `--model ntkscope.experiments.demo:make_model` names, to audit a demo's checkpoint.

    Args:
        seed: Decides its weights.

    Returns:
        The model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = nn.Linear(WIDTH, NUM_CLASSES)
        model = nn.Sequential(nn.Linear(NUM_PIXELS, WIDTH), nn.ReLU(), output)
    with torch.no_grad():
        for parameter in output.parameters():
            parameter.mul_(OUTPUT_SCALE)
    return model


def _make_optimizer(name: str, loss: str, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer."""
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=SGD_LEARNING_RATES[loss])
    kind = torch.optim.AdamW if name == "adamw" else GatedAdamW
    return kind(model.parameters(), lr=ADAM_LEARNING_RATE)


def _encode(labels: Tensor) -> Tensor:
    """Encode labels one-hot."""
    return nn.functional.one_hot(labels, NUM_CLASSES).float()
