"""The front door of the kernel engine."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ntkscope._checks import InputError, check_choice, check_device, check_finite, check_memory
from ntkscope._display import Displayed, gram_to_dataset
from ntkscope._types import BatchNormMode, ForwardFn, GramMethod, KernelOutputs, LossFn
from ntkscope.kernel.batch import count_examples, take, to_device
from ntkscope.kernel.blocks import DEFAULT_MEMORY, blockwise_grams, complete
from ntkscope.kernel.capture import batch_norm_statistics, full_precision, undisturbed
from ntkscope.kernel.coverage import Coverage, probe_routes
from ntkscope.kernel.model import check_module, forward_rows
from ntkscope.kernel.precond import Precond, check_precond
from ntkscope.kernel.ranks import Ranks
from ntkscope.kernel.readout import check_kind, check_targets, make_readout

ACCUMULATE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Gram(Displayed):
    """An empirical NTK Gram matrix.

    Attributes:
        matrix: "full": `(n C, n' C)`, output (i, c) at i * C + c. All other kinds: `(n, n')`. "trace": the sum over c of the full
            kernel's (i, c), (j, c) entries. "sum": of the gradients of Σ_c u_c (not the trace). "class=k": of output k. "loss": of the
            per-example loss gradients.
        num_examples: n, rows' examples.
        num_classes: C, outputs per example.
        outputs: The kind.
        coverage: Route of every parameter.
        by_layer: Kernels by module name that add up to `matrix`; None unless asked for.
    """

    matrix: Float[Tensor, "rows columns"]
    num_examples: int
    num_classes: int
    outputs: KernelOutputs
    coverage: Coverage
    by_layer: dict[str, Float[Tensor, "rows columns"]] | None = field(default=None)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Give the matrix to numpy, so that SciPy and scikit-learn take a kernel as it is."""
        array = self.matrix.detach().cpu().numpy()
        # numpy 1 knows no copy=None, and asks for no other; with copy=False numpy 2 refuses what needs one, as its protocol asks.
        return np.asarray(array, dtype=dtype) if copy is None else np.array(array, dtype=dtype, copy=copy)

    def to_xarray(self, *, examples: Sequence[Any] | None = None, others: Sequence[Any] | None = None) -> Any:
        """Turn into an `xarray.Dataset` whose `kernel` has the dimensions example and example_, for "full" also output and output_.

            gram.to_xarray(examples=ids).kernel.sel(example="a", example_="b")

        Args:
            examples: Names of the rows' examples; 0, 1, ... if not given.
            others: Names of the columns' examples; if not given, those of the rows where the kernel is symmetric, else 0, 1, ...

        Returns:
            The dataset; with `by_layer` also `kernel_by_layer`.

        Raises:
            InputError: If there are not as many names as examples.
            UnsupportedError: If xarray is not installed.
        """
        return gram_to_dataset(self, examples, others)


