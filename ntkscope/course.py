"""The course of a run: its snapshots in order, and between two of them the kernels and Hessians to integrate."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ntkscope._checks import InputError
from ntkscope.dynamics.dissipation import Dissipation, extend
from ntkscope.dynamics.form import Form
from ntkscope.dynamics.interpolation import GAUSS, SMOOTH_BELOW, lagrange_weights, mean_weights
from ntkscope.dynamics.interval import Interval, factor_interval
from ntkscope.dynamics.loss import ProbeLoss
from ntkscope.record.snapshot import Snapshot
from ntkscope.record.trace import Trace

OVERSHOOT = 1e-3  # of the largest eigenvalue: how far below zero an interpolated kernel may go before the cubic is distrusted


@dataclass(frozen=True)
class Moment:
    """A snapshot with its kernels unpacked, float64, in the trace's form."""

    snapshot: Snapshot
    kernel: Float[Tensor, "outputs outputs"]
    cross: Float[Tensor, "query_outputs outputs"] | None
    gradient: Float[Tensor, "outputs ..."]


@dataclass(frozen=True)
class Piece:
    """What is constant over a part of an interval."""

    kernel: Float[Tensor, "outputs outputs"]
    blocks: Float[Tensor, "examples block block"]
    elapsed: float
    cross: Float[Tensor, "query_outputs outputs"] | None
    forcing: Float[Tensor, "outputs ..."] | None
    query_forcing: Float[Tensor, "query_outputs ..."] | None


@dataclass(frozen=True)
class Leg:
    """The way from one snapshot to the next.

    Attributes:
        start: Where it begins.
        stop: Where it ends.
        whole: Trapezoid rule: one piece.
        halves: Cubic through the neighbours: two pieces; empty where the kernel is not smooth.
        tolerance: Negative eigenvalues to expect from rounding.
    """

    start: Moment
    stop: Moment
    whole: Piece
    halves: tuple[Piece, ...]
    tolerance: float


@dataclass(frozen=True)
class FactoredPiece:
    """A piece, ready to be composed."""

    interval: Interval
    cross: Float[Tensor, "query_outputs outputs"] | None
    forcing: Float[Tensor, "outputs ..."] | None
    query_forcing: Float[Tensor, "query_outputs ..."] | None

    def extend(self, state: Dissipation) -> Dissipation:
        """Append the piece to a window."""
        return extend(state, self.interval, cross=self.cross, forcing=self.forcing, query_forcing=self.query_forcing)


