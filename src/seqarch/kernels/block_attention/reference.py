"""The definition of attention with every kind of visibility, one query at a time. Everything else is measured against it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype


class Pattern(NamedTuple):
    """Which keys a query sees: the arguments of `block_attention` that say so, already checked.

    `width` is the one number that a kind needs: the window, the chunk or the length of the prefix.
    """

    kind: str
    width: int = 0
    n_global: int = 0
    causal: bool = True
    cu_seqlens: Tensor | None = None  # (n + 1,)
    mask: Tensor | None = None  # (1 or B, T, N), about the last N keys
    key_mask: Tensor | None = None  # (B, S)


def visible(pattern: Pattern, i: int, T: int, S: int, device: torch.device) -> Tensor:
    """Which of the S keys query i of T sees, ``(1, S)`` bool, or ``(B, S)`` where sequences differ in it.

    The last query stands at the last key: query i is at position p = i + S - T.
    """
    p, j = i + S - T, torch.arange(S, device=device)
    kind, width = pattern.kind, pattern.width
    if kind == "causal":
        seen = j <= p
    elif kind == "window":
        seen = j > p - width if pattern.causal else (j - p).abs() <= width // 2
        seen = seen | (j < pattern.n_global) | (0 <= p < pattern.n_global)
    elif kind == "chunk":
        seen = j // width == p // width
    elif kind == "prefix":
        seen = (j <= p) | (j < width)
    elif kind == "varlen":
        segment = torch.searchsorted(pattern.cu_seqlens, j, right=True)  # 1..n; other numbers are outside all segments
        seen = (segment == segment[p]) & (segment > 0) & (segment < len(pattern.cu_seqlens))
    else:  # "full" and "mask"
        seen = j >= 0
    if pattern.causal and kind in ("window", "chunk", "varlen"):
        seen = seen & (j <= p)
    seen = seen[None]
    if pattern.mask is not None:
        cache = seen.new_ones(len(pattern.mask), S - pattern.mask.shape[-1])
        seen = seen & torch.cat([cache, pattern.mask[:, i]], dim=1)
    return seen if pattern.key_mask is None else seen & pattern.key_mask


def block_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, pattern: Pattern, scale: float
) -> tuple[Tensor, Tensor]:
    """Answer one query after the other; autograd gives the gradients. Shapes as in `block_attention`, o and lse."""
    (_, H, T, _), (_, heads, S, _), dtype = q.shape, k.shape, accumulate_dtype(q.dtype)
    k, v = (x.to(dtype).repeat_interleave(H // heads, dim=1) for x in (k, v))
    outputs, sums = [], []
    for i, query in enumerate(q.to(dtype).unbind(2)):
        seen = visible(pattern, i, T, S, q.device)
        columns = seen.any(0).nonzero()[:, 0]  # the other keys are not touched
        s = scale * torch.einsum("bhd,bhjd->bhj", query, k[:, :, columns])
        if bias is not None:
            s = s + _bias_of(bias.to(dtype), pattern, i, T, S, columns)
        s = s.masked_fill(~seen[:, None, columns], -torch.inf)
        o, lse = softmax_average(s, v[:, :, columns])
        outputs.append(o)
        sums.append(lse)
    return torch.stack(outputs, dim=2).to(q.dtype), torch.stack(sums, dim=2)


def _bias_of(bias: Tensor, pattern: Pattern, i: int, T: int, S: int, columns: Tensor) -> Tensor:
    """What the bias adds to the scores of query i: its row i, or, as a chunk counts from its own start, p mod chunk."""
    if pattern.kind == "chunk":
        i, columns = (i + S - T) % pattern.width, columns % pattern.width
    return bias[..., i, :][..., columns]


def softmax_average(s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The values averaged by the softmax of scores ``(..., n)``, and log sum exp; 0 and -inf where all scores are -inf."""
    if s.shape[-1] == 0:
        return v.sum(-2), s.sum(-1) - torch.inf
    top = s.detach().amax(-1, keepdim=True)
    weights = torch.exp(s - torch.where(top == -torch.inf, torch.inf, top))  # never exp(-inf + inf), which is nan
    total = weights.sum(-1)
    some = total > 0
    total = torch.where(some, total, 1.0)
    o = torch.einsum("bhj,bhje->bhe", weights, v) / total[..., None]
    return o, torch.where(some, top[..., 0] + total.log(), -torch.inf)
