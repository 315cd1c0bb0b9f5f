"""Comparison of two arrays relative to the norm of the expected one, with a message that locates the worst entry."""

from typing import Any

import numpy as np
import torch


def to_array(value: Any) -> np.ndarray:
    """Return a tensor, array, number or nested list as a float64 array."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    return np.asarray(value, dtype=np.float64)


def relative_error(actual: Any, expected: Any) -> float:
    """Return max |actual - expected| / max |expected| (absolute where expected is zero, inf where only one entry is finite)."""
    actual, expected = to_array(actual), to_array(expected)
    return float(_differences(actual, expected).max(initial=0.0) / _scale(expected))


def assert_close(actual: Any, expected: Any, rtol: float = 1e-10, *, name: str = "") -> None:
    """Assert max |actual - expected| <= rtol * max |expected|; infinities must be equal, shapes too, and NaN is never accepted.

    Where `expected` is zero everywhere, `rtol` is an absolute tolerance.
    """
    __tracebackhide__ = True
    assert actual is not None, f"{name}: actual is None"
    assert expected is not None, f"{name}: expected is None"
    actual, expected = to_array(actual), to_array(expected)
    label = f"{name}: " if name else ""
    assert actual.shape == expected.shape, f"{label}shape {actual.shape}, expected {expected.shape}"
    for side, values in (("actual", actual), ("expected", expected)):
        bad = np.argwhere(np.isnan(values))
        assert not len(bad), f"{label}{side} has {len(bad)} NaN of {values.size}, first at {tuple(map(int, bad[0]))}"
    if actual.size == 0:
        return
    differences, scale = _differences(actual, expected), _scale(expected)
    worst = np.unravel_index(int(differences.argmax()), differences.shape)
    got, want = float(actual[worst]), float(expected[worst])
    error = float(differences[worst]) / scale
    ratio = got / want if want else float("nan")
    assert error <= rtol, (
        f"{label}relative error {error:.3e} > {rtol:.1e} (norm {scale:.3e}); worst at {tuple(map(int, worst))}: "
        f"actual {got:.17g}, expected {want:.17g}, actual/expected {ratio:.12g}; "
        f"{int((differences > rtol * scale).sum())} of {differences.size} entries differ, "
        f"norm actual/expected {np.abs(actual).max() / scale:.12g}"
    )


def _differences(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    same = actual == expected  # also equal infinities, whose difference would be NaN
    return np.abs(np.subtract(actual, expected, out=np.zeros(np.broadcast(actual, expected).shape), where=~same))


def _scale(expected: np.ndarray) -> float:
    finite = np.abs(expected[np.isfinite(expected)])
    return float(finite.max(initial=0.0)) or 1.0
