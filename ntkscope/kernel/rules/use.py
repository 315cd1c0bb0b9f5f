"""One use of one weight in a forward pass, and what a rule returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from ntkscope.kernel.layout import Layout, allows, by_example


@dataclass(frozen=True, eq=False)
class Use:
    """A weight's part in one call; `weight` is a parameter, or a tensor computed from parameters only."""

    weight: Tensor

    def fits(self, layout: Layout, shape: tuple[int, ...], num_examples: int) -> bool:
        """Say whether the use makes sense in a layout.

        Args:
            layout: Where the examples are in the call's output.
            shape: Of the output.
            num_examples: n.

        Returns:
            Whether it does.
        """
        return allows(layout, shape, num_examples)

    def rows(self, grads: Tensor, layout: Layout, num_examples: int, inputs: Tensor | None = None) -> Float[Tensor, "examples columns"]:
        """Form the gradient of one output class of every example with respect to the weight.

        Args:
            grads: Gradient of that class, summed over examples, with respect to the call's output.
            layout: Where the examples are.
            num_examples: n.
            inputs: What `inputs()` gave, for uses that have it.

        Returns:
            Flattened gradients.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class OuterUse(Use):
    """A use whose gradient is a sum of outer products over positions."""

    transposed: bool = False  # the weight is [inputs, units] instead of [units, inputs]
    rows_only: bool = False  # the factors do not make a plain outer product (groups)

    def inputs(self, layout: Layout, num_examples: int) -> Tensor:
        """View what multiplies the output gradients.

        Args:
            layout: Where the examples are.
            num_examples: n.

        Returns:
            Activations `(n, T, inputs)`, or token numbers `(n, T)` in place of one-hot activations.
        """
        raise NotImplementedError

    def grads(self, grads: Tensor, layout: Layout, num_examples: int) -> Float[Tensor, "examples units positions"]:
        """Bring the output gradients of one class into the order of the factors.

        Args:
            grads: As for `rows`.
            layout: Where the examples are.
            num_examples: n.

        Returns:
            Shape `(n, units, T)`.
        """
        raise NotImplementedError

    def rows(self, grads: Tensor, layout: Layout, num_examples: int, inputs: Tensor | None = None) -> Float[Tensor, "examples columns"]:
        """Form the gradient: see `Use.rows`.

        Args:
            grads: As there.
            layout: As there.
            num_examples: n.
            inputs: From `inputs()`, computed here if not given.

        Returns:
            Flattened gradients.
        """
        factor = self.grads(grads, layout, num_examples)
        activations = (self.inputs(layout, num_examples) if inputs is None else inputs).to(factor)
        products = activations.mT @ factor.mT if self.transposed else factor @ activations
        return products.flatten(1)


@dataclass(frozen=True, eq=False)
class LinearUse(OuterUse):
    """`y[..., u] = sum over k of weight[u, k] x[..., k]`."""

    activations: Tensor = field(kw_only=True)  # (..., inputs)
    columns: bool = False  # y is [..., units, positions]: the weight stood on the left of the product

    def fits(self, layout: Layout, shape: tuple[int, ...], num_examples: int) -> bool:
        """Keep the example axis apart from the units: see `Use.fits`."""
        own = {Layout.FIRST: 2, Layout.SECOND: 3}.get(layout, 2) + self.columns
        return len(shape) >= own and allows(layout, shape, num_examples) and not (self.columns and layout is Layout.SECOND)

    def inputs(self, layout: Layout, num_examples: int) -> Float[Tensor, "examples positions inputs"]:
        """View the activations."""
        return by_example(self.activations, layout, num_examples).reshape(num_examples, -1, self.activations.shape[-1])

    def grads(self, grads: Tensor, layout: Layout, num_examples: int) -> Float[Tensor, "examples units positions"]:
        """Order the output gradients."""
        units_last = grads.mT if self.columns else grads
        return by_example(units_last, layout, num_examples).reshape(num_examples, -1, units_last.shape[-1]).mT


@dataclass(frozen=True, eq=False)
class TokenUse(OuterUse):
    """`y[..., t, :] = weight[token[t], :]`, times a gain where positions are summed into a bag."""

    transposed: bool = True
    tokens: Int[Tensor, "..."] = field(kw_only=True)
    gains: Float[Tensor, "bags positions"] | None = None  # bags: the output has no position axis
    ignored: int = -1  # the token that has no gradient

    def fits(self, layout: Layout, shape: tuple[int, ...], num_examples: int) -> bool:
        """Keep the example axis apart from the units: see `Use.fits`."""
        return allows(layout, shape, num_examples) and not (layout is Layout.SECOND and len(shape) < 3)

    def inputs(self, layout: Layout, num_examples: int) -> Int[Tensor, "examples positions"]:
        """View the tokens."""
        return by_example(self.tokens, layout, num_examples).reshape(num_examples, -1)

    def grads(self, grads: Tensor, layout: Layout, num_examples: int) -> Float[Tensor, "examples units positions"]:
        """Order the output gradients, zero at the ignored token."""
        per_token = grads[..., None, :] * self.gains[..., None].to(grads) if self.gains is not None else grads
        if self.ignored >= 0:
            per_token = per_token.masked_fill((self.tokens == self.ignored)[..., None], 0.0)
        return by_example(per_token, layout, num_examples).reshape(num_examples, -1, grads.shape[-1]).mT

    def rows(self, grads: Tensor, layout: Layout, num_examples: int, inputs: Tensor | None = None) -> Float[Tensor, "examples columns"]:
        """Form the gradient over the whole vocabulary; only for tables that a model also uses in ways without factors."""
        factor = self.grads(grads, layout, num_examples)
        tokens = self.inputs(layout, num_examples) if inputs is None else inputs
        table = factor.new_zeros(num_examples, self.weight.shape[0], factor.shape[1])
        return table.scatter_add_(1, tokens[:, :, None].expand(-1, -1, factor.shape[1]), factor.mT).flatten(1)


@dataclass(frozen=True, eq=False)
class ScaleUse(Use):
    """`dy/dw = multiplier`, elementwise with broadcasting: additive and multiplicative parameters, biases, norms."""

    shape: tuple[int, ...] = ()  # the weight's shape as it is broadcast, right-aligned with the output
    multiplier: Tensor | float = 1.0

    def fits(self, layout: Layout, shape: tuple[int, ...], num_examples: int) -> bool:
        """Require that the weight is the same for all examples: see `Use.fits`."""
        axis = 1 if layout is Layout.SECOND else 0
        return allows(layout, shape, num_examples) and len(self.shape) <= len(shape) and self._padded(len(shape))[axis] == 1

    def rows(self, grads: Tensor, layout: Layout, num_examples: int, inputs: Tensor | None = None) -> Float[Tensor, "examples columns"]:
        """Sum the gradients over what the weight is broadcast along, but not over examples."""
        multiplier = self.multiplier
        products = grads * (multiplier.to(grads) if isinstance(multiplier, Tensor) else multiplier)
        parts = by_example(products, layout, num_examples)  # [examples, positions, the axes that are left]
        padded = self._padded(products.ndim)
        # Without the example axis; the folded axis, or the one that by_example added, is summed over.
        kept = (padded[0], *padded[2:]) if layout is Layout.SECOND else (1, *padded[1:])
        summed = [axis + 1 for axis, size in enumerate(kept) if size == 1]
        return (parts.sum(dim=summed) if summed else parts).reshape(num_examples, -1)

    def _padded(self, ndim: int) -> tuple[int, ...]:
        return (1,) * (ndim - len(self.shape)) + tuple(self.shape)


@dataclass(frozen=True)
class Seen:
    """What a rule returns: the call's result, and the uses of weights in it, all with respect to `output`."""

    result: Any
    output: Tensor | None = None  # None: inner calls have recorded everything
    uses: tuple[Use, ...] = ()


def bind(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name the arguments of a torch function, which has no signature to ask.

    Args:
        names: Positional arguments in order.
        args: Given by position.
        kwargs: Given by name.

    Returns:
        Arguments by name, None where not given.
    """
    return dict.fromkeys(names) | dict(zip(names, args, strict=False)) | dict(kwargs)
