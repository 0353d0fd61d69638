r"""The segment sum by PyTorch's own operations, chosen so that the same inputs always give the same bits.

On a CPU ``index_add_`` adds the rows one after another, in their order. On a GPU it adds them in whatever order its
threads arrive, and float addition is not associative: two runs differ. There the rows are sorted by segment first, ties
kept in order, and every segment is then one contiguous piece for ``segment_reduce``.

The sum is linear in the rows, with a matrix of zeros and ones; its transpose is a gather, which is the gradient:
$\partial x_j = \partial s_{\text{index}_j}$.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype


def in_order(index: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The rows' numbers sorted by segment, ``(M,)``, and where each segment starts among them, ``(n + 1,)``."""
    index, order = torch.sort(index, stable=True)
    return order, torch.searchsorted(index, torch.arange(n + 1, device=index.device))


class _SegmentSum(torch.autograd.Function):
    """The sum and its transpose, the gather."""

    @staticmethod
    def forward(ctx, values: Tensor, index: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(index)
        wide = values.to(accumulate_dtype(values.dtype))
        if values.is_cuda:
            order, starts = in_order(index, n)
            sums = torch.segment_reduce(wide[order], "sum", lengths=starts.diff(), unsafe=True, initial=0)
        else:
            sums = wide.new_zeros(n, wide.shape[1]).index_add_(0, index, wide)
        return sums.to(values.dtype)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return g.index_select(0, index), None, None


def segment_sum_parallel(values: Tensor, index: Tensor, n: int) -> Tensor:
    """Sum with its gather as gradient; shapes as in `segment_sum`."""
    return _SegmentSum.apply(values, index, n)
