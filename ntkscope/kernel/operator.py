"""The kernel as a linear operator: K v = J M (J'ᵀ v), one backward pass and one forward-mode pass, no matrix."""

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn

from ntkscope._checks import InputError, InputTypeError, check_finite, check_memory
from ntkscope._display import Displayed
from ntkscope._types import ForwardFn, KernelOutputs, LossFn
from ntkscope.kernel.batch import count_examples, take
from ntkscope.kernel.blocks import DEFAULT_MEMORY
from ntkscope.kernel.capture import undisturbed
from ntkscope.kernel.model import select_parameters, working_dtype
from ntkscope.kernel.precond import Precond, check_precond
from ntkscope.kernel.product_routes import choose_routes, ends
from ntkscope.kernel.products import JvpMethod, RowFunction, Tangents, pull, push
from ntkscope.kernel.readout import check_kind, check_targets, make_readout
from ntkscope.kernel.rows import check_rows_are_functions, first_rows, saved_bytes
from ntkscope.kernel.top_eig import EigSolver, TopEigenpairs, top_eigenpairs

LARGEST_CHUNK = 64  # vectors; with more, a pass costs as much a vector, and activations of fewer examples fit


class NTKOperator(Displayed, LinearOperator):
    """The empirical NTK K = J M J'ᵀ as a linear operator, (N, N'), without the matrix or the Jacobians.

    A `scipy.sparse.linalg.LinearOperator` on arrays, and a callable on torch tensors that stays on their device. The model is run
    in evaluation mode and left as found. Its weights are those at the time of a product.

    Args:
        model: Any module whose output rows depend on their own input row only.
        inputs: Batch of the rows, n examples.
        other: Batch of the columns, n' examples; `inputs` itself if not given.
        outputs: Kind of the kernel: "full", "trace" (C products each), "sum", "class=k" or "loss".
        precond: Diagonal of M: parameter name to a nonnegative tensor shaped as the parameter, or to one number; copied. Identity
            if not given.
        params: Names of the parameters to take; all with `requires_grad` if not given.
        forward_fn: The model's call, `forward_fn(model, batch)`, where it is not `model(batch)`.
        targets: For outputs="loss": targets of `inputs`.
        other_targets: For outputs="loss": targets of `other`.
        loss: For outputs="loss": its name, or a callable `(outputs, targets) -> scalar`.
        max_memory: Bytes for activations and for vectors of parameters; 2 GiB if not given. With less, examples and vectors are
            taken in blocks, at the least one of each.

    Attributes:
        outputs: The kind.
        num_examples: n.
        num_classes: Numbers differentiated per example: C for "full" and "trace", else 1.
        is_symmetric: Whether rows and columns are the same examples.
        jvp_route: How products with J are taken: "forward" (forward-mode AD) or "double backward".
        jvp_reason: Why it is not forward-mode AD; empty if it is.

    Raises:
        InputError: If a batch is empty, rows depend on one another, a weight is not finite, or an argument does not fit.
        InputTypeError: If the model's output is no floating-point tensor.
        UnsupportedError: If no trained parameter reaches the output, or products with J cannot be had.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> op = NTKOperator(model, torch.eye(2))
        >>> op(torch.tensor([1.0, 2.0]))  # a linear model's kernel is x xᵀ
        tensor([1., 2.])

    Source:
        theory.md section 1. NTK-vector products as in Novak et al. 2022, Fast Finite Width Neural Tangent Kernel.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        other: Any = None,
        *,
        outputs: KernelOutputs = "full",
        precond: Precond | None = None,
        params: Iterable[str] | None = None,
        forward_fn: ForwardFn | None = None,
        targets: Any = None,
        other_targets: Any = None,
        loss: str | LossFn | nn.Module | None = None,
        max_memory: int | None = None,
    ) -> None:
        check_kind(outputs)
        check_targets(outputs, other=other, targets=targets, other_targets=other_targets, loss=loss)
        self._budget = check_memory(max_memory, DEFAULT_MEMORY)
        parameters = select_parameters(model, params)
        self._function = RowFunction(model, make_readout(outputs, forward_fn=forward_fn, loss=loss), parameters)
        self._working = working_dtype(parameters)
        checked = None if precond is None else check_precond(precond, parameters)
        self._precond = None if checked is None else [
            torch.as_tensor(checked[name]).to(parameter.device, self._working, copy=True) for name, parameter in parameters.items()
        ]  # fmt: skip
        pair_up = outputs == "loss"
        self._rows = (inputs, targets) if pair_up else inputs
        self._columns = self._rows if other is None else ((other, other_targets) if pair_up else other)
        self._num_rows, self._num_columns = count_examples(self._rows), count_examples(self._columns)
        with undisturbed(model):
            pair = ends(self._rows)
            probe = first_rows(pair, self._function.rows)
            check_rows_are_functions(model, pair, probe, self._function.rows)
            self._bytes_per_example = saved_bytes(model, pair, self._function.rows)
            with torch.no_grad():
                width = probe.shape[1] if other is None else self._function.rows(ends(self._columns)).shape[1]
            self._routes = choose_routes(self._function, pair)
        if width != probe.shape[1]:
            raise InputError(f"The model has {probe.shape[1]} outputs on `inputs`, but {width} on `other`. Give both the same shape.")
        self._device = probe.device
        self.outputs, self.num_classes, self.is_symmetric = outputs, width, other is None
        self.num_examples = self._num_rows
        per_example = 1 if outputs == "trace" else width
        shape = (self._num_rows * per_example, self._num_columns * per_example)
        super().__init__(np.dtype(str(self._working).removeprefix("torch.")), shape)

    @property
    def jvp_route(self) -> JvpMethod:
        """How products with J are taken."""
        return self._routes.method

    @property
    def jvp_reason(self) -> str:
        """Why they are not taken by forward-mode AD; empty if they are."""
        return self._routes.reason

    def __call__(self, x: Any) -> Any:
        """Apply K to a tensor of shape (N') or (N', k) on the model's device; to anything else as `op @ x` does."""
        if not isinstance(x, Tensor):
            return super().__call__(x)
        if x.ndim not in (1, 2) or x.shape[0] != self.shape[1]:
            raise InputError(f"The operator is {self.shape[0]} x {self.shape[1]}: it takes ({self.shape[1]},) or ({self.shape[1]}, k), "
                             f"got shape {tuple(x.shape)}.")  # fmt: skip
        if x.is_complex():
            raise InputTypeError("The operator is real, got complex vectors. Apply it to their real and imaginary parts.")
        if x.device != self._device:
            raise InputError(f"The model is on {self._device}, the vectors on {x.device}. Move them with `.to({str(self._device)!r})`.")
        vectors = x.detach().to(self._working).reshape(len(x), -1)
        product = self._apply_trace(vectors) if self.outputs == "trace" else self._apply_full(vectors)
        check_finite("The product K v", product, "Check the vectors; if they are finite, activations overflow: use float64.")
        return product.reshape(self.shape[0], *x.shape[1:])

    def dot(self, x: Any) -> Any:
        """Apply K (`op @ x`), or compose it with a number or another operator.

        Args:
            x: Array or tensor, (N') or (N', k); a number; or a LinearOperator.

        Returns:
            What `x` is: array, tensor or operator.
        """
        return self(x) if isinstance(x, Tensor) else super().dot(x)

    def top(self, k: int, *, solver: EigSolver = "eigsh", tolerance: float | None = None, seed: int = 0) -> TopEigenpairs:
        """Find the k largest eigenpairs; arguments as for `top_eigenpairs`.

        Args:
            k: How many. "eigsh" needs k < N, "lobpcg" 5 k <= N.
            solver: "eigsh" takes one vector at a time and needs the fewest products; "lobpcg" takes k at once.
            tolerance: Largest residual ‖K v − λ v‖ / λ_1; 1e-8 for float64 and 1e-4 for float32 if not given.
            seed: Of the starting vectors.

        Returns:
            The eigenpairs.

        Raises:
            InputError: If this is a cross kernel, an argument does not fit, or the solver does not converge.
        """
        if not self.is_symmetric:
            raise InputError("A cross kernel (`other` given) has no eigenpairs. Leave `other` out, or use scipy.sparse.linalg.svds(op, k).")
        return top_eigenpairs(self, k, solver=solver, tolerance=tolerance, seed=seed)

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        if np.iscomplexobj(X):
            raise InputTypeError("The operator is real, got complex vectors. Apply it to their real and imaginary parts.")
        return self(torch.tensor(np.ascontiguousarray(X), dtype=self._working, device=self._device)).cpu().numpy()

    def _adjoint(self) -> "NTKOperator":  # pyright: ignore[reportIncompatibleMethodOverride]
        """K' M K with the batches exchanged; it is real, so that the transpose is the same."""
        if self.is_symmetric:
            return self
        flipped = copy.copy(self)
        flipped._rows, flipped._columns = self._columns, self._rows
        flipped._num_rows, flipped._num_columns = self._num_columns, self._num_rows
        flipped.num_examples, flipped.shape = self._num_columns, self.shape[::-1]
        return flipped

    _transpose = _adjoint  # pyright: ignore[reportAssignmentType]

    def _apply_trace(self, vectors: Float[Tensor, "columns k"]) -> Float[Tensor, "rows k"]:
        """Σ_c S_cᵀ K S_c v of the full K, where S_c v puts v in the places of class c; classes in groups that make full chunks."""
        k, num_classes = vectors.shape[1], self.num_classes
        product = vectors.new_zeros(self._num_rows, k)
        group = max(1, self._chunk_size(num_classes * k) // k)
        for start in range(0, num_classes, group):
            classes = torch.arange(start, min(start + group, num_classes), device=vectors.device)
            order = classes - start
            spread = vectors.new_zeros(self._num_columns, num_classes, len(classes), k)
            spread[:, classes, order] = vectors[:, None, :]
            image = self._apply_full(spread.reshape(self._num_columns * num_classes, -1))
            product += image.reshape(self._num_rows, num_classes, len(classes), k)[:, classes, order].sum(dim=1)
        return product

    def _apply_full(self, vectors: Float[Tensor, "columns k"]) -> Float[Tensor, "rows k"]:
        """Jᵀv over blocks of columns, M, then J t over blocks of rows; vectors in chunks."""
        product = vectors.new_empty(self._num_rows * self.num_classes, vectors.shape[1])
        chunk = self._chunk_size(vectors.shape[1])
        with undisturbed(self._function.model):
            for start in range(0, vectors.shape[1], chunk):
                part = slice(start, start + chunk)
                tangents = self._pull(vectors[:, part].T)
                for tangent, weight in zip(tangents, self._precond or [], strict=self._precond is not None):
                    tangent *= weight
                product[:, part] = self._push(tangents).T
        return product

    def _pull(self, vectors: Float[Tensor, "k columns"]) -> Tangents:
        cotangents = vectors.reshape(len(vectors), self._num_columns, self.num_classes)
        total: Tangents | None = None
        for block in self._blocks(self._num_columns, len(vectors)):
            grads = pull(self._function, take(self._columns, block), cotangents[:, block], self._routes.vjp)
            grads = [grad.to(self._working) for grad in grads]
            if total is None:
                total = grads
                continue
            for so_far, grad in zip(total, grads, strict=True):
                so_far += grad
        assert total is not None  # a batch has at least one example
        return total

    def _push(self, tangents: Tangents) -> Float[Tensor, "k rows"]:
        images = [
            push(self._function, take(self._rows, block), tangents, self._routes.jvp, self._routes.method)
            for block in self._blocks(self._num_rows, len(tangents[0]))
        ]
        return torch.cat(images, dim=1).to(self._working).flatten(1)

    def _chunk_size(self, num_vectors: int) -> int:
        """Vectors taken at once: half the memory for three vectors of parameters each, half for activations."""
        size = sum(parameter.numel() for parameter in self._function.parameters.values()) * torch.finfo(self._working).bits // 8
        fitting = min(self._budget // 2 // (3 * size), self._budget // 2 // self._bytes_per_example - 1)
        return max(1, min(num_vectors, fitting, LARGEST_CHUNK))

    def _blocks(self, num_examples: int, num_vectors: int) -> list[slice]:
        """Examples taken at once: activations of the model, and as much again for each vector."""
        step = max(1, self._budget // 2 // (self._bytes_per_example * (1 + num_vectors)))
        return [slice(start, start + step) for start in range(0, num_examples, step)]
