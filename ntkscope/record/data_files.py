"""Inputs and targets from tables and from folders of images."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkscope._checks import InputError, UnsupportedError

try:
    from PIL import Image
except ImportError:
    Image = None

TARGET_NAMES = ("target", "targets", "label", "labels", "class", "y")
GREY_MODES = ("1", "L", "I;16", "LA")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def read_csv(path: Path) -> tuple[Tensor, Tensor]:
    """Read a table: a head, then one example a row, all columns numbers but for the target.

    Args:
        path: A .csv file, UTF-8.

    Returns:
        Inputs, float32, shape (n, columns - 1); targets: the column named target, label, class or y, else the last. Whole numbers are
        classes (int64), other numbers values (float32, shape (n, 1)), texts classes in alphabetical order.

    Raises:
        InputError: If there is no such file, no row, rows of different lengths, or a cell that is no number.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            rows = [row for row in csv.reader(handle) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path} cannot be read as a table: {error}. Give a .csv file in UTF-8 with a head and one example a row."
        ) from error
    if len(rows) < 2 or len(rows[0]) < 2:
        raise InputError(f"{path} has no example: it needs a head and rows below it, with at least one input column and the target.")
    head, body = [name.strip() for name in rows[0]], rows[1:]
    for number, row in enumerate(body, start=2):
        if len(row) != len(head):
            raise InputError(
                f"{path}, row {number} has {len(row)} cells, the head has {len(head)}. Give every row a cell for every column."
            )
    lowered = [name.lower() for name in head]
    target = next((lowered.index(name) for name in TARGET_NAMES if name in lowered), len(head) - 1)
    columns = [k for k in range(len(head)) if k != target]
    inputs = np.empty((len(body), len(columns)), dtype=np.float32)
    for i, row in enumerate(body):
        for j, k in enumerate(columns):
            try:
                inputs[i, j] = float(row[k])
            except ValueError:
                raise InputError(
                    f"{path}, row {i + 2}, column {head[k]!r}: {row[k]!r} is no number. Encode texts as numbers first; "
                    f"the target is column {head[target]!r} (name it `target` to choose another)."
                ) from None
    return torch.from_numpy(inputs), _targets([row[target].strip() for row in body])


def _targets(texts: Sequence[str]) -> Tensor:
    """Turn a column of targets into classes or values."""
    try:
        numbers = np.array([float(text) for text in texts])
    except ValueError:
        classes = {name: k for k, name in enumerate(sorted(set(texts)))}
        return torch.tensor([classes[text] for text in texts])
    if np.isfinite(numbers).all() and (numbers == np.round(numbers)).all() and (numbers >= 0).all():
        return torch.from_numpy(numbers.astype(np.int64))
    return torch.from_numpy(numbers.astype(np.float32))[:, None]


def read_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Read a folder with one folder of images for each class.

    Args:
        folder: `folder/<class>/<image>`; classes and images in alphabetical order.

    Returns:
        Inputs in [0, 1], float32, shape (n, channels, height, width), one channel where all images are grey, else three; targets: classes.

    Raises:
        InputError: If there are no images, or they differ in size.
        UnsupportedError: If Pillow is not installed.
    """
    if Image is None:
        raise UnsupportedError("Reading images needs Pillow: pip install pillow, or save the tensors as .npz with `inputs` and `targets`.")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = [(path, k) for k, place in enumerate(classes) for path in sorted(place.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise InputError(f"{folder} holds no images. Put those of each class in a folder of their own, for example {folder}/cat/1.png.")
    pictures = []
    for path, _ in files:
        try:
            with Image.open(path) as opened:
                pictures.append(opened.convert("L" if opened.mode in GREY_MODES else "RGB"))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{path} is no image that Pillow reads: {error}. Remove it, or save it again.") from error
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        (path, _), picture = next(
            (file, picture) for file, picture in zip(files, pictures, strict=True) if picture.size != pictures[0].size
        )
        raise InputError(
            f"The images in {folder} differ in size: {files[0][0].name} has {_size(pictures[0])}, {path.name} has {_size(picture)}. "
            "Resize them to the size that the model was trained on."
        )
    mode = "L" if all(picture.mode == "L" for picture in pictures) else "RGB"
    arrays = [np.asarray(picture.convert(mode), dtype=np.float32) / 255 for picture in pictures]
    stacked = torch.from_numpy(np.stack([array[None] if mode == "L" else array.transpose(2, 0, 1) for array in arrays]))
    return stacked, torch.tensor([label for _, label in files])


def _size(picture: Any) -> str:
    """Write an image's size."""
    return f"{picture.width} x {picture.height}"
