"""Drift and diffusion on digits: growth exponents with batches drawn with replacement, and with reshuffled epochs.

python -m benchmarks.diffusion
"""

import torch
from torch import Tensor, nn

import ntkscope
from benchmarks.digits_runs import encode
from ntkscope.dynamics.diffusion import Growth
from ntkscope.experiments.demo import NUM_PIXELS, OUTPUT_SCALE, WIDTH, load_digits_data

NUM_EXAMPLES, BATCH_SIZE, NUM_STEPS, LEARNING_RATE = 60, 10, 600, 0.02
STEPS_PER_EPOCH = NUM_EXAMPLES // BATCH_SIZE


def batches(is_reshuffled: bool) -> list[Tensor]:
    """Draw all batches of a run."""
    generator = torch.Generator().manual_seed(1)
    if not is_reshuffled:
        return [torch.randint(NUM_EXAMPLES, (BATCH_SIZE,), generator=generator) for _ in range(NUM_STEPS)]
    epochs = [torch.randperm(NUM_EXAMPLES, generator=generator).split(BATCH_SIZE) for _ in range(NUM_STEPS // STEPS_PER_EPOCH)]
    return [batch for epoch in epochs for batch in epoch]


def show(growth: Growth | None, reason: str = "") -> str:
    """Write exponents with their intervals."""
    if growth is None:
        return f"none ({reason})"
    rows = zip(growth.exponent.tolist(), growth.low.tolist(), growth.high.tolist(), strict=True)
    return ", ".join(f"{exponent:.2f} [{low:.2f}, {high:.2f}]" for exponent, low, high in rows)


def main() -> None:
    """Train both ways, and print what the analysis finds."""
    data = load_digits_data(NUM_EXAMPLES, 0.2, 0)
    targets = encode(data.labels, "squared")
    for name, is_reshuffled in (("with replacement", False), ("reshuffled epochs", True)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(NUM_PIXELS, WIDTH), nn.GELU(), nn.Linear(WIDTH, 10))
        with torch.no_grad():
            for parameter in model[2].parameters():
                parameter.mul_(OUTPUT_SCALE)
        recorder = ntkscope.Recorder(model, probe=(data.inputs, targets), loss="squared", every_step=True, steps_per_epoch=STEPS_PER_EPOCH)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        recorder.attach(optimizer)
        for batch in batches(is_reshuffled):
            optimizer.zero_grad()
            (0.5 * (model(data.inputs[batch]) - targets[batch]).square().sum(dim=1).mean()).backward()
            optimizer.step()
        found = ntkscope.analyze(recorder, window=(0, NUM_STEPS))
        moved = found.diffusion
        assert moved is not None, found.diffusion_reason
        print(f"{name}: {moved.sampler.name}. {moved.sampler.reason}")
        print(f"  mean motion          {show(moved.mean_growth)}")
        print(f"  centered motion      {show(moved.centered_growth)}")
        print(f"  within an epoch      {show(moved.within_epoch, moved.within_epoch_reason)}")
        print(f"  across epochs        {show(moved.across_epochs, moved.across_epochs_reason)}")
        print(
            f"  signal-to-noise      step {moved.signal_to_noise_step.tolist()}, window {moved.signal_to_noise_window.tolist()}", flush=True
        )


if __name__ == "__main__":
    main()
