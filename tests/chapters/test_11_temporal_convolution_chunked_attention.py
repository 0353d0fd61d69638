"""Chapter 11: mixers, fences, streaming, and exercise checks that tell right from wrong."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.notebooks import load_definitions

chapter = load_definitions("11-temporal-convolution-chunked-attention")


def ema_parts(D, n, dtype=torch.float64):
    p, q = chapter.ema_decays(*torch.randn(2, D, n, dtype=dtype))
    return p, q, *torch.randn(2, D, n, dtype=dtype)


class TestMovingAverage:
    @settings(max_examples=20, deadline=None)
    @given(B=st.integers(1, 2), L=st.integers(1, 40), D=st.integers(1, 4), n=st.integers(1, 5), seed=st.integers(0, 99))
    def test_loop_convolution_and_scan_agree(self, B, L, D, n, seed):
        torch.manual_seed(seed)
        x, parts = torch.randn(B, L, D).double(), ema_parts(D, n)
        want = chapter.ema_loop(x, *parts)
        by_fft = chapter.fftconv(x.mT, chapter.ema_kernel(*parts, L)).mT
        torch.testing.assert_close(by_fft, want, rtol=0, atol=1e-10)
        torch.testing.assert_close(chapter.ema_by_scan(x, *parts), want, rtol=0, atol=1e-10)

    def test_decays_are_between_0_and_1(self):
        p, q = chapter.ema_decays(*(10 * torch.randn(2, 50, 4)))
        assert (p >= 0).all() and (p <= 1).all() and (q >= 0).all() and (q <= 1).all()

    def test_two_sided_sees_the_same_in_a_mirror(self):
        torch.manual_seed(0)
        ema, mirrored = chapter.EMA(3, 4, causal=False), chapter.EMA(3, 4, causal=False)
        for name in ("delta", "alpha", "beta", "gamma"):  # exchange the directions
            getattr(mirrored, name).data = getattr(ema, name).data.roll(3, 0)
        mirrored.omega.data = ema.omega.data
        x = torch.randn(2, 11, 3)
        torch.testing.assert_close(mirrored(x.flip(1)), ema(x).flip(1), rtol=1e-4, atol=1e-5)


class TestDilatedConvolutions:
    @settings(max_examples=20, deadline=None)
    @given(
        L=st.integers(1, 30),
        D=st.integers(1, 4),
        K=st.integers(1, 5),
        dilation=st.integers(1, 9),
        seed=st.integers(0, 99),
    )
    def test_loop_torch_and_kernel_agree_with_all_gradients(self, L, D, K, dilation, seed):
        torch.manual_seed(seed)
        leaves = [t.double().requires_grad_() for t in (torch.randn(2, L, D), torch.randn(D, K), torch.randn(D))]
        weight, results = torch.randn(2, L, D).double(), []
        for conv in (chapter.dilated_loop, chapter.dilated_torch, chapter.depthwise_conv1d):
            y = conv(*leaves, dilation)
            results.append((y, *torch.autograd.grad((y * weight).sum(), leaves)))
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(results[2], results[0])

    @pytest.mark.parametrize(
        "K, f, layers, R", [(3, 2, 4, 31), (5, 4, 3, 85), (4, 4, 3, 64), (17, 17, 3, 4913), (3, 1, 4, 9)]
    )
    def test_receptive_field_and_paths(self, K, f, layers, R):
        paths = chapter.paths_to_lags(K, f, layers)
        assert chapter.receptive_field(K, f, layers) == R == len(paths) and paths.sum() == K**layers
        assert (paths > 0).all()
        assert f != K or (paths == 1).all()

    def test_holes_are_where_no_path_leads(self):
        torch.manual_seed(0)
        for K, f in ((2, 3), (3, 5), (3, 3)):
            paths = chapter.paths_to_lags(K, f, 2)
            seen = chapter.influence(chapter.TCN(2, K, f, 2), len(paths) + 5, 2)[-1].flip(0)
            assert ((seen[: len(paths)] > 0).numpy() == (paths > 0)).all() and not seen[len(paths) :].any()

    def test_causality_is_exact_and_centred_taps_are_a_mirror(self):
        torch.manual_seed(0)
        x = torch.randn(1, 20, 3)
        other = x.clone()
        other[:, 12] += 1
        tcn = chapter.TCN(3, 3, 2, 3)
        assert torch.equal(tcn(x)[:, :12], tcn(other)[:, :12]) and not torch.equal(tcn(x)[:, 12:], tcn(other)[:, 12:])
        centred, mirrored = chapter.TCN(3, 3, 2, 3, causal=False), chapter.TCN(3, 3, 2, 3, causal=False)
        for mine, theirs in zip(mirrored.w, centred.w, strict=True):
            mine.data = theirs.data.flip(1)
        torch.testing.assert_close(mirrored(x.flip(1)), centred(x).flip(1))

    def test_errors(self):
        x = torch.randn(1, 5, 2)
        with pytest.raises(ValueError, match="dilation"):
            chapter.depthwise_conv1d(x, torch.randn(2, 3), None, 0)
        with pytest.raises(ValueError, match="expected an odd number of taps"):
            chapter.TCN(2, 4, causal=False)(x)
        with pytest.raises(ValueError, match="bias"):
            chapter.block_attention(x[:, None], x[:, None], x[:, None], kind="chunk", chunk=4, bias=torch.zeros(3, 3))
        with pytest.raises(ValueError, match="expected kind to be one of TCNCA, MEGA"):
            chapter.Model("S4", vocab=4)


class TestFences:
    @settings(max_examples=25, deadline=None)
    @given(L=st.integers(1, 30), C=st.integers(1, 9), causal=st.booleans(), seed=st.integers(0, 99))
    def test_chunks_are_masked_attention(self, L, C, causal, seed):
        torch.manual_seed(seed)
        leaves = [
            t.double().requires_grad_() for t in (*torch.randn(2, 2, L, 4), torch.randn(2, L, 3), torch.randn(C, C))
        ]
        weight, results = torch.randn(2, L, 3).double(), []
        for attention in (chapter.chunk_attention, chapter.chunk_attention_by_mask):
            y = attention(*leaves, causal)
            results.append((y, *torch.autograd.grad((y * weight).sum(), leaves)))
        torch.testing.assert_close(*results)

    def test_a_bias_belongs_to_a_distance(self):
        bias = chapter.RelativeBias(5)
        table = bias()
        for offset in range(-4, 5):
            assert (table.diagonal(offset) == bias.table[offset + 4]).all()

    def test_only_the_mixer_crosses_a_fence(self):
        torch.manual_seed(0)
        lag = torch.arange(24)[:, None] - torch.arange(24)
        fence = torch.arange(24)[:, None] // 6 != torch.arange(24) // 6
        starts = torch.arange(24) % 6 == 0
        for layer in (chapter.MegaLayer, chapter.SimpleLayer):
            tcn = chapter.influence(layer(8, 4, 8, 6, chapter.TCN(8, 3, 2, 2), small=False), 24, 8)
            assert not tcn[lag < 0].any()
            assert ((tcn[starts] > 0) == ((lag >= 0) & (lag < 7))[starts]).all()
            identity = chapter.influence(layer(8, 4, 8, 6, torch.nn.Identity(), small=False), 24, 8)
            assert not identity[fence].any()

    @pytest.mark.parametrize("mixer", ["EMA", "TCN"])
    def test_token_by_token_is_the_whole(self, mixer):
        torch.manual_seed(0)
        make = {"EMA": lambda: chapter.EMA(8, 3), "TCN": lambda: chapter.TCN(8, 3, 2, 2)}[mixer]
        layer = chapter.MegaLayer(8, 4, 12, 5, make(), gamma_mean=1.0, small=False)
        x, state, outputs = torch.randn(2, 17, 8), None, []
        with torch.no_grad():
            for x_t in x.unbind(1):
                y, state = chapter.mega_step(layer, x_t, state)
                outputs.append(y)
                assert state[2].shape[1] <= 5  # the cache never outgrows a chunk
            torch.testing.assert_close(torch.stack(outputs, 1), layer(x), rtol=1e-4, atol=1e-5)

    def test_the_update_gate_can_hold_everything_back(self):
        layer = chapter.MegaLayer(8, 4, 12, 5, chapter.TCN(8))
        layer.W.bias.data[:8] = -100.0  # u = 0
        x = torch.randn(2, 9, 8)
        torch.testing.assert_close(layer(x), x)


def test_recall_task_asks_only_what_can_be_known():
    x, y = chapter.recall_task(200, 16, 4, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (200, 15) and (y[:, -1] >= 4).all() and (y[:, 0] == -100).all()
    for row, asked in zip(x.tolist(), y.tolist(), strict=True):
        table = {}
        for t in range(0, 15, 2):
            assert asked[t] == table.get(row[t], -100)
            if t + 1 < 15:
                table[row[t]] = row[t + 1]
                assert asked[t + 1] == -100


def keep_the_cache(q, k, v, bias):
    C, outputs = len(bias), []
    for t in range(q.shape[1]):
        start = max(0, t - C + 1)  # the last C keys, whatever their chunk
        scores = (k[:, start : t + 1] @ q[:, t, :, None])[..., 0] / math.sqrt(q.shape[2])
        scores = scores + bias[(t - start), : t - start + 1]
        outputs.append((scores.softmax(-1)[..., None] * v[:, start : t + 1]).sum(1))
    return torch.stack(outputs, dim=1)


def even_shares(w, n):
    q = torch.linspace(0, 0.9, n, dtype=w.dtype)
    c = torch.full((n,), float(w.mean()), dtype=w.dtype)
    table = q[None, :] ** torch.arange(len(w), dtype=w.dtype)[:, None]
    return q, c, (table @ c - w).square().sum()


WRONG = {
    "check_receptive_field": [lambda K, f, n: K**n, lambda K, f, n: 1 + (K - 1) * f ** (n - 1)],
    "check_smallest_f": [
        lambda L, K, n: K,
        lambda L, K, n: next(f for f in range(1, 10**4) if 1 + (K - 1) * f ** (n - 1) >= L),
    ],
    "check_safe_ema_kernel": [chapter.ema_kernel],
    "check_decode_attention": [
        keep_the_cache,
        lambda q, k, v, b: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    ],
    "check_fit_taps": [even_shares],
}


@pytest.mark.parametrize("name, wrong", [(name, wrong) for name, answers in WRONG.items() for wrong in answers])
def test_exercise_checks_refuse_plausible_wrong_answers(name, wrong):
    with pytest.raises((AssertionError, StopIteration)):
        getattr(chapter, name).verify(wrong)
