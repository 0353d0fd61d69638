"""Random automata and what they write."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.data.icll import icll, random_automata


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999), letters=st.integers(4, 12), states=st.integers(4, 9))
def test_automata_keep_their_ranges(seed, letters, states):
    g = torch.Generator().manual_seed(seed)
    edges = random_automata(20, g, letters=letters, alphabet=(3, letters), states=(4, states), degree=(1, 3))
    assert edges.shape == (20, states, letters)
    for pfa in edges.tolist():
        for state, row in enumerate(pfa):
            targets = [t for t in row if t >= 0]
            assert 1 <= len(targets) <= 3 and len(set(targets)) == len(targets)
            assert state not in targets and max(targets) < states
        used = {a for row in pfa for a, t in enumerate(row) if t >= 0}
        assert len(used) <= letters


def test_targets_stay_among_the_states_that_exist():
    edges = random_automata(200, torch.Generator().manual_seed(0), states=(5, 9))
    reach = edges.amax((1, 2))
    assert reach.min() < 8 and reach.max() == 8  # small automata do not use the states of large ones


def test_every_letter_is_legal_and_a_bar_starts_again():
    data = icll(50, 80, torch.Generator().manual_seed(1), strings=(2, 5))
    for tokens, states, truth, pfa in zip(data.tokens.tolist(), data.state.tolist(), data.truth, data.edges.tolist(),
                                          strict=True):  # fmt: skip
        state, length = 0, 0
        for token, was, p in zip(tokens, states, truth, strict=True):
            assert was == state
            if token == 8:
                assert 2 <= length <= 5 and not p.any()
                state, length = 0, 0
                continue
            legal = [a for a, t in enumerate(pfa[state]) if t >= 0]
            assert token in legal and p.nonzero().flatten().tolist() == legal
            assert p[legal[0]].item() == pytest.approx(1 / len(legal))
            state, length = pfa[state][token], length + 1


def test_the_same_seed_writes_the_same():
    a, b, c = (icll(5, 30, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(a.tokens, b.tokens) and not torch.equal(a.tokens, c.tokens)
    again = icll(5, 30, torch.Generator().manual_seed(9), edges=a.edges)
    assert torch.equal(again.edges, a.edges)


def test_errors():
    g = torch.Generator()
    with pytest.raises(ValueError, match="expected 1 <= degree <= alphabet <= letters"):
        random_automata(2, g, alphabet=(4, 20))
    with pytest.raises(ValueError, match="more states than the greatest degree"):
        random_automata(2, g, states=(3, 8))
    with pytest.raises(ValueError, match="expected strings and length of at least 1"):
        icll(2, 10, g, strings=(0, 3))
    with pytest.raises(ValueError, match=r"expected edges of shape \(2, states, letters\), got \(3, 8, 8\)"):
        icll(2, 10, g, edges=random_automata(3, g))
