"""The segment sum on a GPU: one program owns one segment and a block of columns.

The rows are sorted by segment first, ties kept in order: not the rows themselves, only their numbers. A program then
reads the rows of its segment, BM at a time, through these numbers, and keeps BM partial sums that it adds up at the end.
Every sum has one owner: no atomics, and two runs agree bit for bit. A segment with most of the rows keeps one program
busy for long; the primitive is meant for many segments of moderate size.

The gradient is a gather, which PyTorch does at the speed of memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .parallel import in_order

ROWS = 16


@triton.jit
def _sum(values, order, starts, sums, D, BM: tl.constexpr, BD: tl.constexpr):
    """Add up the rows order[starts_i : starts_(i+1)] of segment i, BD columns of them."""
    segment = tl.program_id(0).to(tl.int64)
    m, d = tl.arange(0, BM), tl.program_id(1) * BD + tl.arange(0, BD)
    low, high = tl.load(starts + segment), tl.load(starts + segment + 1)
    total = tl.zeros((BM, BD), tl.float32)
    for first in range(low, high, BM):
        live = first + m < high
        row = tl.load(order + first + m, mask=live, other=0)
        inside = live[:, None] & (d < D)[None, :]
        total += tl.load(values + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    out = tl.sum(total, axis=0)
    tl.store(sums + segment * D + d, out.to(sums.dtype.element_ty), mask=d < D)


@torch.library.custom_op("seqarch::segment_sum", mutates_args=())
def _segment_sum(values: Tensor, index: Tensor, n: int) -> Tensor:
    D = values.shape[1]
    order, starts = in_order(index, n)
    sums = values.new_empty(n, D)
    width = min(64, max(16, triton.next_power_of_2(D)))
    _sum[(n, triton.cdiv(D, width))](values.contiguous(), order, starts, sums, D, BM=ROWS, BD=width)
    return sums


@_segment_sum.register_fake
def _(values, index, n):
    return values.new_empty(n, values.shape[1])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _gradient(ctx, g):
    (index,) = ctx.saved_tensors
    return g.index_select(0, index), None, None


_segment_sum.register_autograd(_gradient, setup_context=_setup_context)


def segment_sum_triton(values: Tensor, index: Tensor, n: int) -> Tensor:
    """Sum by the kernel above; shapes as in `segment_sum`."""
    return _segment_sum(values, index, n)
