"""Chapter 14: the solver finds the loop's states and gradients, its limits are real, and the checks of exercises can tell."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import linear_scan, para_gru, para_lstm
from tests.notebooks import load_definitions

chapter = load_definitions("14-parallel-nonlinear-rnns")
both_cells = pytest.mark.parametrize("cell", ["ParaGRU", "ParaLSTM"])


def kernel(cell, w, a, **how):
    if cell == "ParaGRU":
        return para_gru(w, a, **how)[0]
    h, c, _ = para_lstm(w, a[:3], a[3:], **how)
    return torch.stack([c, h], dim=-1)


class TestScan:
    @settings(max_examples=25, deadline=None)
    @given(L=st.integers(1, 70), seed=st.integers(0, 999))
    def test_doubling_is_substitution(self, L, seed):
        J, r = torch.randn(2, L, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind()
        want = chapter.forward_substitution(J, r)
        torch.testing.assert_close(chapter.scan_by_doubling(J, r), want, rtol=1e-9, atol=1e-9)

    def test_the_first_jacobian_does_not_matter(self):
        J, r = torch.rand(2, 9).unbind()
        other = J.clone()
        other[0] = 1e6
        assert torch.equal(chapter.scan_by_doubling(J, r), chapter.scan_by_doubling(other, r))


class TestJacobians:
    def test_products_with_ones_are_the_jacobians_by_hand(self):
        w, h, s = (torch.randn(2, 7, *shape, dtype=torch.float64) for shape in ((3, 4), (4,), (4, 2)))
        a, p = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
        got = chapter.diagonal_jacobian(lambda h: chapter.gru_cell(w, a, h), h)
        torch.testing.assert_close(got, chapter.gru_step(w, a, h)[1], rtol=0, atol=1e-12)
        got = chapter.block_jacobian(lambda s: chapter.lstm_cell(w, p, s), s)
        torch.testing.assert_close(got, chapter.lstm_step(w, p, s)[1], rtol=0, atol=1e-12)

    def test_channels_that_mix_are_summed(self):
        matrix = torch.randn(4, 4, dtype=torch.float64)
        got = chapter.diagonal_jacobian(lambda h: h @ matrix.mT, torch.zeros(3, 4, dtype=torch.float64))
        torch.testing.assert_close(got, matrix.sum(0).expand(3, 4))


class TestSolver:
    @both_cells
    @pytest.mark.parametrize("L", [1, 2, 3, 17, 64, 100, 257])
    @pytest.mark.parametrize("B", [1, 3])
    def test_three_iterations_are_the_loop(self, cell, L, B):
        w, a, start = chapter.fresh(cell, B, L, 7, seed=L)
        start = torch.rand_like(start) - 0.5
        want = chapter.loop(cell, w, a, start)
        torch.testing.assert_close(chapter.newton(cell, w, a, start, 3)[-1], want, rtol=0, atol=1e-5)

    @both_cells
    @settings(max_examples=15, deadline=None)
    @given(L=st.integers(1, 30), size=st.floats(0.1, 6), seed=st.integers(0, 999), project=st.booleans())
    def test_a_prefix_is_exact_and_in_the_end_all(self, cell, L, size, seed, project):
        w, a, start = chapter.fresh(cell, 2, L, 3, dtype=torch.float64, seed=seed)
        a = size * a
        want = chapter.loop(cell, w, a, start)
        for k, h in enumerate(chapter.newton(cell, w, a, start, L - 1, project)):
            torch.testing.assert_close(h[:, : k + 1], want[:, : k + 1], rtol=0, atol=1e-7)

    @both_cells
    def test_causality(self, cell):
        w, a, start = chapter.fresh(cell, 1, 40, 4)
        other = w.clone()
        other[:, 25] += 5
        for solve in (lambda w: chapter.newton(cell, w, a, start, 3)[-1], lambda w: kernel(cell, w, a)):
            moved = (solve(w) != solve(other)).flatten(2).any(-1)[0]
            assert not moved[:25].any() and moved[25]

    @both_cells
    def test_gradients_are_those_of_the_loop(self, cell):
        w, a, start = chapter.fresh(cell, 2, 33, 4, dtype=torch.float64)
        inputs = [x.requires_grad_() for x in (w, a, torch.rand_like(start))]
        weight = torch.randn(2, 33, *start.shape[1:], dtype=torch.float64)
        got = torch.autograd.grad((chapter.ParallelRNN.apply(cell, *inputs, 10) * weight).sum(), inputs)
        want = torch.autograd.grad((chapter.loop(cell, *inputs) * weight).sum(), inputs)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-11)

    @both_cells
    def test_projection_keeps_iterates_finite_and_does_not_move_the_solution(self, cell):
        w, a, start = chapter.fresh(cell, 2, 60, 4, bound=9, dtype=torch.float64)
        a = 20 * a
        iterates = chapter.newton(cell, w, a, start, 59)
        assert all(h.isfinite().all() and h.abs().max() <= 1 for h in iterates)
        torch.testing.assert_close(iterates[-1], chapter.loop(cell, w, a, start), rtol=0, atol=1e-6)

    @both_cells
    def test_the_kernel_keeps_wide_states_for_narrow_inputs(self, cell):
        w, a, _ = chapter.fresh(cell, 2, 20, 4)
        if cell == "ParaGRU":
            h, last = para_gru(w.bfloat16(), a.bfloat16())
        else:
            h, _, (_, last) = para_lstm(w.bfloat16(), a[:3].bfloat16(), a[3:].bfloat16())
        assert h.dtype == torch.bfloat16 and last.dtype == torch.float32

    def test_errors(self):
        w, a, _ = chapter.fresh("ParaGRU", 2, 6, 4)
        with pytest.raises(ValueError, match=r"expected w of shape \(B, L, 3, D\), got \(2, 6, 4\)"):
            para_gru(w[:, :, 0], a)
        with pytest.raises(ValueError, match="expected iters to be a number of Newton steps, at least 0"):
            para_gru(w, a, iters=-1)


class TestModels:
    @pytest.mark.parametrize("cell", ["ParaGRU", "linear"])
    def test_the_counter_solved_in_parallel_is_the_counter_walked(self, cell):
        torch.manual_seed(0)
        model = chapter.BitCounter(6, cell)
        bits = torch.randint(2, (3, 40))
        torch.testing.assert_close(model.states(bits, 39), model.states(bits), rtol=0, atol=1e-5)

    def test_parity_targets(self):
        bits, odd = chapter.parity_batch(0, torch.Generator().manual_seed(0), 5, 12)
        for row, answers in zip(bits.tolist(), odd.tolist(), strict=True):
            assert answers == [sum(row[: t + 1]) % 2 for t in range(12)]

    @pytest.mark.parametrize("kind", ["ParaGRU", "ParaLSTM", "linear"])
    def test_one_token_at_a_time(self, kind):
        torch.manual_seed(0)
        model = chapter.LanguageModel(11, 12, 2, 3, kind, 20)
        for block in model.blocks:
            block.mixer.cell.a.data.clamp_(-0.5, 0.5)
        tokens, states, stepped = torch.randint(11, (2, 20)), None, []
        with torch.no_grad():
            for token in tokens.unbind(1):
                logits, states = model.step(token, states)
                stepped.append(logits)
            torch.testing.assert_close(torch.stack(stepped, 1), model(tokens), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("kind", ["ParaGRU", "ParaLSTM", "linear", "attention"])
    def test_causal_and_every_parameter_learns(self, kind):
        torch.manual_seed(0)
        model = chapter.LanguageModel(11, 12, 2, 3, kind, 20)
        tokens = torch.randint(11, (2, 20))
        other = tokens.clone()
        other[:, 12] = (other[:, 12] + 1) % 11
        with torch.no_grad():
            moved = (model(tokens) - model(other)).abs().amax((0, 2)) > 1e-6
        assert not moved[:12].any() and moved[12]
        chapter.token_loss(model, (tokens, tokens.roll(1, 1))).backward()
        assert not [n for n, p in model.named_parameters() if p.numel() and (p.grad is None or not p.grad.any())]

    def test_heads_do_not_mix(self):
        layer = chapter.HeadLinear(12, 3, 2)
        x = torch.randn(5, 12)
        other = x.clone()
        other[:, 4:8] += 1
        moved = (layer(x) != layer(other)).any(0)
        assert (
            layer(x).shape == (5, 2, 12) and moved[:, 4:8].all() and not moved[:, :4].any() and not moved[:, 8:].any()
        )

    def test_the_clip_acts_after_every_step(self):
        a = torch.nn.Parameter(torch.full((3, 2), 0.45))
        optimizer = chapter.adamw_with_clip(1.0, 0.5, [a])([a])
        a.sum().neg().backward()
        optimizer.step()
        assert (a == 0.5).all()


def wrong_prefix(guess, truth, tolerance):
    return int(((guess - truth).abs() <= tolerance).all(-1).sum())


def wrong_min_gru(w, h):
    f, J = chapter.solve_min_gru(w, h)
    return f, 1 - J


def wrong_elman(w, a, h):
    return torch.tanh(a * h + w), a * (1 - h**2)


def wrong_adaptive(w, a, tolerance, most):
    h = chapter.newton("ParaGRU", w, a, w.new_zeros(len(w), w.shape[-1]), 3)[-1]
    return h, 3


def no_projection(w, a, tolerance, most):
    """Looks at the change rather than at the residual, and stops one iteration late."""
    start, k = w.new_zeros(len(w), w.shape[-1]), 0
    h = chapter.gru_step(w, a, torch.zeros_like(w[:, :, 0]))[0]
    while k < most:
        f, J = chapter.gru_step(w, a, chapter.shifted(h, start))
        change = linear_scan(J, f - h)[0]
        h, k = h + change, k + 1
        if change.abs().max() <= tolerance:
            break
    return h, k


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        ("check_exact_prefix", wrong_prefix),
        ("check_exact_prefix", lambda g, t, tol: chapter.solve_exact_prefix(g.clamp_min(0), t, tol)),
        ("check_min_gru", wrong_min_gru),
        ("check_para_elman", wrong_elman),
        ("check_para_elman", lambda w, a, h: (torch.tanh(a * h + w), torch.diag(a))),
        ("check_block2_compose", lambda first, second: chapter.solve_block2_compose(second, first)),
        ("check_block2_compose", lambda f, s: (s[0] @ f[0], (f[0] @ s[1][..., None])[..., 0] + f[1])),
        ("check_newton_adaptive", wrong_adaptive),
        ("check_newton_adaptive", no_projection),
    ],
)
def test_checks_refuse_plausible_mistakes(check, answer):
    assert getattr(chapter, check).verdict(answer).startswith("not yet")
