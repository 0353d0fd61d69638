"""Strings of the Reber grammar and strings that just miss it: a language with two loops, and no word list."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

START, END = 0, 7
# state -> {symbol: next state}; a string is valid when it leads from START to END.
AUTOMATON: dict[int, dict[str, int]] = {
    0: {"B": 1},
    1: {"T": 2, "P": 3},
    2: {"S": 2, "X": 4},
    3: {"T": 3, "V": 5},
    4: {"X": 3, "S": 6},
    5: {"P": 4, "V": 6},
    6: {"E": 7},
    7: {},
}
SYMBOLS = "BEPSTVX"
INTERIOR = "PSTVX"
_RENAMED = str.maketrans("TPSXV", "PSXVT")
_FOREIGN = str.maketrans("TPSXV", "ACDGH")
CORRUPTIONS = ("replace", "swap", "rename", "foreign")


@dataclass(frozen=True)
class ReberStrings:
    """Labelled strings.

    Attributes:
        strings: the strings themselves, n of them.
        x: their ASCII codes, ``(n, T)`` integers, padded on the right with 0.
        lengths: the number of symbols of each, ``(n,)``.
        y: 1 for a valid string, 0 for an invalid one, ``(n,)``.
        kinds: ``"valid"``, or the corruption that made it invalid.
    """

    strings: list[str]
    x: Tensor
    lengths: Tensor
    y: Tensor
    kinds: list[str]

    def __len__(self) -> int:
        """Return the number of strings."""
        return len(self.strings)


def is_reber(string: str) -> bool:
    """Whether the automaton accepts the string."""
    state = START
    for symbol in string:
        state = AUTOMATON[state].get(symbol)
        if state is None:
            return False
    return state == END


def encode(strings: Iterable[str]) -> tuple[Tensor, Tensor]:
    """Return the ASCII codes ``(n, T)``, padded on the right with 0, and the lengths ``(n,)``.

    Raises:
        ValueError: no string, an empty string, or a symbol that is not ASCII.
    """
    strings = list(strings)
    if not strings or not all(s and s.isascii() for s in strings):
        raise ValueError(f"expected strings of ASCII symbols, none of them empty, got {strings[:3]!r}")
    width = max(len(s) for s in strings)
    x = torch.tensor([list(s.encode("ascii").ljust(width, b"\0")) for s in strings])
    return x, torch.tensor([len(s) for s in strings])


def reber(
    n: int,
    seed: int,
    min_len: int = 8,
    max_len: int = 20,
    corruptions: tuple[str, ...] = ("replace", "swap", "rename"),
    *,
    exclude: Collection[str] = (),
) -> ReberStrings:
    """Return n labelled strings in random order, half of them valid (one more than half where n is odd).

    Valid strings walk the automaton with equally likely branches; lengths outside the limits are drawn again, so short
    strings are frequent and repeat. The invalid ones are shared equally among the corruptions:

    * ``"replace"``: a valid string with one interior symbol replaced by another of P, S, T, V, X;
    * ``"swap"``: a valid string with two interior symbols exchanged;
    * ``"rename"``: a string of the same automaton with T, P, S, X, V renamed P, S, X, V, T;
    * ``"foreign"``: the same with five letters that no valid string contains.

    What happens to be valid after all is drawn again, and so is what `exclude` contains (the training strings, when
    the strings of a test are drawn).

    Raises:
        ValueError: n < 2, lengths that no string has, or an unknown corruption.
    """
    if n < 2:
        raise ValueError(f"expected n >= 2, got {n}")
    if not 5 <= min_len <= max_len:
        raise ValueError(f"expected 5 <= min_len <= max_len, got {min_len} and {max_len}")
    if not corruptions or not set(corruptions) <= set(CORRUPTIONS):
        raise ValueError(f"expected corruptions among {', '.join(CORRUPTIONS)}, got {corruptions!r}")
    rng, exclude = random.Random(seed), set(exclude)
    drawn: list[tuple[str, str]] = []
    for i in range(n):
        kind = "valid" if 2 * i < n else corruptions[i % len(corruptions)]
        drawn.append((_draw(kind, rng, min_len, max_len, exclude), kind))
    rng.shuffle(drawn)
    strings, kinds = [s for s, _ in drawn], [k for _, k in drawn]
    x, lengths = encode(strings)
    return ReberStrings(strings, x, lengths, torch.tensor([int(k == "valid") for k in kinds]), kinds)


def _draw(kind: str, rng: random.Random, min_len: int, max_len: int, exclude: set[str]) -> str:
    """Return one string of this kind."""
    for _ in range(100_000):
        string = _walk(rng)
        if not min_len <= len(string) <= max_len:
            continue
        if kind == "replace":
            i = rng.randrange(1, len(string) - 1)
            string = string[:i] + rng.choice(INTERIOR) + string[i + 1 :]
        elif kind == "swap":
            i, j = sorted(rng.sample(range(1, len(string) - 1), 2))
            string = string[:i] + string[j] + string[i + 1 : j] + string[i] + string[j + 1 :]
        elif kind != "valid":
            string = string.translate(_RENAMED if kind == "rename" else _FOREIGN)
        if is_reber(string) == (kind == "valid") and string not in exclude:
            return string
    raise ValueError(
        f"expected limits that leave {kind} strings to draw, got lengths {min_len} to {max_len} and {len(exclude)} excluded"
    )


def _walk(rng: random.Random) -> str:
    """Return one random walk through the automaton, as the string of its symbols."""
    state, symbols = START, []
    while state != END:
        symbol, state = rng.choice(list(AUTOMATON[state].items()))
        symbols.append(symbol)
    return "".join(symbols)
