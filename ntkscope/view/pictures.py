"""Small pictures of inputs, as data URIs."""

import math

import plotly.express as px
import torch
from torch import Tensor

LARGEST_SIDE = 32  # pixels: ten of them stay below 50 kB


def picture_uri(pixels: Tensor) -> str:
    """Turn an input into a PNG inside a data URI.

    Args:
        pixels: uint8, height x width x channels (1 or 3); larger ones are averaged down to 32 pixels a side.

    Returns:
        The URI.
    """
    factor = math.ceil(max(pixels.shape[:2]) / LARGEST_SIDE)
    if factor > 1:
        small = torch.nn.functional.avg_pool2d(pixels.permute(2, 0, 1).float(), factor, ceil_mode=True)
        pixels = small.round().to(torch.uint8).permute(1, 2, 0)
    shown = pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels
    drawn = px.imshow(shown.contiguous().numpy(), binary_string=True, binary_backend="pypng", binary_compression_level=6, zmin=0, zmax=255)
    return drawn.to_dict()["data"][0]["source"]
