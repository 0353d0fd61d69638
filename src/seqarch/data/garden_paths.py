"""Garden-path sentences: a small grammar in which a reader takes the wrong turn and learns of it one word too late."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from .text import Vocabulary

NOUNS = ("horse", "boat", "dog", "child", "man", "woman", "raft", "ship")
AMBIGUOUS = ("raced", "floated", "walked", "rushed", "carried", "pushed")  # past tense or participle
INTRANSITIVE = ("fell", "sank", "slept", "cried", "won")
PREPOSITIONS = ("past", "down", "through", "along")
PLACES = ("barn", "river", "field", "town")
PROBABILITIES = {"reduced": 0.08, "unreduced": 0.12, "ambiguous": 0.5, "plain": 0.3}


@dataclass(frozen=True)
class GardenPaths:
    """Sentences of the grammar.

    Attributes:
        sentences: n of them, words with single spaces between them, a full stop at the end.
        x: their word numbers, ``(n, T)``, padded on the right with the full stop.
        lengths: the number of words of each, the full stop included, ``(n,)``.
        verb: position of the verb that settles the reading of a relative clause, ``(n,)``; -1 where there is none.
        kinds: ``"reduced"``, ``"unreduced"``, ``"ambiguous"`` (a main clause that could have gone on) or ``"plain"``.
        vocabulary: the table of words, the same for every draw.
    """

    sentences: list[str]
    x: Tensor
    lengths: Tensor
    verb: Tensor
    kinds: list[str]
    vocabulary: Vocabulary

    def __len__(self) -> int:
        """Return the number of sentences."""
        return len(self.sentences)

    def stream(self) -> Tensor:
        """All sentences one after the other, ``(sum of lengths,)``."""
        real = torch.arange(self.x.shape[1]) < self.lengths[:, None]
        return self.x[real]


def garden_path(n: int, seed: int = 0, *, kind: str | None = None, exclude: Collection[str] = ()) -> GardenPaths:
    """Draw sentences such as "the horse raced past the barn fell ."

    A reduced relative clause begins like the far more frequent main clause "the horse raced past the barn ."; its
    unreduced control, "the horse that was raced past the barn fell .", does not. Given either beginning the verb has
    the same five candidates, so under the grammar their surprisals differ by -ln(0.08 / 0.58) nats.

    Args:
        n: how many sentences.
        seed: same seed, same sentences.
        kind: one of the four kinds of `PROBABILITIES`; None draws the kind of each sentence with those probabilities.
        exclude: sentences that must not be drawn.

    Raises:
        ValueError: n < 1, an unknown kind, or nothing left to draw.
    """
    if n < 1:
        raise ValueError(f"expected n of at least 1, got {n}")
    if kind is not None and kind not in PROBABILITIES:
        raise ValueError(f"expected kind to be one of {', '.join(PROBABILITIES)}, got {kind!r}")
    rng, excluded = random.Random(seed), frozenset(exclude)
    sentences: list[str] = []
    kinds: list[str] = []
    refused = 0
    while len(sentences) < n:
        drawn = kind or rng.choices(list(PROBABILITIES), list(PROBABILITIES.values()))[0]
        sentence = _sentence(drawn, rng)
        if sentence not in excluded:
            sentences.append(sentence)
            kinds.append(drawn)
            continue
        refused += 1
        if refused > 1000 * n:
            raise ValueError(f"expected exclude to leave sentences to draw, got {len(excluded)} sentences that do not")
    grammar = ("the", "that", "was", *NOUNS, *AMBIGUOUS, *INTRANSITIVE, *PREPOSITIONS, *PLACES)
    vocabulary = Vocabulary((".", *grammar), kind="words")
    ids = [vocabulary.encode(s) for s in sentences]
    lengths = torch.tensor([len(i) for i in ids])
    x = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=vocabulary["."])
    relative = torch.tensor([k in ("reduced", "unreduced") for k in kinds])
    return GardenPaths(sentences, x, lengths, torch.where(relative, lengths - 2, -1), kinds, vocabulary)


def _sentence(kind: str, rng: random.Random) -> str:
    noun, ambiguous, verb = rng.choice(NOUNS), rng.choice(AMBIGUOUS), rng.choice(INTRANSITIVE)
    phrase = f"{ambiguous} {rng.choice(PREPOSITIONS)} the {rng.choice(PLACES)}"
    return {
        "plain": f"the {noun} {verb} .",
        "ambiguous": f"the {noun} {phrase} .",
        "reduced": f"the {noun} {phrase} {verb} .",
        "unreduced": f"the {noun} that was {phrase} {verb} .",
    }[kind]
