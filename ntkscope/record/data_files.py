"""Inputs and targets from tables and from folders of images."""

import csv
import logging
import math
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
LOGGER = logging.getLogger("ntkscope")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def read_csv(path: Path) -> tuple[Tensor, Tensor]:
    """Read a table: a head, then one example a row, all columns numbers but for the target.

    Args:
        path: A .csv file, UTF-8.

    Returns:
        Inputs, float32, shape (n, columns - 1); targets: the column named target, label, class or y, else the last. Whole numbers are
        classes (int64), other numbers values (float32, shape (n, 1)), texts classes in alphabetical order.

    Raises:
        InputError: If there is no such file, no head, no row, rows of different lengths, or a cell that is no number.
    """
    head, body, target = _read_table(path)
    columns = [k for k in range(len(head)) if k != target]
    inputs = np.empty((len(body), len(columns)), dtype=np.float32)
    for i, row in enumerate(body):
        for j, k in enumerate(columns):
            try:
                inputs[i, j] = _finite(row[k])
            except ValueError:
                raise InputError(
                    f"{path}, row {i + 2}, column {head[k]!r}: {row[k]!r} is no finite number. Encode texts and fill gaps first; "
                    f"the target is column {head[target]!r} (name it `target` to choose another)."
                ) from None
    texts = [row[target].strip() for row in body]
    _say_classes(path, _classes_of(texts))
    return torch.from_numpy(inputs), _targets(texts)


def _finite(text: str) -> float:
    """Read a finite number; ValueError for anything else."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _read_table(path: Path) -> tuple[list[str], list[list[str]], int]:
    """Read the head and the rows of a table, and find the column of the targets."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            rows = [row for row in csv.reader(handle) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path} cannot be read as a table: {error}. Give a .csv file in UTF-8 with a head and one example a row."
        ) from error
    if len(rows) < 2 or len(rows[0]) < 2:
        raise InputError(
            f"{path} has no example: it needs a head and rows below it, with at least one input column and the target, separated by commas."
        )
    head, body = [name.strip() for name in rows[0]], rows[1:]
    is_counted = head == [str(k) for k in range(len(head))]  # pandas names columns so that have no name
    if all(_is_number(name) for name in head) and not is_counted:
        raise InputError(f"{path} has numbers in its first row, where the names of the columns belong. Put a head above them.")
    for number, row in enumerate(body, start=2):
        if len(row) != len(head):
            raise InputError(
                f"{path}, row {number} has {len(row)} cells, the head has {len(head)}. Give every row a cell for every column."
            )
    lowered = [name.lower() for name in head]
    target = next((lowered.index(name) for name in TARGET_NAMES if name in lowered), len(head) - 1)
    return head, body, target


def _targets(texts: Sequence[str]) -> Tensor:
    """Turn a column of targets into classes or values."""
    names = _classes_of(texts)
    if names:
        classes = {name: k for k, name in enumerate(names)}
        return torch.tensor([classes[text] for text in texts])
    numbers = np.array([float(text) for text in texts])
    if np.isfinite(numbers).all() and (numbers == np.round(numbers)).all() and (numbers >= 0).all():
        return torch.from_numpy(numbers.astype(np.int64))
    return torch.from_numpy(numbers.astype(np.float32))[:, None]


def _classes_of(texts: Sequence[str]) -> list[str]:
    """Find the names of classes in a column of targets, by number; none where all are numbers."""
    return [] if all(_is_number(text) for text in texts) else sorted(set(texts))


def _is_number(text: str) -> bool:
    """Tell numbers from texts."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _say_classes(path: Path, names: Sequence[str]) -> None:
    """Say how classes were numbered: the model may number them otherwise."""
    if names:
        LOGGER.info("%s: classes by name: %s.", path, ", ".join(f"{k} is {name}" for k, name in enumerate(names)))


def check_same_classes(data: str, query: str) -> None:
    """Check that classes with names are the same in two sources, since each numbers its own.

    Args:
        data: SPEC of training examples.
        query: SPEC of held-out ones.

    Raises:
        InputError: If they differ.
    """
    names, others = (_named_classes(Path(spec)) for spec in (data, query))
    if names and others and names != others:
        raise InputError(
            f"{data} has the classes {', '.join(names)}, and {query} {', '.join(others)}; numbered by name in each, they would mix. "
            "Give both the same classes (for images, an empty folder will do), or number them yourself."
        )


def _named_classes(path: Path) -> list[str]:
    """Find the names of classes in a table or a folder of images; none in others."""
    if path.is_dir():
        return [folder.name for folder in _class_folders(path)]
    if path.suffix != ".csv":
        return []
    _, body, target = _read_table(path)
    return _classes_of([row[target].strip() for row in body])


def _class_folders(folder: Path) -> list[Path]:
    """List the folders of classes, by number."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


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
    classes = _class_folders(folder)
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
    _say_classes(folder, [place.name for place in classes])
    return stacked, torch.tensor([label for _, label in files])


def _size(picture: Any) -> str:
    """Write an image's size."""
    return f"{picture.width} x {picture.height}"