class Course:
    """Walks along a trace, with the neighbours that interpolation needs in memory.

    Args:
        trace: The record.
        start: Index of the first snapshot.
        stop: Index of the last.
        loss: The loss, where it can be rebuilt; without it, or with `is_refined` off, every leg is one trapezoid.
        is_refined: Whether to interpolate by cubics.
    """

    def __init__(self, trace: Trace, start: int, stop: int, *, loss: ProbeLoss | None, is_refined: bool = True) -> None:
        self.trace, self.start, self.stop = trace, start, stop
        self.loss = loss
        self.is_refined = is_refined and loss is not None
        self.form = Form(trace.facts.outputs == "trace")
        self._moments: dict[int, Moment] = {}

    def moment(self, position: int) -> Moment:
        """Read a snapshot, or return it if it is in memory.

        Args:
            position: Its index in the trace.

        Returns:
            The snapshot, unpacked.
        """
        if position not in self._moments:
            self._moments[position] = self.read(position)
        return self._moments[position]

    def read(self, position: int) -> Moment:
        """Read a snapshot without keeping it in memory.

        Args:
            position: Its index in the trace.

        Returns:
            The snapshot, unpacked.
        """
        snapshot = self.trace[position]
        cross = None if snapshot.cross_kernel is None else snapshot.cross_kernel.double()
        return Moment(snapshot, snapshot.kernel(), cross, self.form.field(snapshot.gradient))

    def legs(self) -> Iterator[Leg]:
        """Walk from the first snapshot to the last.

        Yields:
            Every interval between snapshots.
        """
        for position in range(self.start, self.stop):
            yield self._leg(position)
            self._moments = {kept: moment for kept, moment in self._moments.items() if kept >= position}

    def merged_legs(self, num_legs: int) -> Iterator[Leg]:
        """Walk in few long legs, each a trapezoid: quicker, and less accurate.

        Args:
            num_legs: At most so many.

        Yields:
            Intervals that together span the whole course.
        """
        stops = np.unique(np.linspace(self.start, self.stop, min(num_legs, self.stop - self.start) + 1).round().astype(int)).tolist()
        first = self.read(stops[0])
        for begin, end in pairwise(stops):
            leg = self.span(first, begin, end)
            yield leg
            first = leg.stop

    def span(self, first: Moment, begin: int, end: int) -> Leg:
        """Take several intervals as one trapezoid.

        Args:
            first: The snapshot at `begin`.
            begin: Index of a snapshot in the trace.
            end: Index of a later one.

        Returns:
            The way between them.
        """
        last = self.read(end)
        elapsed = last.snapshot.time - first.snapshot.time
        blocks = torch.zeros_like(last.snapshot.hessian)
        before = first.snapshot.time
        for position in range(begin + 1, end + 1):
            snapshot = last.snapshot if position == end else self.trace[position]
            share = (snapshot.time - before) / elapsed if elapsed > 0 else 1.0 / (end - begin)
            blocks += share * _mean_hessian(snapshot)
            before = snapshot.time
        piece = self._piece(((first, 0.5), (last, 0.5)), self.form.blocks(blocks), elapsed)
        return Leg(first, last, piece, (), max(first.snapshot.kernel_eps, last.snapshot.kernel_eps))

    def _leg(self, position: int) -> Leg:
        """Prepare one interval."""
        first, last = self.moment(position), self.moment(position + 1)
        elapsed = last.snapshot.time - first.snapshot.time
        whole = self._piece(((first, 0.5), (last, 0.5)), self.form.blocks(_mean_hessian(last.snapshot)), elapsed)
        tolerance = max(first.snapshot.kernel_eps, last.snapshot.kernel_eps)
        return Leg(first, last, whole, self._halves(position, whole) if self.is_refined and elapsed > 0 else (), tolerance)

    def _halves(self, position: int, whole: Piece) -> tuple[Piece, ...]:
        """Interpolate through the neighbours; nothing where the kernel is not smooth."""
        assert self.loss is not None
        # Neighbours outside the window count too: a window's numbers must not depend on how it was asked for.
        moments = [moment for k in range(position - 1, position + 3) if (moment := self._neighbour(k)) is not None]
        nodes = [moment.snapshot.time for moment in moments]
        if len(moments) < 3 or min(np.diff(nodes)) <= 0:
            return ()
        begin, end = self.moment(position), self.moment(position + 1)
        start, middle = begin.snapshot.time, begin.snapshot.time + 0.5 * whole.elapsed
        mean = _combine([moment.kernel for moment in moments], mean_weights(nodes, start, end.snapshot.time))
        moved = float(torch.linalg.vector_norm(end.kernel - begin.kernel))
        if float(torch.linalg.vector_norm(mean - whole.kernel)) > SMOOTH_BELOW * moved:
            return ()
        pieces = []
        for a, b in ((start, middle), (middle, end.snapshot.time)):
            weighted = list(zip(moments, mean_weights(nodes, a, b).tolist(), strict=True))
            blocks = torch.zeros_like(begin.snapshot.hessian)
            for place, share in GAUSS:
                outputs = _combine([m.snapshot.outputs.double() for m in moments], lagrange_weights(nodes, a + (b - a) * place))
                blocks += share * self.loss.hessian_blocks(outputs)
            pieces.append(self._piece(weighted, self.form.blocks(blocks), b - a))
        return tuple(pieces)

    def _neighbour(self, position: int) -> Moment | None:
        """Read a snapshot that may lie outside the window, and then may be damaged: the window does without it."""
        if self.start <= position <= self.stop:
            return self.moment(position)
        try:
            return self.moment(position) if 0 <= position < len(self.trace) else None
        except InputError:
            return None

    def _piece(self, weighted: Sequence[tuple[Moment, float]], blocks: Tensor, elapsed: float) -> Piece:
        """Combine snapshots into one piece."""
        weights = np.array([weight for _, weight in weighted])
        moments = [moment for moment, _ in weighted]

        def combined(tensors: list[Tensor | None]) -> Tensor | None:
            known = [tensor for tensor in tensors if tensor is not None]
            return _combine(known, weights) if len(known) == len(tensors) else None

        field = self.form.field
        kernel = combined([moment.kernel for moment in moments])
        assert kernel is not None
        return Piece(
            kernel=kernel,
            blocks=blocks,
            elapsed=elapsed,
            cross=combined([moment.cross for moment in moments]),
            forcing=combined([None if m.snapshot.forcing is None else field(m.snapshot.forcing) for m in moments]),
            query_forcing=combined([None if m.snapshot.query_forcing is None else field(m.snapshot.query_forcing) for m in moments]),
        )


def factor_leg(leg: Leg, *, kept: Int[Tensor, " kept"] | None = None, device: torch.device | str | None = None) -> list[FactoredPiece]:
    """Factor a leg's halves, or the whole where there are none or an interpolated kernel is not positive semidefinite.

    Args:
        leg: From `Course.legs`.
        kept: Examples to keep; all if not given.
        device: Where to decompose.

    Returns:
        One or two pieces.
    """
    if leg.halves:
        try:
            return [_factor(piece, max(leg.tolerance, OVERSHOOT), kept, device) for piece in leg.halves]
        except InputError:
            pass  # the cubic overshot: the whole, an average of two kernels, cannot
    return [_factor(leg.whole, leg.tolerance, kept, device)]


def _factor(piece: Piece, tolerance: float, kept: Tensor | None, device: torch.device | str | None) -> FactoredPiece:
    """Factor one piece."""
    kernel, blocks, cross, forcing = piece.kernel, piece.blocks, piece.cross, piece.forcing
    if kept is not None:
        rows = output_rows(kept, len(kernel) // len(blocks))
        kernel, blocks = kernel[rows][:, rows], blocks[kept]
        cross = None if cross is None else cross[:, rows]
        forcing = None if forcing is None else forcing[rows]
    interval = factor_interval(kernel, blocks, piece.elapsed, negative_tolerance=tolerance, device=device)
    return FactoredPiece(interval, cross, forcing, piece.query_forcing)


def output_rows(examples: Int[Tensor, " kept"], num_per_example: int) -> Int[Tensor, " rows"]:
    """List the stacked outputs of some examples.

    Args:
        examples: Their indices.
        num_per_example: Stacked outputs of one example: C, or 1 in the trace form.

    Returns:
        Row indices.
    """
    return (examples[:, None] * num_per_example + torch.arange(num_per_example)).flatten()


def _mean_hessian(snapshot: Snapshot) -> Float[Tensor, "examples classes classes"]:
    """Read the Hessian average since the snapshot before."""
    if snapshot.mean_hessian is None:
        raise InputError(f"The snapshot at step {snapshot.step} lacks the Hessian average since the one before. Record the run again.")
    return snapshot.mean_hessian


def _combine(tensors: list[Tensor], weights: np.ndarray) -> Tensor:
    """Add tensors up with weights, in float64."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights.tolist(), strict=True):
        total.add_(tensor, alpha=weight)
    return total
