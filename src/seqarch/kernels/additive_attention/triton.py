r"""Additive scores on a GPU: a program owns a tile of queries x keys and walks over the H hidden units.

All tiles of $t_{ijh} = \tanh(q_{ih} + k_{jh})$ live and die in registers, in the forward pass and, computed again, in
the backward pass; memory sees q, k, v and the scores only. There is no matrix product here (the tanh sits between
the sum and the weights), so the work runs on the ordinary cores and is bound by the tanh.

The backward pass is two kernels, so that every sum has one owner and no atomics are needed:

``_grad_queries``  owns (16 queries, BH units), walks over the keys: dq, and its share of dv
``_grad_keys``     owns (32 keys, BH units), walks over the queries: dk

The shares of dv are added outside in a fixed order: two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N, BLOCK_H = 16, 32, 16


@triton.jit
def _tanh(x):
    e = tl.exp(-2 * tl.abs(x))  # at most 1: nothing overflows, however far the tanh is saturated
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _tile(base, row, rows, count, h, H, live):
    # a [rows, BH] tile of a (B, count, H) tensor; dead entries are 0
    here = (row.to(tl.int64) * count + rows)[:, None] * H + h[None, :]
    return tl.load(base + here, mask=live[:, None] & (h < H)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _kept(mask, row, n, N, MASKED: tl.constexpr):
    # which of the keys n exist and are not masked
    live = n < N
    if MASKED:
        live = live & (tl.load(mask + row.to(tl.int64) * N + n, mask=live, other=0) != 0)
    return live


@triton.jit
def _scores(
    q, k, v, mask, scores, M, N, H,
    MASKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Scores of one tile [BM, BN]: the sum over h of v_h tanh(q_ih + k_jh)."""
    tiles = tl.cdiv(M, BM)
    row, m = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    kept = _kept(mask, row, n, N, MASKED)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, H, BH):
        h = start + tl.arange(0, BH)
        x, y = _tile(q, row, m, M, h, H, m < M), _tile(k, row, n, N, h, H, kept)
        w = tl.load(v + h, mask=h < H, other=0.0).to(tl.float32)
        total += tl.sum(_tanh(x[:, None, :] + y[None, :, :]) * w[None, None, :], axis=2)
    total = tl.where(kept[None, :], total, float("-inf"))
    here = (row.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(scores + here, total.to(scores.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _grad_queries(
    q, k, v, mask, grad, grad_q, share_v, M, N, H,
    MASKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """dq_ih = v_h sum_j g_ij (1 - t_ijh^2) for BM queries and BH units, and their share of dv_h = sum g_ij t_ijh."""
    tiles = tl.cdiv(M, BM)
    row, m = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    x = _tile(q, row, m, M, h, H, m < M)
    w = tl.load(v + h, mask=h < H, other=0.0).to(tl.float32)
    total, share = tl.zeros((BM, BH), tl.float32), tl.zeros((BH,), tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        kept = _kept(mask, row, n, N, MASKED)
        there = (row.to(tl.int64) * M + m)[:, None] * N + n[None, :]
        g = tl.load(grad + there, mask=(m < M)[:, None] & kept[None, :], other=0.0).to(tl.float32)[:, :, None]
        t = _tanh(x[:, None, :] + _tile(k, row, n, N, h, H, kept)[None, :, :])
        total += tl.sum(g * (1 - t * t), axis=1)
        share += tl.sum(tl.sum(g * t, axis=1), axis=0)
    here = (row.to(tl.int64) * M + m)[:, None] * H + h[None, :]
    live = (m < M)[:, None] & (h < H)[None, :]
    tl.store(grad_q + here, (total * w[None, :]).to(grad_q.dtype.element_ty), mask=live)
    tl.store(share_v + tl.program_id(0).to(tl.int64) * H + h, share, mask=h < H)


@triton.jit
def _grad_keys(
    q, k, v, mask, grad, grad_k, M, N, H,
    MASKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """dk_jh = v_h sum_i g_ij (1 - t_ijh^2) for BN keys and BH units; masked keys get 0."""
    tiles = tl.cdiv(N, BN)
    row, n = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    kept = _kept(mask, row, n, N, MASKED)
    y = _tile(k, row, n, N, h, H, kept)
    w = tl.load(v + h, mask=h < H, other=0.0).to(tl.float32)
    total = tl.zeros((BN, BH), tl.float32)
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM)
        there = (row.to(tl.int64) * M + m)[:, None] * N + n[None, :]
        g = tl.load(grad + there, mask=(m < M)[:, None] & kept[None, :], other=0.0).to(tl.float32)[:, :, None]
        t = _tanh(_tile(q, row, m, M, h, H, m < M)[:, None, :] + y[None, :, :])
        total += tl.sum(g * (1 - t * t), axis=0)
    here = (row.to(tl.int64) * N + n)[:, None] * H + h[None, :]
    live = (n < N)[:, None] & (h < H)[None, :]
    tl.store(grad_k + here, (total * w[None, :]).to(grad_k.dtype.element_ty), mask=live)


def _arguments(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None):
    """Contiguous inputs, the sizes and the compile-time settings of all three kernels."""
    flags = dict(MASKED=mask is not None, BM=BLOCK_M, BN=BLOCK_N, BH=BLOCK_H)
    keep = q if mask is None else mask.contiguous().view(torch.uint8)  # without a mask its pointer is never read
    return (q.contiguous(), k.contiguous(), v.contiguous(), keep), (q.shape[1], k.shape[1], q.shape[2]), flags


@torch.library.custom_op("seqarch::additive_scores", mutates_args=())
def _additive_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    tensors, (M, N, H), flags = _arguments(q, k, v, mask)
    scores = torch.empty(q.shape[0], M, N, dtype=q.dtype, device=q.device)
    _scores[q.shape[0] * triton.cdiv(M, BLOCK_M), triton.cdiv(N, BLOCK_N)](*tensors, scores, M, N, H, **flags)
    return scores


@_additive_scores.register_fake
def _(q, k, v, mask):
    return q.new_empty(q.shape[0], q.shape[1], k.shape[1])


@torch.library.custom_op("seqarch::additive_scores_backward", mutates_args=())
def _additive_scores_backward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grad: Tensor) -> list[Tensor]:
    tensors, (M, N, H), flags = _arguments(q, k, v, mask)
    grad, units = grad.contiguous(), triton.cdiv(H, BLOCK_H)
    programs = q.shape[0] * triton.cdiv(M, BLOCK_M)
    grad_q, grad_k = torch.empty_like(tensors[0]), torch.empty_like(tensors[1])
    share_v = torch.empty(programs, H, dtype=torch.float32, device=q.device)
    _grad_queries[programs, units](*tensors, grad, grad_q, share_v, M, N, H, **flags)
    _grad_keys[q.shape[0] * triton.cdiv(N, BLOCK_N), units](*tensors, grad, grad_k, M, N, H, **flags)
    return [grad_q, grad_k, share_v.sum(0).to(v.dtype)]


@_additive_scores_backward.register_fake
def _(q, k, v, mask, grad):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return (*_additive_scores_backward(*ctx.saved_tensors, grad), None)


_additive_scores.register_autograd(_backward, setup_context=_setup_context)


def additive_scores_triton(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Forward and backward by the kernels above; shapes as in `additive_scores`."""
    return _additive_scores(q, k, v, mask)
