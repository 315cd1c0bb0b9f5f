"""What a live audit costs: `python -m benchmarks.live_audit`.

A training step on the probe (forward, backward, AdamW) against the same step with a live audit of its gate: medians of many, interleaved.
Off, nothing is called. The signal channel is that of a short recorded run.
"""

import statistics
import time

import torch
from torch import nn

import ntkscope
from ntkscope.experiments.demo import load_digits_data, make_model
from ntkscope.record.live_audit import LiveAudit

NUM_ROUNDS = 60


def wide_model() -> nn.Module:
    """Make an MLP of 5,000 parameters or more."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 67), nn.ReLU(), nn.Linear(67, 10))


def measure(name: str, model: nn.Module, num_examples: int) -> None:
    """Time both kinds of steps."""
    data = load_digits_data(num_examples, 0.2, 0)
    targets = nn.functional.one_hot(data.labels, 10).float()
    recorder = ntkscope.Recorder(model, probe=(data.inputs, targets), loss="squared", schedule=20, drift=None, audit=True, live_audit=10**6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    recorder.attach(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        (0.5 * (model(data.inputs) - targets).square().sum(dim=1).mean()).backward()
        optimizer.step()

    for _ in range(200):
        step()
    live = recorder._live
    assert isinstance(live, LiveAudit)
    assert recorder._gate_audit is not None
    live.measure(recorder._attached, recorder._clock, recorder._gate_audit)
    optimizer_without_hooks = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer_without_hooks.load_state_dict(optimizer.state_dict())
    recorded, optimizer = optimizer, optimizer_without_hooks
    plain, audits = [], []
    for _ in range(NUM_ROUNDS):
        start = time.perf_counter()
        step()
        middle = time.perf_counter()
        live.measure(recorder._attached, recorder._clock, recorder._gate_audit)
        plain.append(middle - start)
        audits.append(time.perf_counter() - middle)
    assert recorded is not optimizer
    base, audit = statistics.median(plain), statistics.median(audits)
    ratio = (base + audit) / base
    print(
        f"{name}: step {base * 1e3:.2f} ms, audit {audit * 1e3:.2f} ms, audited step {ratio:.2f}x (asked 3): {'ok' if ratio <= 3 else 'NO'}"
    )


def main() -> None:
    """Measure small and larger models."""
    measure("MLP 64-48-10, n = 100", make_model(0), 100)
    measure("MLP 64-67-10 (5,035 parameters), n = 100", wide_model(), 100)
    torch.manual_seed(0)
    measure("MLP 64-1024-1024-10, n = 100", nn.Sequential(
        nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    ), 100)  # fmt: skip


if __name__ == "__main__":
    main()
