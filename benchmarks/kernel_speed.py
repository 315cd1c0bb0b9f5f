"""`make bench`: ntk_gram against the contraction of torch.func's Jacobian, both sides in one run, median of several."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import ntkscope

NUM_EXAMPLES = 128
REPEATS = 3


def contraction(model: nn.Module, inputs: Tensor) -> Tensor:
    """Compute the kernel as torch.func's tutorial does: per-example Jacobians, contracted parameter by parameter."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def outputs(parameters: dict[str, Tensor], example: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (example.unsqueeze(0),)).squeeze(0)

    jacobian = torch.func.vmap(torch.func.jacrev(outputs), (None, 0))(parameters, inputs)
    blocks = [block.flatten(2) for block in jacobian.values()]
    return torch.stack([torch.einsum("icp,jdp->icjd", block, block) for block in blocks]).sum(0)


def seconds(function: Callable[[], object], repeats: int = REPEATS) -> float:
    """Measure the median time of a call, after one call to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Print the comparison."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    inputs = torch.randn(NUM_EXAMPLES, 784)
    fast, slow = ntkscope.ntk_gram(model, inputs).matrix, contraction(model, inputs).reshape(NUM_EXAMPLES * 10, -1)
    error = float((fast - slow).abs().max() / slow.abs().max())
    ours, theirs = seconds(lambda: ntkscope.ntk_gram(model, inputs)), seconds(lambda: contraction(model, inputs))
    print(f"MLP 784-512-512-10, n = {NUM_EXAMPLES}, full kernel, float32, {torch.get_num_threads()} threads, median of {REPEATS}")
    print(f"  ntk_gram                         {ours:8.4f} s")
    print(f"  torch.func Jacobian contraction  {theirs:8.4f} s")
    print(f"  ratio {theirs / ours:.0f}x, largest relative difference {error:.1e}")


if __name__ == "__main__":
    main()
