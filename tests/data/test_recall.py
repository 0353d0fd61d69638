"""Questions about documents that are made from tables; the other tasks of recall are tested in test_text.py."""

import pytest
import torch

from seqarch.data.recall import SPLITS, table_documents

NAMES = {"gapminder": "country", "movies": "film"}


def records(text, field):
    """The rows of a document as dictionaries."""
    pieces = text.split(f"{field}: ")[1:]
    return [dict(line.split(": ") for line in f"{field}: {piece}".splitlines()) for piece in pieces]


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("rows", [1, 5])
def test_the_answer_stands_in_the_document(source, rows):
    name = NAMES[source]
    for d in table_documents(50, torch.Generator().manual_seed(0), source=source, rows=rows):
        found = records(d.text, name)
        assert len(found) == rows == len({row[name] for row in found}) and d.text.count("\n") == 4 * rows
        field, about = d.question.removesuffix(": ").split(" of ", 1)
        assert [row[field] for row in found if row[name] == about] == [d.answer]
        assert field != name and d.answer.isdigit()
        assert set(d.text + d.question) <= set("\n abcdefghijklmnopqrstuvwxyz0123456789:-")


@pytest.mark.parametrize("source", NAMES)
def test_no_name_occurs_in_two_splits(source):
    names = {}
    for split in SPLITS:
        some = table_documents(300, torch.Generator().manual_seed(1), source=source, split=split)
        names[split] = {row[NAMES[source]] for d in some for row in records(d.text, NAMES[source])}
    assert all(names.values())
    assert not names["train"] & names["test"] and not names["train"] & names["validation"]
    assert not names["validation"] & names["test"]


def test_every_field_and_row_is_asked_for():
    documents = table_documents(300, torch.Generator().manual_seed(3), rows=4)
    assert {d.question.split(" of ")[0] for d in documents} == {"year", "life", "income"}
    places = [
        [r["country"] for r in records(d.text, "country")].index(d.question[:-2].split(" of ")[1]) for d in documents
    ]
    assert set(places) == {0, 1, 2, 3}


def test_the_same_seed_writes_the_same():
    a, b, c = (table_documents(5, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert a == b and a != c


def test_errors():
    g = torch.Generator()
    with pytest.raises(ValueError, match="expected source to be 'gapminder' or 'movies', got 'films'"):
        table_documents(1, g, source="films")
    with pytest.raises(ValueError, match="expected split to be one of"):
        table_documents(1, g, split="dev")
    with pytest.raises(ValueError, match="expected between 1 and 12 rows, the names of the test split, got 13"):
        table_documents(1, g, rows=13, split="test")
