"""In-context language learning: every sequence is written by an automaton of its own (chapter 16).

A probabilistic finite automaton has states, and from every state one to three edges, each with a letter and a target. A
string is a walk from state 0 that takes each outgoing edge with the same probability. One sequence contains several
strings of one automaton with separators between them; the next sequence is written by another one. Letters are 0 to
letters - 1, and the separator is `letters`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Icll", "icll", "random_automata"]

NOWHERE = -1


@dataclass(frozen=True)
class Icll:
    """Sequences and what is to be known about them.

    Attributes:
        tokens: ``(B, T)``.
        truth: the distribution from which each token was drawn, ``(B, T, letters)``; zero where the token is a separator.
        state: the automaton's state before each token, ``(B, T)``.
        edges: the automata, ``(B, states, letters)``: the target of the edge with this letter, or -1.
    """

    tokens: Tensor
    truth: Tensor
    state: Tensor
    edges: Tensor


def random_automata(
    batch: int,
    generator: torch.Generator,
    *,
    letters: int = 8,
    alphabet: tuple[int, int] = (4, 8),
    states: tuple[int, int] = (4, 8),
    degree: tuple[int, int] = (1, 3),
) -> Tensor:
    """Draw automata: edges ``(batch, states, letters)``, the target of an edge or -1.

    Args:
        batch: how many.
        generator: seeded source of randomness.
        letters: of the common alphabet.
        alphabet, states, degree: the least and the greatest number of letters that an automaton uses, of its states,
            and of edges that leave a state (with distinct letters, to distinct states other than its own).

    Raises:
        ValueError: ranges that contradict each other.
    """
    low, high = degree
    if not 1 <= low <= high <= alphabet[0] <= alphabet[1] <= letters or not high < states[0] <= states[1]:
        raise ValueError(
            "expected 1 <= degree <= alphabet <= letters and more states than the greatest degree, got "
            f"degree={degree}, alphabet={alphabet}, letters={letters}, states={states}"
        )

    def between(lowest: int, highest: int, *shape: int) -> Tensor:
        return torch.randint(lowest, highest + 1, shape, generator=generator)

    S = states[1]
    used = torch.rand(batch, letters, generator=generator).argsort(1).argsort(1) < between(*alphabet, batch)[:, None]
    exists = torch.arange(S) < between(*states, batch)[:, None]
    leaving = between(low, high, batch, S)
    score = torch.rand(batch, S, letters, generator=generator).masked_fill(~used[:, None], 2.0)
    place = score.argsort(2).argsort(2)  # of a letter among those of its state; the first `leaving` are taken
    score = torch.rand(batch, S, S, generator=generator).masked_fill(~exists[:, None] | torch.eye(S, dtype=bool), 2.0)
    target = score.argsort(2)  # the first ones are distinct states other than its own
    edges = target.gather(2, place.clamp_max(S - 1))
    return edges.masked_fill(place >= leaving[..., None], NOWHERE)


def icll(
    batch: int,
    length: int,
    generator: torch.Generator,
    *,
    strings: tuple[int, int] = (1, 11),
    edges: Tensor | None = None,
    **automata,
) -> Icll:
    """Let each of `batch` automata write strings, joined by separators, until there are `length` tokens.

    Args:
        batch, length: of the sequences.
        generator: seeded source of randomness.
        strings: the least and the greatest length of a string.
        edges: the automata; None draws new ones, to which `automata` (letters, alphabet, states, degree) goes.

    Raises:
        ValueError: as in `random_automata`; or strings of length 0.
    """
    if not 1 <= strings[0] <= strings[1] or length < 1:
        raise ValueError(f"expected strings and length of at least 1, got strings={strings} and length={length}")
    edges = random_automata(batch, generator, **automata) if edges is None else edges
    if edges.ndim != 3 or len(edges) != batch:
        raise ValueError(f"expected edges of shape ({batch}, states, letters), got {tuple(edges.shape)}")
    B, _, L = edges.shape
    rows, state = torch.arange(B), torch.zeros(B, dtype=torch.long)
    left = torch.randint(strings[0], strings[1] + 1, (B,), generator=generator)
    tokens, truth, visited = [], [], []
    for _ in range(length):
        legal = (edges[rows, state] != NOWHERE).float()
        letter = torch.multinomial(legal, 1, generator=generator)[:, 0]
        ended = left == 0
        visited.append(state)
        tokens.append(torch.where(ended, L, letter))
        truth.append((legal / legal.sum(1, keepdim=True)).masked_fill(ended[:, None], 0.0))
        state = torch.where(ended, 0, edges[rows, state, letter])
        left = torch.where(ended, torch.randint(strings[0], strings[1] + 1, (B,), generator=generator), left - 1)
    return Icll(torch.stack(tokens, 1), torch.stack(truth, 1), torch.stack(visited, 1), edges)
