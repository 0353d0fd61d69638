"""Chapter 05: its laws on small networks, its search and decoding by hand, and its exercise checks against wrong answers."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from seqarch.data.moving_digits import moving_digits
from seqarch.kernels.gated_rnn import lstm_scan
from seqarch.layers.decoding import greedy_search
from seqarch.layers.rnn import LSTM, RNN
from tests.notebooks import load_definitions

chapter = load_definitions("05-recurrent-convolutional")


def clips(B=3, T=6, C=1, S=16):
    return torch.randn(B, T, C, S, S)


def network(kind="LRCN", **options):
    torch.manual_seed(0)
    return getattr(chapter, kind)(1, 16, **options).eval()


# --- activity recognition -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_single_frame_model_has_no_order_and_the_lrcn_has(seed):
    torch.manual_seed(seed)
    x = clips()
    order = torch.randperm(6)
    order = order if (order != torch.arange(6)).any() else order.flip(0)
    with torch.no_grad():
        single, lrcn = network("SingleFrame"), network()
        before, after = single(x).softmax(-1), single(x[:, order]).softmax(-1)
        torch.testing.assert_close(before[:, order], after, rtol=0, atol=1e-6)
        torch.testing.assert_close(before.mean(1), after.mean(1), rtol=0, atol=1e-6)
        assert not torch.allclose(lrcn(x).softmax(-1).mean(1), lrcn(x[:, order]).softmax(-1).mean(1), atol=1e-6)


@pytest.mark.parametrize("core", [LSTM, RNN])
def test_causal(core):
    model, x = network(core=core), clips()
    changed = x.clone()
    changed[:, 4:] += 1
    with torch.no_grad():
        one, other = model(x), model(changed)
    assert torch.equal(one[:, :4], other[:, :4]) and not torch.equal(one[:, 4:], other[:, 4:])


def test_streaming_is_the_whole_clip():
    model, x = network(), clips()
    with torch.no_grad():
        whole, state, parts = model(x), None, []
        for t in range(6):
            part, state = model.stream(x[:, t : t + 1], state)
            parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-6)


def test_packed_streams_are_separate_runs():
    model, x = network(), clips(2, 5)
    flags = torch.ones(1, 10)
    flags[0, [0, 5]] = 0
    with torch.no_grad():
        packed = model(x.flatten(0, 1)[None], cont=flags).view(2, 5, -1)
        torch.testing.assert_close(packed, model(x), rtol=0, atol=1e-6)
        assert (model(x.flatten(0, 1)[None])[0, 5:] - model(x)[1]).abs().max() > 1e-5


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"expected frames of shape \(batch, time, channels, height, width\), got"):
        network()(torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match="expected cont to hold only 0"):
        network()(clips(1, 2), cont=torch.tensor([[0.0, 2.0]]))


def test_the_loss_repeats_the_label_at_every_step():
    model, x, y = network(), clips(), torch.tensor([1, 5, 9])
    logits = model(x)
    by_hand = -torch.stack([logits[i, t].log_softmax(-1)[y[i]] for i in range(3) for t in range(6)]).mean()
    torch.testing.assert_close(chapter.every_step_loss(model, (x, y)), by_hand)
    torch.testing.assert_close(chapter.clip_probabilities(model, x).sum(1), torch.ones(3))


# --- the LSTM -------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(B=st.integers(1, 3), T=st.integers(1, 7), H=st.integers(1, 6), seed=st.integers(0, 1000))
def test_the_kernel_is_the_loop(B, T, H, seed):
    g = torch.Generator().manual_seed(seed)
    xp, W = (torch.randn(*s, generator=g).requires_grad_() for s in ((B, T, 4 * H), (4 * H, H)))
    flags = (torch.rand(B, T, generator=g) < 0.6).float()
    weight = torch.randn(B, T, H, generator=g)
    results = []
    for run in (chapter.lstm_loop, lambda a, w, d: lstm_scan(a, w, cont=d)[0]):
        h = run(xp, W, flags)
        results.append([h, *torch.autograd.grad((h * weight).sum(), (xp, W))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_gradcheck_with_flags():
    torch.manual_seed(0)
    B, T, H = 2, 5, 3
    xp, W = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((B, T, 4 * H), (4 * H, H)))
    flags = torch.tensor([[0, 1, 1, 0, 1], [0, 1, 0, 1, 1]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, w: chapter.lstm_loop(a, w, flags), (xp, W))
    assert torch.autograd.gradcheck(lambda a, w: lstm_scan(a, w, cont=flags)[0], (xp, W))


def test_the_loop_is_torch_nn():
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(4, 5, batch_first=True).double()
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    xp = x @ theirs.weight_ih_l0.T + theirs.bias_ih_l0 + theirs.bias_hh_l0
    torch.testing.assert_close(chapter.lstm_loop(xp, theirs.weight_hh_l0), theirs(x)[0], rtol=0, atol=1e-10)


# --- flow -----------------------------------------------------------------------------------------------------------


def test_flow_of_still_and_of_moving_pictures():
    torch.manual_seed(0)
    picture = torch.rand(1, 1, 1, 16, 16)
    still = chapter.flow_images(picture.expand(1, 4, 1, 16, 16))
    assert still.shape == (1, 4, 3, 16, 16) and still.abs().max() < 1e-4
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    moving = torch.stack([torch.sin((x - 0.5 * t) / 3) + torch.cos((y + 0.3 * t) / 3) for t in range(5)])[None, :, None]
    u, w, length = chapter.flow_images(moving)[0, :, :, 8:-8, 8:-8].mean((0, 2, 3)).tolist()
    assert u == pytest.approx(0.5, abs=0.08) and w == pytest.approx(-0.3, abs=0.08)
    assert length == pytest.approx(math.hypot(u, w), abs=0.05)
    assert chapter.flow_images(torch.zeros(1, 3, 1, 16, 16)).isfinite().all()


def test_weak_features_do_not_see_the_order_in_between():
    x = moving_digits(4).frames
    order = torch.tensor([0, 3, 1, 2, *range(4, 16)])
    one, other = chapter.weak_features(x), chapter.weak_features(x[:, order])
    torch.testing.assert_close(one[:, :256], other[:, :256])
    assert torch.equal(one[:, 512:], other[:, 512:])


# --- captions -------------------------------------------------------------------------------------------------------


def captioner(variant="2f", K=11, D=4):
    torch.manual_seed(0)
    return chapter.Captioner(variant, K, D, embedding=6, hidden=8).eval()


@pytest.mark.parametrize("variant", chapter.VARIANTS)
def test_who_sees_the_image(variant):
    model, v = captioner(variant), torch.randn(2, 4, requires_grad=True)
    outputs = model.layers(v, torch.randint(11, (2, 5)))[0]
    gradient = torch.autograd.grad(outputs[0].sum(), v, allow_unused=True, retain_graph=True)[0]
    assert (gradient is None or not gradient.any()) == (variant == "2f")
    assert torch.autograd.grad(outputs[-1].sum(), v)[0].abs().min() > 0
    assert len(outputs) == int(variant[0])


@pytest.mark.parametrize("variant", chapter.VARIANTS)
def test_stepping_is_teacher_forcing(variant):
    model, v, words = captioner(variant), torch.randn(3, 4), torch.randint(11, (3, 6))
    with torch.no_grad():
        logits, state = model(v, words), model.start(v)
        for t in range(6):
            step, state = model.step(words[:, t], state)
            torch.testing.assert_close(step, logits[:, t], rtol=1e-5, atol=1e-6)


def test_unknown_variant():
    with pytest.raises(ValueError, match="expected variant to be one of 1u, 2u, 2f, got '3u'"):
        captioner("3u")


def test_words():
    words = chapter.Words(["a big cat", "a dog"])
    assert words.list == ["<end>", "a", "big", "cat", "dog"] and len(words) == 5
    inputs, targets = words.shifted(["a big cat", "dog"])
    assert inputs.tolist() == [[0, 1, 2, 3], [0, 4, 0, 0]] and targets.tolist() == [[1, 2, 3, 0], [4, 0, -1, -1]]
    assert words.text([1, 4, 0, 3]) == "a dog"
    for empty in ([], [""], ["a dog", " "]):
        with pytest.raises(ValueError, match="expected sentences of at least one word each, got an empty one"):
            words.shifted(empty)


def test_a_sampled_caption_has_the_score_of_its_steps():
    model, v = captioner(), torch.randn(3, 4)
    drawn, log_p = chapter.sample_captions(model, v, 5, 1.5, torch.Generator().manual_seed(0), max_len=40)
    assert drawn.shape == (3, 5, 40) and log_p.shape == (3, 5)
    for b, n in itertools.product(range(3), range(5)):
        ids = list(itertools.takewhile(bool, drawn[b, n].tolist()))
        if len(ids) == 40:
            continue
        inputs, targets = torch.tensor([[0, *ids]]), torch.tensor([[*ids, 0]])
        again = chapter.score_caption(model, v[b : b + 1], inputs, targets)
        torch.testing.assert_close(again[0], log_p[b, n], rtol=1e-4, atol=1e-4)
        padded = F.pad(inputs, (0, 3)), F.pad(targets, (0, 3), value=-1)
        torch.testing.assert_close(chapter.score_caption(model, v[b : b + 1], *padded), again)


def test_an_empty_caption_has_no_score():
    with pytest.raises(ValueError, match="expected captions with at least one symbol to score, got an empty one"):
        chapter.score_caption(captioner(), torch.zeros(1, 4), torch.zeros(1, 2).long(), torch.full((1, 2), -1))


def test_a_large_gamma_is_greedy():
    model, v = captioner(), torch.randn(4, 4)
    drawn, _ = chapter.sample_captions(model, v, 2, 1e4, torch.Generator().manual_seed(0), max_len=9)
    greedy = greedy_search(model.step, model.start(v), 0, 0, 9)
    for rows, hypothesis in zip(drawn.tolist(), greedy, strict=True):
        for row in rows:
            assert tuple(itertools.takewhile(bool, row)) == hypothesis.tokens


def test_normalising_ranks_captions_anew_and_images_not():
    torch.manual_seed(0)
    s = torch.randn(6, 9, dtype=torch.float64) * 3 - 20 - 5 * torch.rand(9, dtype=torch.float64)
    n = chapter.normalise(s)
    assert torch.equal(s.argsort(dim=0), n.argsort(dim=0)) and not torch.equal(s.argmax(1), n.argmax(1))
    torch.testing.assert_close(n.exp().mean(0), torch.ones(9, dtype=torch.float64))
    assert chapter.normalise(s - 3000).isfinite().all()


def test_score_matrix():
    model, v = captioner(), torch.randn(3, 4)
    inputs, targets = torch.tensor([[0, 3, 5], [0, 2, 0]]), torch.tensor([[3, 5, 0], [2, 0, -1]])
    s = chapter.score_matrix(model, v, inputs, targets)
    log_p = model(v[2:], inputs[1:]).log_softmax(-1)[0]
    torch.testing.assert_close(s[2, 1], log_p[0, 2] + log_p[1, 0])
    assert s.shape == (3, 2)


def test_bleu():
    references = [["the cat is on the mat", "there is a cat on the mat"]]
    assert chapter.corpus_bleu([references[0][0]], references) == pytest.approx(1)
    assert chapter.corpus_bleu(["the the the the the the the"], references, 1) == pytest.approx(2 / 7)
    assert chapter.corpus_bleu(["the cat"], references, 1) == pytest.approx(math.exp(-2))
    assert chapter.corpus_bleu(["a dog"], references, 2) == 0 and chapter.corpus_bleu([""], references) == 0
    # a corpus adds counts before it divides: not the mean of the sentences' scores
    pair = chapter.corpus_bleu(["the cat is on the mat", "a b c d"], [references[0], ["a x c y"]], 1)
    assert pair == pytest.approx((6 + 2) / 10)


# --- the conditional random field -----------------------------------------------------------------------------------


def test_crf_by_enumeration():
    torch.manual_seed(0)
    theta = [torch.randn(4, n).log_softmax(1) for n in chapter.SIZES]
    tables = {(j, k): torch.randn(chapter.SIZES[j], chapter.SIZES[k]) for j, k in ((0, 1), (0, 2), (1, 2))}
    best, marginals = chapter.crf(theta, tables)
    for i in range(4):
        p = Counter()
        for u in itertools.product(*map(range, chapter.SIZES)):
            p[u] = math.exp(
                sum(theta[j][i, u[j]].item() for j in range(3))
                + sum(t[u[j], u[k]].item() for (j, k), t in tables.items())
            )
        assert tuple(best[i].tolist()) == p.most_common(1)[0][0]
        for j, a in ((0, 3), (1, 7), (2, 2)):
            want = sum(v for u, v in p.items() if u[j] == a) / sum(p.values())
            assert marginals[j][i, a].item() == pytest.approx(want, abs=1e-5)


def test_without_pairs_the_crf_is_its_classifiers():
    theta = [torch.randn(5, n).log_softmax(1) for n in chapter.SIZES]
    best, marginals = chapter.crf(theta, {})
    for j, t in enumerate(theta):
        torch.testing.assert_close(marginals[j], t.exp())
        assert torch.equal(best[:, j], t.argmax(1))


def test_co_occurrence_of_independent_values_is_about_zero():
    g = torch.Generator().manual_seed(0)
    facts = torch.stack([torch.randint(n, (40_000,), generator=g) for n in chapter.SIZES], dim=1)
    assert max(t.abs().max() for t in chapter.co_occurrence(facts).values()) < 0.25
    facts[:, 1] = facts[:, 0]
    tied = chapter.co_occurrence(facts)[0, 1]
    assert tied.diagonal().min() > 1.5 and tied[0, 1] < -3


def test_encoder_decoder_steps():
    torch.manual_seed(0)
    model = chapter.EncoderDecoder(9).eval()
    symbols, words = chapter.as_symbols(torch.tensor([[7, 9, 3], [0, 0, 0]])), torch.randint(9, (2, 5))
    assert symbols.tolist() == [[7, 17, 21], [0, 8, 18]]
    assert chapter.as_one_hots(torch.tensor([[7, 9, 3]])).nonzero()[:, 1].tolist() == [7, 17, 21]
    with torch.no_grad():
        logits, state = model(symbols, words), model.start(symbols)
        for t in range(5):
            step, state = model.step(words[:, t], state)
            torch.testing.assert_close(step, logits[:, t], rtol=1e-5, atol=1e-6)


def test_scene_labels_do_not_depend_on_what_is_named_first():
    facts = torch.tensor([[1, 3, 2, 0, 7], [0, 7, 3, 1, 3], [0, 4, 1, 0, 5]])
    assert chapter.scene_labels(facts).tolist() == [[1, 3, 1, 0, 7], [1, 3, 1, 0, 7], [0, 5, 0, 0, 4]]


# --- the exercises: every check accepts its solution and refuses plausible wrong answers ---------------------------


def unit_flushes_h_alone(x, h, c, W, cont):
    return chapter.solve_lstm_unit(x, h * cont[:, None], c, W, torch.ones_like(cont))


def unit_flushes_c_alone(x, h, c, W, cont):
    return chapter.solve_lstm_unit(x, h, c * cont[:, None], W, torch.ones_like(cont))


def unit_in_caffe_order(x, h, c, W, cont):
    i, f, o, g = (x + (cont[:, None] * h) @ W.T).chunk(4, dim=-1)
    c = f.sigmoid() * c * cont[:, None] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def unit_returns_c_first(*args):
    return chapter.solve_lstm_unit(*args)[::-1]


def unit_flushes_afterwards(x, h, c, W, cont):
    h, c = chapter.solve_lstm_unit(x, h, c, W, torch.ones_like(cont))
    return h * cont[:, None], c * cont[:, None]


def fuse_unchecked(p, q, w):
    return (w * p.mean(1) + (1 - w) * q.mean(1)).argmax(-1)


def checked(f):
    def fuse(p, q, w):
        if not 0 <= w <= 1:
            raise ValueError(f"expected w between 0 and 1, got {w}")
        return f(p, q, w)

    return fuse


@checked
def fuse_votes(p, q, w):
    votes = [F.one_hot(x.argmax(-1), x.shape[-1]).float().mean(1) for x in (p, q)]
    return (w * votes[0] + (1 - w) * votes[1]).argmax(-1)


@checked
def fuse_logarithms(p, q, w):
    return (w * (p + 1e-9).log().mean(1) + (1 - w) * (q + 1e-9).log().mean(1)).argmax(-1)


@checked
def fuse_the_wrong_way(p, q, w):
    return fuse_unchecked(q, p, w)


@checked
def fuse_the_last_step(p, q, w):
    return (w * p[:, -1] + (1 - w) * q[:, -1]).argmax(-1)


def bleu_unclipped(candidate, references, n):
    said, logs = candidate.split(), 0.0
    for k in range(1, n + 1):
        mine = chapter.ngrams(said, k)
        known = set().union(*(chapter.ngrams(r.split(), k) for r in references))
        found = sum(c for g, c in mine.items() if g in known)
        if not found:
            return 0.0
        logs += math.log(found / sum(mine.values()))
    r = min((abs(len(t.split()) - len(said)), len(t.split())) for t in references)[1]
    return min(1.0, math.exp(1 - r / len(said))) * math.exp(logs / n)


def bleu_without_penalty(candidate, references, n):
    said = candidate.split()
    score = chapter.solve_bleu(candidate, references, n)
    if not score:
        return score
    r = min((abs(len(t.split()) - len(said)), len(t.split())) for t in references)[1]
    return score / min(1.0, math.exp(1 - r / len(said)))


def bleu_pools_references(candidate, references, n):
    return chapter.solve_bleu(candidate, [" ".join(references)], n)


def bleu_longer_of_equals(candidate, references, n):
    score, said = chapter.solve_bleu(candidate, references, n), candidate.split()
    if not score:
        return score
    short = min((abs(len(t.split()) - len(said)), len(t.split())) for t in references)[1]
    long = min((abs(len(t.split()) - len(said)), -len(t.split())) for t in references)[1] * -1
    return score * min(1.0, math.exp(1 - long / len(said))) / min(1.0, math.exp(1 - short / len(said)))


def scores_over_captions(logp, lengths):
    return logp - (logp.logsumexp(1, keepdim=True) - math.log(logp.shape[1])), logp / lengths


def scores_naive(logp, lengths):
    return logp - logp.exp().mean(0).log(), logp / lengths


def scores_sum(logp, lengths):
    return logp - logp.logsumexp(0), logp / lengths


def scores_mean_of_logs(logp, lengths):
    return logp - logp.mean(0), logp / lengths


def crf_ignores_pairs(unary, pairwise):
    return [t.softmax(0) for t in unary]


def crf_naive_exponential(unary, pairwise):
    J, energy = len(unary), 0
    for j, t in enumerate(unary):
        energy = energy + t.view([-1 if d == j else 1 for d in range(J)])
    for (j, k), t in pairwise.items():
        energy = energy + t.view([t.shape[0] if d == j else t.shape[1] if d == k else 1 for d in range(J)])
    p = energy.exp() / energy.exp().sum()
    return [p.sum([d for d in range(J) if d != j]) for j in range(J)]


def crf_best_instead_of_sum(unary, pairwise):
    marginals = []
    J, energy = len(unary), 0
    for j, t in enumerate(unary):
        energy = energy + t.view([-1 if d == j else 1 for d in range(J)])
    for (j, k), t in pairwise.items():
        energy = energy + t.view([t.shape[0] if d == j else t.shape[1] if d == k else 1 for d in range(J)])
    for j in range(J):
        marginals.append(energy.amax([d for d in range(J) if d != j]).softmax(0))
    return marginals


EXERCISES = [
    (
        "check_lstm_unit",
        "solve_lstm_unit",
        [
            unit_flushes_h_alone,
            unit_flushes_c_alone,
            unit_in_caffe_order,
            unit_returns_c_first,
            unit_flushes_afterwards,
        ],
    ),
    (
        "check_fuse",
        "solve_fuse",
        [fuse_unchecked, fuse_votes, fuse_logarithms, fuse_the_wrong_way, fuse_the_last_step],
    ),
    (
        "check_bleu",
        "solve_bleu",
        [bleu_unclipped, bleu_without_penalty, bleu_pools_references, bleu_longer_of_equals],
    ),
    (
        "check_retrieval_scores",
        "solve_retrieval_scores",
        [scores_over_captions, scores_naive, scores_sum, scores_mean_of_logs],
    ),
    (
        "check_crf_marginals",
        "solve_crf_marginals",
        [crf_ignores_pairs, crf_naive_exponential, crf_best_instead_of_sum],
    ),
]


@pytest.mark.parametrize("check, solution", [(c, s) for c, s, _ in EXERCISES])
def test_solutions_pass(check, solution):
    assert getattr(chapter, check).verdict(getattr(chapter, solution)) == "correct"


@pytest.mark.parametrize("check, wrong", [(c, w) for c, _, wrongs in EXERCISES for w in wrongs])
def test_wrong_answers_are_refused(check, wrong):
    assert getattr(chapter, check).verdict(wrong).startswith("not yet: ")
