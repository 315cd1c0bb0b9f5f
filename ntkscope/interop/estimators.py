"""The NTK in scikit-learn: a kernel for estimators that take one, a transformer for those that take it precomputed."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkscope._checks import InputError
from ntkscope._types import ForwardFn, KernelOutputs
from ntkscope.kernel.gram import ntk_gram
from ntkscope.kernel.precond import Precond

try:
    from sklearn.base import BaseEstimator, TransformerMixin
    from sklearn.gaussian_process.kernels import Kernel
    from sklearn.utils.validation import check_is_fitted
except ImportError as error:
    raise ImportError("ntkscope.interop.estimators needs scikit-learn: pip install 'ntkscope[interop]'.") from error

DIAGONAL_BLOCK = 64  # examples whose kernel is computed to read its diagonal


class NTKKernel(Kernel):
    """The empirical NTK of a model as it is, as a kernel of `sklearn.gaussian_process`.

        SVC(kernel=NTKKernel(model)).fit(x, y)                         # also KernelRidge, KernelPCA, Nystroem, ...
        GaussianProcessRegressor(ConstantKernel() * NTKKernel(model) + WhiteKernel()).fit(x, y)

    It has no hyperparameters, and copies that scikit-learn makes of it share the model, whose weights are never changed.

    Args:
        model: Any module whose output rows depend on their own input row only.
        outputs: "trace" (summed over outputs), "sum" or "class=k": the kinds with one row per example.
        precond: Diagonal of M by parameter name, as for `ntk_gram`; identity if not given.
        params: Names of the parameters to take; all with `requires_grad` if not given.
        forward_fn: The model's call, `forward_fn(model, batch)`, where it is not `model(batch)`.
        shape: Shape of one example, where estimators see it flattened: `(1, 28, 28)`.
        max_memory: Bytes, as for `ntk_gram`.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> NTKKernel(model)(np.eye(2), 3 * np.eye(2))  # a linear model's kernel is x xᵀ
        array([[3., 0.],
               [0., 3.]])

    Source:
        theory.md section 1.
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: KernelOutputs = "trace",
        precond: Precond | None = None,
        params: Iterable[str] | None = None,
        forward_fn: ForwardFn | None = None,
        shape: Sequence[int] | None = None,
        max_memory: int | None = None,
    ) -> None:
        self.model = model
        self.outputs = outputs
        self.precond = precond
        self.params = params
        self.forward_fn = forward_fn
        self.shape = shape
        self.max_memory = max_memory

    def __sklearn_clone__(self) -> "NTKKernel":
        """Copy for cross-validation: parameters of the estimator, and the same model."""
        return NTKKernel(**self.get_params(deep=False))

    def __call__(self, X: Any, Y: Any = None, eval_gradient: bool = False) -> Any:
        """Compute the kernel.

        Args:
            X: n examples, an array or a tensor.
            Y: n' examples; X itself if not given.
            eval_gradient: Whether to return the gradient in the hyperparameters, too, of which there are none.

        Returns:
            Kernel, float64, (n, n'); with `eval_gradient` also an empty array (n, n, 0).

        Raises:
            InputError: If the kind has no row per example, or `ntk_gram` refuses the input.
        """
        if self.outputs in ("full", "loss"):
            raise InputError(f"Estimators take one row per example: 'trace', 'sum' or 'class=k', got outputs={self.outputs!r}.")
        other = None if Y is None or Y is X else self._batch(Y)
        gram = ntk_gram(
            self.model,
            self._batch(X),
            other,
            outputs=self.outputs,
            precond=self.precond,
            params=self.params,
            forward_fn=self.forward_fn,
            max_memory=self.max_memory,
        )
        kernel = np.asarray(gram, dtype=np.float64)
        return (kernel, np.empty((*kernel.shape, 0))) if eval_gradient else kernel

    def diag(self, X: Any) -> Any:
        """Compute the diagonal without the whole kernel.

        Args:
            X: n examples.

        Returns:
            (n,), float64.
        """
        parts = (X[start : start + DIAGONAL_BLOCK] for start in range(0, len(X), DIAGONAL_BLOCK))
        return np.concatenate([np.diagonal(self(part)) for part in parts])

    def is_stationary(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - typed by a base class that raises
        """Say whether the kernel depends on differences of inputs alone: it does not."""
        return False

    def __repr__(self) -> str:
        """Write the model's class and the kind."""
        return f"NTKKernel({type(self.model).__name__}, outputs={self.outputs!r})"

    def _batch(self, examples: Any) -> Tensor:
        """Put examples into the precision of the model, unless they are whole numbers, and into their shape."""
        batch = torch.as_tensor(examples)
        if batch.is_floating_point():
            batch = batch.to(next((p.dtype for p in self.model.parameters() if p.is_floating_point()), batch.dtype))
        return batch if self.shape is None else batch.reshape(len(batch), *self.shape)


class NTKFeatures(TransformerMixin, BaseEstimator):
    """Turns examples into their kernel with the training examples, for estimators with `kernel="precomputed"`.

        make_pipeline(NTKFeatures(NTKKernel(model)), SVC(kernel="precomputed"))

    It takes examples, so that cross-validation and grid search split them before any kernel is computed. `fit_transform` gives the kernel
    of the training set with itself, exactly symmetric.

    Args:
        kernel: The kernel.

    Attributes:
        inputs_: The training examples.
    """

    def __init__(self, kernel: NTKKernel) -> None:
        self.kernel = kernel

    def fit(self, X: Any, y: Any = None) -> "NTKFeatures":
        """Keep the training examples.

        Args:
            X: n examples, an array or a tensor of any shape.
            y: Not used.

        Returns:
            Itself.
        """
        self.inputs_ = X
        return self

    def transform(self, X: Any) -> Any:
        """Compute the kernel with the training examples.

        Args:
            X: n' examples.

        Returns:
            (n', n), float64: as `fit` and `predict` of estimators with a precomputed kernel expect it.

        Raises:
            NotFittedError: If there are no training examples yet.
        """
        check_is_fitted(self)
        return self.kernel(X, self.inputs_)
