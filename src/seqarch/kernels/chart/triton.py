r"""Mixing candidates on a GPU: a program owns one row and keeps its K <= 64 scores and weights in registers.

Forward, a program computes the softmax of its row and $\sum_k w_k c_k$ for a block of columns; the blocks of one row repeat the
softmax, which costs K numbers against K x BD. Backward, one program per row walks over the columns once: it writes
$\partial c_k = w_k \bar e$ and adds up $\langle \bar e, c_k \rangle$, from which $\partial t$ follows (equation in
`softmax_mix`).

With an index, the numbers of the candidates are read first and the candidates then from where they lie, and their
gradients go back there. No candidate occurs twice, so every gradient has one writer: no atomics, and two runs agree bit
for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 2048  # of c that a program holds at a time


@triton.jit
def _places(mask, index, row, k, K, MASKED: tl.constexpr, INDEXED: tl.constexpr):
    # where the candidates of a row lie, and which of them exist
    at = row.to(tl.int64) * K + k
    live = k < K
    if MASKED:
        live = live & (tl.load(mask + at, mask=live, other=0) != 0)
    if INDEXED:
        at = tl.load(index + at, mask=live, other=-1)
        live = live & (at >= 0)
    return at, live


@triton.jit
def _mix(
    t, c, mask, index, e, s, w, K, d,
    MASKED: tl.constexpr, INDEXED: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The softmax of one row, and BD columns of the mixture."""
    row, block = tl.program_id(0), tl.program_id(1)
    k, f = tl.arange(0, BK), block * BD + tl.arange(0, BD)
    at, live = _places(mask, index, row, k, K, MASKED, INDEXED)
    scores = tl.load(t + at, mask=live, other=float("-inf"))
    live = live & (scores > float("-inf"))
    top = tl.max(scores, axis=0)
    x = tl.exp(scores - tl.where(top == float("-inf"), float("inf"), top))  # nothing there: exp(-inf), never nan
    total = tl.sum(x, axis=0)
    weights = x / tl.where(total > 0, total, 1.0)
    vectors = tl.load(c + at[:, None] * d + f[None, :], mask=live[:, None] & (f < d)[None, :], other=0.0)
    mixed = tl.sum(weights[:, None] * vectors.to(tl.float32), axis=0)
    tl.store(e + row.to(tl.int64) * d + f, mixed.to(e.dtype.element_ty), mask=f < d)
    if block == 0:
        mean = tl.sum(weights * tl.where(live, scores - top, 0.0), axis=0)
        tl.store(s + row, mean + tl.where(total > 0, top, 0.0))
        tl.store(w + row.to(tl.int64) * K + k, weights, mask=k < K)


@triton.jit
def _unmix(
    t, c, mask, index, w, grad_e, grad_s, grad_w, dt, dc, K, d,
    MASKED: tl.constexpr, INDEXED: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores and candidates of one row."""
    row = tl.program_id(0)
    k = tl.arange(0, BK)
    at, live = _places(mask, index, row, k, K, MASKED, INDEXED)
    here = row.to(tl.int64) * K + k
    weights = tl.load(w + here, mask=live, other=0.0)
    kept = live & (weights > 0)  # others may hold anything; their gradients are 0
    g = tl.load(grad_w + here, mask=kept, other=0.0)
    for start in range(0, d, BD):
        f = start + tl.arange(0, BD)
        to = at[:, None] * d + f[None, :]
        grads = tl.load(grad_e + row.to(tl.int64) * d + f, mask=f < d, other=0.0).to(tl.float32)
        vectors = tl.load(c + to, mask=kept[:, None] & (f < d)[None, :], other=0.0).to(tl.float32)
        g += tl.sum(vectors * grads[None, :], axis=1)
        spread = (weights[:, None] * grads[None, :]).to(dc.dtype.element_ty)
        tl.store(dc + to, spread, mask=live[:, None] & (f < d)[None, :])
    through_s = tl.load(grad_s + row)
    # a constant in all scores leaves the gradient as it is: with the largest taken off, no digits are lost
    scores = tl.load(t + at, mask=kept, other=float("-inf"))
    g += through_s * tl.where(kept, scores - tl.max(scores, axis=0), 0.0)
    change = weights * (g - tl.sum(weights * g, axis=0) + through_s)
    tl.store(dt + at, change, mask=live)


def _arguments(t: Tensor, c: Tensor, mask: Tensor | None, index: Tensor | None):
    """Contiguous inputs, the sizes R, K and d, and the compile-time settings of both kernels."""
    R, K = t.shape if index is None else index.shape
    width = triton.next_power_of_2(K)
    columns = min(128, NUMBERS // width)
    flags = dict(MASKED=mask is not None, INDEXED=index is not None, BK=width, BD=columns)
    # without a mask or an index their pointers are never read
    mask = t if mask is None else mask.contiguous().view(torch.uint8)
    index = t if index is None else index.contiguous()
    return (t.contiguous(), c.contiguous(), mask, index), (R, K, c.shape[-1]), flags


@torch.library.custom_op("seqarch::softmax_mix", mutates_args=())
def _softmax_mix(t: Tensor, c: Tensor, mask: Tensor | None, index: Tensor | None) -> list[Tensor]:
    tensors, (R, K, d), flags = _arguments(t, c, mask, index)
    e, s, w = c.new_empty(R, d), t.new_empty(R), t.new_empty(R, K)
    _mix[R, triton.cdiv(d, flags["BD"])](*tensors, e, s, w, K, d, **flags)
    return [e, s, w]


@_softmax_mix.register_fake
def _(t, c, mask, index):
    R, K = t.shape if index is None else index.shape
    return [c.new_empty(R, c.shape[-1]), t.new_empty(R), t.new_empty(R, K)]


@torch.library.custom_op("seqarch::softmax_mix_backward", mutates_args=())
def _softmax_mix_backward(
    t: Tensor, c: Tensor, mask: Tensor | None, index: Tensor | None,
    w: Tensor, grad_e: Tensor, grad_s: Tensor, grad_w: Tensor,
) -> list[Tensor]:  # fmt: skip
    tensors, (R, K, d), flags = _arguments(t, c, mask, index)
    dt, dc = torch.zeros_like(tensors[0]), torch.zeros_like(tensors[1])  # what no row uses keeps a gradient of 0
    grads = [g.contiguous() for g in (grad_e, grad_s, grad_w)]
    _unmix[R,](*tensors, w, *grads, dt, dc, K, d, **flags)
    return [dt, dc]


@_softmax_mix_backward.register_fake
def _(t, c, mask, index, w, grad_e, grad_s, grad_w):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (t, c)]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grads):
    t, c, mask, index, *outputs = ctx.saved_tensors
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, outputs, strict=True)]
    return (*_softmax_mix_backward(t, c, mask, index, outputs[2], *filled), None, None)


_softmax_mix.register_autograd(_backward, setup_context=_setup_context)


def softmax_mix_triton(
    t: Tensor, c: Tensor, mask: Tensor | None, index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward by the kernels above; shapes as in `softmax_mix`, t float32."""
    e, s, w = _softmax_mix(t, c, mask, index)
    return e, s, w
