"""The definition of the fetched memory: a loop over sequences and their picks. Everything else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._dispatch import accumulate_dtype


def memory_ffn_reference(
    x: Tensor,
    bank_in: Tensor,
    bank_gate: Tensor | None,
    bank_out: Tensor,
    idx: Tensor,
    w: Tensor | None,
    sparse_grad: bool,
) -> Tensor:
    """One sequence and one pick at a time; autograd gives the gradients. Arguments as in `memory_ffn`."""
    dtype = accumulate_dtype(x.dtype)
    inside, out = fetch(bank_in, idx, sparse_grad, dtype), fetch(bank_out, idx, sparse_grad, dtype)
    gate = None if bank_gate is None else fetch(bank_gate, idx, sparse_grad, dtype)
    outputs = []
    for b, tokens in enumerate(x.to(dtype)):
        y = torch.zeros_like(tokens)
        for j in range(idx.shape[1]):
            q = tokens @ inside[b, j].T
            h = F.silu(q) if gate is None else F.silu(tokens @ gate[b, j].T) * q
            if w is not None:
                h = w[b, j].to(dtype) * h
            y = y + h @ out[b, j].T
        outputs.append(y)
    return torch.stack(outputs).to(x.dtype) if outputs else x.clone()


class _Fetch(torch.autograd.Function):
    """bank[idx] in another dtype; the gradient holds, for every block picked, the sum over its picks."""

    @staticmethod
    def forward(ctx, bank: Tensor, idx: Tensor, sparse_grad: bool, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(idx)
        ctx.shape, ctx.sparse_grad, ctx.dtype = bank.shape, sparse_grad, bank.dtype
        return bank[idx].to(dtype)

    @staticmethod
    def backward(ctx, g: Tensor):
        ids, blocks = ctx.saved_tensors[0].flatten(), g.flatten(0, 1)
        wide = blocks.to(accumulate_dtype(g.dtype))  # one block may collect many terms: rounded once, after the sum
        if ctx.sparse_grad:
            total = torch.sparse_coo_tensor(ids[None], wide, ctx.shape, check_invariants=False).coalesce()
        else:  # index_put sorts and sums in order; index_add would race on a GPU
            total = wide.new_zeros(ctx.shape).index_put((ids,), wide, accumulate=True)
        return total.to(ctx.dtype), None, None, None


def fetch(bank: Tensor, idx: Tensor, sparse_grad: bool, dtype: torch.dtype) -> Tensor:
    """Copy the picked blocks: bank ``(M, ...)``, idx ``(B, k)`` -> ``(B, k, ...)``, with a gradient of either kind."""
    return _Fetch.apply(bank, idx, sparse_grad, dtype)
