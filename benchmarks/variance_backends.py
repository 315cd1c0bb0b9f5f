"""Three variances of the batch-mean gradient, against the one of the whole training set: digits, MLP 64-48-10, batches of 20.

python -m benchmarks.variance_backends [steps, by default 1500]

(a) Stationary: the weights stay as they are. (b) Drifting: AdamW trains. Batches are drawn with replacement, so that the truth is
σ²/b with σ² over the training set (1/n). Bias: sum over entries of what a backend says, over that of the truth, averaged over batches;
spread: interquartile range of log(backend/truth) over entries, likewise. Gates: m̂² > α ŝ with the streaming mean, and in the place of
ŝ 2/(1+β₁) times what a backend says; differing: share that the backend decides otherwise than the truth.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.measure import time_call
from ntkscope.experiments.demo import NUM_CLASSES, NUM_PIXELS, OUTPUT_SCALE, DigitsData, load_digits_data
from ntkscope.gate.step import Center
from ntkscope.gate.variance import MicrobatchVariance, StreamingMoments, exact_variance
from ntkscope.gate.variance_ratio import compare_variances
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.coverage import probe_routes
from ntkscope.kernel.moments import GradientMoments, gradient_moments, loss_pulls, make_pulled_readout, moments_of

BATCH_SIZE, NUM_PARTS, WIDTH = 20, 4, 48
NUM_EXAMPLES, LABEL_NOISE, LEARNING_RATE = 500, 0.2, 1e-3
LARGER = 200  # examples
NUM_COMPARED = 25  # of the steps
BETA1 = 0.9
ALPHAS = (1.0, "unbiased")
TRACKERS: dict[str, tuple[float, Center]] = {
    "streaming ρ=0.99 paper": (0.99, "paper"),
    "streaming ρ=0.99 corrected": (0.99, "corrected"),
    "streaming ρ=0.9  paper": (0.9, "paper"),
}
TIMED_SIZES = ((20, 48), (20, 512), (128, 512), (128, 2048))
REPEATS = 30

Probe = Callable[[tuple[Tensor, Tensor]], GradientMoments]


@dataclass(frozen=True)
class Row:
    """One backend at one step: bias, spread, differing gates by α, and those open under the truth."""

    bias: float
    spread: float
    differing: tuple[float, ...]
    open_truth: tuple[float, ...]


def make_model(width: int = WIDTH, seed: int = 0) -> nn.Module:
    """Make the demo's MLP."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(NUM_PIXELS, width), nn.ReLU(), nn.Linear(width, NUM_CLASSES))
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter.mul_(OUTPUT_SCALE)
    return model