def ntk_gram(
    model: nn.Module,
    inputs: Any,
    other: Any = None,
    *,
    outputs: KernelOutputs = "full",
    precond: Precond | None = None,
    params: Iterable[str] | None = None,
    forward_fn: ForwardFn | None = None,
    method: GramMethod = "auto",
    bn: BatchNormMode = "eval",
    targets: Any = None,
    other_targets: Any = None,
    loss: str | LossFn | nn.Module | None = None,
    by_layer: bool = False,
    max_memory: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    distributed: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Gram:
    """Compute the empirical NTK J M Jᵀ exactly.

    The model is run in evaluation mode and left as found: parameters, buffers, modes, `.grad` and random state bit for bit.

    Args:
        model: Any module whose output rows depend on their own input row only.
        inputs: Batch of n examples: a tensor, or tuples, lists and dicts of tensors, examples on the first axis.
        other: Second batch of n' examples, for the cross kernel `J(inputs) M J(other)ᵀ`; `inputs` itself if not given.
        outputs: "full", "trace", "sum", "class=k" or "loss" (see `Gram.matrix`).
        precond: Diagonal of M: parameter name to a nonnegative tensor shaped as the parameter, or to one number. Identity if
            not given.
        params: Names of the parameters to take; all with `requires_grad` if not given.
        forward_fn: The model's call, `forward_fn(model, batch)`, where it is not `model(batch)`.
        method: "auto" takes layer rules where they are exact; "autograd" differentiates every row (slow).
        bn: "eval" normalizes with BatchNorm's running statistics; "batch" with those of `inputs`, held fixed.
        targets: For "loss": targets of `inputs`, examples on the first axis.
        other_targets: For "loss": targets of `other`.
        loss: For "loss": "squared", "mse", "cross_entropy", or a callable `(outputs, targets) -> scalar`, called with one example.
        by_layer: Also return one kernel per module that owns parameters; they add up to the whole.
        max_memory: Bytes for Jacobian factors and result together; 2 GiB if not given. With less, examples are taken in blocks and
            some work is done twice.
        device: Where to compute; a copy of the model is moved there if it is elsewhere.
        dtype: In which sums over chunks are taken: float32 or float64. Not given: products in the model's precision (float32 for
            half-precision models), their sums in float64. Given float64, factors and result are float64, too.
        distributed: Share the work among the ranks of an initialized `torch.distributed`, each of which must make the same call;
            all get the same matrix.
        progress: Called with (blocks done, blocks in all).

    Returns:
        The kernel and its coverage.

    Raises:
        InputError: If the batch is empty, rows depend on one another, a weight or the kernel is not finite, `precond` does not
            fit, the result does not fit in `max_memory`, or ranks disagree or are lost.
        InputTypeError: If the model's output is no floating-point tensor.
        UnsupportedError: If no trained parameter reaches the output.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> ntk_gram(model, torch.eye(2)).matrix  # a linear model's kernel is x xᵀ
        tensor([[1., 0.],
                [0., 1.]])

    Source:
        theory.md section 1; Jacot et al. 2018. Memory is O(N² + factors); the N x p Jacobian is never formed for layers with a rule.
    """
    check_module(model)
    check_kind(outputs)
    check_targets(outputs, other=other, targets=targets, other_targets=other_targets, loss=loss)
    budget = check_memory(max_memory, DEFAULT_MEMORY)
    check_choice("method", method, get_args(GramMethod))
    check_choice("bn", bn, get_args(BatchNormMode))
    if dtype is not None and dtype not in ACCUMULATE:
        raise InputError(f"`dtype` must be torch.float32 or torch.float64, got {dtype}: sums of a kernel need the precision.")
    check_device(device)
    if device is not None:
        model = _on_device(model, torch.device(device))
    home = next((parameter.device for parameter in model.parameters()), None)
    batch, columns = (
        _complete(part, own_targets, outputs, name)
        for part, own_targets, name in ((inputs, targets, "targets"), (other, other_targets, "other_targets"))
    )
    num_examples = count_examples(batch)
    if home is not None:
        batch, columns = to_device(batch, home), None if columns is None else to_device(columns, home)
    readout = make_readout(outputs, forward_fn=forward_fn, loss=loss)
    ranks = Ranks.here(enabled=distributed)
    with full_precision(), batch_norm_statistics(model, bn, lambda: readout(model, batch)):
        routes, coverage = probe_routes(model, batch, params=params, forward_fn=readout, method=method, budget=budget)
        if dtype is torch.float64:
            routes = routes.with_dtype(torch.float64)
        checked = None if precond is None else check_precond(precond, routes.parameters)
        ranks.check_same_call(routes.parameters, batch, columns)
        groups = _layers(routes.parameters) if by_layer else {"": None}
        with undisturbed(model), ranks.failing_together():
            totals = blockwise_grams(
                model,
                batch,
                columns,
                routes=routes,
                coverage=coverage,
                outputs=outputs,
                precond=checked,
                budget=budget,
                progress=progress,
                accumulate=torch.float64 if dtype is None else dtype,
                groups=groups,
                part=ranks.part,
            )
        for total in totals.values():
            ranks.add_up(total)
        num_classes = coverage.num_classes
        if outputs not in ("full", "trace"):  # the readout has one output
            with undisturbed(model), torch.no_grad():
                num_classes = forward_rows(model, take(batch[0] if outputs == "loss" else batch, slice(0, 1)), forward_fn).shape[1]
    layers = {name: complete(total, routes.dtype, is_symmetric=other is None) for name, total in totals.items()}
    matrix = torch.stack(list(layers.values())).sum(dim=0) if by_layer else layers[""]
    check_finite("The kernel", matrix, "The weights are finite, so activations overflow: check the inputs, or use float64.")
    return Gram(matrix, num_examples, num_classes, outputs, coverage, layers if by_layer else None)


def _on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Copy a model to a device, unless it is there."""
    place = torch.empty(0, device=device).device  # "cuda" is "cuda:0"
    if all(tensor.device == place for tensor in (*model.parameters(), *model.buffers())):
        return model
    return copy.deepcopy(model).to(device)


def _complete(batch: Any, targets: Any, outputs: KernelOutputs, name: str) -> Any:
    """Join inputs and targets where the kind needs both."""
    if outputs != "loss" or batch is None:
        return batch
    if count_examples(batch) != count_examples(targets):
        raise InputError(f"`{name}` must have one entry per example, got {count_examples(targets)} for {count_examples(batch)} examples.")
    return batch, targets


def _layers(parameters: Iterable[str]) -> dict[str, frozenset[str]]:
    """Group parameters by the module that owns them ("" for the model itself)."""
    groups: dict[str, set[str]] = {}
    for name in parameters:
        groups.setdefault(name.rpartition(".")[0], set()).add(name)
    return {layer: frozenset(names) for layer, names in groups.items()}
