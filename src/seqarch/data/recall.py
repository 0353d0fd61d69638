"""Tasks that only a memory can solve: recall of one symbol over noise, and of many key-value pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def first_symbol(
    batch: int, length: int, classes: int, generator: torch.Generator, noise: int = 4
) -> tuple[Tensor, Tensor]:
    """Return sequences whose first symbol is the answer and whose other symbols are noise.

    Returns:
        x ``(batch, length)``: x_1 uniform in 0..classes-1, the rest uniform in classes..classes+noise-1; and y
        ``(batch,)`` = x_1, to be read out at the last step.
    """
    if length < 1 or classes < 2 or noise < 1:
        raise ValueError(f"expected length >= 1, classes >= 2, noise >= 1, got {length}, {classes}, {noise}")
    y = torch.randint(classes, (batch,), generator=generator)
    x = torch.randint(classes, classes + noise, (batch, length), generator=generator)
    x[:, 0] = y
    return x, y


def mqar(
    batch: int, pairs: int, keys: int, values: int, generator: torch.Generator, queries: int | None = None
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall: key value key value ..., then the keys again in random order.

    Args:
        batch: sequences.
        pairs: key-value pairs each; keys are distinct.
        keys, values: sizes of the two alphabets; keys are 0..keys-1, values keys..keys+values-1.
        generator: seeded source of randomness.
        queries: how many of the keys are asked for (None: every one).

    Returns:
        x ``(batch, 2*pairs + queries)`` and the targets of the same shape: the value that belongs to the key at each
        query position, and -100 (ignored) elsewhere.
    """
    queries = pairs if queries is None else queries
    if not 1 <= pairs <= keys or not 1 <= queries <= pairs or values < 1:
        raise ValueError(
            f"expected 1 <= queries <= pairs <= keys and values >= 1, got queries={queries}, pairs={pairs}, keys={keys}, "
            f"values={values}"
        )
    k = torch.rand(batch, keys, generator=generator).argsort(1)[:, :pairs]
    v = torch.randint(keys, keys + values, (batch, pairs), generator=generator)
    asked = torch.rand(batch, pairs, generator=generator).argsort(1)[:, :queries]
    x = torch.cat([torch.stack([k, v], dim=2).flatten(1), k.gather(1, asked)], dim=1)
    y = torch.full_like(x, -100)
    y[:, 2 * pairs :] = v.gather(1, asked)
    return x, y
