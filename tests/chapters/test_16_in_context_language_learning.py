"""Chapter 16: automata, rulers, n-gram layers and networks; the checks of exercises can tell right from wrong."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from seqarch.data.icll import icll
from seqarch.kernels import linear_attention, ngram_attention
from tests.notebooks import load_definitions

chapter = load_definitions("16-in-context-language-learning")
KINDS = ["attention", "retention", "gla", "mamba2", "lstm", "none", "ngram1", "ngram3"]


class TestLanguages:
    @given(seed=st.integers(0, 10**6))
    def test_an_automaton_accepts_what_it_writes(self, seed):
        g = random.Random(seed)
        pfa = chapter.random_pfa(g)
        string, states = chapter.write(pfa, 12, g)
        assert chapter.accepts(pfa, string) and len(states) == 12 and states[0] == 0
        legal = set(pfa[states[-1]])
        for letter in set("abcdefgh") - legal:
            assert not chapter.accepts(pfa, string[:-1] + letter)

    def test_scores_of_the_truth_and_of_its_opposite(self):
        data = icll(20, 50, torch.Generator().manual_seed(0))
        letters = data.truth.sum(-1) > 0
        legal, distance = chapter.scores(data.truth.double(), data.truth.double())
        assert torch.equal(legal.isnan(), ~letters) and (legal[letters] == 1).all() and (distance[letters] == 0).all()
        wrong = (data.truth == 0).double()
        legal, distance = chapter.scores(wrong / wrong.sum(-1, keepdim=True), data.truth.double())
        assert (legal[letters] == 0).all() and torch.allclose(distance[letters], torch.ones_like(distance[letters]))


class TestRulers:
    @settings(max_examples=15, deadline=None)
    @given(T=st.integers(1, 40), c=st.integers(0, 4), seed=st.integers(0, 999))
    def test_counting_is_attention(self, T, c, seed):
        tokens = torch.randint(9, (2, T), generator=torch.Generator().manual_seed(seed))
        want = torch.tensor([chapter.ruler_by_counting(row, c) for row in tokens.tolist()], dtype=torch.float64)
        got = chapter.ruler(tokens, c)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(got.sum(-1), torch.ones(2, T, dtype=torch.float64))

    @settings(max_examples=15, deadline=None)
    @given(T=st.integers(1, 30), n=st.integers(1, 5), seed=st.integers(0, 999))
    def test_the_definition_is_the_kernel(self, T, n, seed):
        ids = torch.randint(3, (T,), generator=torch.Generator().manual_seed(seed))
        A, h = chapter.match_by_loops(ids.tolist(), n).double(), torch.randn(1, T, 4, dtype=torch.float64)
        out, count = ngram_attention(ids[None], h, n)
        assert torch.equal(count[0].double(), A.sum(1))
        torch.testing.assert_close(out[0], A @ h[0] / A.sum(1, keepdim=True).clamp_min(1))

    def test_equal_tokens_match_everywhere_behind_the_start(self):
        A = chapter.match_by_loops([5] * 9, 3)
        want = torch.tensor([[float(3 <= j <= i - 1) for j in range(9)] for i in range(9)])
        assert torch.equal(A, want)

    def test_baum_welch_finds_a_simple_language(self):
        cycle = torch.tensor([0, 1, 2] * 30)[None].repeat(2, 1)
        P = chapter.baum_welch(cycle, 4, 30, torch.Generator().manual_seed(0), restarts=8)
        torch.testing.assert_close(P.sum((2, 3)), torch.ones(2, 4, dtype=torch.float64))
        p = chapter.follow(P, cycle)
        assert (p[:, 30:-1].argmax(-1) == cycle[:, 31:]).double().mean() > 0.95


class TestNetworks:
    @pytest.mark.parametrize("kind", KINDS)
    def test_causal_and_every_parameter_learns(self, kind):
        torch.manual_seed(0)
        model = chapter.Network(9, [kind, "ngram2", kind], 16, 2)
        tokens = icll(4, 41, torch.Generator().manual_seed(0)).tokens
        other = tokens.clone()
        other[:, 25] = (other[:, 25] + 1) % 9
        with torch.no_grad():
            moved = (model(tokens) - model(other)).abs().amax((0, 2)) > 1e-5
        assert not moved[:25].any() and moved[25]
        chapter.icll_loss(model, tokens).backward()
        without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        unused = {"norms.0.weight", "norms.0.bias", "norms.2.weight", "norms.2.bias"} if kind == "none" else set()
        assert set(without) == unused

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_sequences_of_a_batch_do_not_meet(self, n):
        layer, tokens, h = chapter.NGramLayer(6, n), torch.randint(2, (3, 20)), torch.randn(3, 20, 6)
        alone = torch.cat([layer(h[b : b + 1], tokens[b : b + 1]) for b in range(3)])
        torch.testing.assert_close(layer(h, tokens), alone)

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_token_by_token(self, n):
        layer, tokens, h = chapter.NGramLayer(6, n), torch.randint(3, (2, 30)), torch.randn(2, 30, 6)
        state, outputs = None, []
        for t in range(30):
            y, state = layer.step(h[:, t], tokens[:, t], state)
            outputs.append(y)
        torch.testing.assert_close(torch.stack(outputs, 1), layer(h, tokens), rtol=1e-4, atol=1e-5)

    def test_bars_carry_no_loss(self):
        torch.manual_seed(0)
        model = chapter.Network(9, ["none"], 8, 2)
        tokens = icll(3, 30, torch.Generator().manual_seed(0)).tokens
        logits, target = model(tokens[:, :-1]), tokens[:, 1:]
        want = F.cross_entropy(logits[target < 8], target[target < 8])
        torch.testing.assert_close(chapter.icll_loss(model, tokens), want)

    def test_a_head_that_copies_the_follower_scores_one(self):
        torch.manual_seed(0)
        model = chapter.Network(9, ["attention"], 16, 2)
        tokens = torch.randint(9, (2, 30))
        found, uniform = chapter.head_scores(model, tokens, 1)
        assert len(found) == 1 and len(found[0]) == 2 and all(0 <= s <= 1 for s in found[0]) and 0 < uniform < 1
        model.mixers[0].qkv.weight.data.zero_()  # a head that cannot tell anything apart is the uniform one
        assert chapter.head_scores(model, tokens, 1)[0][0] == pytest.approx([uniform, uniform], abs=1e-5)


class TestGatedRecurrences:
    def test_gla_with_a_fixed_fade_is_linear_attention_that_forgets_at_one_rate(self):
        torch.manual_seed(0)
        layer, h = chapter.GatedLinearAttention(16, 2).double(), torch.randn(3, 40, 16, dtype=torch.float64)
        with torch.no_grad():
            layer.fade[1].weight.zero_()
            layer.fade[1].bias.fill_(-1.5)
            q, k, v = layer.qkv(h).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            rate = F.logsigmoid(torch.tensor(-1.5, dtype=torch.float64)) / 16
            y, _ = linear_attention(q / 8**0.5, k, v, log_decay=rate.expand(3, 2, 40))
            want = layer.leave(F.silu(layer.gate(h)) * layer.norm(y).transpose(1, 2).flatten(2))
            torch.testing.assert_close(layer(h, None), want)

    def test_mamba_without_steps_sees_no_farther_than_its_convolution(self):
        torch.manual_seed(0)
        layer, h = chapter.Mamba2(16).double(), torch.randn(1, 30, 16, dtype=torch.float64)
        other = h.clone()
        other[:, 10] += 1
        with torch.no_grad():
            far = (layer(other, None) - layer(h, None)).abs().amax((0, 2))
            assert not far[:10].any() and (far[10:] > 1e-9).all()  # with steps, all of the past
            layer.dt_bias.fill_(-1e3)
            near = (layer(other, None) - layer(h, None)).abs().amax((0, 2))
        assert (near[10:14] > 1e-9).all() and not near[14:].any()


class TestSwitches:
    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_without_w2_it_is_the_layer_with_w2_zero(self, n):
        torch.manual_seed(0)
        bare, full = chapter.SwitchedNGram(6, n, own=False), chapter.NGramLayer(6, n)
        bare.followers.load_state_dict(full.followers.state_dict())
        full.own.weight.data.zero_()
        tokens, h = torch.randint(3, (2, 30)), torch.randn(2, 30, 6)
        torch.testing.assert_close(bare(h, tokens), full(h, tokens))
        assert len(list(bare.parameters())) == 2

    @settings(max_examples=15, deadline=None)
    @given(T=st.integers(1, 25), n=st.integers(1, 4), seed=st.integers(0, 999))
    def test_itself_adds_the_diagonal_where_the_tokens_repeat(self, T, n, seed):
        g = torch.Generator().manual_seed(seed)
        tokens, h = torch.randint(2, (1, T), generator=g), torch.randn(1, T, 5, generator=g)
        layer, ids = chapter.SwitchedNGram(5, n, itself=True), tokens[0].tolist()
        A = chapter.match_by_loops(ids, n)
        for i in range(n, T):
            A[i, i] = float(all(ids[i - r] == ids[i - 1 - r] for r in range(n)))
        want = layer.followers(A @ h / A.sum(1, keepdim=True).clamp_min(1)) + layer.own(h)
        torch.testing.assert_close(layer(h, tokens), want, rtol=1e-4, atol=1e-5)

    def test_with_both_switches_as_they_were_it_is_the_layer(self):
        layer, same = chapter.NGramLayer(6, 2), chapter.SwitchedNGram(6, 2)
        same.load_state_dict(layer.state_dict())
        tokens, h = torch.randint(3, (2, 30)), torch.randn(2, 30, 6)
        assert torch.equal(same(h, tokens), layer(h, tokens))

    def test_a_function_can_stand_for_a_layer(self):
        model = chapter.Network(9, [lambda d: chapter.SwitchedNGram(d, 2, own=False), "none"], 8, 2)
        assert isinstance(model.mixers[0], chapter.SwitchedNGram)
        assert model(torch.randint(9, (2, 12))).shape == (2, 12, 9)


class TestHeads:
    def test_maps_are_causal_distributions(self):
        torch.manual_seed(0)
        maps = chapter.attention_maps(chapter.Network(9, ["attention"] * 2, 16, 4), torch.randint(9, (3, 20)))
        assert [tuple(m.shape) for m in maps] == [(3, 4, 20, 20)] * 2
        for m in maps:
            torch.testing.assert_close(m.sum(-1), torch.ones(3, 4, 20))
            assert not m.triu(1).any()

    def test_attention_on_the_matches_alone_scores_one(self):
        ids = [0, 1, 2, 0, 1, 2, 0, 1]
        A = chapter.match_by_loops(ids, 2)[None]
        perfect = torch.where(A.sum(-1, keepdim=True) > 0, A / A.sum(-1, keepdim=True).clamp_min(1), torch.eye(8))
        assert chapter.on_matches(perfect, A).item() == pytest.approx(1)
        assert chapter.on_matches(torch.eye(8)[None], A).item() == 0


def keeps_i(ids, n):
    A = chapter.solve_match_mask(ids, n)
    return A | torch.eye(ids.shape[1], dtype=torch.bool)


def copies(ids, n):
    """Reads the match itself rather than what follows it."""
    T = ids.shape[1]
    return (ids[:, :, None] == ids[:, None]) & torch.ones(T, T, dtype=torch.bool).tril(-1)


def wraps(ids, n):
    """Looks around the corner: the first tokens are preceded by the last ones."""
    T, A = ids.shape[1], torch.ones(len(ids), ids.shape[1], ids.shape[1], dtype=torch.bool).tril(-1)
    for r in range(n):
        A &= ids.roll(r, 1)[:, :, None] == ids.roll(r + 1, 1)[:, None]
    return A.view(-1, T, T)


def unfilled(strings, prefix, n):
    for size in range(min(n - 1, len(prefix)), -1, -1):
        sought = prefix[len(prefix) - size :]
        counts = Counter(s[i + size] for s in strings for i in range(len(s) - size) if s[i : i + size] == sought)
        if counts:
            return {a: c / counts.total() for a, c in counts.items()}
    return {}


class StoresFirst:
    def __init__(self, n):
        self.n, self.last, self.sums = n, (), {}

    def step(self, token, h):
        before, now = self.last, (*self.last, token)[-self.n :]
        if len(before) == self.n:
            old, seen = self.sums.get(before, (torch.zeros_like(h), 0))
            self.sums[before] = old + h, seen + 1
        total, count = self.sums.get(now, (torch.zeros_like(h), 0))
        self.last = now
        return total / max(1, count)


def matches_itself(ids, V):
    x = F.one_hot(ids, V).float()
    agree = (x @ x.mT).tril(-1)
    return agree @ x / agree.sum(-1, keepdim=True).clamp_min(1)


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        ("check_next_distribution", lambda pfa, prefix: {a: 1 / len(pfa[0]) for a in pfa[0]}),
        ("check_next_distribution", lambda pfa, prefix: chapter.solve_next_distribution(pfa, prefix) or {"a": 1.0}),
        ("check_match_mask", keeps_i),
        ("check_match_mask", copies),
        ("check_match_mask", wraps),
        ("check_backoff", unfilled),
        ("check_ngram_memory", StoresFirst),
        ("check_induction", matches_itself),
    ],
)
def test_checks_refuse_plausible_mistakes(check, answer):
    assert getattr(chapter, check).verdict(answer).startswith("not yet")