def make_probe(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Probe:
    """Probe once; what is returned computes moments of any batch at the weights of the time."""
    readout = make_pulled_readout()
    with undisturbed(model):
        pulls, _ = loss_pulls(model, batch, loss="cross_entropy")
    routes, coverage = probe_routes(model, (batch[0], pulls), forward_fn=readout)

    def probe(other: tuple[Tensor, Tensor]) -> GradientMoments:
        inputs, labels = other
        with undisturbed(model):
            outputs = model(inputs).detach().requires_grad_()
            (grad,) = torch.autograd.grad(nn.functional.cross_entropy(outputs, labels), outputs)
            return moments_of(model, (inputs, len(inputs) * grad), routes, coverage)

    return probe


def backward(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    """Put the gradient of the mean loss into `.grad`."""
    model.zero_grad()
    nn.functional.cross_entropy(model(inputs), labels).backward()


def run(data: DigitsData, num_steps: int, *, is_training: bool) -> Iterator[tuple[str, Row]]:
    """Take steps, and compare all backends at some of them, after a warm-up of the averages."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    probe = make_probe(model, (data.inputs, data.labels))
    trackers = {name: StreamingMoments(beta1=BETA1, rho=rho, center=center) for name, (rho, center) in TRACKERS.items()}
    generator = torch.Generator().manual_seed(1)
    compared = {round(num_steps * (k + 1) / NUM_COMPARED) for k in range(NUM_COMPARED)}
    for step in range(1, num_steps + 1):
        chosen = torch.randint(len(data.labels), (BATCH_SIZE,), generator=generator)
        batch = data.inputs[chosen], data.labels[chosen]
        backward(model, *batch)
        for tracker in trackers.values():
            tracker.add(model)
        if step in compared and step > 20:
            gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]
            truth = {name: value / BATCH_SIZE for name, value in probe((data.inputs, data.labels)).variance.items()}
            parts = backward_in_parts(model, batch)
            found = {"exact, of the batch": exact_variance(probe(batch)), f"microbatch k={NUM_PARTS}": parts.variance()}
            larger = torch.randint(len(data.labels), (LARGER,), generator=generator)  # as an audit can afford
            moments = probe((data.inputs[larger], data.labels[larger]))
            found[f"exact, of {LARGER} examples"] = exact_variance(moments, batch_size=BATCH_SIZE)
            found |= {name: tracker.variance() for name, tracker in trackers.items()}
            mean = trackers[next(iter(TRACKERS))].mean()
            for name, variance in found.items():
                ratios = [compare_variances(variance, truth, mean, alpha=alpha, beta1=BETA1).overall for alpha in ALPHAS]
                yield (
                    name,
                    Row(
                        ratios[0].bias,
                        ratios[0].spread,
                        tuple(ratio.differing for ratio in ratios),
                        tuple(ratio.open_exact for ratio in ratios),
                    ),
                )
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
        if is_training:
            optimizer.step()


def report(title: str, rows: Iterator[tuple[str, Row]]) -> None:
    """Print means over the compared steps, and the range of biases."""
    by_name: dict[str, list[Row]] = {}
    for name, row in rows:
        by_name.setdefault(name, []).append(row)
    first = next(iter(by_name.values()))
    opened = ", ".join(f"{statistics.mean(row.open_truth[k] for row in first):.2%} (α={alpha})" for k, alpha in enumerate(ALPHAS))
    print(f"\n{title}: {len(first)} comparisons; gates open under the truth {opened}")
    print(f"  {'backend':28s} {'bias':>7s} {'5%..95%':>15s} {'spread':>7s}" + "".join(f"  differing α={alpha}" for alpha in ALPHAS))
    for name, own in by_name.items():
        biases = sorted(row.bias for row in own)
        low, high = (biases[round(share * (len(biases) - 1))] for share in (0.05, 0.95))
        differing = "".join(
            f"  {statistics.mean(row.differing[k] for row in own):>{len(f'differing α={alpha}')}.2%}" for k, alpha in enumerate(ALPHAS)
        )
        spread = statistics.mean(row.spread for row in own)
        print(f"  {name:28s} {statistics.mean(biases):7.3f} {f'{low:.3f}..{high:.3f}':>15s} {spread:7.3f}{differing}", flush=True)


def backward_in_parts(model: nn.Module, batch: tuple[Tensor, Tensor]) -> MicrobatchVariance:
    """Differentiate a batch in equal parts."""
    parts = MicrobatchVariance()
    for own in torch.arange(len(batch[1])).chunk(NUM_PARTS):
        backward(model, batch[0][own], batch[1][own])
        parts.add(model)
    return parts


def report_cost(data: DigitsData) -> None:
    """Print the seconds of exact moments, probed before and not, over those of a plain backward pass, taken in turn."""
    print("\nCost, median of interleaved ratios to one plain forward and backward pass")
    for size, width in TIMED_SIZES:
        model, batch = make_model(width), (data.inputs[:size], data.labels[:size])
        probe = make_probe(model, batch)
        calls = [
            lambda model=model, batch=batch: backward(model, *batch),
            lambda probe=probe, batch=batch: probe(batch),
            lambda model=model, batch=batch: gradient_moments(model, *batch, loss="cross_entropy"),
            lambda model=model, batch=batch: backward_in_parts(model, batch),
        ]
        for call in calls:
            call()
        times = [[time_call(call) for call in calls] for _ in range(REPEATS)]
        ratios = [statistics.median(row[k] / row[0] for row in times) for k in range(1, len(calls))]
        plain = statistics.median(row[0] for row in times)
        print(
            f"  b={size:3d}, width {width:3d}: plain {1e3 * plain:6.2f} ms; moments, probed before {ratios[0]:5.1f}; "
            f"gradient_moments {ratios[1]:5.1f}; {NUM_PARTS} microbatches {ratios[2]:4.1f}",
            flush=True,
        )


def main() -> None:
    """Print all three tables."""
    num_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
    data = load_digits_data(NUM_EXAMPLES, LABEL_NOISE, 0)
    report(f"(a) stationary, {num_steps} batches at the initial weights", run(data, num_steps, is_training=False))
    report(f"(b) drifting, {num_steps} steps of AdamW", run(data, num_steps, is_training=True))
    report(f"(b') drifting, the first {num_steps // 10} steps", run(data, num_steps // 10, is_training=True))
    report_cost(data)


if __name__ == "__main__":
    main()
