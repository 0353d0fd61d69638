"""The Reber automaton and its strings."""

import pytest
import torch

from seqarch.data.reber import AUTOMATON, CORRUPTIONS, END, INTERIOR, START, SYMBOLS, encode, is_reber, reber


def test_automaton_is_the_one_of_the_literature():
    assert [is_reber(s) for s in ("BTXSE", "BPVVE", "BTSSSXXTTVPSE", "BPTTVPXVVE")] == [True] * 4
    assert [is_reber(s) for s in ("", "B", "BTXS", "BTXSEE", "BTXTE", "BPVVe", "TXSE", "BTXQE")] == [False] * 8
    assert all(set(arrows) <= set(SYMBOLS) for arrows in AUTOMATON.values()) and AUTOMATON[END] == {}
    assert set(INTERIOR) == set(SYMBOLS) - {"B", "E"} and START in AUTOMATON


def test_labels_are_right_and_half_of_the_strings_are_valid():
    data = reber(600, seed=3)
    assert len(data) == 600 and int(data.y.sum()) == 300
    assert [is_reber(s) for s in data.strings] == [bool(y) for y in data.y]
    assert all((k == "valid") == bool(y) for k, y in zip(data.kinds, data.y, strict=True))
    assert all(8 <= n <= 20 for n in data.lengths.tolist())
    assert all(set(s) <= set(SYMBOLS) and s[0] == "B" and s[-1] == "E" for s in data.strings)
    assert [data.kinds.count(k) for k in ("replace", "swap", "rename")] == [100] * 3


def test_every_corruption_can_be_drawn_alone():
    for kind in CORRUPTIONS:
        data = reber(40, seed=1, corruptions=(kind,))
        assert set(data.kinds) == {"valid", kind}
    assert not set("".join(s for s, y in zip(data.strings, data.y, strict=True) if not y)) <= set(SYMBOLS)  # foreign


def test_seed_decides_and_excluded_strings_do_not_come():
    first, again, other = (reber(200, seed=s) for s in (0, 0, 1))
    assert first.strings == again.strings != other.strings and torch.equal(first.x, again.x)
    assert not set(reber(200, seed=1, exclude=set(first.strings)).strings) & set(first.strings)
    assert all(11 <= n <= 50 for n in reber(50, seed=0, min_len=11, max_len=50).lengths.tolist())


def test_encoding():
    x, lengths = encode(["BTXSE", "BPVVE", "BTSSXSE"])
    assert x.shape == (3, 7) and x.dtype == torch.long and lengths.tolist() == [5, 5, 7]
    assert bytes(x[0].tolist()) == b"BTXSE\0\0" and bytes(x[2].tolist()) == b"BTSSXSE"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: reber(1, seed=0), "expected n >= 2, got 1"),
        (lambda: reber(4, seed=0, min_len=9, max_len=8), "expected 5 <= min_len <= max_len, got 9 and 8"),
        (lambda: reber(4, seed=0, min_len=3), "expected 5 <= min_len"),
        (
            lambda: reber(4, seed=0, corruptions=("shuffle",)),
            "expected corruptions among replace, swap, rename, foreign",
        ),
        (lambda: reber(4, seed=0, corruptions=()), "expected corruptions among"),
        (lambda: encode([]), "expected strings of ASCII symbols"),
        (lambda: encode(["BTXSE", ""]), "expected strings of ASCII symbols"),
        (lambda: encode(["BTXSÉ"]), "expected strings of ASCII symbols"),
        (
            lambda: reber(4, seed=0, min_len=5, max_len=5, corruptions=("swap",), exclude={"BTXSE", "BPVVE"}),
            "expected limits that leave valid strings to draw, got lengths 5 to 5 and 2 excluded",
        ),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
