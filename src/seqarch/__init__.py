"""The package behind the book Sequence Architectures from Scratch.

`setup` starts a chapter. The rest is imported by name: `seqarch.kernels`, `seqarch.layers`, `seqarch.data`,
`seqarch.training`, `seqarch.explore`, `seqarch.figures`, `seqarch.claims`, `seqarch.exercises`.
"""

from __future__ import annotations

import os
import random

# On Linux, let PyTorch back large CPU tensors with 2 MB pages: mapping fresh memory 4 kB at a time costs more than
# most of the arithmetic in this book. PyTorch reads this when it first allocates a large tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch

__version__ = "0.1.0"
__all__ = ["seed_everything", "setup"]


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators (all devices)."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  some data packages draw from the global generator
    torch.manual_seed(seed)


def setup(seed: int = 0) -> torch.device:
    """Start a chapter: seed everything, register the plotly template, and return the device to compute on."""
    from .figures import register_template

    seed_everything(seed)
    register_template()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
