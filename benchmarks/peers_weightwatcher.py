"""WeightWatcher and ntkscope on networks trained with 0 % and 20 % wrong labels: what each says, and what it takes.

python -m benchmarks.peers_weightwatcher [threads]

MLP 64-512-512-10 on 1,000 digits, SGD with batches of 50, until it has memorized. WeightWatcher looks at the final weights. ntkscope has
followed 100 of the training examples; the true labels are used for nothing but the score (AUROC of the wrong ones).
"""

import logging
import statistics
import sys
import warnings

import torch
import weightwatcher
from torch import nn

import ntkscope
from benchmarks.peers_worker import choose_clock
from ntkscope.experiments.demo import NUM_CLASSES, NUM_PIXELS, load_digits_data
from ntkscope.spectrum.examples import RECOMMENDED, area_under_roc

NUM_EXAMPLES, NUM_FOLLOWED, BATCH_SIZE = 1000, 100, 50
WIDTH, LEARNING_RATE, NUM_STEPS = 512, 0.1, 3000
NOISES = (0.0, 0.2)
SEEDS = (0, 1, 2)
REPEATS = 5
NUM_THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else 1
CLOCK = choose_clock(NUM_THREADS)


def make_model(seed: int) -> nn.Sequential:
    """Make the MLP."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Linear(NUM_PIXELS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()),
        nn.Linear(WIDTH, NUM_CLASSES),
    )


def read_alphas(model: nn.Module) -> list[float]:
    """Ask WeightWatcher for the exponent of every layer it fits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weightwatcher.WeightWatcher(model=model).analyze()["alpha"].tolist()


def run(noise: float, seed: int) -> list[float]:
    """Train and record one network, and print what both say of it.

    Args:
        noise: Share of wrong labels.
        seed: Of data, initialization and batches.

    Returns:
        WeightWatcher's exponents.
    """
    data = load_digits_data(NUM_EXAMPLES, noise, seed)
    model = make_model(seed)
    followed = slice(0, NUM_FOLLOWED)
    recorder = ntkscope.Recorder(
        model,
        probe=(data.inputs[followed], data.labels[followed]),
        loss="cross_entropy",
        clean_targets=data.clean_labels[followed],
        training_size=NUM_EXAMPLES,
        tolerance=0.05,  # batches are drawn: denser snapshots do not follow the noise
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    recorder.attach(optimizer)
    generator = torch.Generator().manual_seed(seed)
    start = CLOCK()
    for _ in range(NUM_STEPS):
        batch = torch.randint(NUM_EXAMPLES, (BATCH_SIZE,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.inputs[batch]), data.labels[batch]).backward()
        optimizer.step()
    trained = CLOCK() - start
    with torch.no_grad():
        outputs = model(data.inputs)
        train = (outputs.argmax(dim=1) == data.labels).float().mean()
        test = (model(data.query_inputs).argmax(dim=1) == data.query_labels).float().mean()
        losses = nn.functional.cross_entropy(outputs[followed], data.labels[followed], reduction="none")
    alphas = read_alphas(model)
    start = CLOCK()
    found = ntkscope.analyze(recorder)
    analyzed = CLOCK() - start
    scores = found.examples.auroc
    told = "no wrong labels to find"
    if scores is not None and found.examples.is_noise is not None:
        final = area_under_roc(losses, found.examples.is_noise)
        told = f"AUROC {RECOMMENDED} {scores[RECOMMENDED]:.3f}, margin {scores['margin']:.3f} in the window, final loss {final:.3f}"
    closure = found.closure
    told_by_peer = f"WeightWatcher alpha {' '.join(f'{alpha:.2f}' for alpha in alphas)}, mean {statistics.mean(alphas):.2f}"
    told_by_us = (
        f"ntkscope: rank {found.channels.signal_rank} of {len(found.spectrum.eigvals)} in steps 0:{found.window.stop_step}, "
        f"energy error {closure.energy_error:.1%}, closure {closure.gradient_error:.0%}, {told}"
    )
    print(
        f"wrong {noise:.0%} seed {seed}: training accuracy {train:.3f}, held out {test:.2f} | {told_by_peer} | {told_by_us} | "
        f"run with recording {trained:.1f} s, {recorder.num_snapshots} snapshots, analysis {analyzed:.1f} s",
        flush=True,
    )
    return alphas


def main() -> None:
    """Print one line a run, exponents by noise, and WeightWatcher's time and its exponents without training."""
    torch.set_num_threads(NUM_THREADS)
    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    model = make_model(0)
    seconds = []
    for _ in range(REPEATS):
        start = CLOCK()
        alphas = read_alphas(model)
        seconds.append(CLOCK() - start)
    print(
        f"WeightWatcher analyze: median {statistics.median(seconds):.2f} s; untrained alpha {' '.join(f'{alpha:.2f}' for alpha in alphas)}"
    )
    found = {noise: [run(noise, seed) for seed in SEEDS] for noise in NOISES}
    for noise, rows in found.items():
        means = [statistics.mean(row) for row in rows]
        by_layer = ", ".join(f"{statistics.mean(layer):.2f} ({min(layer):.2f}-{max(layer):.2f})" for layer in zip(*rows, strict=True))
        print(f"wrong {noise:.0%}: mean alpha {statistics.mean(means):.2f} ({min(means):.2f}-{max(means):.2f}); by layer {by_layer}")


if __name__ == "__main__":
    main()
