"""A CNN on Fashion-MNIST followed by the trace form: 500 probe examples of 10,000, and what the approximation costs at 150.

Needs Debian's package dataset-fashion-mnist: apt-get install dataset-fashion-mnist. Each case runs in a fresh process, for its peak memory:

    python -m benchmarks.fashion_trace                 # all cases
    python -m benchmarks.fashion_trace trace 500       # one
"""

import gzip
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import ntkscope
from benchmarks.measure import read_memory
from ntkscope._checks import format_bytes

FOLDER = Path("/usr/share/datasets/fashion-mnist")
NUM_TRAINING, NUM_QUERY, NUM_CLASSES = 10_000, 100, 10
BATCH_SIZE, NUM_EPOCHS = 100, 3
LABEL_NOISE = 0.2
LEARNING_RATE = {"squared": 0.05, "cross_entropy": 0.02}
CASES = (("trace", 500, "squared"), ("trace", 500, "cross_entropy"), ("trace", 150, "squared"), ("full", 150, "squared"),
         ("trace", 150, "cross_entropy"), ("full", 150, "cross_entropy"))  # fmt: skip


def read_idx(name: str) -> Tensor:
    """Read an IDX file of bytes."""
    with gzip.open(FOLDER / name) as stream:
        content = stream.read()
    num_axes = content[3]
    shape = np.frombuffer(content, dtype=">i4", count=num_axes, offset=4)
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * num_axes).reshape(shape).copy())


def load() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return inputs, given labels, true labels, query inputs and labels."""
    images, labels = read_idx("train-images-idx3-ubyte.gz"), read_idx("train-labels-idx1-ubyte.gz").long()
    test, test_labels = read_idx("t10k-images-idx3-ubyte.gz"), read_idx("t10k-labels-idx1-ubyte.gz").long()
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(images), generator=generator)[:NUM_TRAINING]
    inputs, clean = images[chosen, None] / 255.0 - 0.286, labels[chosen]
    is_noise = torch.rand(NUM_TRAINING, generator=generator) < LABEL_NOISE
    wrong = (clean + torch.randint(1, NUM_CLASSES, (NUM_TRAINING,), generator=generator)) % NUM_CLASSES
    return inputs, torch.where(is_noise, wrong, clean), clean, test[:NUM_QUERY, None] / 255.0 - 0.286, test_labels[:NUM_QUERY]


def make_model() -> nn.Sequential:
    """Make a small convolutional network with smooth activations."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.GELU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GELU(),
        nn.Flatten(), nn.Linear(16 * 7 * 7, NUM_CLASSES),
    )  # fmt: skip


def run(outputs: str, num_probe: int, loss: str) -> None:
    """Train, record and analyze one case, and print a line."""
    inputs, labels, clean, query, query_labels = load()

    def encode(values: Tensor) -> Tensor:
        return values if loss == "cross_entropy" else nn.functional.one_hot(values, NUM_CLASSES).float()

    targets, model = encode(labels), make_model()
    probe = ntkscope.stratified_subset(labels, num_probe)
    start = time.perf_counter()
    recorder = ntkscope.Recorder(
        model,
        probe=(inputs[probe], targets[probe]),
        query=(query, encode(query_labels)),
        loss=loss,
        clean_targets=encode(clean[probe]),
        training_size=NUM_TRAINING,
        outputs=outputs,
        steps_per_epoch=NUM_TRAINING // BATCH_SIZE,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE[loss])
    recorder.attach(optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(NUM_EPOCHS):
        for batch in torch.randperm(NUM_TRAINING, generator=generator).split(BATCH_SIZE):
            optimizer.zero_grad()
            found = model(inputs[batch])
            value = nn.functional.cross_entropy(found, targets[batch]) if loss == "cross_entropy" else (
                0.5 * (found - targets[batch]).square().sum(dim=1).mean()
            )  # fmt: skip
            value.backward()
            optimizer.step()
    trace = recorder.trace
    recorded = time.perf_counter() - start
    result = ntkscope.analyze(trace, window=(0, trace.steps[-1]))
    seconds = time.perf_counter() - start
    closure, transfer = result.closure, result.transfer
    assert transfer is not None
    scores = result.examples.auroc or {}
    print(
        f"{outputs:5s} n={num_probe} {loss:13s} {len(trace)} snapshots  recorded and trained {recorded:.0f} s, in all {seconds:.0f} s, "
        f"peak {format_bytes(read_memory('VmHWM'))}  drift {result.drift.max:.2f}  energy {closure.energy_error:.2%}  "
        f"closure {closure.gradient_error:.2%}  test corr {transfer.fit.correlation:.4f} error {transfer.fit.relative_error:.3f}  "
        f"signal rank {result.channels.signal_rank} of {result.channels.num_modes}  effective rank {result.spectrum.effective_rank:.1f}  "
        f"AUROC reservoir {scores['reservoir_energy']:.3f} half-time {scores['half_time']:.3f} loss {scores['loss']:.3f}  "
        f"trustworthy {closure.trustworthy}",
        flush=True,
    )


def price_full() -> None:
    """Price the full form at 500 probe examples."""
    inputs, *_ = load()
    price, _ = ntkscope.price_gram(make_model(), inputs[:500])
    num_outputs = 500 * NUM_CLASSES
    matrices = 8 * num_outputs**2
    print(f"full  n=500 priced: kernel {price.seconds:.1f} s a snapshot; each N x N matrix {format_bytes(matrices)}, about 80 held: "
          f"{format_bytes(80 * matrices)}")  # fmt: skip


def main() -> None:
    """Run one case, or each in a process of its own."""
    if len(sys.argv) > 2:
        run(sys.argv[1], int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "cross_entropy")
        return
    price_full()
    for outputs, num_probe, loss in CASES:
        subprocess.run([sys.executable, "-m", "benchmarks.fashion_trace", outputs, str(num_probe), loss], check=True)


if __name__ == "__main__":
    main()
