"""Chapter 09: loop, convolution and stream agree, the neurons keep their laws, and the exercises' checks can tell."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from seqarch.kernels import lif
from tests.notebooks import load_definitions

chapter = load_definitions("09-legendre-memory")


def system(d, theta, dtype=torch.float32):
    return tuple(t.to(dtype) for t in chapter.zero_order_hold(*chapter.memory_system(d, theta)))


def warm(model, inputs=8, frames=32):
    """A model in evaluation mode whose batch normalisation has seen noise, of the size that the tests use."""
    for layer in model.modules():
        if isinstance(layer, chapter.LIF):
            layer.v_th = 0.2  # untrained neurons are silent with the usual threshold, and silence hides every mistake
    return chapter.warmed_up(model, 2 * torch.randn(1280, frames, inputs))


MODELS = {
    "LMUFormer": lambda: chapter.LMUFormer(8, 12, 32, 5),
    "LMU alone": lambda: chapter.LMUFormer(8, 12, 32, 5, embed=False, mix=False),
    "with states": lambda: chapter.LMUFormer(8, 12, 32, 5, activation=chapter.LeakyReLUState),
    "spiking": lambda: chapter.SpikingLMUFormer(8, 12, 32, 5, v_memory=0.5),
}
every_model = pytest.mark.parametrize("name", MODELS)


class TestMemory:
    def test_matrices_by_hand(self):
        A, B = chapter.memory_system(3, 1)
        assert A.tolist() == [[-1, -1, -1], [3, -3, -3], [-5, 5, -5]] and B.tolist() == [1, -3, 5]
        A10, B10 = chapter.memory_system(3, 10)
        torch.testing.assert_close(A10 * 10, A)
        torch.testing.assert_close(B10 * 10, B)

    @pytest.mark.parametrize(("d", "theta"), [(1, 4), (6, 10), (20, 64)])
    def test_zero_order_hold(self, d, theta):
        A, B = chapter.memory_system(d, theta)
        Abar, Bbar = chapter.zero_order_hold(A, B)
        torch.testing.assert_close(Abar, torch.linalg.matrix_exp(A), rtol=0, atol=1e-12)
        held = torch.linalg.solve(A, (Abar - torch.eye(d, dtype=A.dtype)) @ B)
        torch.testing.assert_close(Bbar, held, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("d", [1, 2, 16, 64, 128, 256])
    def test_a_step_shrinks(self, d):
        assert torch.linalg.eigvals(system(d, d, torch.float64)[0]).abs().max() < 1

    def test_legendre_polynomials_are_orthogonal_and_meet_their_ends(self):
        r = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
        P = chapter.legendre(r, 9)
        want = torch.diag(1 / (2 * torch.arange(9, dtype=torch.float64) + 1))
        torch.testing.assert_close(P.mT @ P / 20000, want, rtol=0, atol=1e-6)
        signs = (-1.0) ** torch.arange(9, dtype=torch.float64)
        torch.testing.assert_close(chapter.legendre(0.0, 9), signs)
        torch.testing.assert_close(chapter.legendre(1.0, 9), torch.ones(9, dtype=torch.float64))

    @settings(max_examples=25)
    @given(B=st.integers(1, 3), N=st.integers(1, 70), d=st.integers(1, 20), seed=st.integers(0, 999))
    def test_every_form_is_the_loop(self, B, N, d, seed):
        for dtype, close in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
            u = torch.randn(B, N, dtype=dtype, generator=torch.Generator().manual_seed(seed))
            Abar, Bbar = system(d, 33, dtype)
            H = chapter.krylov(Abar[None], Bbar[None], 70)[0]
            want = chapter.memory_loop(u, Abar, Bbar)
            for form in (chapter.memory_toeplitz, chapter.memory_fft):
                torch.testing.assert_close(form(u, H[:, :N]), want, rtol=0, atol=close)

    def test_a_module_built_for_more_frames_serves_fewer(self):
        long, short = chapter.LegendreMemory(6, 20, 50), chapter.LegendreMemory(6, 20, 17)
        u = torch.randn(2, 17)
        torch.testing.assert_close(long(u), short(u), rtol=0, atol=1e-6)
        torch.testing.assert_close(long(u), chapter.memory_loop(u, long.Abar, long.Bbar), rtol=0, atol=1e-4)
        assert not list(long.parameters())

    @pytest.mark.parametrize("shape", [(2, 51), (2, 1, 50), (50,)])
    def test_errors(self, shape):
        with pytest.raises(ValueError, match=r"expected u of shape \(B, N\) with N up to 50, got"):
            chapter.LegendreMemory(6, 20, 50)(torch.zeros(shape))

    def test_the_original_cell_is_its_equations(self):
        cell, x = chapter.OriginalLMU(3, 5, 4, 10).double(), torch.randn(2, 7, 3, dtype=torch.float64)
        nn.init.normal_(cell.e_m)
        h, m = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
        for t in range(7):
            u = torch.einsum("bi,i->b", x[:, t], cell.e_x) + h @ cell.e_h + m @ cell.e_m
            m = torch.einsum("ij,bj->bi", cell.Abar, m) + u[:, None] * cell.Bbar
            h = torch.tanh(F.linear(x[:, t], cell.W_x) + F.linear(h, cell.W_h) + F.linear(m, cell.W_m))
            torch.testing.assert_close(cell(x)[:, t], h)


class TestModels:
    def test_the_official_number_of_parameters(self):
        assert sum(p.numel() for p in chapter.LMUFormer().parameters()) == 1_621_796

    @every_model
    def test_shapes_for_any_length_up_to_the_built_one(self, name):
        model = warm(MODELS[name]())
        for N in (1, 9, 32):
            assert model(torch.randn(2, N, 8)).shape == (2, 5)
        with pytest.raises(ValueError, match="with N up to 32"):
            model(torch.randn(2, 33, 8))
        with pytest.raises(ValueError, match=r"expected x of shape \(B, N, inputs\), got \(32, 8\)"):
            model(torch.randn(32, 8))

    @every_model
    def test_every_parameter_gets_a_gradient(self, name):
        torch.manual_seed(0)
        model = MODELS[name]().train()
        F.cross_entropy(model(3 * torch.randn(16, 32, 8)), torch.arange(16) % 5).backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # a bias before batch normalisation has no effect, and its gradient is rounding or nothing
        assert not [n for n in missing if not n.endswith("bias")]

    @every_model
    @pytest.mark.parametrize("N", [1, 2, 3, 20, 32])
    def test_stream_equals_batch_with_a_fixed_delay(self, name, N):
        torch.manual_seed(1)
        model, taken, delays, answers = warm(MODELS[name]()), [], [], []
        x = 2 * torch.randn(2, N, 8)
        for y in chapter.stream_logits(model, (taken.append(t) or x[:, t] for t in range(N))):
            delays.append(len(taken) - 1 - len(answers))
            answers.append(y)
        with torch.no_grad():
            per_frame = model.head(model.features(x).mT).cumsum(1) / torch.arange(1, N + 1)[:, None]
        torch.testing.assert_close(torch.stack(answers, 1), per_frame, rtol=0, atol=1e-4)
        torch.testing.assert_close(answers[-1], model(x).detach(), rtol=0, atol=1e-4)
        ahead = 0 if name == "LMU alone" else 5
        assert delays == [min(ahead, N - 1 - t) for t in range(N)]

    @every_model
    def test_a_frame_moves_nothing_more_than_five_frames_before_it(self, name):
        torch.manual_seed(2)
        model, x = warm(MODELS[name]()), 2 * torch.randn(16, 32, 8)
        shaken = x.clone()
        shaken[:, 20] += 10
        with torch.no_grad():
            still = model.features(x)
            moved = (model.features(shaken) - still).abs().amax((0, 1)) > 1e-4
        assert still.any() and not moved[:15].any() and moved[15:].any()

    def test_the_head_on_the_mean_is_the_mean_of_the_heads(self):
        model, x = warm(MODELS["LMUFormer"]()), 2 * torch.randn(2, 32, 8)
        each = model.head(model.features(x).mT).mean(1)
        torch.testing.assert_close(model(x), each, rtol=0, atol=1e-5)

    def test_the_states_of_ours_are_a_leaky_average(self):
        x, h, want = torch.randn(2, 3, 20), torch.zeros(2, 3), []
        for x_t in x.unbind(-1):
            h = h + (x_t - h) / 2
            want.append(F.relu(h))
        torch.testing.assert_close(chapter.LeakyReLUState()(x), torch.stack(want, -1), rtol=0, atol=1e-6)


class TestSpikes:
    @settings(max_examples=25)
    @given(
        C=st.integers(1, 20), N=st.integers(1, 50), tau=st.sampled_from([1.0, 2.0, 4.0]), seed=st.integers(0, 999)
    )  # fmt: skip
    def test_loop_and_kernel_fire_bit_for_bit(self, C, N, tau, seed):
        g = torch.Generator().manual_seed(seed)
        x, weight = 3 * torch.randn(2, C, N, generator=g), torch.randn(2, C, N, generator=g)
        grads = []
        for neuron in (chapter.lif_loop, lif):
            current = x.clone().requires_grad_()
            s, v = neuron(current, tau)
            grads.append((s.detach(), v.detach(), torch.autograd.grad((s * weight).sum() + v.sum(), current)[0]))
        assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])
        assert ((grads[0][0] == 0) | (grads[0][0] == 1)).all()
        torch.testing.assert_close(grads[1][2], grads[0][2], rtol=0, atol=1e-6)

    def test_the_reset_passes_no_gradient(self):
        """With the spike's own gradient left out, what remains is the leak wherever no spike came between."""
        x = torch.tensor([[[0.5, 0.5, 0.5]]], requires_grad=True)
        (g,) = torch.autograd.grad(chapter.lif_loop(x)[1].sum(), x)
        torch.testing.assert_close(g, torch.tensor([[[1 / 8, 1 / 4, 1 / 2]]]))
        x = torch.tensor([[[0.5, 3.0, 0.5]]], requires_grad=True)
        (g,) = torch.autograd.grad(chapter.lif_loop(x)[1].sum(), x)
        torch.testing.assert_close(g, torch.tensor([[[0.0, 0.0, 1 / 2]]]))

    def test_pieces_with_a_carried_voltage_equal_the_whole(self):
        x, layer = 2 * torch.randn(3, 7, 40), chapter.LIF(0.7)
        first, v = lif(x[..., :13], v_th=0.7)
        second, _ = lif(x[..., 13:], v_th=0.7, v0=v)
        assert torch.equal(torch.cat([first, second], -1), layer(x))
        assert torch.equal(torch.stack(list(layer.stream(iter(x.unbind(-1)))), -1), layer(x))

    def test_no_state_leaks_from_call_to_call(self):
        model, x = warm(MODELS["spiking"]()), 2 * torch.randn(2, 32, 8)
        assert torch.equal(model(x), model(x))

    def test_every_layer_after_the_first_is_fed_with_spikes(self):
        model = warm(MODELS["spiking"]())
        arrived = [x for _, x in chapter.inputs_of_layers(model, 2 * torch.randn(2, 32, 8))]
        binary = [bool(((x == 0) | (x == 1)).all()) for x in arrived]
        assert not binary[0] and all(binary[1:]) and len(binary) == 11
        real = [x for _, x in chapter.inputs_of_layers(warm(MODELS["LMUFormer"]()), 2 * torch.randn(2, 32, 8))]
        assert not any(((x == 0) | (x == 1)).all() for x in real)

    def test_error_for_a_time_constant_below_one(self):
        with pytest.raises(ValueError, match="expected tau of at least 1, got 0.5"):
            lif(torch.zeros(1, 1, 4), 0.5)
        with pytest.raises(ValueError, match="x"):
            lif(torch.zeros(3, 4))

    def test_firing_rates_have_a_name_each(self):
        model = warm(MODELS["spiking"]())
        rates = chapter.firing(model, 2 * torch.randn(2, 32, 8))
        assert list(rates) == chapter.NAMES and all(0 <= r <= 1 for r in rates.values())


