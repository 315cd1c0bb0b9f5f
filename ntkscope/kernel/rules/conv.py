"""Convolutions and transposed convolutions in one, two and three dimensions: any stride, dilation, padding and number of groups.

A convolution is a Linear over patches, one position per output pixel. Padding modes other than zeros pad before the call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ntkscope.kernel.layout import Layout, by_example
from ntkscope.kernel.rules.use import OuterUse, ScaleUse, Seen, Use, bind

if TYPE_CHECKING:
    from ntkscope.kernel.watch import WeightWatch


@dataclass(frozen=True, eq=False)
class Geometry:
    """How windows lie on an image."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # before and after, by axis
    dilation: tuple[int, ...]

    def patches(self, images: Tensor, groups: int, counts: Sequence[int] | None = None) -> Float[Tensor, "rows groups positions inputs"]:
        """Cut images into the windows that a convolution sees.

        Args:
            images: Shape `(rows, channels, *size)`.
            groups: Channels are split into so many.
            counts: Windows to keep along each axis, all if not given.

        Returns:
            One row per window, of `channels / groups * kernel` entries, channel slowest.
        """
        num_axes = len(self.kernel)
        windows = F.pad(images, [side for sides in reversed(self.padding) for side in sides])
        for axis, (size, step, gap) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            windows = windows.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
        for axis, count in enumerate(counts or ()):
            windows = windows.narrow(2 + axis, 0, count)
        windows = windows.unflatten(1, (groups, -1))  # [rows, groups, channels, *positions, *kernel]
        order = (0, 1, *range(3, 3 + num_axes), 2, *range(3 + num_axes, 3 + 2 * num_axes))
        ordered = windows.permute(order)
        return ordered.reshape(*ordered.shape[:2], ordered.shape[2 : 2 + num_axes].numel(), -1)


@dataclass(frozen=True, eq=False)
class ConvUse(OuterUse):
    """`y[row, u, t] = sum over k of weight[u, k] patch[row, t, k]`."""

    images: Tensor = field(kw_only=True)
    geometry: Geometry = field(kw_only=True)
    groups: int = 1

    def fits(self, layout: Layout, shape: tuple[int, ...], num_examples: int) -> bool:
        """Require batched images: see `Use.fits`."""
        is_batched = len(shape) == len(self.geometry.kernel) + 2
        return is_batched and layout is not Layout.SECOND and super().fits(layout, shape, num_examples)

    def inputs(self, layout: Layout, num_examples: int) -> Tensor:
        """Cut the patches."""
        patches = self.geometry.patches(self.images, self.groups)
        if self.rows_only:
            return patches
        return by_example(patches[:, 0], layout, num_examples).flatten(1, 2)

    def grads(self, grads: Tensor, layout: Layout, num_examples: int) -> Float[Tensor, "examples units positions"]:
        """Order the output gradients."""
        parts = by_example(grads.flatten(2), layout, num_examples)  # [examples, folded, units, pixels]
        return parts[:, 0] if parts.shape[1] == 1 else parts.transpose(1, 2).flatten(2)

    def rows(self, grads: Tensor, layout: Layout, num_examples: int, inputs: Tensor | None = None) -> Float[Tensor, "examples columns"]:
        """Form the gradient, group by group in one product."""
        if not self.rows_only:
            return super().rows(grads, layout, num_examples, inputs)
        patches = (self.inputs(layout, num_examples) if inputs is None else inputs).to(grads)
        by_group = grads.flatten(2).unflatten(1, (self.groups, -1))  # [rows, groups, units, positions]
        return by_example((by_group @ patches).flatten(1), layout, num_examples).sum(dim=1)


