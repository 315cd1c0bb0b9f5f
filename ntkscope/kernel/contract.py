"""From two factored Jacobians to J M J'ᵀ: for every parameter the cheapest exact contraction.

With n, n' examples, C classes, N = n C, T positions, u units and k inputs of one weight (multiply-adds; half of them where both sides
are the same block, since only the lower triangle is computed):

| contraction | M = I | elementwise M | when it wins |
| --- | --- | --- | --- |
| `grams`, T = 1: <d aᵀ, d' a'ᵀ> = <d, d'> <a, a'> | n n' k + N N' u | – | a plain Linear |
| `modes`, a pattern h_o of inputs per unit o: Q_o = h_o M_o h'_oᵀ, Σ_o d_o Q_o d'_o | n n' u k + N N' u | same | M ≠ I; pooled heads |
| `positions`: a aᵀ', times d, times d' | T² (n n' k + N n' u) + T N N' u | – | late convolutions, wide inputs, many classes |
| `gradients`: form d aᵀ in chunks of columns, and multiply | N N' u k + (N + N') T u k | the same | many positions |

`trace` sums over classes: N N' becomes C n n'. theory.md section 1 has only the last row for M ≠ I; the two in the middle are ours.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ntkscope.kernel.cost import cheapest
from ntkscope.kernel.factor import FactoredJacobian, OuterFactor
from ntkscope.kernel.precond import Precond

ROW_BLOCKS = 8  # of columns, of a symmetric product: 9/16 of the multiplications instead of all
SMALLEST_BLOCK = 80  # columns: matrix products with fewer are slow
CACHE_BYTES = 2**23  # what is formed and multiplied at once stays in cache, and malloc reuses it instead of asking the system
TOKENS_AT_ONCE = 64
LARGEST_SUM = 2**17  # columns added up in the factors' precision


def contract(
    left: FactoredJacobian,
    right: FactoredJacobian,
    total: Float[Tensor, "rows columns"],
    *,
    precond: Precond | None,
    trace: bool,
    chunk_bytes: int,
    names: frozenset[str] | None = None,
) -> None:
    """Add J M J'ᵀ of two blocks of examples to `total`.

    Args:
        left: Jacobian of the rows.
        right: Jacobian of the columns; `left` itself for a diagonal block, of which only the lower triangle is filled reliably.
        total: Where to add, of any precision: `(n C, n' C)`, or `(n, n')` with `trace`.
        precond: Diagonal M by parameter name: a tensor shaped as the parameter, or one number; the identity if not given.
        trace: Sum over classes.
        chunk_bytes: Bound on what is formed at a time.
        names: Parameters to take; all if not given.
    """
    is_same = left is right
    products = _Products(total, left, trace, is_same)  # of everything that is multiplied as gradients
    for name in left.shapes:
        if names is not None and name not in names:
            continue
        scale: Tensor | float = 1.0 if precond is None else precond[name]
        if isinstance(scale, Tensor):
            scale = scale.to(left.outputs.device, left.dtype)
        if name in left.rows and name in right.rows:
            _add_rows(products, left.rows[name], right.rows[name], scale, chunk_bytes)
        for factor in left.factors.get(name, []):
            for other in right.factors.get(name, []):
                _add_factors(total, products, factor, other, scale, trace, chunk_bytes, is_same and factor is other)
    products.finish()


def _add_factors(
    total: Tensor,
    products: "_Products",
    left: OuterFactor,
    right: OuterFactor,
    scale: Tensor | float,
    trace: bool,
    chunk_bytes: int,
    is_same: bool,
) -> None:
    """Choose the contraction of two factors of one parameter."""
    if left.is_token != right.is_token:
        _add_tied(total, left.joined(), right.joined(), scale, trace, chunk_bytes)
        return
    start, stop = max(left.part.start, right.part.start), min(left.part.stop, right.part.stop)
    if start >= stop:
        return  # different rows of the parameter
    left, right = left.restricted(start, stop), right if right is left else right.restricted(start, stop)
    weight = left.diagonal(scale) if isinstance(scale, Tensor) else None
    tokens = _shared_tokens(left, right) if left.is_token else None
    num_inputs = left.inputs.shape[2] if tokens is None else len(tokens)
    if num_inputs == 0:
        return  # no token in common
    way = cheapest(
        num_rows=left.grads.shape[0],
        num_columns=right.grads.shape[0],
        num_classes=left.grads.shape[1],
        units=left.grads.shape[2],
        inputs=num_inputs,
        positions=max(left.inputs.shape[1], right.inputs.shape[1]),
        has_modes=left.has_modes and right.has_modes and (left.patterns is None) == (right.patterns is None),
        is_weighted=weight is not None,
        is_trace=trace,
    )
    plain = 1.0 if isinstance(scale, Tensor) else scale
    if way == "modes":
        _add_modes(total, left, right, weight, plain, trace, chunk_bytes, is_same)
        return
    joined = left.joined()
    left, right = joined, joined if right is left else right.joined()
    if way == "gradients":
        _add_gradients(products, left, right, plain if weight is None else weight, chunk_bytes, is_same, tokens)
    else:
        add = _add_grams if way == "grams" else _add_positions
        add(total, left, right, plain, trace, chunk_bytes, is_same)


def _shared_tokens(left: OuterFactor, right: OuterFactor) -> Tensor:
    """List the tokens that both sides have: gradients are formed over these, never over the vocabulary."""
    own = torch.unique(left.inputs)
    return own if left is right else own[torch.isin(own, torch.unique(right.inputs))]


def _inner_inputs(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of all pairs of positions: of activations, or whether tokens match."""
    if left.ndim == 2:
        return left.flatten()[:, None] == right.flatten()
    return left.flatten(0, 1) @ right.flatten(0, 1).T