class TestMeasures:
    def test_settled(self):
        curve = torch.tensor([0.2, 0.9, 0.5, 0.9, 0.91, 0.905, 0.91], dtype=torch.float64)
        assert chapter.settled(curve) == 5  # the fourth value, 0.9, is still below 0.99 * 0.91
        assert chapter.settled(torch.full((4,), 0.7)) == 1
        assert chapter.settled(torch.tensor([0.1, 0.2, 0.3])) == 3

    def test_operations_of_the_network_without_spikes(self):
        mac, ac = chapter.operations(warm(MODELS["LMUFormer"]()), 2 * torch.randn(2, 32, 8))
        C, classes = 12, 5
        cell = C + (C * C + C) + 2 * C * C + C * C  # write, remember, read, project
        assert (mac, ac) == (3 * 8 * C + 12 * C * C + cell + 8 * C * C + C * classes, 0)

    def test_operations_with_spikes(self):
        model = warm(MODELS["spiking"]())
        mac, ac = chapter.operations(model, 2 * torch.randn(16, 32, 8))
        C = 12
        neurons = 3 * C + C + C + 1 + 2 * C + C + C + 4 * C + C
        assert mac == 3 * 8 * C + (2 * C) ** 2 + 2 * C + neurons
        assert 0 < ac < 12 * C * C + C + 3 * C * C + C * C + 8 * C * C + 5 * C


