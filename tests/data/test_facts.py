"""Streams of facts: what is asked can be known, and only what is asked carries a target."""

import pytest
import torch

from seqarch.data.facts import IGNORE, QUERY, fact_stream, passkey_stream, vocabulary_size


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("recent", [None, 4])
def test_every_answer_is_the_newest_value_of_the_key(recent):
    stream = fact_stream(20, 300, generator(), recent=recent)
    asked = 0
    for row, targets, told, age in zip(*(t.tolist() for t in stream), strict=True):
        table, order, t = {}, [], 0
        while t < 300:
            assert told[t] == len(order)
            if row[t] == QUERY:
                if t + 1 < 300:
                    key = row[t + 1]
                    assert targets[t + 1] == table[key][0] and age[t + 1] == t + 1 - table[key][1]
                    assert recent is None or key in order[-recent:]
                    assert t + 2 >= 300 or row[t + 2] == table[key][0]
                    asked += 1
                t += 3
            elif row[t] <= 64:
                assert row[t] not in order[-40:]
                if t + 1 < 300:
                    assert 65 <= row[t + 1] < 73
                    table[row[t]] = (row[t + 1], t + 2)
                order.append(row[t])
                t += 2
            else:
                assert 73 <= row[t] < vocabulary_size()
                t += 1
        places = [t for t in range(300) if targets[t] != IGNORE]
        assert all(row[t - 1] == QUERY for t in places)
    assert asked > 500


def test_the_same_seed_gives_the_same_stream():
    assert torch.equal(fact_stream(3, 50, generator(1)).tokens, fact_stream(3, 50, generator(1)).tokens)
    assert not torch.equal(fact_stream(3, 50, generator(1)).tokens, fact_stream(3, 50, generator(2)).tokens)


def test_passkey_is_one_fact_fillers_and_the_question():
    x, y = passkey_stream(5, 9, generator())
    assert x.shape == (5, 13) and torch.equal(x[:, 1], y) and torch.equal(x[:, -1], x[:, 0])
    assert (x[:, -2] == QUERY).all() and (x[:, 2:-2] >= 73).all()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(recent=0), "recent"),
        (dict(gap=64), "gap"),
        (dict(p_query=0.8, p_filler=0.2), "p_query"),
        (dict(values=0), "values"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        fact_stream(2, 10, generator(), **options)
    with pytest.raises(ValueError, match="length and before >= 0"):
        passkey_stream(2, -1, generator())


def test_fillers_before_the_passkey_move_it_back_and_change_nothing_else():
    plain, answer = passkey_stream(5, 9, generator())
    moved, same = passkey_stream(5, 9, generator(), before=7)
    assert torch.equal(moved[:, 7:], plain) and torch.equal(same, answer)
    assert moved.shape == (5, 20) and (moved[:, :7] >= vocabulary_size() - 4).all()
    with pytest.raises(ValueError, match="length and before >= 0, got"):
        passkey_stream(5, 9, generator(), before=-1)
