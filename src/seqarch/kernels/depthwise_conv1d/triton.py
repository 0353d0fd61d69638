r"""The depthwise convolution on a GPU: one program owns a tile of time steps and channels of one sequence.

Channels lie side by side in memory, so a tile is read in whole lines, and shifting it in time only moves the starting
address. The k shifted tiles of a program overlap; all but the first come out of the cache, and main memory sees x once.

The backward pass is one kernel as well. A program owns a tile of *inputs* $x_j$ and walks over the taps. The one shifted
tile $g_{j-s+i\delta}$ of the output's gradient serves two sums:

$$\partial x_j \mathrel{+}= w_i \odot g_{j-s+i\delta},\qquad
  \partial w_i \text{ (share of this tile)} = \sum_j x_j \odot g_{j-s+i\delta} .$$

Shares of the taps' gradient go to a buffer with one row per program and are added outside, in a fixed order: no atomics,
and two runs give the same bits. With SiLU, the gradient of its argument is needed at k different places by k programs;
it is formed once, before, by the forward kernel: it computes the argument again and multiplies instead of activating.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T, BLOCK_D, WARPS = 64, 64, 8
LINEAR, SILU, SILU_GRADIENT = 0, 1, 2  # what the forward kernel does with the sums


@triton.jit
def _tile(base, row, first, i, T, d, D):
    # steps first + i of a (B, T, D) tensor, [BT, BD]; 0 outside. Only the corner of the tile needs a 64-bit offset.
    corner = base + (row.to(tl.int64) * T + first) * D
    live = ((first + i >= 0) & (first + i < T))[:, None] & (d < D)[None, :]
    return tl.load(corner + i[:, None] * D + d[None, :], mask=live, other=0.0).to(tl.float32)


@triton.jit
def _put(base, row, first, i, T, d, D, value):
    corner = base + (row.to(tl.int64) * T + first) * D
    live = (first + i < T)[:, None] & (d < D)[None, :]
    tl.store(corner + i[:, None] * D + d[None, :], value.to(base.dtype.element_ty), mask=live)


@triton.jit
def _convolve(
    x, w, bias, grad, y, T, D, K, dilation, shift, steps,
    BIAS: tl.constexpr, FINISH: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Outputs of one tile; with FINISH = 2 the gradient of the sums, from that of their SiLU."""
    tiles = tl.cdiv(steps, BT)
    row, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BT
    i, d = tl.arange(0, BT), tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros((BT, BD), tl.float32)
    if BIAS:
        total += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    for k in range(K):
        tap = tl.load(w + k * D + d, mask=d < D, other=0.0).to(tl.float32)
        total += tap[None, :] * _tile(x, row, first + shift - k * dilation, i, T, d, D)
    if FINISH > 0:
        gate = tl.sigmoid(total)
        if FINISH == 1:
            total *= gate
        else:  # silu'(u) = sigmoid(u) (1 + u (1 - sigmoid(u)))
            total = _tile(grad, row, first, i, steps, d, D) * gate * (1 + total * (1 - gate))
    _put(y, row, first, i, steps, d, D, total)


