"""The definition of the segment sum: row after row onto its segment. Everything else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype


def segment_sum_reference(values: Tensor, index: Tensor, n: int) -> Tensor:
    """Walk over the rows and add each to its segment; autograd gives the gradient. Shapes as in `segment_sum`."""
    zero = values.new_zeros(values.shape[1], dtype=accumulate_dtype(values.dtype))
    sums = [zero] * n
    for row, segment in zip(values.unbind(0), index.tolist(), strict=True):
        sums[segment] = sums[segment] + row
    return (torch.stack(sums) if sums else values.new_zeros(0, values.shape[1])).to(values.dtype)
