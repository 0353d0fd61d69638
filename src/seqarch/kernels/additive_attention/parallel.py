r"""Additive scores in PyTorch, a block of queries at a time, with the gradient written by hand.

The one-line form ``torch.tanh(q[:, :, None] + k[:, None]) @ v`` builds a tensor of shape (B, M, N, H), and autograd
keeps it until the backward pass. Here a block of queries is as large as fits in ``BLOCK`` numbers, and nothing of
that shape outlives its block: the backward pass computes the tanh again.

With $g = \partial L/\partial u$ and $t_{ijh} = \tanh(q_{ih} + k_{jh})$, and $1 - t^2$ for the slope of the tanh,

$$\partial q_{ih} = v_h \sum_j g_{ij}(1 - t_{ijh}^2),\quad \partial k_{jh} = v_h \sum_i g_{ij}(1 - t_{ijh}^2),\quad
  \partial v_h = \sum_{bij} g_{ij}\, t_{ijh}.$$

Every step on the block is done in place, so that forward and backward need one block each beside inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._dispatch import accumulate_dtype

BLOCK = 2**22  # numbers in one block: 16 MB in float32


def _query_blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, t) with t = tanh(q_i + k_j), (B, rows, N, H), for consecutive blocks of queries."""
    B, N, H = k.shape
    rows = max(1, BLOCK // max(1, B * N * H))
    for start in range(0, q.shape[1], rows):
        block = slice(start, start + rows)
        yield block, (q[:, block, None] + k[:, None]).tanh_()


class _AdditiveScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dtype = accumulate_dtype(q.dtype)
        queries, keys, weights = q.to(dtype), k.to(dtype), v.to(dtype)
        if mask is not None:
            keys = keys.masked_fill(~mask[..., None], 0.0)
        scores = torch.empty(*q.shape[:2], k.shape[1], dtype=dtype, device=q.device)
        for block, t in _query_blocks(queries, keys):
            scores[:, block] = t @ weights
        if mask is not None:
            scores.masked_fill_(~mask[:, None], -torch.inf)
        ctx.save_for_backward(q, k, v, mask)
        return scores.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, mask = ctx.saved_tensors
        dtype = accumulate_dtype(q.dtype)
        queries, keys, weights, grad = q.to(dtype), k.to(dtype), v.to(dtype), grad.to(dtype)
        if mask is not None:
            keys = keys.masked_fill(~mask[..., None], 0.0)
            grad = grad.masked_fill(~mask[:, None], 0.0)  # a softmax over nothing hands down NaN
        grad_q, grad_k = torch.empty_like(queries), torch.zeros_like(keys)
        grad_v = torch.zeros_like(weights)
        for block, t in _query_blocks(queries, keys):
            g = grad[:, block]
            grad_v += g.flatten() @ t.flatten(0, 2)
            slope = t.square_().neg_().add_(1).mul_(g[..., None])  # g (1 - t^2), in t's memory
            grad_q[:, block] = slope.sum(2)
            grad_k += slope.sum(1)
        return (grad_q * weights).to(q.dtype), (grad_k * weights).to(k.dtype), grad_v.to(v.dtype), None


def additive_scores_parallel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Blocks of queries with the hand-written gradient; shapes as in `additive_scores`."""
    return _AdditiveScores.apply(q, k, v, mask)
