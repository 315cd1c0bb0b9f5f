"""Kernels between snapshots: a cubic through the four nearest, averaged over each half of an interval.

The trapezoid rule of theory.md section 4 takes ½(K_j + K_{j+1}) for a whole interval. Where the kernel moves smoothly, a cubic through
the neighbours and two half intervals lower the error per snapshot two- to fivefold (benchmarks/RESULTS.md); a commutator-free Magnus
rule of fourth order costs the same two decompositions and was measured to be no better.
Where the kernel jumps about (minibatches of few examples, the first steps of Adam) the cubic is noise: the trapezoid rule is kept there.
"""

from collections.abc import Sequence

import numpy as np

# Three-point Gauss quadrature on [0, 1]: exact for cubics.
GAUSS = ((0.5 - 0.5 * (3 / 5) ** 0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.5 * (3 / 5) ** 0.5, 5 / 18))
SMOOTH_BELOW = 0.25  # correction of the mean kernel, as a share of the kernel's change, below which it counts as smooth


def lagrange_weights(nodes: Sequence[float], time: float) -> np.ndarray:
    """Compute the weights that interpolate values at `nodes` to `time` by one polynomial.

    Args:
        nodes: Distinct times.
        time: Where to interpolate.

    Returns:
        One weight per node; they sum to one.

    Example:
        >>> lagrange_weights([0.0, 1.0], 0.25).tolist()
        [0.75, 0.25]
    """
    weights = np.ones(len(nodes))
    for i, own in enumerate(nodes):
        for k, other in enumerate(nodes):
            if k != i:
                weights[i] *= (time - other) / (own - other)
    return weights


def mean_weights(nodes: Sequence[float], start: float, stop: float) -> np.ndarray:
    """Compute the weights of the polynomial's average over an interval.

    Args:
        nodes: Distinct times, at most six.
        start: Beginning of the interval.
        stop: Its end.

    Returns:
        One weight per node.
    """
    return np.sum([share * lagrange_weights(nodes, start + (stop - start) * place) for place, share in GAUSS], axis=0)
