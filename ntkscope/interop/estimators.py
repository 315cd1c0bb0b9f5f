"""The NTK in scikit-learn: a kernel for estimators that take one, a transformer for those that take it precomputed."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from torch import Tensor, nn

from ntkscope._checks import InputError, InputTypeError
from ntkscope._types import ForwardFn, KernelOutputs
from ntkscope.kernel.gram import ntk_gram
from ntkscope.kernel.model import check_module
from ntkscope.kernel.precond import Precond

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
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
        params: Sequence[str] | None = None,
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
        return type(self)(**self.get_params(deep=False))

    def __call__(self, X: Any, Y: Any = None, eval_gradient: bool = False) -> Any:
        """Compute the kernel.

        Args:
            X: n examples: an array, a tensor, a data frame or lists.
            Y: n' examples; X itself if not given.
            eval_gradient: Whether to return the gradient in the hyperparameters, too, of which there are none.

        Returns:
            Kernel, float64, (n, n'); with `eval_gradient` also an empty array (n, n, 0).

        Raises:
            InputError: If the kind has no row per example, examples do not have `shape`, or `ntk_gram` refuses the input.
            InputTypeError: If examples are sparse or no numbers, or the model is no module.
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

        Raises:
            InputError: As for the kernel.
            InputTypeError: As for the kernel.
        """
        batch = self._batch(X)
        starts = range(0, max(len(batch), 1), DIAGONAL_BLOCK)  # no example is refused as the kernel refuses it
        parts = (batch[start : start + DIAGONAL_BLOCK] for start in starts)
        return np.concatenate([np.diagonal(self(part)) for part in parts])

    def is_stationary(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - typed by a base class that raises
        """Say whether the kernel depends on differences of inputs alone: it does not."""
        return False

    def __repr__(self) -> str:
        """Write the model's class and the kind."""
        return f"NTKKernel({type(self.model).__name__}, outputs={self.outputs!r})"

    def _batch(self, examples: Any) -> Tensor:
        """Put examples into the precision of the model, unless they are whole numbers, and into their shape."""
        check_module(self.model)
        batch = _tensor(examples)
        if batch.is_floating_point():
            batch = batch.to(next((p.dtype for p in self.model.parameters() if p.is_floating_point()), batch.dtype))
        if self.shape is None:
            return batch
        if math.prod(batch.shape[1:]) != math.prod(self.shape):
            raise InputError(
                f"Examples of shape {tuple(batch.shape[1:])} cannot be put into `shape` {tuple(self.shape)}: {math.prod(batch.shape[1:])} "
                f"numbers, not {math.prod(self.shape)}. Give the shape that one example had before it was flattened."
            )
        return batch.reshape(len(batch), *self.shape)


class NTKFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Turns examples into their kernel with the training examples, for estimators with `kernel="precomputed"`.

        make_pipeline(NTKFeatures(NTKKernel(model)), SVC(kernel="precomputed"))

    It takes examples, so that cross-validation and grid search split them before any kernel is computed. `fit_transform` gives the kernel
    of the training set with itself, exactly symmetric.

    Args:
        kernel: An `NTKKernel`, alone or composed.

    Attributes:
        inputs_: The training examples.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def fit(self, X: Any, y: Any = None) -> "NTKFeatures":
        """Keep the training examples.

        Args:
            X: n examples of any shape, as `NTKKernel` takes them.
            y: Not used.

        Returns:
            Itself.

        Raises:
            InputTypeError: If `kernel` is something else, such as a model.
        """
        if not isinstance(self.kernel, Kernel):
            raise InputTypeError(f"`kernel` must be a kernel, got {type(self.kernel).__name__}. Give NTKFeatures(NTKKernel(model)).")
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

    @property
    def _n_features_out(self) -> int:
        """Count the columns, one per training example; scikit-learn names them for `set_output`."""
        return len(self.inputs_)


def _tensor(examples: Any) -> Tensor:
    """Take a tensor from what scikit-learn passes on."""
    if isinstance(examples, Tensor):
        return examples
    if issparse(examples):
        raise InputTypeError("Examples are a sparse matrix, but models take dense ones. Give `x.toarray()`.")
    array = np.asarray(examples)
    if array.dtype == object:  # data frames with columns of several kinds
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise InputTypeError(f"Examples must be numbers: {error}. Encode or leave out the columns that are not.") from error
    if array.dtype.kind not in "biuf":
        raise InputTypeError(f"Examples must be real numbers, got an array of {array.dtype}. Encode them as numbers.")
    # A copy where torch would warn (memory maps of joblib and views of pandas are read-only) or refuse (reversed axes).
    return torch.from_numpy(np.require(array, requirements=("C", "W")))
