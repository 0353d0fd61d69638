"""Handwritten digits as short sequences: eight rows of eight pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ._packages import require


@dataclass(frozen=True)
class Digits:
    """Images as sequences ``(N, 8, 8)`` in [0, 1], from the top row to the bottom one, and labels ``(N,)`` 0..9."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits(test: int | str = 500, seed: int = 0) -> Digits:
    """Return scikit-learn's 1,797 digits.

    Args:
        test: how many images to hold out at random, stratified by class; or ``"every-fifth"``, the images whose index is
            a multiple of five (360 of them).
        seed: of the random split.
    """
    source = require("sklearn.datasets", "scikit-learn").load_digits()
    x = torch.tensor(source.images / 16, dtype=torch.float32)
    y = torch.tensor(source.target, dtype=torch.long)
    if test == "every-fifth":
        held_out = torch.arange(len(x)) % 5 == 0
    elif isinstance(test, int) and 10 <= test < len(x) - 10:
        split = require("sklearn.model_selection", "scikit-learn").train_test_split
        _, chosen = split(np.arange(len(x)), test_size=test, random_state=seed, stratify=source.target)
        held_out = torch.zeros(len(x), dtype=torch.bool)
        held_out[torch.from_numpy(chosen)] = True
    else:
        raise ValueError(f"expected test to be a number from 10 to {len(x) - 11} or 'every-fifth', got {test!r}")
    return Digits(x[~held_out], y[~held_out], x[held_out], y[held_out])
