r"""Mixing all rows at once, and where the parts of spans lie in a chart.

A chart ``(B, n, n, d)`` flattened to ``(B, n * n, d)`` holds span (i, w) at $i n + w - 1$. Split m of the span (i, w) then needs

$$\text{left} = i n + m - 1,\qquad \text{right} = (i + m)\, n + w - m - 1,$$

one table of numbers for all spans of a length, whatever the batch holds. The table of parents is built in the same way.
A part is used by many spans, so the gradient of a gather adds up; PyTorch's indexing does that in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def children_index(n: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places of the left and right parts in a flattened chart, both ``(n - length + 1, length - 1)``."""
    i = torch.arange(n - length + 1, device=device)[:, None]
    m = torch.arange(1, length, device=device)[None, :]
    return i * n + m - 1, (i + m) * n + length - m - 1


def parents_index(n: int, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the parents and siblings, and whether the span is the left part, all ``(n - length + 1, n - length)``."""
    i = torch.arange(n - length + 1, device=device)[:, None]
    p = torch.arange(n - length, device=device)[None, :]
    is_left = p < n - i - length
    start = p - (n - i - length)  # of the parents that begin before the span
    parent = torch.where(is_left, i * n + length + p, start * n + length + i - start - 1)
    sibling = torch.where(is_left, (i + length) * n + p, start * n + i - start - 1)
    return parent, sibling, is_left


def softmax_mix_parallel(
    t: Tensor, c: Tensor, mask: Tensor | None, index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax and product over all rows, gathered first where there is an index; autograd gives the gradients."""
    live = mask
    if index is not None:
        live = index >= 0 if mask is None else mask & (index >= 0)
        t, c = t[index.clamp(min=0)], c[index.clamp(min=0)]
    if live is not None:  # what is left out may hold anything, even NaN
        t, c = t.masked_fill(~live, -torch.inf), c.masked_fill(~live[..., None], 0.0)
    if t.shape[-1] == 0:
        return c.sum(1), t.sum(1), t
    exists = t > -torch.inf
    t = torch.where(exists, t, 0.0)
    top = torch.where(exists, t, -torch.inf).amax(-1, keepdim=True).detach()
    # the difference of a candidate without a score could be large and positive: it is replaced before the exponential
    below = torch.where(exists, t - top, 0.0)
    x = torch.where(exists, below.exp(), 0.0)
    total = x.sum(-1, keepdim=True)
    w = x / torch.where(total > 0, total, 1.0)
    # the mean of the differences, not of the scores: gradients then never subtract two large scores
    s = (w * below).sum(-1) + torch.where(exists.any(-1), top[..., 0], 0.0)
    return (w[:, None] @ c)[:, 0], s, w
