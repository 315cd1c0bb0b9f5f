"""nn.Conv2d: any stride, dilation, padding mode and number of groups."""

import torch.nn.functional as F
from torch import Tensor, nn

from ntkscope.kernel.capture import LayerCall
from ntkscope.kernel.rules.factor import PositionFactor, bias_factor


class Conv2dRule:
    """A convolution is a Linear over unfolded patches, one position per output pixel, one weight slice per group."""

    def matches(self, module: nn.Module) -> bool:
        """Accept Conv2d, and subclasses that keep its forward pass.

        Args:
            module: A layer.

        Returns:
            Whether the rule applies.
        """
        return isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward

    def factors(self, call: LayerCall, output_grads: Tensor) -> dict[str, list[PositionFactor]]:
        """Factor one call.

        Args:
            call: What the layer saw; its input has shape `(examples, channels, height, width)`.
            output_grads: Shape `(classes, examples, units, height, width)`.

        Returns:
            Factors of `weight` (one per group) and `bias`.
        """
        conv = call.module
        assert isinstance(conv, nn.Conv2d)  # matches() said so
        padded = _pad(conv, call.input)
        grads = output_grads.flatten(3).permute(1, 0, 3, 2)  # [examples, classes, positions, units]
        units_per_group = conv.out_channels // conv.groups
        weight = []
        for group, channels in enumerate(padded.chunk(conv.groups, dim=1)):
            patches = F.unfold(channels, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
            units = slice(group * units_per_group, (group + 1) * units_per_group)
            weight.append(PositionFactor(units, patches.transpose(1, 2), grads[..., units]))
        return {"weight": weight, "bias": [bias_factor(grads)]}


def _pad(conv: nn.Conv2d, inputs: Tensor) -> Tensor:
    """Pad as the layer does: zeros, or its padding mode; "same" pads one more at the end where it must."""
    if conv.padding == "valid":
        return inputs
    if isinstance(conv.padding, str):  # "same"
        totals = [dilation * (size - 1) for dilation, size in zip(conv.dilation, conv.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(size, size) for size in conv.padding]
    (top, bottom), (left, right) = sides
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(inputs, (left, right, top, bottom), mode=mode)