def says(check, answer):
    verdict = check.verdict(answer)
    assert verdict.startswith("not yet"), verdict
    return verdict


class TestExercises:
    """Each solution passes when the chapter is loaded; here, plausible wrong answers do not."""

    def test_1_change_of_coordinates(self):
        right = chapter.solve_lmu_matrices

        def backwards(d, theta):  # S A S^-1 instead of S^-1 A S
            A, B = right(d, theta)
            s2 = 1 / (2 * torch.arange(d, dtype=torch.float64) + 1)
            return s2[:, None] * A / s2, s2 * B

        def transposed(d, theta):
            A, B = right(d, theta)
            return A.mT, B

        def window_forgotten(d, theta):
            A, B = right(d, theta)
            return A, B * theta

        def single(d, theta):
            return tuple(t.float() for t in right(d, theta))

        assert "direction" in says(chapter.check_lmu_matrices, backwards)
        assert "transpose" in says(chapter.check_lmu_matrices, transposed)
        assert "theta = 2" in says(chapter.check_lmu_matrices, window_forgotten)
        assert "double" in says(chapter.check_lmu_matrices, single)

    def test_2_one_step_of_a_neuron(self):
        def without_leak(v, x, soft):
            h = v + x / 2
            s = (h >= 1).float()
            return s, (h - s if soft else h * (1 - s))

        def always_hard(v, x, soft):
            return chapter.solve_lif_step(v, x, False)

        def always_soft(v, x, soft):
            return chapter.solve_lif_step(v, x, True)

        def strict(v, x, soft):
            h = v + (x - v) / 2
            s = (h > 1).float()
            return s, (h - s if soft else h * (1 - s))

        says(chapter.check_lif_step, without_leak)
        assert "keeps" in says(chapter.check_lif_step, always_hard)
        assert "leaves nothing" in says(chapter.check_lif_step, always_soft)
        assert "exactly at the threshold" in says(chapter.check_lif_step, strict)

    def test_3_read_any_delay(self):
        right = chapter.solve_decode_delay

        def other_end(m, r):
            return right(m, 1 - r)

        def without_sign(m, r):
            return right(m * (-1.0) ** torch.arange(m.shape[-1]), r)

        def stretched(m, r):
            return right(m, min(1.0, 0.9 * r + 0.1 * (r == 1.0)))

        assert "present end" in says(chapter.check_decode_delay, other_end)
        assert "present end" in says(chapter.check_decode_delay, without_sign)
        assert "ramp" in says(chapter.check_decode_delay, stretched)

    def test_4_push_a_frame(self):
        Right = chapter.SolveStreamConv

        class Impatient(Right):  # answers at once, a frame late in content
            def push(self, frame):
                y = super().push(frame)
                return torch.zeros(len(frame), self.conv.out_channels) if y is None else y

        class Forgetful(Right):  # owes the last outputs
            def finish(self):
                return []

        class Hoarder(Right):  # keeps everything and convolves anew
            def __init__(self, conv):
                super().__init__(conv)
                self.all = []

            def push(self, frame):
                self.all.append(frame)
                return super().push(frame)

        class Backwards(Right):
            def _at(self, window):
                return super()._at(window[::-1])

        assert "cannot know its future" in says(chapter.check_stream_conv, Impatient)
        assert "outputs for 10 frames" in says(chapter.check_stream_conv, Forgetful)
        assert "numbers are kept" in says(chapter.check_stream_conv, Hoarder)
        assert "wrong outputs" in says(chapter.check_stream_conv, Backwards)

    def test_5_the_memory_of_the_drawing(self):
        def linear(u, Abar, Bbar, v_th):
            return lif(chapter.memory_loop(u, Abar, Bbar), 2.0, v_th)[0]

        def voltage_goes_round(u, Abar, Bbar, v_th):
            v, out = u.new_zeros(len(u), len(Bbar)), []
            for u_t in u.unbind(1):
                s, v = chapter.lif_step(v @ Abar.mT + u_t[:, None] * Bbar, v, 2.0, v_th)
                out.append(s)
            return torch.stack(out, -1)

        def voltages_reset(u, Abar, Bbar, v_th):
            s, out = u.new_zeros(len(u), len(Bbar)), []
            for u_t in u.unbind(1):
                s, _ = chapter.lif_step(s @ Abar.mT + u_t[:, None] * Bbar, None, 2.0, v_th)
                out.append(s)
            return torch.stack(out, -1)

        def detached(u, Abar, Bbar, v_th):
            return chapter.solve_memory_fed_back(u.detach(), Abar, Bbar, v_th) + 0 * u.sum()

        assert "nothing is fed back" in says(chapter.check_memory_fed_back, linear)
        assert "contradict" in says(chapter.check_memory_fed_back, voltage_goes_round)
        assert "contradict" in says(chapter.check_memory_fed_back, voltages_reset)
        assert "no gradient" in says(chapter.check_memory_fed_back, detached)

    def test_6_no_delay(self):
        def with_delay(*sizes):
            return chapter.LMUFormer(*sizes)

        def change(make):
            def build(*sizes):
                model = chapter.LMUFormer(*sizes)
                for parent in list(model.modules()):
                    for name, layer in parent.named_children():
                        if isinstance(layer, nn.Conv1d) and layer.kernel_size == (3,):
                            setattr(parent, name, make(layer.in_channels, layer.out_channels))
                return model

            return build

        narrow = change(lambda a, b: nn.Conv1d(a, b, 1, bias=False))
        late = change(lambda a, b: nn.Sequential(nn.ConstantPad1d((3, -1), 0.0), nn.Conv1d(a, b, 3, bias=False)))
        longer = change(lambda a, b: nn.Conv1d(a, b, 3, padding=2, bias=False))
        assert "future" in says(chapter.check_causal_former, with_delay)
        assert "parameters" in says(chapter.check_causal_former, narrow)
        assert "came late" in says(chapter.check_causal_former, late)
        says(chapter.check_causal_former, longer)


def test_the_wave_is_five_sines():
    t = torch.arange(3, dtype=torch.float64)
    sizes, phases = (1.0, 0.8, 1.2, 0.7, 0.9), (0.3, 4.2, 2.5, 1.1, 5.9)
    cycles = [0.5 + i * 3.4 / 4 for i in range(5)]
    for k in range(3):
        want = sum(a * math.sin(2 * math.pi * c * k / 64 + p) for a, c, p in zip(sizes, cycles, phases, strict=True))
        assert abs(chapter.wave(t)[k].item() - want) < 1e-5