@triton.jit
def _gradient(
    x, w, grad, grad_x, share_w, share_b, T, D, K, dilation, shift, steps,
    BIAS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of inputs, and this tile's share of the gradients of taps and bias."""
    tiles = tl.cdiv(T, BT)
    row, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BT
    i, d = tl.arange(0, BT), tl.program_id(1) * BD + tl.arange(0, BD)
    program = tl.program_id(0).to(tl.int64)
    own, total = _tile(x, row, first, i, T, d, D), tl.zeros((BT, BD), tl.float32)
    for k in range(K):
        tap = tl.load(w + k * D + d, mask=d < D, other=0.0).to(tl.float32)
        g = _tile(grad, row, first - shift + k * dilation, i, steps, d, D)
        total += tap[None, :] * g
        tl.store(share_w + (program * K + k) * D + d, tl.sum(own * g, axis=0), mask=d < D)
    if BIAS:
        g = _tile(grad, row, first, i, steps, d, D)
        tl.store(share_b + program * D + d, tl.sum(g, axis=0), mask=d < D)
    _put(grad_x, row, first, i, T, d, D, total)


def _run(
    x: Tensor, taps: Tensor, bias: Tensor | None, grad: Tensor, sizes: tuple[int, int, int], finish: int
) -> Tensor:
    """Launch the forward kernel; taps ``(k, D)``, sizes are dilation, shift and steps."""
    B, T, D = x.shape
    steps = sizes[2]
    y = torch.empty(B, steps, D, dtype=x.dtype, device=x.device)
    grid = (B * triton.cdiv(steps, BLOCK_T), triton.cdiv(D, BLOCK_D))
    blocks = dict(BIAS=bias is not None, FINISH=finish, BT=BLOCK_T, BD=BLOCK_D, num_warps=WARPS)
    # a pointer that is never read stands in for an absent bias
    _convolve[grid](x, taps, taps if bias is None else bias.contiguous(), grad, y, T, D, len(taps), *sizes, **blocks)
    return y


@torch.library.custom_op("seqarch::depthwise_conv1d", mutates_args=())
def _depthwise_conv1d(
    x: Tensor, w: Tensor, bias: Tensor | None, dilation: int, shift: int, steps: int, silu: bool
) -> Tensor:
    x = x.contiguous()
    return _run(x, w.T.contiguous(), bias, x, (dilation, shift, steps), SILU if silu else LINEAR)


@_depthwise_conv1d.register_fake
def _(x, w, bias, dilation, shift, steps, silu):
    return x.new_empty(x.shape[0], steps, x.shape[2])


@torch.library.custom_op("seqarch::depthwise_conv1d_backward", mutates_args=())
def _depthwise_conv1d_backward(
    x: Tensor, w: Tensor, bias: Tensor | None, grad: Tensor, dilation: int, shift: int, steps: int, silu: bool
) -> list[Tensor]:
    x, taps, grad, sizes = x.contiguous(), w.T.contiguous(), grad.contiguous(), (dilation, shift, steps)
    if silu:
        grad = _run(x, taps, bias, grad, sizes, SILU_GRADIENT)
    B, T, D = x.shape
    programs = B * triton.cdiv(T, BLOCK_T)
    grad_x = torch.empty_like(x)
    share_w = torch.empty(programs, *taps.shape, dtype=torch.float32, device=x.device)
    share_b = torch.empty(programs if bias is not None else 0, D, dtype=torch.float32, device=x.device)
    grid = (programs, triton.cdiv(D, BLOCK_D))
    blocks = dict(BIAS=bias is not None, BT=BLOCK_T, BD=BLOCK_D, num_warps=WARPS)
    _gradient[grid](x, taps, grad, grad_x, share_w, share_b, T, D, len(taps), *sizes, **blocks)
    grad_w = share_w.sum(0).T.contiguous().to(w.dtype)
    return [grad_x, grad_w, share_b.sum(0).to(torch.float32 if bias is None else bias.dtype)]


@_depthwise_conv1d_backward.register_fake
def _(x, w, bias, grad, dilation, shift, steps, silu):
    grad_b = x.new_empty(x.shape[2], dtype=torch.float32 if bias is None else bias.dtype)
    return [*(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, w)), grad_b]


def _setup_context(ctx, inputs, output):
    x, w, bias, *ctx.sizes = inputs
    ctx.save_for_backward(x, w, bias)


def _backward(ctx, grad):
    x, w, bias = ctx.saved_tensors
    grad_x, grad_w, grad_b = _depthwise_conv1d_backward(x, w, bias, grad, *ctx.sizes)
    return grad_x, grad_w, None if bias is None else grad_b, None, None, None, None


_depthwise_conv1d.register_autograd(_backward, setup_context=_setup_context)


def depthwise_conv1d_triton(
    x: Tensor, w: Tensor, bias: Tensor | None, dilation: int, shift: int, steps: int, activation: str | None
) -> Tensor:
    """Forward and backward by the kernels above; arguments as in `depthwise_conv1d_reference`."""
    return _depthwise_conv1d(x, w, bias, dilation, shift, steps, activation == "silu")
