"""The garden-path grammar: its words, its labels, its proportions."""

from collections import Counter

import pytest
import torch

from seqarch.data.garden_paths import AMBIGUOUS, INTRANSITIVE, PROBABILITIES, garden_path


def test_sentences_of_each_kind():
    want = {"plain": 4, "ambiguous": 7, "reduced": 8, "unreduced": 10}
    for kind, length in want.items():
        data = garden_path(40, seed=1, kind=kind)
        assert set(data.kinds) == {kind} and len(data) == 40 and (data.lengths == length).all()
        words = data.sentences[0].split()
        assert words[0] == "the" and words[-1] == "." and len(words) == length
        assert data.vocabulary.decode(data.x[0]) == data.sentences[0]


def test_the_label_is_the_verb_that_settles_the_reading():
    data = garden_path(300, seed=0)
    for sentence, kind, verb, length in zip(
        data.sentences, data.kinds, data.verb.tolist(), data.lengths.tolist(), strict=True
    ):
        words = sentence.split()
        assert len(words) == length
        if kind in ("reduced", "unreduced"):
            assert words[verb] in INTRANSITIVE and any(w in AMBIGUOUS for w in words[:verb])
            assert ("that" in words) == (kind == "unreduced")
        else:
            assert verb == -1


def test_padding_vocabulary_and_stream():
    data = garden_path(200, seed=3)
    assert len(data.vocabulary) == 31 < 40
    for row, n in zip(data.x, data.lengths.tolist(), strict=True):
        assert (row[n - 1 :] == data.vocabulary["."]).all() and (row[: n - 1] != data.vocabulary["."]).all()
    assert data.vocabulary.decode(data.stream()) == " ".join(data.sentences)


def test_same_seed_same_sentences_in_the_grammars_proportions():
    data = garden_path(4000, seed=0)
    assert torch.equal(data.x, garden_path(4000, seed=0).x)
    assert not torch.equal(data.x[:50], garden_path(4000, seed=1).x[:50])
    counts = Counter(data.kinds)
    assert all(abs(counts[kind] / 4000 - p) < 0.03 for kind, p in PROBABILITIES.items())


def test_excluded_sentences_are_not_drawn():
    seen = set(garden_path(2000, seed=0).sentences)
    assert not seen & set(garden_path(300, seed=1, kind="reduced", exclude=seen).sentences)
    everything = set(garden_path(5000, seed=0, kind="plain").sentences)
    assert len(everything) == 40
    with pytest.raises(ValueError, match="expected exclude to leave sentences to draw, got 40 sentences"):
        garden_path(2, kind="plain", exclude=everything)


def test_errors():
    with pytest.raises(ValueError, match="expected n of at least 1, got 0"):
        garden_path(0)
    with pytest.raises(ValueError, match="expected kind to be one of reduced, unreduced, ambiguous, plain, got 'odd'"):
        garden_path(3, kind="odd")
