"""The definition of n-gram attention, one position after another, and its streaming form with a dictionary."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._dispatch import accumulate_dtype


def ngram_attention_reference(ids: Tensor, h: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Compare the last n tokens with those before every earlier j; shapes as in `ngram_attention`."""
    vectors = h.to(accumulate_dtype(h.dtype))
    (B, T, _), outputs, counts = h.shape, [], []
    for i in range(T):
        candidates = max(0, i - n)  # j = n, ..., i - 1
        match = torch.ones(B, candidates, dtype=torch.bool, device=h.device)
        for r in range(n if candidates else 0):
            match &= ids[:, n - 1 - r : i - 1 - r] == ids[:, i - r, None]
        found = torch.where(match[..., None], vectors[:, n : n + candidates], 0).sum(1)
        count = match.sum(1)
        outputs.append(found / count.clamp(min=1)[:, None])
        counts.append(count.int())
    if T == 0:
        return h.clone(), ids.new_zeros(B, 0, dtype=torch.int32)
    return torch.stack(outputs, 1).to(h.dtype), torch.stack(counts, 1)


@dataclass
class Memory:
    """What one sequence has seen: its last tokens, and for every n-gram how many vectors followed it and their sum."""

    recent: tuple[int, ...] = ()
    followers: dict[tuple[int, ...], tuple[int, Tensor]] = field(default_factory=dict)


def ngram_step(ids: Tensor, h: Tensor, n: int, state: list[Memory]) -> tuple[Tensor, Tensor]:
    """Ask first, then insert: what followed the n tokens up to now does not yet include the present position."""
    vectors = h.to(accumulate_dtype(h.dtype))
    outputs, counts = [], []
    for token, vector, memory in zip(ids.tolist(), vectors, state, strict=True):
        before, now = memory.recent, (*memory.recent, token)[-n:]
        count, total = memory.followers.get(now, (0, torch.zeros_like(vector)))
        outputs.append(total / max(1, count))
        counts.append(count)
        if len(before) == n:
            count, total = memory.followers.get(before, (0, torch.zeros_like(vector)))
            memory.followers[before] = count + 1, total + vector
        memory.recent = now
    out = torch.stack(outputs).to(h.dtype) if outputs else h.clone()
    return out, torch.tensor(counts, dtype=torch.int32, device=h.device)
