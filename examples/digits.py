"""Handwritten digits for the CNN of digit-recognizer-py, in the form it was trained on: MNIST's.

    ntkscope analyze build/real/digit_recognizer/models/handwriting_model.pth --continue 100 --loss cross_entropy \
        --model build/real/digit_recognizer/model.py:CNN --data examples/digits.py:train --query examples/digits.py:held_out

The model needs no code of ours: its class is made without arguments.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels, from the package's recognizer.py
NUM_TRAIN, NUM_HELD_OUT, NUM_WRONG, SEED = 50, 25, 10, 0


def scans() -> tuple[Tensor, Tensor]:
    """Load scikit-learn's 1,797 scans of 8 x 8 pixels as MNIST has its digits: 20 pixels high, in the middle of 28 x 28, normalised."""
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]  # [n, 8, 8] -> [n, 1, 8, 8]
    x = F.pad(F.interpolate(x, size=(20, 20), mode="bicubic").clamp(0, 1), (4, 4, 4, 4))
    return (x - MEAN) / STD, torch.tensor(digits.target)


def train() -> tuple[Tensor, Tensor]:
    """Take digits to go on training with."""
    x, y = scans()
    kept = _order()[:NUM_TRAIN]
    return x[kept], y[kept]


def train_mislabeled() -> tuple[Tensor, Tensor]:
    """Take the same digits, a fifth of them with a wrong label: the first ten."""
    x, y = train()
    shifts = torch.randint(1, 10, (NUM_WRONG,), generator=torch.Generator().manual_seed(SEED))
    y[:NUM_WRONG] = (y[:NUM_WRONG] + shifts) % 10
    return x, y


def held_out() -> tuple[Tensor, Tensor]:
    """Take other digits."""
    x, y = scans()
    kept = _order()[NUM_TRAIN : NUM_TRAIN + NUM_HELD_OUT]
    return x[kept], y[kept]


def _order() -> Tensor:
    """Shuffle all scans, always alike."""
    return torch.randperm(len(load_digits().target), generator=torch.Generator().manual_seed(SEED))
