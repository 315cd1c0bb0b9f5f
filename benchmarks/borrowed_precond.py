"""M before Adam's first step, borrowed from the next checkpoint, against the live recorder and against leaving step 0 out: digits, n = 30.

python -m benchmarks.borrowed_precond
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from sklearn.datasets import load_digits
from torch import nn

import ntkscope

NUM_STEPS, SPACINGS = 100, (5, 10, 20)
OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "GatedAdamW": lambda parameters: ntkscope.GatedAdamW(parameters, lr=1e-3, alpha="unbiased"),
}


def make() -> nn.Module:
    """Make the network: the same in every run."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10)).double()


def errors(source: object, start: int, **options: object) -> str:
    """Write the closure errors of the window from a step to the end."""
    closure = ntkscope.analyze(source, window=(start, NUM_STEPS), audit=False, **options).closure  # pyright: ignore[reportArgumentType]
    return f"energy {closure.energy_error:6.2%} gradient {closure.gradient_error:6.2%}"


def main() -> None:
    """Print one line for every optimizer and spacing of checkpoints."""
    images, labels = load_digits(return_X_y=True)
    data = torch.tensor(images[:30] / 16), torch.tensor(labels[:30])
    for name, make_optimizer in OPTIMIZERS.items():
        for spacing in SPACINGS:
            model = make()
            optimizer = make_optimizer(model.parameters())
            recorder = ntkscope.Recorder(model, data, loss="cross_entropy", schedule=spacing, drift=None)
            recorder.attach(optimizer)
            with TemporaryDirectory() as folder:
                paths = []
                for step in range(NUM_STEPS + 1):
                    if step % spacing == 0:
                        paths.append(Path(folder) / f"step{step}.pt")
                        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, paths[-1])
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(data[0]), data[1]).backward()
                    if step < NUM_STEPS:
                        optimizer.step()
                bare = {"model": make(), "data": data, "loss": "cross_entropy"}
                print(
                    f"{name:10s} every {spacing:2d}  recorder: {errors(recorder, 0)}  borrowed: {errors(paths, 0, **bare)}  "
                    f"without step 0: {errors(paths[1:], spacing, **bare)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
