"""The definitions: a loop over rows and candidates, and loops over the cells of a chart. All else is measured against it."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_mix_reference(
    t: Tensor, c: Tensor, mask: Tensor | None, index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix row by row; autograd gives the gradients. Shapes as in `softmax_mix`, t and c of one dtype."""
    R, K = t.shape if index is None else index.shape
    rows = []
    for r in range(R):
        places = [k for k in range(K) if mask is None or mask[r, k]]
        if index is None:
            candidates = [(k, t[r, k], c[r, k]) for k in places]
        else:
            candidates = [(k, t[index[r, k]], c[index[r, k]]) for k in places if index[r, k] >= 0]
        candidates = [(k, score, vector) for k, score, vector in candidates if score > -torch.inf]
        e, s, w = c.new_zeros(c.shape[-1]), t.new_zeros(()), [t.new_zeros(()) for _ in range(K)]
        if candidates:
            top = max(score.detach() for _, score, _ in candidates)
            total = sum(torch.exp(score - top) for _, score, _ in candidates)
            for k, score, vector in candidates:
                w[k] = torch.exp(score - top) / total
                e, s = e + w[k] * vector, s + w[k] * score
        rows.append((e, s, torch.stack(w)))
    return tuple(torch.stack(x) for x in zip(*rows, strict=True))


def gather_children_reference(e: Tensor, s: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """`gather_children`, one cell and one split at a time."""
    n = e.shape[1]
    left, right, scores = [], [], []
    for i in range(n - length + 1):
        for m in range(1, length):
            left.append(e[:, i, m - 1])
            right.append(e[:, i + m, length - m - 1])
            scores.append(s[:, i, m - 1] + s[:, i + m, length - m - 1])
    shape = (n - length + 1, length - 1)
    return tuple(torch.stack(x, dim=1).unflatten(1, shape) for x in (left, right, scores))


def gather_parents_reference(
    e: Tensor, s: Tensor, b: Tensor, o: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gather_parents`, one cell and one parent at a time."""
    n = e.shape[1]
    parents, siblings, scores, is_left = [], [], [], []
    for i in range(n - length + 1):
        as_left = [((i, length + m), (i + length, m)) for m in range(1, n - i - length + 1)]
        as_right = [((start, length + i - start), (start, i - start)) for start in range(i)]
        for (parent, long), (sibling, short) in as_left + as_right:
            parents.append(b[:, parent, long - 1])
            siblings.append(e[:, sibling, short - 1])
            scores.append(o[:, parent, long - 1] + s[:, sibling, short - 1])
            is_left.append(parent == i)
    shape = (n - length + 1, n - length)
    stacked = [torch.stack(x, dim=1).unflatten(1, shape) for x in (parents, siblings, scores)]
    return *stacked, torch.tensor(is_left, device=e.device).view(shape)