def _add_tied(total: Tensor, left: OuterFactor, right: OuterFactor, scale: Tensor | float, trace: bool, chunk_bytes: int) -> None:
    """A table that is also a head's weight: its gradients d aᵀ meet those of tokens, e_token d'ᵀ, where the token is the unit."""
    if left.is_token:
        transposed = total.new_zeros(total.shape[::-1])
        _add_tied(transposed, right, left, scale, trace, chunk_bytes)
        total += transposed.T
        return
    n, num_classes, _, positions = left.grads.shape
    other, num_tokens = right.grads.shape[0], right.inputs.shape[1]
    token_grads = right.grads.permute(0, 3, 1, 2)  # [examples', tokens, classes, inputs]
    if isinstance(scale, Tensor):
        token_grads = token_grads * scale[right.inputs][:, :, None, :]
    tokens = right.inputs.flatten()
    per_row = num_classes * positions * other * num_tokens * 2 * left.grads.element_size()
    for rows in _slices(n, max(1, chunk_bytes // per_row)):
        picked = left.grads[rows][:, :, tokens].unflatten(2, (other, num_tokens))  # [rows, classes, examples', tokens, positions]
        inner = torch.einsum("itk,jsdk->itjsd", left.inputs[rows], token_grads)
        block = torch.einsum("icjst,itjsc->ij" if trace else "icjst,itjsd->icjd", picked, inner)
        where = rows if trace else slice(rows.start * num_classes, rows.stop * num_classes)
        block = block if trace else block.flatten(2).flatten(0, 1)
        total[where] += block if isinstance(scale, Tensor) else scale * block


def _add_rows(products: "_Products", left: Tensor, right: Tensor, scale: Tensor | float, chunk_bytes: int) -> None:
    """Multiply plain gradient rows, in chunks of columns."""
    width = left.shape[2]
    flat = scale.flatten() if isinstance(scale, Tensor) else None
    # Views need no chunks, but a weighted copy does.
    is_view = flat is None and scale == 1.0
    step = width if is_view else max(1, min(chunk_bytes, CACHE_BYTES) // (left.shape[:2].numel() * left.element_size()))
    for columns in _slices(width, step):
        first = left[:, :, columns]
        products.add(first if is_view else first * (scale if flat is None else flat[columns]), right[:, :, columns])


def _add_gradients(
    products: "_Products",
    left: OuterFactor,
    right: OuterFactor,
    weight: Tensor | float,
    chunk_bytes: int,
    is_same: bool,
    tokens: Tensor | None,
) -> None:
    """Form per-output weight gradients, a chunk of columns at a time, weighted by M."""
    num_units = left.grads.shape[2]
    num_inputs = left.inputs.shape[2] if tokens is None else len(tokens)
    is_weighted = isinstance(weight, Tensor) or weight != 1.0
    num_rows = left.grads.shape[:2].numel() * (2 if is_weighted else 1)
    num_rows += 0 if is_same else right.grads.shape[:2].numel()
    columns = max(1, min(chunk_bytes, CACHE_BYTES) // (num_rows * left.grads.element_size()))
    inputs_step = min(num_inputs if tokens is None else TOKENS_AT_ONCE, columns)
    units_step = max(1, columns // inputs_step)
    for inputs in _slices(num_inputs, inputs_step):
        where = inputs if tokens is None else tokens[inputs]
        first_inputs = _activations(left, where)
        second_inputs = first_inputs if is_same else _activations(right, where)
        for units in _slices(num_units, units_step):
            first = _weight_gradients(left, units, first_inputs)
            second = first if is_same else _weight_gradients(right, units, second_inputs)
            scale = weight[units, where].flatten() if isinstance(weight, Tensor) else weight
            products.add(first * scale if is_weighted else first, second)


def _activations(factor: OuterFactor, where: slice | Tensor) -> Float[Tensor, "examples positions inputs"]:
    """Cut some inputs out of a factor; of tokens, the one-hot activations of those named."""
    return factor.inputs[:, :, where] if isinstance(where, slice) else (factor.inputs[:, :, None] == where).to(factor.grads)


class _Products:
    """Adds up left @ rightᵀ over chunks of columns; only the blocks on and below the diagonal where both sides are one block.

    Chunks are added inside the matrix product, in the factors' precision, and go to `total`, of higher precision, now and then.
    """

    def __init__(self, total: Tensor, left: FactoredJacobian, trace: bool, is_same: bool) -> None:
        self._total, self._trace, self._dtype = total, trace, left.dtype
        self._sum: Tensor | None = None
        rows, columns = total.shape
        num_blocks = min(ROW_BLOCKS, -(-rows // SMALLEST_BLOCK)) if is_same else 1
        self._blocks = [(block.start if is_same else 0, block) for block in _slices(columns, -(-columns // num_blocks))]
        self._num_columns = 0

    def add(self, left: Float[Tensor, "examples classes columns"], right: Float[Tensor, "examples2 classes columns"]) -> None:
        """Add a chunk.

        Args:
            left: Gradients of the rows' outputs.
            right: Gradients of the columns' outputs.
        """
        first, second = _flat(left, self._trace), _flat(right, self._trace)
        if self._num_columns + first.shape[1] > LARGEST_SUM and self._num_columns:
            self.finish()
        if self._sum is None:
            self._sum = self._total.new_zeros(self._total.shape, dtype=self._dtype)
        self._num_columns += first.shape[1]
        for start, columns in self._blocks:
            self._sum[start:, columns].addmm_(first[start:], second[columns].T)

    def finish(self) -> None:
        """Add what there is to the total, and begin anew."""
        if self._sum is None or not self._num_columns:
            return
        for start, columns in self._blocks:
            self._total[start:, columns] += self._sum[start:, columns]
        self._sum.zero_()
        self._num_columns = 0


def _weight_gradients(factor: OuterFactor, units: slice, inputs: Tensor) -> Float[Tensor, "examples classes columns"]:
    """Form gradients of every output in weight[units, inputs]."""
    grads = factor.grads[:, :, units]
    gradients = grads.flatten(1, 2) @ inputs  # [examples, classes * units, inputs]
    return gradients.view(*grads.shape[:2], -1)


def _flat(gradients: Float[Tensor, "examples classes columns"], trace: bool) -> Tensor:
    """View gradients as matrix rows: one per output, or one per example (whose products sum over classes: the trace)."""
    return gradients.flatten(1) if trace else gradients.flatten(0, 1)


def _add_grams(total: Tensor, left: OuterFactor, right: OuterFactor, scale: float, trace: bool, chunk_bytes: int, is_same: bool) -> None:
    """One position: two small Grams, of inputs and of output gradients, multiplied elementwise."""
    n, num_classes, _, _ = left.grads.shape
    d, e = left.grads[..., 0], right.grads[..., 0]  # [examples, classes, units]
    per_row = 3 * (1 if trace else num_classes**2) * len(e) * d.element_size()
    for rows, stop in _row_chunks(n, len(e), max(1, chunk_bytes // per_row), is_same):
        grads = _flat(d[rows], trace) @ _flat(e[:stop], trace).T
        inputs = _inner_inputs(left.inputs[rows], right.inputs[:stop])  # [examples, examples']
        if trace:
            _add_block(total, grads.mul_(inputs), rows, stop, 1, scale)
            continue
        products = grads.view(len(inputs), num_classes, stop, num_classes).mul_(inputs[:, None, :, None])
        _add_block(total, products.view(grads.shape), rows, stop, num_classes, scale)


def _add_positions(
    total: Tensor, left: OuterFactor, right: OuterFactor, scale: float, trace: bool, chunk_bytes: int, is_same: bool
) -> None:
    """Many positions, M = I: a aᵀ' of one example with all others, then its output gradients, then theirs; no weight gradient is formed."""
    n, num_classes, num_units, _ = left.grads.shape
    others, other_positions = right.inputs.shape[:2]
    d = left.grads.permute(0, 1, 3, 2).contiguous()  # [examples, classes, positions, units]
    e = right.grads.permute(0, 1, 3, 2).flatten(2)  # [examples', classes', positions' units]
    per_other = other_positions * num_units * num_classes * left.grads.element_size()
    step = max(1, min(chunk_bytes, CACHE_BYTES) // (2 * per_other))
    width = 1 if trace else num_classes
    for i in range(n):
        for columns in _slices(i + 1 if is_same else others, step):
            inner = _inner_inputs(right.inputs[columns], left.inputs[i : i + 1]).to(d)  # [examples' positions', positions]
            pushed = torch.bmm(inner.expand(num_classes, -1, -1), d[i])  # [classes, examples' positions', units]
            by_other = pushed.view(num_classes, columns.stop - columns.start, -1).transpose(0, 1)
            if trace:
                block = torch.einsum("jcl,jcl->j", by_other, e[columns])[None]
            else:
                block = (by_other @ e[columns].mT).transpose(0, 1).flatten(1)  # [classes, examples' classes']
            total[i * width : (i + 1) * width, columns.start * width : columns.stop * width].add_(block, alpha=scale)


def _add_modes(
    total: Tensor, left: OuterFactor, right: OuterFactor, weight: Tensor | None, scale: float, trace: bool, chunk_bytes: int, is_same: bool
) -> None:
    """One pattern of inputs per unit: their Gram for every unit, weighted by M, then its sum over units with the output gradients."""
    n, num_classes, num_units, _ = left.grads.shape
    others, itemsize = len(right.grads), left.grads.element_size()
    a = left.modes()  # [examples, units or 1, inputs]
    b = a if right is left else right.modes()
    d, e = left.grads[..., 0], right.grads[..., 0].permute(2, 0, 1)  # [examples, classes, units], [units, examples', classes]
    units_step = max(1, chunk_bytes // (3 * (others + n) * (b.shape[2] + n) * itemsize))
    for units in _slices(num_units, units_step):
        own = slice(0, 1) if a.shape[1] == 1 else units
        first, second = a[:, own].transpose(0, 1), b[:, own].transpose(0, 1)  # [units or 1, examples, inputs]
        weighted = second if weight is None else weight[units, None, :] * second
        one_product = len(first) == 1  # large, instead of one small product per unit
        grams = (weighted.reshape(-1, weighted.shape[2]) @ first[0].T).view(-1, others, n) if one_product else weighted @ first.mT
        per_row = 2 * grams.shape[0] * others * num_classes * itemsize
        for rows, stop in _row_chunks(n, others, max(1, min(chunk_bytes, CACHE_BYTES) // per_row), is_same):
            inner = grams[:, :stop, rows].permute(2, 0, 1)  # [rows, units, examples']
            if trace:
                both = torch.einsum("icu,ujc->iuj", d[rows][:, :, units], e[units, :stop])
                _add_block(total, (both * inner).sum(dim=1), rows, stop, 1, scale)
                continue
            scaled = (inner[..., None] * e[units, :stop]).flatten(2)  # [rows, units, examples' classes']
            block = d[rows][:, :, units] @ scaled  # [rows, classes, examples' classes']
            _add_block(total, block.flatten(0, 1), rows, stop, num_classes, scale)


def _add_block(total: Tensor, block: Tensor, rows: slice, stop: int, width: int, scale: float) -> None:
    """Add the block of some rows' examples and the first columns' examples."""
    total[rows.start * width : rows.stop * width, : stop * width] += block if scale == 1.0 else scale * block


def _row_chunks(num_rows: int, num_columns: int, step: int, is_same: bool) -> Iterator[tuple[slice, int]]:
    """Cut the rows, and say how many columns each chunk needs: those up to the diagonal where both sides are one block."""
    if is_same:
        step = min(step, -(-num_rows // ROW_BLOCKS))
    for rows in _slices(num_rows, step):
        yield rows, rows.stop if is_same else num_columns


def _slices(length: int, step: int) -> list[slice]:
    """Cut `range(length)` into slices of `step`."""
    return [slice(start, min(start + step, length)) for start in range(0, length, max(1, step))]
