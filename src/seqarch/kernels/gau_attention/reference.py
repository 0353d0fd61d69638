"""The definition of group-local plus global attention: one token at a time. Everything else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype


def gau_attention_reference(
    quad_q: Tensor, quad_k: Tensor, lin_q: Tensor, lin_k: Tensor, v: Tensor, group: int, causal: bool
) -> Tensor:
    """Answer one query after the other; autograd gives the gradients. Shapes as in `gau_attention`."""
    dtype, T = accumulate_dtype(v.dtype), v.shape[1]
    # split first: the backward of a slice fills a zero tensor of the size that it was cut from
    groups = [x.to(dtype).split(group, dim=1) for x in (quad_q, quad_k, lin_q, lin_k, v)]
    memory, outputs = v.new_zeros(v.shape[0], quad_q.shape[2], v.shape[2], dtype=dtype), []
    if not causal:
        for keys, values in zip(groups[3], groups[4], strict=True):
            memory = memory + torch.einsum("bsk,bse->bke", keys, values) / max(T, 1)
    for queries, keys, readers, writers, values in zip(*groups, strict=True):
        for i, (query, reader) in enumerate(zip(queries.unbind(1), readers.unbind(1), strict=True)):
            seen = slice(0, i + 1) if causal else slice(None)
            weights = torch.relu(torch.einsum("bk,bsk->bs", query, keys[:, seen]) / group) ** 2
            local = torch.einsum("bs,bse->be", weights, values[:, seen])
            outputs.append(local + torch.einsum("bk,bke->be", reader, memory))
        if causal:
            memory = memory + torch.einsum("bsk,bse->bke", writers, values) / group
    return (torch.stack(outputs, dim=1) if outputs else v.clone()).to(v.dtype)
