"""Chapter 01: its definitions against torch.nn and autograd, its laws, and its exercise checks against wrong answers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from seqarch.kernels.gated_rnn import gru_scan, lstm_scan, rnn_scan
from seqarch.layers.decoding import beam_search, greedy_search
from seqarch.layers.rnn import LSTM, reverse_within_length
from tests.notebooks import load_definitions

chapter = load_definitions("01-recurrent-networks")


def parameters(D=4, H=5, V=6, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"W_hx": (H, D), "W_hh": (H, H), "b_h": (H,), "W_yh": (V, H), "b_y": (V,)}
    return {name: torch.randn(*s, generator=g, dtype=torch.float64).div(2).to(dtype) for name, s in shapes.items()}, g


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@settings(max_examples=15)
@given(B=st.integers(1, 3), T=st.integers(1, 9), seed=st.integers(0, 1000))
def test_bptt_by_hand_is_autograd(dtype, limit, B, T, seed):
    p, g = parameters(dtype=dtype, seed=seed)
    x = torch.randn(B, T, 4, generator=g, dtype=torch.float64).to(dtype)
    h0 = torch.randn(B, 5, generator=g, dtype=torch.float64).to(dtype)
    targets = torch.randint(6, (B, T), generator=g)
    targets[torch.rand(B, T, generator=g) < 0.2] = -100
    targets[0, 0] = 1
    leaves = {name: v.clone().requires_grad_() for name, v in (p | {"x": x, "h0": h0}).items()}
    h, logits = chapter.rnn_forward(leaves, leaves["x"], leaves["h0"])
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    want = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    got = chapter.rnn_backward(p, x, h.detach(), chapter.output_errors(logits.detach(), targets))
    for name in want:
        assert (got[name] - want[name]).abs().max() <= limit * max(1.0, want[name].abs().max().item()), name


@pytest.mark.parametrize("k", [1, 3, 12, 20])
def test_truncated_bptt(k):
    """With k >= T it is full BPTT; with a smaller k the loss is the same and the gradient is not."""
    p, g = parameters()
    x, targets = torch.randn(2, 12, 4, generator=g, dtype=torch.float64), torch.randint(6, (2, 12), generator=g)
    leaves = {name: v.clone().requires_grad_() for name, v in p.items()}
    _, logits = chapter.rnn_forward(leaves, x, torch.zeros(2, 5, dtype=torch.float64))
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    same = torch.allclose(chapter.truncated_gradient(p, x, targets, k), leaves["W_hh"].grad)
    assert same == (k >= 12)


def test_cells_are_those_of_torch_nn():
    torch.manual_seed(0)
    x = torch.randn(3, 9, 4)
    ours, theirs = chapter.LSTMByHand(4, 5), torch.nn.LSTM(4, 5, batch_first=True)
    with torch.no_grad():
        for name, value in (("weight_ih_l0", ours.W_x), ("weight_hh_l0", ours.W_h), ("bias_ih_l0", ours.b)):
            getattr(theirs, name).copy_(value)
        theirs.bias_hh_l0.zero_()
    want, (_, s) = theirs(x)
    h, cells = ours(x)
    torch.testing.assert_close(h, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(cells[:, -1], s[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(chapter.lstm_hoisted(x, ours.W_x, ours.W_h, ours.b), want, rtol=0, atol=1e-6)


def test_lstm_variants():
    torch.manual_seed(0)
    x, H = torch.randn(2, 5, 3), 4
    plain = chapter.LSTMByHand(3, H)
    peep = chapter.LSTMByHand(3, H, peepholes=True)
    peep.load_state_dict(plain.state_dict() | {"p": torch.zeros(3, H)})
    torch.testing.assert_close(peep(x), plain(x))
    peep.p.data.normal_()
    assert not torch.allclose(peep(x)[0], plain(x)[0])
    never = chapter.LSTMByHand(3, H, forget_gate=False)
    never.load_state_dict(plain.state_dict())
    never.b.data[:H] = -1e4  # the input gate shut: without a forget gate the cell stays as it is
    start = torch.randn(2, H), torch.randn(2, H)
    assert torch.equal(never(x, start)[1], start[1][:, None].expand(-1, 5, -1))
    open_end = chapter.LSTMByHand(3, H, squash_output=False)
    open_end.load_state_dict(plain.state_dict())
    assert not torch.allclose(open_end(x)[0], plain(x)[0])


@pytest.mark.parametrize("B, T, H", [(1, 1, 1), (2, 7, 17), (1, 5, 64), (2, 3, 128), (3, 1, 5)])
def test_kernels_are_the_chapters_loops(B, T, H):
    """Values 1e-5 and gradients 1e-4 in float32; xp without contiguous memory."""
    torch.manual_seed(0)
    D = 3
    x = torch.randn(B, T, D)
    weight = torch.randn(B, T, H)

    def compare(loop, kernel, leaves):
        results = []
        for run in (loop, kernel):
            h = run()
            results.append((h, torch.autograd.grad((h * weight).sum(), leaves)))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-5)
        for a, b in zip(results[0][1], results[1][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    def strided(xp):
        return xp.transpose(0, 1).contiguous().transpose(0, 1)

    lstm = chapter.LSTMByHand(D, H)
    compare(
        lambda: lstm(x)[0],
        lambda: lstm_scan(strided(x @ lstm.W_x.T + lstm.b), lstm.W_h)[0],
        [lstm.W_x, lstm.W_h, lstm.b],
    )
    W_x, b_x, W_h, b_h = (
        torch.randn(*s).div(H**0.5).requires_grad_() for s in ((3 * H, D), (3 * H,), (3 * H, H), (3 * H,))
    )

    def gru_loop():
        h, outputs = torch.zeros(B, H), []
        for x_t in x.unbind(1):
            h = chapter.gru_step(x_t, h, W_x, b_x, W_h, b_h)
            outputs.append(h)
        return torch.stack(outputs, 1)

    compare(gru_loop, lambda: gru_scan(strided(x @ W_x.T + b_x), W_h, b_h)[0], [W_x, b_x, W_h, b_h])
    p = {k: v.requires_grad_() for k, v in parameters(D, H, 2, torch.float32)[0].items()}
    p["W_hh"].data /= H**0.5
    used = [p["W_hx"], p["W_hh"], p["b_h"]]
    compare(
        lambda: chapter.rnn_forward(p, x, torch.zeros(B, H))[0][:, 1:],
        lambda: rnn_scan(strided(x @ p["W_hx"].T + p["b_h"]), p["W_hh"])[0],
        used,
    )


def test_gradients_obey_the_bound():
    for name, (_, _, gamma) in chapter.NONLINEARITIES.items():
        for rho in (0.3, 1.0, 2.0):
            norms = chapter.elman_gradient_norms(rho, name, steps=20, H=16, seed=3)
            assert all(n <= (gamma * rho) ** lag * (1 + 1e-9) for lag, n in enumerate(norms))
    assert chapter.elman_gradient_norms(0.5)[40] < 1e-8
    norms = chapter.lstm_gradient_norms(5.0)
    assert norms[40] > 0.1 * norms[0]


def test_bidirectional_network_ignores_padding():
    torch.manual_seed(0)
    both = LSTM(4, 5, bidirectional=True)
    one_way, other_way = LSTM(4, 5), LSTM(4, 5)
    one_way.layers[0], other_way.layers[0] = both.layers[0], both.backward_layers[0]
    x, lengths = torch.randn(3, 8, 4), torch.tensor([8, 1, 5])
    real = torch.arange(8) < lengths[:, None]
    got = chapter.bidirectional_forward(one_way, other_way, x, lengths)
    torch.testing.assert_close(got[real], both(x, lengths=lengths)[0][real])
    longer = torch.cat([x, torch.full((3, 4, 4), 9.0)], dim=1)
    torch.testing.assert_close(
        chapter.bidirectional_forward(one_way, other_way, longer, lengths)[:, :8][real], got[real]
    )


def test_ngram_model_is_a_distribution_and_beats_its_lower_order_on_its_own_text():
    g = torch.Generator().manual_seed(0)
    text = torch.randint(5, (4000,), generator=g).cumsum(0).remainder(33).numpy()
    bits = [chapter.ngram_bits(text, text, n) for n in (1, 2, 3)]
    assert bits[0] > bits[1] > bits[2] - 0.2
    assert chapter.ngram_bits(text[:5], text[:400], 3) < math.log2(33) * 3  # contexts never seen fall back


def test_bits_with_context_find_the_window_of_a_model_that_sees_two_symbols():
    class SeesTwo(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(5, 5, 5, generator=torch.Generator().manual_seed(0)))

        def forward(self, x):
            return self.table[x.roll(1, 1), x], None

    text, model = torch.randint(5, (600,), generator=torch.Generator().manual_seed(1)), SeesTwo()
    bits = {k: chapter.bits_with_context(model, text, k, longest=8, stride=8) for k in (1, 2, 4, 8)}
    assert all(len(b) == 75 - 1 for b in bits.values())
    torch.testing.assert_close(bits[2], bits[4])
    torch.testing.assert_close(bits[2], bits[8])
    assert not torch.allclose(bits[1], bits[2])
    log_p = model.table[text[6:-2:8], text[7:-1:8]].log_softmax(-1)
    torch.testing.assert_close(bits[2], -log_p.gather(1, text[8::8, None])[:, 0].detach() / math.log(2))


@given(a=st.text("abc", max_size=6), b=st.text("abc", max_size=6))
def test_edit_distance(a, b):
    d = chapter.edit_distance(a, b)
    assert d == chapter.edit_distance(b, a)
    assert abs(len(a) - len(b)) <= d <= max(len(a), len(b))
    assert (d == 0) == (a == b)
    assert chapter.edit_distance(a + "x", b + "x") == d


def test_f1_and_space_data():
    x, y = chapter.space_data("the cat sat on the mat", width=5)
    assert x.shape == y.shape == (3, 5)
    assert y.flatten().tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0]
    assert chapter.f1(y, y) == 1.0 and chapter.f1(torch.zeros_like(y), y) == 0.0
    assert chapter.f1(torch.ones_like(y), y) == pytest.approx(2 * 5 / (15 + 5))


class TestEncoderDecoder:
    def model(self):
        torch.manual_seed(0)
        return chapter.EncoderDecoder(27, 8, hidden=12, embedding=6).eval()

    def test_teacher_forcing_is_stepping(self):
        model = self.model()
        source, target = torch.randint(27, (3, 6)), torch.randint(8, (3, 5))
        with torch.no_grad():
            logits, state = model(source, target), model.encode(source)
            for t in range(5):
                step, state = model.step(target[:, t], state)
                torch.testing.assert_close(step, logits[:, t], rtol=1e-5, atol=1e-6)

    def test_a_beam_of_one_is_greedy_and_ours_is_the_packages(self):
        model = self.model()
        source = torch.randint(27, (6, 6))
        with torch.no_grad():
            state = model.encode(source)
            greedy = greedy_search(model.step, state, chapter.GO, chapter.EOS, 7)
            beam = beam_search(model.step, state, chapter.GO, chapter.EOS, 1, 7)
            assert [h[0].tokens for h in beam] == [h.tokens for h in greedy]
            wide = beam_search(model.step, state, chapter.GO, chapter.EOS, 4, 7)
            for row, hypotheses in zip(source, wide, strict=True):
                assert chapter.beam_by_hand(model, row[None], 4, 7) == hypotheses[0].tokens

    def test_sources_and_targets(self):
        split, sounds = chapter.spelling_data(6, 7)
        assert not {w.word for w in split["train"]} & {w.word for w in split["test"]}
        knight = [w for part in split.values() for w in part if w.word == "knight"]
        x, y = chapter.spelling_tensors(knight, sounds, 6, 7)
        assert "".join(chr(97 + i) for i in x[0].tolist()) == "thgink"
        ids = y[0].tolist()
        assert ids[0] == chapter.GO and ids[4] == chapter.EOS and ids[5:] == [-100] * 4
        assert [sounds.symbols[i] for i in ids[1:4]] == ["N", "AY", "T"]


def test_jordan_network_remembers_what_it_said_alone():
    p, g = parameters()
    p["W_hc"] = torch.randn(5, 6, generator=g, dtype=torch.float64)
    x = torch.randn(2, 6, 4, generator=g, dtype=torch.float64)
    targets = torch.randint(6, (2, 6), generator=g)
    forced = chapter.jordan_forward(p, x, 0.0, targets)
    changed = x.clone()
    changed[:, 2] += 1.0  # with forced outputs an input reaches its own step alone
    other = chapter.jordan_forward(p, changed, 0.0, targets)
    assert torch.equal(forced[:, 3:], other[:, 3:]) and not torch.equal(forced[:, 2], other[:, 2])
    assert not torch.equal(chapter.jordan_forward(p, x, 0.5)[:, 3:], chapter.jordan_forward(p, changed, 0.5)[:, 3:])


# --- the exercises: every check accepts its solution and refuses plausible wrong answers ---------------------------


def elman_without_error(x, h, W_hx, W_hh, b):
    return torch.tanh(x @ W_hx.T + h @ W_hh.T + b)


def elman_transposed(x, h, W_hx, W_hh, b):
    if x.shape[-1] != W_hx.shape[1]:
        raise ValueError(f"expected x of width {W_hx.shape[1]}, got {x.shape[-1]}")
    return torch.tanh(x @ W_hx.T + h @ W_hh + b)


def elman_mute(x, h, W_hx, W_hh, b):
    if x.shape[-1] != W_hx.shape[1]:
        raise ValueError("wrong shape")
    return torch.tanh(x @ W_hx.T + h @ W_hh.T + b)


def perplexity_of_padding(logits, targets, ignore_index=-100):
    p = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])
    return p.mean().neg().exp()


def perplexity_in_bits(logits, targets, ignore_index=-100):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index) / math.log(2)


def perplexity_fixed_index(logits, targets, ignore_index=-100):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()).exp()


def perplexity_softmax_twice(logits, targets, ignore_index=-100):
    return F.cross_entropy(logits.softmax(-1).flatten(0, 1), targets.flatten(), ignore_index=ignore_index).exp()


def clip_each(grads, c):
    return [g * min(1.0, c / (g.norm().item() + 1e-12)) for g in grads]


def clip_values(grads, c):
    return [g.clamp(-c, c) for g in grads]


def clip_always(grads, c):
    norm = torch.cat([g.flatten() for g in grads]).norm()
    return [g * c / (norm + 1e-12) for g in grads]


def clip_nan(grads, c):
    norm = torch.cat([g.flatten() for g in grads]).norm()
    return [g / norm * norm.clamp(max=c) for g in grads]


def flip_all(x, lengths):
    return x.flip(1)


def roll_padding(x, lengths):
    return torch.stack([torch.cat([row[n:], row[:n].flip(0)]) for row, n in zip(x, lengths.tolist(), strict=True)])


def zero_padding(x, lengths):
    out = torch.zeros_like(x)
    for b, n in enumerate(lengths.tolist()):
        out[b, :n] = x[b, :n].flip(0)
    return out


def lstm_forgets_the_path_through_h(i, f, g, o, s_prev, s, W_h, dh, ds):
    da = torch.cat(
        [ds * g * i * (1 - i), ds * s_prev * f * (1 - f), ds * i * (1 - g**2), dh * torch.tanh(s) * o * (1 - o)], dim=1
    )
    return da, da @ W_h, ds * f


def lstm_wrong_order(i, f, g, o, s_prev, s, W_h, dh, ds):
    da, dh, ds = chapter.solve_lstm_backward(i, f, g, o, s_prev, s, W_h, dh, ds)
    a, b, c, d = da.chunk(4, dim=1)
    return torch.cat([a, b, d, c], dim=1), dh, ds


def lstm_forgets_the_forget_gate(i, f, g, o, s_prev, s, W_h, dh, ds):
    da, dh_prev, _ = chapter.solve_lstm_backward(i, f, g, o, s_prev, s, W_h, dh, ds)
    return da, dh_prev, ds + dh * o * (1 - torch.tanh(s) ** 2)


def coupled_without_peephole(a, s, p):
    return chapter.solve_coupled(a, s, torch.zeros_like(p))


def coupled_the_other_way(a, s, p):
    f, g, o = a.chunk(3, dim=1)
    f = torch.sigmoid(f + p * s)
    s = (1 - f) * s + f * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(s), s


EXERCISES = [
    ("check_elman_step", "solve_elman_step", [elman_without_error, elman_transposed, elman_mute]),
    (
        "check_perplexity",
        "solve_perplexity",
        [perplexity_of_padding, perplexity_in_bits, perplexity_fixed_index, perplexity_softmax_twice],
    ),
    ("check_clipping", "solve_clipping", [clip_each, clip_values, clip_always, clip_nan]),
    ("check_reversing", "solve_reversing", [flip_all, roll_padding, zero_padding]),
    (
        "check_lstm_backward",
        "solve_lstm_backward",
        [lstm_forgets_the_path_through_h, lstm_wrong_order, lstm_forgets_the_forget_gate],
    ),
    ("check_coupled", "solve_coupled", [coupled_without_peephole, coupled_the_other_way]),
]


@pytest.mark.parametrize("check, solution", [(c, s) for c, s, _ in EXERCISES])
def test_solutions_pass(check, solution):
    assert getattr(chapter, check).verdict(getattr(chapter, solution)) == "correct"


@pytest.mark.parametrize("check, wrong", [(c, w) for c, _, wrongs in EXERCISES for w in wrongs])
def test_wrong_answers_do_not_pass(check, wrong):
    assert getattr(chapter, check).verdict(wrong).startswith("not yet: ")


def test_the_packages_reversal_solves_exercise_4():
    assert chapter.check_reversing.verdict(reverse_within_length) == "correct"
