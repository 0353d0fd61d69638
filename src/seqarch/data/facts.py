"""Streams of facts and questions: what a memory must keep, and what it may forget (chapter 12).

A *fact* is a key followed by its value. A *query* is the token `QUERY`, a key, and the value that this key has now. One
vocabulary serves all streams: `QUERY`, then the keys, the values, and fillers that mean nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

QUERY = 0
IGNORE = -100


class FactStream(NamedTuple):
    """A batch of streams; every field is ``(batch, length)``.

    tokens: what is read.
    targets: the value to predict where a queried key stands, -100 elsewhere (what `cross_entropy` ignores).
    told: how many facts have been told before this token.
    age: at a queried key, how many tokens ago the newest fact about it was complete; 0 elsewhere.
    """

    tokens: Tensor
    targets: Tensor
    told: Tensor
    age: Tensor


def vocabulary_size(keys: int = 64, values: int = 8, fillers: int = 4) -> int:
    """QUERY, keys, values, fillers."""
    return 1 + keys + values + fillers


def fact_stream(
    batch: int,
    length: int,
    generator: torch.Generator,
    *,
    recent: int | None = None,
    keys: int = 64,
    values: int = 8,
    fillers: int = 4,
    gap: int = 40,
    p_query: float = 0.45,
    p_filler: float = 0.25,
) -> FactStream:
    """Facts, questions about them and fillers, in random order, until `length` tokens are there.

    Args:
        batch, length: sequences, and tokens in each (the last event is cut off).
        generator: seeded source of randomness.
        recent: ask only about the newest so many facts; None asks about any fact since the beginning. The answer is
            always the newest value of the key.
        keys, values, fillers: sizes of the three alphabets, in this order after `QUERY` = 0.
        gap: a key is not told again among the next `gap` facts.
        p_query, p_filler: how often an event is a query (never before the first fact) or a filler; the rest are facts.

    Raises:
        ValueError: sizes or probabilities out of range, with what was expected and what was given.
    """
    for name, value in (("batch", batch), ("length", length), ("values", values), ("fillers", fillers)):
        if value < 1:
            raise ValueError(f"expected {name} to be at least 1, got {value}")
    if not 0 <= gap < keys:
        raise ValueError(f"expected a gap of 0 to keys - 1 = {keys - 1} facts, got {gap}")
    if recent is not None and recent < 1:
        raise ValueError(f"expected recent to be None or at least 1, got {recent}")
    if not (p_query >= 0 and p_filler >= 0 and p_query + p_filler < 1):
        raise ValueError(f"expected p_query and p_filler >= 0 with a sum below 1, got {p_query} and {p_filler}")

    def below(limit: Tensor | int) -> Tensor:
        """Uniform integers 0 ... limit - 1, one per row."""
        return (torch.rand(batch, generator=generator, dtype=torch.float64) * limit).long()

    rows, end = torch.arange(batch), length + 3  # three tokens of slack: an event is written whole, then cut off
    tokens, targets, told, age = (torch.zeros(batch, end, dtype=torch.long) for _ in range(4))
    targets.fill_(IGNORE)
    keys_told = torch.zeros(batch, length // 2 + 2, dtype=torch.long)  # fact j of a row was about this key
    value_of = torch.zeros(batch, keys, dtype=torch.long)
    told_at = torch.zeros(batch, keys, dtype=torch.long)  # position right after the newest fact about a key
    number_of = torch.full((batch, keys), -gap - 1)  # which fact that was
    n, at = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, dtype=torch.long)
    while int(at.min()) < length:
        live = at < length
        draw = torch.rand(batch, generator=generator)
        ask = live & (draw < p_query) & (n > 0)
        fill = live & (draw >= p_query) & (draw < p_query + p_filler)
        tell = live & ~ask & ~fill

        lowest = torch.zeros_like(n) if recent is None else (n - recent).clamp(min=0)
        which = (lowest + below(n - lowest)).clamp(max=keys_told.shape[1] - 1)
        asked = keys_told[rows, which]
        free = torch.rand(batch, keys, generator=generator).masked_fill(number_of >= (n - gap)[:, None], -1.0)
        new, value, noise = free.argmax(1), below(values), below(fillers)

        r = rows[fill]
        tokens[r, at[r]], told[r, at[r]] = 1 + keys + values + noise[r], n[r]
        r = rows[tell]
        tokens[r, at[r]], tokens[r, at[r] + 1] = 1 + new[r], 1 + keys + value[r]
        told[r, at[r]] = told[r, at[r] + 1] = n[r]
        keys_told[r, n[r]], value_of[r, new[r]], number_of[r, new[r]] = new[r], value[r], n[r]
        told_at[r, new[r]] = at[r] + 2
        r = rows[ask]
        answer = 1 + keys + value_of[r, asked[r]]
        tokens[r, at[r]], tokens[r, at[r] + 1], tokens[r, at[r] + 2] = QUERY, 1 + asked[r], answer
        targets[r, at[r] + 1], age[r, at[r] + 1] = answer, at[r] + 1 - told_at[r, asked[r]]
        for offset in range(3):
            told[r, at[r] + offset] = n[r]
        n, at = n + tell, at + fill + 2 * tell + 3 * ask
    return FactStream(*(t[:, :length].contiguous() for t in (tokens, targets, told, age)))


def passkey_stream(
    batch: int,
    length: int,
    generator: torch.Generator,
    *,
    before: int = 0,
    keys: int = 64,
    values: int = 8,
    fillers: int = 4,
) -> tuple[Tensor, Tensor]:
    """`before` random fillers, one fact, `length` more fillers, and the question.

    Returns:
        tokens ``(batch, before + length + 4)`` and the answers ``(batch,)``, to be predicted at the last token, the
        queried key.

    Raises:
        ValueError: sizes out of range.
    """
    if batch < 1 or min(length, before) < 0 or min(keys, values, fillers) < 1:
        raise ValueError(
            "expected batch, keys, values and fillers >= 1, length and before >= 0, got "
            f"{batch}, {keys}, {values}, {fillers}, {length} and {before}"
        )
    key = torch.randint(1, 1 + keys, (batch, 1), generator=generator)
    value = torch.randint(1 + keys, 1 + keys + values, (batch, 1), generator=generator)
    after, ahead = (
        torch.randint(fillers, (batch, n), generator=generator) + 1 + keys + values for n in (length, before)
    )
    return torch.cat([ahead, key, value, after, torch.full_like(key, QUERY), key], dim=1), value[:, 0]
