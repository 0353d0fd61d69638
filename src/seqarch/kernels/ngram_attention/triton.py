r"""N-gram attention on a GPU: tiles of the matrix A are made of integer comparisons where attention has scores.

A program owns one sequence, BT positions and BD columns. It walks over the earlier positions BT at a time, forms the tile of
A by n comparisons of tokens, and adds its product with a tile of h. The time is quadratic in T but the memory is not: no
tile is ever stored, and the tokens stay in the cache. The conditions $n \le j < i < T$ keep n-grams inside the sequence
without a special token for what is outside.

The gradient $\partial h_j = \sum_i A_{ij}\, \partial o_i / \max(1, c_i)$ swaps the roles: a program owns positions j and
walks over the later ones. Its tiles of A are formed transposed. Every sum has one owner: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import dot_options


@triton.jit
def _matches(ids, i, j, n, T):
    """The entries A_ij; i and j run along different axes."""
    same = (j >= n) & (j < i) & (i < T)
    for r in range(0, n):
        now = tl.load(ids + i - r, mask=(i >= r) & (i < T), other=0)
        then = tl.load(ids + j - 1 - r, mask=(j > r) & (j < T), other=0)
        same = same & (now == then)
    return same


@triton.jit
def _average(
    ids, h, out, count, n, T, D,
    BT: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i and count_i for BT positions i and BD columns."""
    tiles = tl.cdiv(T, BT)
    row, first = (tl.program_id(0) // tiles).to(tl.int64) * T, tl.program_id(0) % tiles * BT
    t, d = tl.arange(0, BT), tl.program_id(1) * BD + tl.arange(0, BD)
    i = first + t
    total, found = tl.zeros((BT, BD), tl.float32), tl.zeros((BT,), tl.int32)
    for start in range(n // BT * BT, first + BT, BT):
        j = start + t
        same = _matches(ids + row, i[:, None], j[None, :], n, T)
        inside = (j < T)[:, None] & (d < D)[None, :]
        vectors = tl.load(h + (row + j)[:, None] * D + d[None, :], mask=inside, other=0.0)
        total = tl.dot(same.to(DOT), vectors.to(DOT), total, input_precision=PRECISION)
        found += tl.sum(same.to(tl.int32), axis=1)
    total = total / tl.maximum(found, 1).to(tl.float32)[:, None]
    inside = (i < T)[:, None] & (d < D)[None, :]
    tl.store(out + (row + i)[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(count + row + i, found, mask=i < T)


@triton.jit
def _spread(
    ids, g, count, dh, n, T, D,
    BT: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dh_j for BT positions j and BD columns."""
    tiles = tl.cdiv(T, BT)
    row, first = (tl.program_id(0) // tiles).to(tl.int64) * T, tl.program_id(0) % tiles * BT
    t, d = tl.arange(0, BT), tl.program_id(1) * BD + tl.arange(0, BD)
    j = first + t
    total = tl.zeros((BT, BD), tl.float32)
    for start in range(first, T, BT):
        i = start + t
        same = _matches(ids + row, i[None, :], j[:, None], n, T)
        inside = (i < T)[:, None] & (d < D)[None, :]
        grads = tl.load(g + (row + i)[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        found = tl.load(count + row + i, mask=i < T, other=1)
        grads = grads / tl.maximum(found, 1).to(tl.float32)[:, None]
        total = tl.dot(same.to(DOT), grads.to(DOT), total, input_precision=PRECISION)
    inside = (j < T)[:, None] & (d < D)[None, :]
    tl.store(dh + (row + j)[:, None] * D + d[None, :], total.to(dh.dtype.element_ty), mask=inside)


def _grid(h: Tensor, backward: bool = False) -> tuple[tuple[int, int], dict]:
    """The launch grid (tiles of positions, blocks of columns) and the constants."""
    B, T, D = h.shape
    # a gradient divided by a large count can be below the range of float16: it is multiplied in TF32, whose digits it has
    wide = backward and h.dtype == torch.float16
    options = {"DOT": tl.float32, "PRECISION": "tf32"} if wide else dot_options(h.dtype)
    side = 32 if wide or h.dtype == torch.float32 else 64
    width = min(64, max(16, triton.next_power_of_2(D)))  # tl.dot wants at least 16 columns
    return (B * triton.cdiv(T, side), triton.cdiv(D, width)), {"BT": side, "BD": width, **options}


@torch.library.custom_op("seqarch::ngram_attention", mutates_args=())
def _ngram_attention(ids: Tensor, h: Tensor, n: int) -> list[Tensor]:
    B, T, D = h.shape
    out, count = torch.empty(B, T, D, dtype=h.dtype, device=h.device), h.new_empty(B, T, dtype=torch.int32)
    grid, blocks = _grid(h)
    _average[grid](ids.contiguous(), h.contiguous(), out, count, n, T, D, **blocks)
    return [out, count]


@_ngram_attention.register_fake
def _(ids, h, n):
    return [
        torch.empty_like(h, memory_format=torch.contiguous_format),
        h.new_empty(h.shape[:2], dtype=torch.int32),
    ]


@torch.library.custom_op("seqarch::ngram_attention_backward", mutates_args=())
def _ngram_attention_backward(ids: Tensor, count: Tensor, g: Tensor, n: int) -> Tensor:
    _, T, D = g.shape
    grid, blocks = _grid(g, backward=True)
    g = g.contiguous()
    dh = torch.empty_like(g)
    _spread[grid](ids.contiguous(), g, count, dh, n, T, D, **blocks)
    return dh


@_ngram_attention_backward.register_fake
def _(ids, count, g, n):
    return torch.empty_like(g, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1])
    ctx.n = inputs[2]


def _gradient(ctx, grads):
    ids, count = ctx.saved_tensors
    dh = None if grads[0] is None else _ngram_attention_backward(ids, count, grads[0], ctx.n)
    return None, dh, None


_ngram_attention.register_autograd(_gradient, setup_context=_setup_context)


def ngram_attention_triton(ids: Tensor, h: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Forward and backward by the kernels above; shapes as in `ngram_attention`, ids int64."""
    out, count = _ngram_attention(ids, h, n)
    return out, count
