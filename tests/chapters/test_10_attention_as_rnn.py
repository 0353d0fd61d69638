"""Chapter 10: the forms agree, Aaren's laws hold, and the exercises' checks can tell right from wrong."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels.softmax_scan import softmax_scan
from tests.notebooks import load_definitions

chapter = load_definitions("10-attention-as-rnn")


def table(s, v):
    return chapter.prefix_attention(s.double(), v.double()).to(v.dtype)


class TestForms:
    @settings(max_examples=30)
    @given(
        T=st.integers(1, 70), E=st.sampled_from([1, 3, 16]), size=st.sampled_from([1.0, 30.0]), seed=st.integers(0, 999)
    )
    def test_every_form_is_prefix_attention(self, T, E, size, seed):
        g = torch.Generator().manual_seed(seed)
        s, v = size * torch.randn(1, 2, T, generator=g), torch.randn(1, 2, T, E, generator=g)
        want = table(s, v)
        for form in (chapter.hillis_steele, chapter.chunked_attention, chapter.prefix_attention):
            torch.testing.assert_close(form(s, v), want, rtol=1e-4, atol=1e-5)
        for b in (1, 3, T):
            torch.testing.assert_close(
                chapter.attention_in_blocks(s[0, 0], v[0, 0], b), want[0, 0, -1], rtol=1e-4, atol=1e-5
            )

    @pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 130])
    @pytest.mark.parametrize("E", [1, 16, 33])
    def test_chapter_and_all_backends_agree_in_values_and_gradients(self, T, E):
        s, v = torch.randn(1, 1, T), torch.randn(1, 1, T, E)
        forms = [chapter.hillis_steele, chapter.chunked_attention] + [
            lambda s, v, b=b: softmax_scan(s, v, backend=b)[0] for b in ("reference", "parallel", "triton")
        ]

        def run(form):
            x = [s.clone().requires_grad_(), v.clone().requires_grad_()]
            o = form(*x)
            return o, *torch.autograd.grad((o * o).sum() + o.sum(), x, materialize_grads=True)

        want = run(chapter.prefix_attention)
        for form in forms:
            got = run(form)
            torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got[1:], want[1:], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", ["hillis_steele", "chunked_attention"])
    def test_gradcheck(self, name):
        s, v = torch.randn(1, 2, 9, dtype=torch.float64), torch.randn(1, 2, 9, 2, dtype=torch.float64)
        assert torch.autograd.gradcheck(getattr(chapter, name), (s.requires_grad_(), v.requires_grad_()))

    @pytest.mark.parametrize("name", ["hillis_steele", "chunked_attention", "prefix_attention"])
    def test_laws(self, name):
        form = getattr(chapter, name)
        s, v = (torch.randn(1, 1, 50) * 64).round() / 64, torch.randn(1, 1, 50, 3)
        for shift in (1e4, -1e4):
            torch.testing.assert_close(form(s + shift, v), form(s, v), rtol=0, atol=1e-4)
        mean = v.cumsum(2) / torch.arange(1, 51)[:, None]
        torch.testing.assert_close(form(torch.zeros_like(s), v), mean, rtol=1e-4, atol=1e-5)
        s = torch.zeros_like(s)
        s[..., 20] = 50
        torch.testing.assert_close(form(s, v)[..., 20:, :], v[..., 20:21, :].expand(-1, -1, 30, -1))

    def test_transformer_and_perceiver_are_such_networks(self):
        q, K, V = torch.randn(9, 4), torch.randn(9, 4), torch.randn(9, 4)
        want = F.scaled_dot_product_attention(q[None], K[None], V[None], is_causal=True)[0]
        got = torch.stack([chapter.attention_rnn(q[j], K[: j + 1], V[: j + 1]) for j in range(9)])
        torch.testing.assert_close(got, want)

    def test_the_cell_survives_a_token_that_is_left_out(self):
        state = chapter.attention_cell(chapter.empty_state(2), torch.tensor(-torch.inf), torch.ones(2))
        assert state[0] == -torch.inf and state[1] == 0 and not torch.isnan(state[2]).any()
        state = chapter.attention_cell(state, torch.tensor(-200.0), torch.ones(2))
        torch.testing.assert_close(state[2] / state[1], torch.ones(2))


class TestLayer:
    def test_streaming_equals_parallel_and_memory_is_constant(self):
        torch.manual_seed(0)
        model = chapter.Model("Aaren", 5, 3, positions=70)
        x, state, outputs, sizes = torch.randn(2, 70, 5), None, [], set()
        with torch.no_grad():
            for t in range(70):
                y, state = model.step(x[:, t], state)
                outputs.append(y)
                sizes.add(sum(a.numel() for layer in state[1] for a in layer))
            torch.testing.assert_close(torch.stack(outputs, dim=1), model(x), rtol=1e-4, atol=1e-5)
        assert sizes == {2 * 2 * 4 * (2 + 8)}  # batch, layers, heads, 2 + e

    def test_causal_to_the_bit(self):
        model, x = chapter.Model("Aaren", 5, 3, positions=40), torch.randn(2, 40, 5)
        changed = x.clone()
        changed[:, 20] += 1
        assert torch.equal(model(x)[:, :20], model(changed)[:, :20])

    def test_the_last_output_of_one_layer_ignores_order_and_others_do_not(self):
        layer, x = chapter.Aaren(16, 2), torch.randn(1, 30, 16)
        y, z = layer(x), layer(x.flip(1))
        torch.testing.assert_close(y[:, -1], z[:, -1], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(y[:, 10], z[:, 10], atol=1e-3)

    def test_one_vector_more_than_the_transformer_per_layer(self):
        def count(name):
            return sum(p.numel() for p in chapter.Model(name, 8, 10, 8).parameters())

        assert (count("Aaren"), count("Transformer")) == (17834, 17770)

    def test_every_parameter_gets_a_gradient(self):
        layer = chapter.Aaren(16, 4)
        layer(torch.randn(2, 9, 16)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())

    def test_the_decision_model_streams_what_it_reads_at_once(self):
        for mixer in chapter.MIXERS:
            model = chapter.DecisionModel(mixer)
            goals, states, actions = torch.randn(3, 6), torch.randn(3, 6, 2), torch.randint(3, (3, 6))
            memory, outputs = None, []
            with torch.no_grad():
                for t in range(6):
                    last = actions[:, t - 1] if t else None
                    y, memory = model.act(t, goals[:, t], states[:, t], last, memory)
                    outputs.append(y)
                want = model(goals, states, actions)
            torch.testing.assert_close(torch.stack(outputs, dim=1), want, rtol=1e-4, atol=1e-5)

    def test_actions_cannot_see_themselves(self):
        model = chapter.DecisionModel("Aaren")
        goals, states, actions = torch.randn(3, 6), torch.randn(3, 6, 2), torch.randint(3, (3, 6))
        changed = actions.clone()
        changed[:, 4] = (changed[:, 4] + 1) % 3
        y, z = model(goals, states, actions), model(goals, states, changed)
        assert torch.equal(y[:, :5], z[:, :5]) and not torch.equal(y[:, 5], z[:, 5])

    def test_event_density_integrates_to_one(self):
        out = torch.randn(1, 1, 14, dtype=torch.float64)
        gaps = torch.linspace(math.log(1e-7), math.log(1e9), 200001, dtype=torch.float64).exp()[None]
        total = 0.0
        for mark in (0, 1):
            density = torch.exp(
                -chapter.event_nll(out.expand(1, gaps.shape[1], 14), gaps, torch.full_like(gaps, mark).long())
            )
            total += torch.trapezoid(density[0], gaps[0]).item()
        assert abs(total - 1) < 1e-3

    def test_error_for_a_width_that_heads_do_not_divide(self):
        with pytest.raises(ValueError, match="expected d to be a multiple of heads, got d = 10 and heads = 4"):
            chapter.Aaren(10, 4)


def says(check, answer):
    verdict = check.verdict(answer)
    assert verdict.startswith("not yet"), verdict
    return verdict


class TestExercises:
    """Each solution passes when the chapter is loaded; here, plausible wrong answers do not."""

    def test_1_merge_of_pairs(self):
        def without_identity(a, b):
            l = torch.logaddexp(a[0], b[0])
            return l, torch.exp(a[0] - l)[..., None] * a[1] + torch.exp(b[0] - l)[..., None] * b[1]

        def overflowing(a, b):
            x, y = a[0].exp(), b[0].exp()
            o = (x[..., None] * a[1] + y[..., None] * b[1]) / (x + y).clamp_min(1e-30)[..., None]
            return (x + y).log(), o

        def adding(a, b):
            return torch.logaddexp(a[0], b[0]), a[1] + b[1]

        def maximum(a, b):
            l = torch.maximum(a[0], b[0])
            _, o = chapter.solve_merge_pairs(a, b)
            return l, o

        assert "nan" in says(chapter.check_merge_pairs, without_identity)
        assert "overflow" in says(chapter.check_merge_pairs, overflowing)
        assert "softmax average" in says(chapter.check_merge_pairs, adding)
        assert "associative" in says(chapter.check_merge_pairs, maximum)

    def test_2_block_attention(self):
        def all_at_once(q, K, V, b):
            return torch.softmax(K[:] @ q / 2, 0) @ V[:]

        def without_rescaling(q, K, V, b):
            m, u, w = chapter.empty_state(4)
            for i in range(0, len(K), b):
                s = K[i : i + b] @ q / 2
                m = torch.maximum(m, s.max())
                u, w = u + torch.exp(s - m).sum(), w + torch.exp(s - m) @ V[i : i + b]
            return w / u

        def without_maximum(q, K, V, b):
            u, w = 0, 0
            for i in range(0, len(K), b):
                s = K[i : i + b] @ q / 2
                u, w = u + torch.exp(s).sum(), w + torch.exp(s) @ V[i : i + b]
            return w / u

        def without_scale(q, K, V, b):
            return chapter.solve_block_attention(2 * q, K, V, b)

        def without_the_rest(q, K, V, b):
            m, u, w = chapter.empty_state(4)
            for i in range(0, max(1, len(K) // b) * b, b):
                s, v = K[i : i + b] @ q / 2, V[i : i + b]
                m, u, w = chapter.merge((m, u, w), (s.max(), torch.exp(s - s.max()).sum(), torch.exp(s - s.max()) @ v))
            return w / u

        assert "only 1 were allowed" in says(chapter.check_block_attention, all_at_once)
        for wrong in (without_rescaling, without_maximum, without_scale, without_the_rest):
            assert "wrong output" in says(chapter.check_block_attention, wrong)

    def test_3_gate_form(self):
        def gate_of_the_present(s, v):  # sigmoid of s_t - l_t
            l, o, out = s[0], v[0], [v[0]]
            for score, value in zip(s[1:], v[1:], strict=True):
                l = torch.logaddexp(l, score)
                i = torch.sigmoid(score - l)
                o = (1 - i) * o + i * value
                out.append(o)
            return torch.stack(out)

        def from_zero(s, v):  # l = 0 before the first token
            l, o, out = torch.tensor(0.0), torch.zeros(3), []
            for score, value in zip(s, v, strict=True):
                i = torch.sigmoid(score - l)
                o, l = (1 - i) * o + i * value, torch.logaddexp(l, score)
                out.append(o)
            return torch.stack(out)

        def no_log(s, v):
            u = torch.exp(10 * s).cumsum(0)
            return (torch.exp(10 * s)[:, None] * v).cumsum(0) / u[:, None]

        for wrong in (gate_of_the_present, from_zero, no_log, lambda s, v: v.cumsum(0)):
            says(chapter.check_gate_form, wrong)

    def test_4_blelloch_scan(self):
        def loop(op, xs):
            out = [xs[0]]
            for x in xs[1:]:
                out.append(op(out[-1], x))
            return out

        def hillis_steele(op, xs):
            k = 1
            while k < len(xs):
                xs = [op(xs[j - k], x) if j >= k else x for j, x in enumerate(xs)]
                k *= 2
            return xs

        def swapped(op, xs):
            return chapter.solve_blelloch_scan(lambda a, b: op(b, a), xs)

        def exclusive(op, xs):
            return [("", 0), *chapter.solve_blelloch_scan(op, xs)[:-1]]

        assert "cannot run in parallel" in says(chapter.check_blelloch_scan, loop)
        assert "at most" in says(chapter.check_blelloch_scan, hillis_steele)
        assert "covers" in says(chapter.check_blelloch_scan, swapped)
        assert "covers" in says(chapter.check_blelloch_scan, exclusive)

    def test_5_windowed_aaren(self):
        def subtracting(s, v, r, op):
            u, w = torch.exp(s).cumsum(0), (torch.exp(s)[:, None] * v).cumsum(0)
            u, w = u - F.pad(u, (r, 0))[:-r], w - F.pad(w, (0, 0, r, 0))[:-r]
            for i in range(len(s)):
                op(*[(s[i], torch.tensor(1.0), v[i])] * 2)
            return w / u[:, None]

        def recomputing(s, v, r, op):
            out = []
            for t in range(len(s)):
                z = chapter.empty_state(v.shape[-1])
                for j in range(max(0, t - r + 1), t + 1):
                    z = op(z, (s[j], torch.tensor(1.0), v[j]))
                out.append(z[2] / z[1])
            return torch.stack(out)

        def one_too_many(s, v, r, op):
            return chapter.solve_windowed_aaren(s, v, r + 1, op)

        def never_forgetting(s, v, r, op):
            return chapter.solve_windowed_aaren(s, v, len(s), op)

        assert "wrong output" in says(chapter.check_windowed_aaren, subtracting)
        assert "at most" in says(chapter.check_windowed_aaren, recomputing)
        assert "number 18" in says(chapter.check_windowed_aaren, one_too_many)
        assert "number 18" in says(chapter.check_windowed_aaren, never_forgetting)
