"""greedy_search and beam_search against brute force over all sequences."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.layers.decoding import beam_search, greedy_search

EOS = 0


def model(B, V, seed, longest=8):
    """A random second-order chain, different for each row of the batch; its state holds the last two symbols."""
    table = torch.randn(B, V, V, V, generator=torch.Generator().manual_seed(seed)) * 2

    def step(tokens, state):
        rows = table[state["row"], state["last"], tokens]
        return rows, {"row": state["row"], "last": tokens, "pair": (tokens, [state["last"]]), "note": "kept"}

    start = torch.zeros(B, dtype=torch.long)
    return table, step, {"row": torch.arange(B), "last": start, "pair": (start, [start]), "note": "kept"}


def all_scores(table, max_len):
    """Every finished sequence of one row: {tokens: log_prob}."""
    V, found = len(table), {}
    for length in range(max_len):
        for body in itertools.product(range(1, V), repeat=length):
            total, before, last = 0.0, 0, 1
            for symbol in (*body, EOS):
                total += table[before, last].double().log_softmax(-1)[symbol].item()
                before, last = last, symbol
            found[body] = total
    return found


@settings(max_examples=60)
@given(B=st.integers(1, 3), V=st.integers(2, 6), max_len=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_a_beam_of_one_is_greedy(B, V, max_len, seed):
    _, step, state = model(B, V, seed)
    greedy = greedy_search(step, state, 1, EOS, max_len)
    beam = beam_search(step, state, 1, EOS, 1, max_len)
    assert [h[0].tokens for h in beam] == [h.tokens for h in greedy]
    for (one,), other in zip(beam, greedy, strict=True):
        assert one.finished == other.finished and one.log_prob == pytest.approx(other.log_prob, abs=1e-5)


@settings(max_examples=40)
@given(V=st.integers(2, 4), max_len=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_a_wide_beam_finds_the_best_sequence(V, max_len, seed):
    table, step, state = model(2, V, seed)
    found = beam_search(step, state, 1, EOS, width=V**max_len, max_len=max_len, length_penalty=0.0)
    for row, hypotheses in zip(table, found, strict=True):
        truth = all_scores(row, max_len)
        best = max(truth, key=truth.get)
        assert hypotheses[0].tokens == best
        assert hypotheses[0].log_prob == pytest.approx(truth[best], abs=1e-5)
        for h in hypotheses:  # every probability reported is the probability of that sequence
            if h.finished:
                assert h.log_prob == pytest.approx(truth[h.tokens], abs=1e-5)
                assert h.score == pytest.approx(h.log_prob)


@settings(max_examples=30)
@given(
    B=st.integers(1, 3),
    V=st.integers(2, 6),
    width=st.integers(1, 7),
    max_len=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_hypotheses_are_distinct_sorted_and_at_most_width(B, V, width, max_len, seed):
    _, step, state = model(B, V, seed)
    for hypotheses in beam_search(step, state, 1, EOS, width, max_len):
        assert 1 <= len(hypotheses) <= width
        assert len({(h.tokens, h.finished) for h in hypotheses}) == len(hypotheses)
        order = [(not h.finished, -h.score) for h in hypotheses]
        assert order == sorted(order)
        for h in hypotheses:
            assert EOS not in h.tokens
            assert h.score == pytest.approx(h.log_prob / (len(h.tokens) + h.finished))


def test_beam_beats_greedy_where_greed_is_punished():
    """The best first symbol leads into a dead end of low probability."""
    probabilities = {1: [0.0, 0.0, 0.6, 0.4], 2: [0.3, 0.0, 0.35, 0.35], 3: [0.9, 0.0, 0.05, 0.05]}

    def step(tokens, state):
        return torch.tensor([probabilities[int(t)] for t in tokens]).log(), state

    greedy = greedy_search(step, None, torch.tensor([1]), EOS, 3)[0]
    best = beam_search(step, None, torch.tensor([1]), EOS, 2, 3, length_penalty=0.0)[0][0]
    assert greedy.tokens[0] == 2
    assert best.tokens == (3,) and best.log_prob == pytest.approx(math.log(0.36))


def test_masks_make_permutations():
    """A symbol is forbidden by -inf once used, the end until all are used: what a tour needs."""
    n = 5
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(2, n + 1, n + 1, generator=generator)

    def step(tokens, state):
        used = state["used"].clone()
        used[torch.arange(len(tokens)), tokens] = True
        scores = table[state["row"], tokens].masked_fill(used, float("-inf"))
        complete = used[:, 1:].all(1)
        scores[:, 0] = torch.where(complete, scores[:, 0].new_zeros(()), float("-inf"))
        return scores, {"row": state["row"], "used": used}

    state = {"row": torch.arange(2), "used": torch.zeros(2, n + 1, dtype=torch.bool)}
    # the start symbol 0 is the end symbol too: it is marked as used and allowed again at the end
    for width in (1, 3, 50):
        for hypotheses in beam_search(step, state, 0, 0, width, n + 1):
            assert hypotheses and all(sorted(h.tokens) == list(range(1, n + 1)) for h in hypotheses)
    for h in greedy_search(step, state, 0, 0, n + 1):
        assert sorted(h.tokens) == list(range(1, n + 1))


def test_without_an_end_symbol_every_sequence_is_full():
    _, step, state = model(2, 4, 0)
    for hypotheses in beam_search(step, state, 1, None, 3, 5):
        assert len(hypotheses) == 3 and all(len(h.tokens) == 5 and not h.finished for h in hypotheses)
    assert all(len(h.tokens) == 5 for h in greedy_search(step, state, 1, None, 5))


def test_logits_and_log_probabilities_are_the_same_thing():
    _, step, state = model(2, 5, 1)

    def normalised(tokens, state):
        scores, state = step(tokens, state)
        return scores.log_softmax(-1), state

    one, other = (beam_search(f, state, 1, EOS, 3, 5) for f in (step, normalised))
    assert [[h.tokens for h in row] for row in one] == [[h.tokens for h in row] for row in other]


def test_batch_rows_do_not_meddle():
    _, step, state = model(3, 5, 2)
    together = beam_search(step, state, 1, EOS, 3, 5)
    for b in range(3):
        alone = {k: v[b : b + 1] if torch.is_tensor(v) else v for k, v in state.items() if k != "pair"} | {"pair": ()}
        row = beam_search(step, alone, 1, EOS, 3, 5)[0]
        assert [h.tokens for h in row] == [h.tokens for h in together[b]]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s, m: beam_search(s, m, 1, EOS, 0, 5), "expected width to be at least 1, got 0"),
        (lambda s, m: greedy_search(s, m, 1, EOS, 0), "expected max_len to be at least 1, got 0"),
        (
            lambda s, m: greedy_search(s, m, torch.zeros(2, 1), EOS, 3),
            r"expected bos .* shape \(B,\), got shape \(2, 1\)",
        ),
        (
            lambda s, m: greedy_search(s, m, torch.ones(5).long(), EOS, 3),
            r"batch of 5 sequences .* got shape \(2,\)",
        ),
        (
            lambda s, m: greedy_search(lambda t, q: (torch.zeros(1, 4), q), m, 1, EOS, 3),
            r"expected scores from step_fn of shape \(N, V\) with N = 2, got \(1, 4\)",
        ),
    ],
)
def test_errors_name_what_was_expected(call, message):
    _, step, state = model(2, 4, 0)
    with pytest.raises(ValueError, match=message):
        call(step, state)