@dataclass(frozen=True, eq=False)
class ConvTransposeUse(ConvUse):
    """The adjoint of a convolution: images and output gradients change places, and the weight is [channels in, units, kernel]."""

    rows_only: bool = True

    def inputs(self, layout: Layout, num_examples: int) -> Tensor:
        """View the images, which take the place of a convolution's output gradients."""
        return self.images.flatten(2).unflatten(1, (self.groups, -1))

    def rows(self, grads: Tensor, layout: Layout, num_examples: int, inputs: Tensor | None = None) -> Float[Tensor, "examples columns"]:
        """Form the gradient: windows over the output gradients, weighted by the images."""
        images = (self.inputs(layout, num_examples) if inputs is None else inputs).to(grads)
        # A window that output_padding added lies on no input pixel.
        patches = self.geometry.patches(grads, self.groups, self.images.shape[2:])
        return by_example((images @ patches).flatten(1), layout, num_examples).sum(dim=1)


def convolution(watch: "WeightWatch", func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """F.conv1d, F.conv2d, F.conv3d."""
    given = bind(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, kwargs)
    output = func(*args, **kwargs)
    weight, groups = given["weight"], given["groups"] or 1
    uses: list[Use] = []
    if watch.is_weight(weight) and watch.is_data(given["input"]):
        kernel = tuple(weight.shape[2:])
        dilation = _per_axis(given["dilation"], kernel, default=1)
        geometry = Geometry(kernel, _per_axis(given["stride"], kernel, default=1), _sides(given["padding"], kernel, dilation), dilation)
        uses.append(ConvUse(weight, rows_only=groups > 1, images=given["input"].detach(), geometry=geometry, groups=groups))
    uses += _bias_use(watch, given["bias"])
    return Seen(output, output, tuple(uses))


def transposed_convolution(watch: "WeightWatch", func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Seen:
    """F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d."""
    given = bind(("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"), args, kwargs)
    output = func(*args, **kwargs)
    weight = given["weight"]
    uses: list[Use] = []
    if watch.is_weight(weight) and watch.is_data(given["input"]):
        kernel = tuple(weight.shape[2:])
        stride, dilation = _per_axis(given["stride"], kernel, default=1), _per_axis(given["dilation"], kernel, default=1)
        geometry = Geometry(kernel, stride, _sides(given["padding"], kernel, dilation), dilation)
        uses.append(ConvTransposeUse(weight, images=given["input"].detach(), geometry=geometry, groups=given["groups"] or 1))
    uses += _bias_use(watch, given["bias"])
    return Seen(output, output, tuple(uses))


def _bias_use(watch: "WeightWatch", bias: Any) -> list[Use]:
    """Describe a bias, one number per channel; its output is (rows, channels, *size)."""
    if not watch.is_weight(bias):
        return []
    return [ChannelUse(bias)]


@dataclass(frozen=True, eq=False)
class ChannelUse(Use):
    """A bias per channel, on the second axis of the output."""

    multiplier: Tensor | float = 1.0

    def _scale(self, ndim: int) -> ScaleUse:
        return ScaleUse(self.weight, shape=(self.weight.numel(), *(1,) * (ndim - 2)), multiplier=self.multiplier)

    def fits(self, layout: Layout, shape: tuple[int, ...], num_examples: int) -> bool:
        """Require a channel axis after the examples: see `Use.fits`."""
        return len(shape) > 1 and layout is not Layout.SECOND and self._scale(len(shape)).fits(layout, shape, num_examples)

    def rows(self, grads: Tensor, layout: Layout, num_examples: int, inputs: Tensor | None = None) -> Float[Tensor, "examples columns"]:
        """Sum over all but examples and channels."""
        return self._scale(grads.ndim).rows(grads, layout, num_examples)


def _per_axis(value: Any, kernel: tuple[int, ...], *, default: int) -> tuple[int, ...]:
    """Spell out one number for all axes."""
    if value is None:
        value = default
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(kernel) if len(values) == 1 else values


def _sides(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Spell out padding before and after every axis; "same" pads one more at the end where it must."""
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        totals = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((size, size) for size in _per_axis(padding, kernel, default=0))
