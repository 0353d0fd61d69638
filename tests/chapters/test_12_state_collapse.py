"""Chapter 12: all forms of the selective recurrence agree, remedies do what they say, and checks of exercises can tell."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from seqarch.data.facts import fact_stream
from seqarch.kernels import ssd, ssd_step, use
from tests.notebooks import load_definitions

chapter = load_definitions("12-state-collapse")


def small(layers=2, **start):
    torch.manual_seed(0)
    return chapter.MambaModel(30, 16, 8, 8, layers=layers, **start)


class TestRecurrence:
    @settings(max_examples=20, deadline=None)
    @given(T=st.integers(1, 150), Q=st.sampled_from([1, 16, 64]), seed=st.integers(0, 999))
    def test_every_form_is_the_loop(self, T, Q, seed):
        g = torch.Generator().manual_seed(seed)
        x, B, C = (torch.randn(T, n, generator=g, dtype=torch.float64) for n in (5, 4, 4))
        dt = torch.rand(T, generator=g, dtype=torch.float64)
        want = chapter.ssd_loop(x, dt, -0.7, B, C)
        torch.testing.assert_close(chapter.ssd_dual(x, dt, -0.7, B, C), want, rtol=0, atol=1e-9)
        torch.testing.assert_close(chapter.ssd_chunked(x, dt, -0.7, B, C, Q), want, rtol=0, atol=1e-9)

    def test_a_step_of_zero_changes_nothing(self):
        x, B, C = torch.randn(6, 5), torch.randn(6, 4), torch.randn(6, 4)
        dt = torch.tensor([0.5, 0.3, 0.0, 0.0, 0.2, 0.1])
        keep = dt > 0
        want = chapter.ssd_loop(x[keep], dt[keep], -1.0, B[keep], C[keep])
        torch.testing.assert_close(chapter.ssd_loop(x, dt, -1.0, B, C)[keep], want)

    def test_the_mask_has_finite_gradients(self):
        a = (-100 * torch.rand(20)).requires_grad_()
        (slope,) = torch.autograd.grad(chapter.log_mask(a).exp().sum(), a)
        assert slope.isfinite().all()

    def test_errors_of_the_kernel(self):
        x, dt, B = torch.randn(1, 5, 2, 3), torch.rand(1, 5, 2), torch.randn(1, 5, 1, 4)
        with use(debug=True), pytest.raises(ValueError, match="expected A to be negative, got a largest value of 1"):
            ssd(x, dt, torch.ones(2), B, B)
        with pytest.raises(ValueError, match="expected B of shape"):
            ssd(x, dt, -torch.ones(2), B[:, :, 0], B)


class TestModel:
    @pytest.mark.parametrize("cuts", [[50], [1] * 50, [20, 1, 29]])
    def test_pieces_are_the_whole(self, cuts):
        model, tokens = small(), torch.randint(30, (2, 50))
        states, outputs = None, []
        with torch.no_grad():
            for piece in tokens.split(cuts, dim=1):
                y, states = model.run(piece, states)
                outputs.append(y)
            torch.testing.assert_close(torch.cat(outputs, 1), model(tokens), rtol=1e-4, atol=1e-4)

    def test_causal_and_every_parameter_learns(self):
        model, tokens = small(), torch.randint(30, (2, 40))
        other = tokens.clone()
        other[:, 25] = (other[:, 25] + 1) % 30
        with torch.no_grad():
            moved = (model(tokens) - model(other)).abs().amax((0, 2)) > 1e-6
        assert not moved[:25].any() and moved[25]
        model(tokens).square().mean().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]

    def test_the_start(self):
        torch.manual_seed(0)
        block = chapter.Mamba2(64, 16, 8)
        dt = F.softplus(block.dt_bias)
        assert (block.A_log.exp() >= 1).all() and (block.A_log.exp() <= 16).all()
        assert (dt >= 0.99e-3).all() and (dt <= 0.101).all()
        held = chapter.Mamba2(64, 16, 8, **chapter.HIGH)
        assert torch.exp(-F.softplus(held.dt_bias) * held.A_log.exp()).min() > 0.99

    def test_inside_is_the_kernel(self):
        model, tokens = small(layers=1), torch.randint(30, (25,))
        alpha, states = chapter.inside(model, tokens)
        block = model.blocks[0]
        with torch.no_grad():
            _, x, dt, B, C, _ = block.parts(model.norms[0](model.embed(tokens[None])))
            _, h = ssd(x, dt, -block.A_log.exp(), B, C)
        assert ((alpha > 0) & (alpha < 1)).all()
        torch.testing.assert_close(states[-1], h[0], rtol=1e-4, atol=1e-5)


class TestRemedies:
    def setup_method(self):
        self.model, self.tokens = small(**chapter.HIGH), torch.randint(30, (2, 90))
        self.plain = self.model(self.tokens).detach()

    def read(self, recurrence):
        return chapter.read_with(self.model, self.tokens, recurrence)

    def test_neutral_strengths_change_nothing(self):
        free = {block: torch.full((block.H,), math.inf) for block in self.model.blocks}
        for neutral in (chapter.forgetful(1.0), chapter.smaller_steps(1.0), chapter.windowed(90), chapter.capped(free)):
            torch.testing.assert_close(self.read(neutral), self.plain, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("r", [1, 5, 32, 89])
    def test_a_window_is_the_kernels(self, r):
        block = self.model.blocks[0]
        with torch.no_grad():
            _, x, dt, B, C, _ = block.parts(self.model.norms[0](self.model.embed(self.tokens)))
            want, _ = ssd(x, dt, -block.A_log.exp(), B, C, block.D, window=r)
            torch.testing.assert_close(chapter.windowed(r)(block, x, dt, B, C), want, rtol=1e-3, atol=1e-4)

    def test_forgetting_is_a_factor_at_every_step(self):
        block = self.model.blocks[0]
        with torch.no_grad():
            _, x, dt, B, C, _ = block.parts(self.model.norms[0](self.model.embed(self.tokens)))
            got = chapter.forgetful(0.9, 0.5)(block, x, dt, B, C)
            A, h, outputs = -block.A_log.exp(), torch.zeros(2, block.H, 8, 8), []
            for t in range(90):
                h = 0.9 * torch.exp(dt[:, t] * A)[..., None, None] * h
                h = h + 0.5 * dt[:, t, :, None, None] * B[:, t, 0, None, :, None] * x[:, t, :, None]
                outputs.append(torch.einsum("bn,bhnp->bhp", C[:, t, 0], h) + block.D[:, None] * x[:, t])
            torch.testing.assert_close(got, torch.stack(outputs, 1), rtol=1e-3, atol=1e-4)

    def test_a_cap_holds(self):
        block, limit = self.model.blocks[0], 0.01
        with torch.no_grad():
            _, x, dt, B, C, _ = block.parts(self.model.norms[0](self.model.embed(self.tokens)))
            y = chapter.capped({block: torch.full((block.H,), limit)})(block, x, dt, B, C) - block.D[:, None] * x
        reach = C[:, :, 0].norm(dim=-1)[..., None]
        assert (y.norm(dim=-1) <= limit * reach + 1e-6).all()  # |C h| is at most |C| |h|

    def test_losses_by_position(self):
        stream = fact_stream(4, 64, torch.Generator().manual_seed(0))
        sure = F.one_hot(stream.targets.clamp_min(0), 77) * 100.0
        loss, right = chapter.by_position(sure, stream, (0, 32, 64))
        assert right == [1.0, 1.0] and max(loss) < 1e-6


class TestCarrying:
    def test_pieces_in_a_row_are_one_stream(self):
        batches = chapter.carried(6, 4, 16, 3, 7, recent=4)
        assert len(batches) == 6 and [bool(first) for *_, first in batches] == [True, False, False] * 2
        whole = chapter.streams(2, 4, 48, 7, recent=4)
        for i, (tokens, targets) in enumerate(whole):
            assert torch.equal(torch.cat([b[0] for b in batches[3 * i : 3 * i + 3]], 1), tokens)
            assert torch.equal(torch.cat([b[1] for b in batches[3 * i : 3 * i + 3]], 1), targets)

    def test_the_state_is_carried_and_dropped_at_the_beginning(self):
        torch.manual_seed(0)
        model, states, losses = chapter.MambaModel(77, 16, 8, 8), None, []
        batches = chapter.carried(6, 4, 32, 3, 7)
        with torch.no_grad():
            for batch in batches:
                loss, states = chapter.carried_loss(model, batch, states)
                losses.append(loss.item())
            tokens = torch.cat([b[0] for b in batches[3:]], 1)
            logits = model(tokens)[:, 32:64]
            want = F.cross_entropy(logits.flatten(0, 1), batches[4][1].flatten(), ignore_index=-100)
        assert losses[4] == pytest.approx(want.item(), rel=1e-4)


def own_step_missing(dt, A):
    return (dt * A).cumsum(0).exp() / (dt * A).exp()


def pops_too_late(r, A):
    return chapter.SolveStreamingWindow(r + 1, A)


class ForgetsToFade(chapter.SolveStreamingWindow):
    def step(self, x, dt, B, C):
        self.h = self.absorb(self.h, x, dt, B)
        self.ring.append((x, dt, B))
        if len(self.ring) > self.r:
            self.late = self.absorb(self.late, *self.ring.pop(0))
        return torch.einsum("n,hnp->hp", C, self.h - self.late)


def late_mask(a):
    c = a.cumsum(0)
    return (c[:, None] - c).exp().masked_fill(torch.ones(len(a), len(a), dtype=torch.bool).triu(1), 0.0)


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        ("check_retention_left", own_step_missing),
        ("check_retention_left", lambda dt, A: (dt * A).exp()),
        ("check_constant_input", lambda alpha, b, x, t: torch.outer(b, x) * (1 - alpha**t) / max(1 - alpha, 1e-12)),
        ("check_windowed_state", lambda h, late, total, A: h - late),
        ("check_windowed_state", lambda h, late, total, A: h - torch.exp(A)[:, None, None] * late),
        ("check_decay_mask", late_mask),
        ("check_decay_mask", lambda a: chapter.solve_decay_mask(a).mT),
        ("check_streaming_window", pops_too_late),
        ("check_streaming_window", ForgetsToFade),
    ],
)
def test_checks_refuse_plausible_mistakes(check, answer):
    assert getattr(chapter, check).verdict(answer).startswith("not yet")


def test_one_step_is_the_kernel_at_length_one():
    x, dt, A = torch.randn(2, 1, 3, 4), torch.rand(2, 1, 3), -torch.rand(3) - 0.1
    B, C = torch.randn(2, 2, 1, 1, 5).unbind()
    y, h = ssd(x, dt, A, B, C)
    y1, h1 = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0])
    torch.testing.assert_close(y[:, 0], y1)
    torch.testing.assert_close(h, h1)
