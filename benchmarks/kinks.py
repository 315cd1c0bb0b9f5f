"""Why long windows of ReLU networks do not close: the kernel taken at every single step, float64, digits. `python -m benchmarks.kinks`.

Three ways to carry the output gradient from step to step, each from its own prediction:

- trapezoid: ½(K_t + K_{t+1}), the densest a record could be;
- left: the kernel a quarter of a step earlier, where gradient descent takes its gradient;
- midpoint: ½(J_t + J_{t+1}) J_tᵀ, not symmetric: what the outputs do, but for what happens inside the step.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from benchmarks.digits_runs import encode
from ntkscope.experiments.demo import NUM_PIXELS, OUTPUT_SCALE, load_digits_data

NUM_EXAMPLES, WIDTH, HORIZON = 20, 32, 100.0  # optimizer time
CASES = ((nn.ReLU, 0.2), (nn.ReLU, 0.05), (nn.GELU, 0.2), (nn.Tanh, 0.2))


def follow(activation: type[nn.Module], lr: float) -> dict[str, float]:
    """Train by full-batch gradient descent, and return the closure error of each way at the end."""
    data = load_digits_data(NUM_EXAMPLES, 0.2, 0)
    inputs, targets = data.inputs.double(), encode(data.labels, "squared").double().flatten()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(NUM_PIXELS, WIDTH), activation(), nn.Linear(WIDTH, 10)).double()
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter.mul_(OUTPUT_SCALE)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (inputs,)).flatten()

    def jacobian(parameters: dict[str, Tensor]) -> Tensor:
        parts = jacrev(outputs)(parameters)
        return torch.cat([parts[name].flatten(1) for name in parameters], dim=1)

    here = jacobian(weights)
    start = (outputs(weights) - targets) / NUM_EXAMPLES
    carried = {"trapezoid": start.clone(), "left": start.clone(), "midpoint": start.clone()}
    for _ in range(round(HORIZON / lr)):
        gradient = (outputs(weights) - targets) / NUM_EXAMPLES
        update = (here.T @ gradient).split([value.numel() for value in weights.values()])
        weights = {name: value - lr * part.view_as(value) for (name, value), part in zip(weights.items(), update, strict=True)}
        there = jacobian(weights)
        before, after = here @ here.T, there @ there.T
        for name, kernel in (
            ("trapezoid", 0.5 * (before + after)),
            ("left", before + 0.25 * (after - before)),
            ("midpoint", 0.5 * (here + there) @ here.T),
        ):
            carried[name] = carried[name] - lr * kernel @ carried[name] / NUM_EXAMPLES
        here = there
    end = (outputs(weights) - targets) / NUM_EXAMPLES
    return {name: float((value - end).norm() / end.norm()) for name, value in carried.items()}


def main() -> None:
    """Print one line a case."""
    for activation, lr in CASES:
        found = follow(activation, lr)
        print(f"{activation.__name__:5s} lr {lr:4.2f}  " + "  ".join(f"{name} {error:.2%}" for name, error in found.items()), flush=True)


if __name__ == "__main__":
    main()
