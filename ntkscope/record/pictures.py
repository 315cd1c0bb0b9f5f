"""Small pictures of a probe's inputs, kept in the trace so that a reader can look at the examples it points out."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from ntkscope._checks import InputError

MAX_SIDE = 32  # pixels
SMALLEST_SIDE = 8  # below which a tensor of the right number of axes is not taken for images unasked
GREY, COLOUR = 1, 3  # channels
CHUNK = 64  # examples scaled at once: a full-sized copy of all images would take several times their memory
MIDDLE = 0.5  # brightness of inputs that are all the same


def make_pictures(inputs: Any, image_shape: Sequence[int] | None = None) -> UInt8[Tensor, "examples height width channels"] | None:
    """Draw every input as a small picture, all with the same scale from the smallest value (black) to the largest (white).

    Without `image_shape` this is done where inputs are one floating-point or uint8 tensor of shape (n, 1 or 3, h, w) with sides of at
    least 8. Values that are not finite do not count for the scale; NaN is black. Pictures larger than 32 pixels a side are made smaller
    by averaging areas, smaller ones stay as they are.

    Args:
        inputs: Of the probe.
        image_shape: (height, width) or (height, width, channels), with 1 or 3 channels. Flat inputs are read as torch flattens images:
            channel after channel, in each row after row. Inputs of more axes are (n, h, w), (n, channels, h, w) or (n, h, w, channels).

    Returns:
        The pictures, on the CPU; None where inputs are no images.

    Raises:
        InputError: If `image_shape` is no shape of images, or does not fit the inputs.
    """
    images = _recognised(inputs) if image_shape is None else _shaped(inputs, _checked(image_shape))
    if images is None or not len(images):
        return None
    low, high = _range_of(images)
    return torch.cat([_draw(chunk.detach().double(), low, high) for chunk in images.split(CHUNK)])


def _recognised(inputs: Any) -> Tensor | None:
    """Take inputs as images if they can hardly be anything else."""
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or not (inputs.is_floating_point() or inputs.dtype == torch.uint8):
        return None
    return inputs if inputs.shape[1] in (GREY, COLOUR) and min(inputs.shape[2:]) >= SMALLEST_SIDE else None


def _checked(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """Check the shape of an image, and complete it."""
    shape = list(image_shape) if isinstance(image_shape, Sequence) else []
    is_sound = len(shape) in (2, 3) and all(isinstance(side, int) and side >= 1 for side in shape)
    if not is_sound or (len(shape) == 3 and shape[2] not in (GREY, COLOUR)):
        raise InputError(
            f"`image_shape` must be (height, width) or (height, width, channels) with 1 or 3 channels, got {image_shape!r}. "
            "For 28 by 28 grey images give (28, 28); leave it out if the inputs are no images."
        )
    return shape[0], shape[1], shape[2] if len(shape) == 3 else GREY


def _shaped(inputs: Any, shape: tuple[int, int, int]) -> Tensor:
    """View inputs as images, channels first."""
    height, width, channels = shape
    words = f"({height}, {width})" if channels == GREY else f"({height}, {width}, {channels})"
    if not isinstance(inputs, Tensor) or inputs.is_complex():
        found = f"a tensor of {inputs.dtype}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise InputError(
            f"`image_shape` {words} needs probe inputs that are one tensor of real numbers, got {found}. "
            "Leave `image_shape` out: pictures are drawn of single tensors only."
        )
    rows = tuple(inputs.shape[1:])
    if rows in ((height * width * channels,), (channels, height, width)) or (channels == GREY and rows == (height, width)):
        return inputs.reshape(-1, channels, height, width)
    if rows == (height, width, channels):
        return inputs.permute(0, 3, 1, 2)
    raise InputError(
        f"`image_shape` {words} means {height * width * channels} numbers an example, but the probe's inputs have shape {rows} each. "
        f"Expected ({height * width * channels},), ({channels}, {height}, {width}) or ({height}, {width}, {channels}): "
        "give the shape that the images have, or leave `image_shape` out."
    )


def _range_of(images: Tensor) -> tuple[float, float]:
    """Find the smallest and the largest finite value; (0, 0) if there is none."""
    ends = []
    for chunk in images.split(CHUNK):
        finite = chunk.detach().double()
        finite = finite[torch.isfinite(finite)]
        if finite.numel():
            ends.extend([float(finite.min()), float(finite.max())])
    return (min(ends), max(ends)) if ends else (0.0, 0.0)


def _draw(images: Tensor, low: float, high: float) -> UInt8[Tensor, "examples height width channels"]:
    """Scale and shrink some images."""
    # Halves: the difference of the largest numbers would overflow.
    span = high / 2 - low / 2
    finite = images.nan_to_num(nan=low, posinf=high, neginf=low)
    bright = (finite / 2 - low / 2) / span if span > 0 else torch.full_like(images, MIDDLE)
    height, width = images.shape[2:]
    larger = max(height, width)
    if larger > MAX_SIDE:
        small = (max(1, round(height * MAX_SIDE / larger)), max(1, round(width * MAX_SIDE / larger)))
        bright = torch.nn.functional.adaptive_avg_pool2d(bright, small)
    return (255 * bright).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
