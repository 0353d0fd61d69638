"""The definition of additive scores, one query at a time. Everything else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype


def additive_scores_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Score the keys for each query in turn; autograd gives the gradients. Shapes as in `additive_scores`."""
    dtype = accumulate_dtype(q.dtype)
    queries, keys, weights = q.to(dtype), k.to(dtype), v.to(dtype)
    if mask is not None:
        keys = keys.masked_fill(~mask[..., None], 0.0)  # whatever stands in the padding stays there, NaN included
    rows = [torch.tanh(queries[:, i, None] + keys) @ weights for i in range(q.shape[1])]  # each (B, N)
    scores = torch.stack(rows, dim=1)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    return scores.to(q.dtype)
