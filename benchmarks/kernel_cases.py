"""What the kernel benchmarks compare: `ntk_gram`, and the contraction of torch.func's per-example Jacobians.

A case says how much faster and smaller `ntk_gram` must be. For "trace" and "class=k" the other side is still the full contraction.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ntkscope
from benchmarks.kernel_models import NUM_CLASSES, MakeCase, make_cnn, make_minilm, make_mlp, make_resnet18, make_transformer


@dataclass(frozen=True)
class Case:
    """One line of the comparison.

    Attributes:
        name: For the command line.
        title: For the reader.
        make: Model and inputs from the number of examples.
        num_examples: n.
        outputs: As for `ntk_gram`.
        weighted: Whether M is Adam-like (`random_precond`), else the identity.
        asked_speed: The contraction's time over ours, at least; None where the contraction does not fit in memory.
        asked_share: Our memory over the contraction's, at most; None if not asked.
        asked_peak: Peak resident memory of our process in GiB, less than this; None if not asked.
        rate: Whether the contraction over parameters bounds the time, so that its rate is worth printing.
    """

    name: str
    title: str
    make: MakeCase
    num_examples: int
    outputs: str = "full"
    weighted: bool = False
    asked_speed: float | None = None
    asked_share: float | None = None
    asked_peak: float | None = None
    rate: bool = False


CASES = (
    Case("mlp", "MLP 784-512-512-10", make_mlp, 128, asked_speed=100, asked_share=1 / 20),
    Case("mlp-256", "MLP 784-512-512-10", make_mlp, 256, asked_speed=150),
    Case("mlp-adam", "MLP, Adam's M", make_mlp, 128, weighted=True, asked_speed=2, asked_share=1 / 10),
    Case("cnn", "CNN 16-32-64", make_cnn, 128, asked_speed=2.5, asked_share=1 / 4, rate=True),
    Case("transformer", "Transformer encoder", make_transformer, 64, asked_speed=1.5, asked_share=1 / 4, rate=True),
    Case("transformer-trace", "Transformer encoder", make_transformer, 64, outputs="trace", asked_speed=2.5),
    Case("transformer-class", "Transformer encoder", make_transformer, 64, outputs="class=3", asked_speed=10),
    Case("resnet18", "ResNet-18, 32 x 32", make_resnet18, 64, asked_peak=8),
    Case("minilm", "all-MiniLM-L6-v2", make_minilm, 32, asked_peak=10),
)
BY_NAME = {case.name: case for case in CASES}


def random_precond(model: nn.Module) -> dict[str, Tensor]:
    """Draw M as Adam's: positive, log-uniform over 4 decades, different for every entry of a parameter."""
    generator = torch.Generator().manual_seed(1)
    return {name: 10 ** (4 * torch.rand(value.shape, generator=generator) - 2) for name, value in model.named_parameters()}


def contract_jacobian(model: nn.Module, inputs: Tensor, precond: dict[str, Tensor] | None) -> Tensor:
    """Compute J M Jᵀ, (N, N), as torch.func's tutorial does: per-example Jacobians, contracted parameter by parameter.

    It is given every advantage we know: blocks are freed as they are used, and √M scales the one Jacobian in place.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def outputs(parameters: dict[str, Tensor], example: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (example.unsqueeze(0),)).squeeze(0)

    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no batching rule: vmap would run it example by example, slowly
        jacobian = torch.func.vmap(torch.func.jacrev(outputs), (None, 0))(parameters, inputs)
    num_rows = len(inputs) * NUM_CLASSES
    kernel = torch.zeros(num_rows, num_rows)
    for name in parameters:
        block = jacobian.pop(name).flatten(2).contiguous()  # [n, C, parameter entries]
        if precond is not None:
            block.mul_(precond[name].sqrt().flatten())
        kernel += torch.einsum("icp,jdp->icjd", block, block).reshape(num_rows, num_rows)
    return kernel


def read_kind(kernel: Tensor, outputs: str) -> Tensor:
    """Reduce the full kernel (N, N) to the kind `outputs`."""
    blocks = kernel.reshape(-1, NUM_CLASSES, len(kernel) // NUM_CLASSES, NUM_CLASSES)
    if outputs == "trace":
        return torch.einsum("icjc->ij", blocks)
    if outputs.startswith("class="):
        index = int(outputs.removeprefix("class="))
        return blocks[:, index, :, index]
    return kernel


def prepare(case: Case, side: str, num_examples: int | None = None) -> tuple[Callable[[Any], Tensor], Any]:
    """Build a case's model and inputs, and the function of the inputs that computes one side's kernel.

    Args:
        case: The case.
        side: "ours" or "contraction".
        num_examples: n, if not the case's own.

    Returns:
        The function and the inputs. "contraction" returns the full kernel for every kind.
    """
    model, inputs = case.make(num_examples or case.num_examples)
    precond = random_precond(model) if case.weighted else None
    if side == "contraction":
        return lambda batch: contract_jacobian(model, batch, precond), inputs
    return lambda batch: ntkscope.ntk_gram(model, batch, outputs=case.outputs, precond=precond).matrix, inputs


def first(inputs: Any, num: int) -> Any:
    """Take the first `num` examples of a tensor or a dict of tensors."""
    return {name: value[:num] for name, value in inputs.items()} if isinstance(inputs, dict) else inputs[:num]
