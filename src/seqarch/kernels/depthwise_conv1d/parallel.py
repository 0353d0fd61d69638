r"""The depthwise convolution in PyTorch: loop over the taps instead of over time.

All steps need tap i of an input that lies equally far away, so one tap is one multiply-add of the whole sequence with a
shifted view of itself: k calls instead of T, and no copy of x is made. (An unfolded copy would be k times as large.)

The gradients are shifted products too (equations in `depthwise_conv1d`): that of x is the same function with shift and
dilation negated, that of a tap is the product of the output's gradient with the view that the tap was multiplied with,
summed over time. Left to itself, autograd would keep every partial sum; here x and w are all that is kept.

Long sequences are worked off in blocks of time that fit a CPU's cache, with all taps of a block in turn.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .._dispatch import accumulate_dtype

BLOCK = 2**19  # elements of x in one block


def _shifts(x: Tensor, taps: int, dilation: int, shift: int, steps: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield (i, where, source): outputs `where` take tap i of inputs `source`, block by block of the output."""
    B, T, D = x.shape
    block = max(1, BLOCK // max(1, B * D))
    for start in range(0, steps, block):
        stop = min(start + block, steps)
        for i in range(taps):
            away = shift - i * dilation  # output t takes input t + away, as long as that lies within 0..T-1
            first, last = max(start, -away), min(stop, T - away)
            if first < last:
                yield i, slice(first, last), slice(first + away, last + away)


def shift_and_add(x: Tensor, w: Tensor, bias: Tensor | None, dilation: int, shift: int, steps: int) -> Tensor:
    """The convolution of ``reference.py`` without its activation and without autograd; taps w ``(k, D)``."""
    y = x.new_zeros(x.shape[0], steps, x.shape[2])
    if bias is not None:
        y += bias
    for i, where, source in _shifts(x, len(w), dilation, shift, steps):
        y[:, where].addcmul_(x[:, source], w[i])
    return y


class _DepthwiseConv(torch.autograd.Function):
    """Shift and add, and its gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, bias: Tensor | None, dilation: int, shift: int, steps: int) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.sizes, ctx.bias_dtype = (dilation, shift, steps), None if bias is None else bias.dtype
        dtype = accumulate_dtype(x.dtype)
        taps = w.to(dtype).T.contiguous()  # the taps of one step side by side: a row is multiplied with a row
        return shift_and_add(x.to(dtype), taps, None if bias is None else bias.to(dtype), *ctx.sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, w = ctx.saved_tensors
        dilation, shift, steps = ctx.sizes
        taps, wide = w.to(g.dtype).T.contiguous(), x.to(g.dtype)
        grad_x = shift_and_add(g, taps, None, -dilation, -shift, x.shape[1])
        grad_w = torch.zeros_like(taps)
        for i, where, source in _shifts(x, len(taps), dilation, shift, steps):
            grad_w[i] += (g[:, where] * wide[:, source]).sum((0, 1))
        grad_bias = None if ctx.bias_dtype is None else g.sum((0, 1)).to(ctx.bias_dtype)
        return grad_x.to(x.dtype), grad_w.T.to(w.dtype), grad_bias, None, None, None


def depthwise_conv1d_parallel(
    x: Tensor, w: Tensor, bias: Tensor | None, dilation: int, shift: int, steps: int, activation: str | None
) -> Tensor:
    """All steps at once, with the gradient written by hand; arguments as in `depthwise_conv1d_reference`."""
    y = _DepthwiseConv.apply(x, w, bias, dilation, shift, steps)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)
