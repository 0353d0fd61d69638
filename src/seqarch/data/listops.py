"""ListOps: nested operations on digits, written as one long sequence of symbols (chapter 08).

An expression such as ``[MAX 2 9 [MIN 4 7 ] 0 ]`` has a value from 0 to 9. Finding it takes the brackets, which may open
at the beginning and close at the end: a test of long-range structure, after the Long Range Arena's description.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAD = "<pad>"
OPERATIONS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
SYMBOLS = (PAD, *"0123456789", *OPERATIONS, "]")
BRANCHING = 0.25  # how likely an argument is to be an expression of its own


@dataclass(frozen=True)
class ListOps:
    """Expressions as numbers of `SYMBOLS`, padded with 0 at the end."""

    x: Tensor  # (count, longest), integers
    length: Tensor  # (count,)
    y: Tensor  # (count,), the values, 0..9


class _TooLongError(Exception):
    pass


def listops(
    count: int,
    generator: torch.Generator,
    *,
    shortest: int = 500,
    longest: int = 2000,
    depth: int = 10,
    arguments: int = 10,
) -> ListOps:
    """Return random expressions with their values.

    Args:
        count: how many.
        generator: seeded source of randomness.
        shortest, longest: bounds on the number of symbols of an expression, brackets included.
        depth: how deep operations may be nested; 1 is an operation on digits.
        arguments: an operation has from 2 to this many.

    Raises:
        ValueError: count or depth below 1, arguments below 2, or lengths that no such expression can have.
    """
    if count < 1 or depth < 1 or arguments < 2:
        raise ValueError(
            f"expected count >= 1, depth >= 1 and arguments >= 2, got count={count}, depth={depth}, "
            f"arguments={arguments}"
        )
    # The longest expression has every argument of every operation but the innermost ones an operation again.
    possible = sum(2 * arguments**level for level in range(depth)) + arguments**depth
    if not 4 <= longest or not shortest <= min(longest, possible):
        raise ValueError(
            f"expected lengths that expressions of depth {depth} with up to {arguments} arguments can have (4 to "
            f"{possible}), got {shortest} to {longest}"
        )
    source = random.Random(int(torch.randint(2**31, (1,), generator=generator)))
    x, lengths, y = torch.zeros(count, longest, dtype=torch.long), [], []
    number = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    while len(y) < count:
        symbols: list[str] = []
        try:
            value = _grow(symbols, source, depth, arguments, longest)
        except _TooLongError:
            continue
        if len(symbols) >= shortest:
            x[len(y), : len(symbols)] = torch.tensor([number[s] for s in symbols])
            lengths.append(len(symbols))
            y.append(value)
    return ListOps(x, torch.tensor(lengths), torch.tensor(y))


def write(x: Tensor | Sequence[int]) -> str:
    """Return one expression as text, without its padding."""
    return " ".join(SYMBOLS[int(i)] for i in x if int(i))


def _grow(symbols: list[str], source: random.Random, depth: int, arguments: int, longest: int) -> int:
    """Append a random operation, at most `depth` deep, and return its value."""
    name = source.choice(list(OPERATIONS))
    symbols.append(name)
    values = []
    for _ in range(source.randint(2, arguments)):
        if len(symbols) + 2 > longest:  # this argument and the closing bracket
            raise _TooLongError
        if depth > 1 and source.random() < BRANCHING:
            values.append(_grow(symbols, source, depth - 1, arguments, longest))
        else:
            values.append(source.randrange(10))
            symbols.append(str(values[-1]))
    symbols.append("]")
    if len(symbols) > longest:
        raise _TooLongError
    return OPERATIONS[name](values)
