"""Chapter 07: three faces of one system, the HiPPO family, the layer, and checks that can tell right from wrong."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import fftconv, krylov, lti_scan, tridiag
from seqarch.layers.hippo import hippo
from tests.notebooks import load_definitions

chapter = load_definitions("07-linear-state-space-layers")


def system(H, N, M, seed=0, measure="legs", dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    dt = 10 ** (-3 + 2.5 * torch.rand(H, generator=g, dtype=torch.float64))
    C, D = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((H, M, N), (H, M)))
    return [x.to(dtype) for x in (*chapter.gbt(*hippo(measure, N), dt), C, D)]


class TestFaces:
    @settings(max_examples=30)
    @given(
        H=st.sampled_from([1, 3]),
        N=st.sampled_from([1, 4, 16]),
        M=st.sampled_from([1, 2]),
        L=st.sampled_from([1, 2, 7, 33, 64]),
        measure=st.sampled_from(["legs", "legt", "lagt"]),
        single=st.booleans(),
        seed=st.integers(0, 99),
    )
    def test_loop_convolution_and_pieces_agree(self, H, N, M, L, measure, single, seed):
        dtype = torch.float32 if single else torch.float64
        Abar, Bbar, C, D = system(H, N, M, seed, measure, dtype)
        u = torch.randn(2, H, L, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        y, last = chapter.recur(Abar, Bbar, C, D, u)
        tolerance = dict(rtol=0, atol=(1e-4 if single else 1e-9) * max(1.0, y.abs().max().item()))
        K = chapter.naive_kernel(Abar, Bbar, C, L)
        torch.testing.assert_close(chapter.naive_convolution(u, K, D), y, **tolerance)
        torch.testing.assert_close(torch.einsum("hmn,hnl->mhl", C, krylov(Abar, Bbar, L)), K, **tolerance)
        torch.testing.assert_close(fftconv(u, K, D.T), y, **tolerance)
        cut = L // 2
        first, x = chapter.recur(Abar, Bbar, C, D, u[..., :cut]) if cut else (u.new_zeros(2, M, H, 0), None)
        second, end = lti_scan(Abar, Bbar, C, D, u[..., cut:], x)
        torch.testing.assert_close(torch.cat([first, second], dim=-1), y, **tolerance)
        torch.testing.assert_close(end, last, rtol=1e-4 if single else 1e-9, atol=1e-4 if single else 1e-9)

    def test_the_loop_is_causal_to_the_bit(self):
        parts, u = system(3, 4, 2), torch.randn(2, 3, 20, dtype=torch.float64)
        changed = u.clone()
        changed[..., 11] += 1
        before, after = (chapter.recur(*parts, x)[0] for x in (u, changed))
        assert torch.equal(before[..., :11], after[..., :11]) and not torch.equal(before[..., 11], after[..., 11])

    def test_half_precision_is_convolved_in_single(self):
        u, K = torch.randn(2, 3, 100).bfloat16(), torch.randn(3, 100)
        got = fftconv(u, K)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, fftconv(u.float(), K).bfloat16())

    def test_gradients(self):
        A, B = (x.requires_grad_() for x in hippo("legs", 4))
        dt = torch.tensor([0.1, 0.4], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda A, B, dt: chapter.gbt(A, B, dt), (A, B, dt))
        Abar, Bbar, C, D = (x.requires_grad_() for x in system(2, 4, 2))
        assert torch.autograd.gradcheck(lambda A, B: krylov(A, B, 6), (Abar, Bbar))
        u = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True)
        x0 = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lti_scan, (Abar, Bbar, C, D, u, x0))
        bands = [torch.randn(n, dtype=torch.float64).requires_grad_() for n in (3, 4, 3)]
        rhs = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda dl, d, du, r: tridiag(dl, d + 4, du, r), (*bands, rhs))


class TestDiscretisation:
    @pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
    @pytest.mark.parametrize("N", [1, 5, 32])
    def test_bilinear_is_stable_for_every_step(self, measure, N):
        dt = torch.tensor([1e-3, 1.0, 10.0], dtype=torch.float64)
        Abar, _ = chapter.gbt(*hippo(measure, N), dt)
        assert torch.linalg.eigvals(Abar).abs().max() <= 1

    def test_forward_euler_is_not(self):
        Abar, _ = chapter.gbt(*hippo("legs", 32), torch.tensor([0.1], dtype=torch.float64), alpha=0.0)
        assert torch.linalg.eigvals(Abar).abs().max() > 1

    def test_all_rules_approach_the_zero_order_hold(self):
        A, B = hippo("legs", 6)
        distance = {}
        for dt in (1e-2, 1e-3):
            step = torch.tensor([dt], dtype=torch.float64)
            exact = chapter.zero_order_hold(A, B, step)
            torch.testing.assert_close(exact[0], torch.linalg.matrix_exp(step * A)[None])
            for alpha in (0.0, 0.5, 1.0):
                got = chapter.gbt(A, B, step, alpha)
                distance[alpha, dt] = max((g - e).abs().max().item() for g, e in zip(got, exact, strict=True))
        assert all(5 < distance[a, 1e-2] / distance[a, 1e-3] for a in (0.0, 0.5, 1.0))
        assert distance[0.5, 1e-3] < distance[1.0, 1e-3]

    def test_the_definition(self):
        A, B = hippo("legt", 5)
        for alpha in (0.0, 0.3, 0.5, 1.0):
            Abar, Bbar = chapter.gbt(A, B, torch.tensor([0.2], dtype=torch.float64), alpha)
            inverse = torch.linalg.inv(torch.eye(5, dtype=torch.float64) - alpha * 0.2 * A)
            torch.testing.assert_close(Abar[0], inverse @ (torch.eye(5, dtype=torch.float64) + (1 - alpha) * 0.2 * A))
            torch.testing.assert_close(Bbar[0], inverse @ (0.2 * B))

    @pytest.mark.parametrize("dt", [0.0, -0.1])
    def test_a_step_must_be_positive(self, dt):
        with pytest.raises(ValueError, match="expected dt > 0, got"):
            chapter.gbt(*hippo("legs", 2), torch.tensor([0.1, dt], dtype=torch.float64))


class TestStructuredFamily:
    @pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
    @pytest.mark.parametrize("N", [1, 2, 9, 64])
    def test_it_contains_hippo(self, measure, N):
        vectors = chapter.solve_lagt_vectors(N) if measure == "lagt" else chapter.structured_start(measure, N)
        assert sum(x.numel() for x in vectors) == 7 * N - 2
        A, B = hippo(measure, N)
        eye = torch.eye(N, dtype=torch.float64)
        dense = chapter.structured_multiply(vectors, eye[None], eye.new_ones(1))[0] - eye
        torch.testing.assert_close(dense, A, rtol=0, atol=1e-10)
        torch.testing.assert_close(vectors[0] * vectors[3], B, rtol=0, atol=1e-10)

    @settings(max_examples=25)
    @given(N=st.integers(1, 12), seed=st.integers(0, 99))
    def test_solve_undoes_multiply_anywhere_in_the_family(self, N, seed):
        g = torch.Generator().manual_seed(seed)
        start = chapter.structured_start("legs", N)
        vectors = [x + 0.1 * torch.randn(x.shape, generator=g, dtype=torch.float64) for x in start]
        v, delta = torch.randn(2, N, 3, generator=g, dtype=torch.float64), torch.tensor([0.1, 1.0], dtype=torch.float64)
        back = chapter.structured_solve(vectors, chapter.structured_multiply(vectors, v, -delta), delta)
        torch.testing.assert_close(back, v, rtol=1e-7, atol=1e-7)

    def test_the_trainable_system_begins_at_the_fixed_one_and_gets_gradients(self):
        dt = torch.tensor([0.01, 0.3], dtype=torch.float64)
        free = chapter.StructuredSystem("legs", 12)
        for ours, dense in zip(free.discretise(dt), chapter.gbt(*hippo("legs", 12), dt), strict=True):
            torch.testing.assert_close(ours, dense, rtol=0, atol=1e-10)
        torch.testing.assert_close(free.dense(), hippo("legs", 12)[0], rtol=0, atol=1e-10)
        sum((x**2).sum() for x in free.discretise(dt)).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in free.parameters())

    def test_unknown_start(self):
        with pytest.raises(ValueError, match="expected measure to be 'legs' or 'legt', got 'lagt'"):
            chapter.structured_start("lagt", 4)


def fixed(H=6, N=8, L=40, **how):
    return chapter.LSSLayer(chapter.FixedSystem(*hippo("legs", N)), H, L, **how)


def free(H=6, N=8, L=40, **how):
    return chapter.LSSLayer(chapter.StructuredSystem("legs", N), H, L, **how)


class TestLayer:
    @pytest.mark.parametrize("make", [fixed, free])
    @pytest.mark.parametrize("L", [1, 7, 40])
    def test_convolution_equals_recurrence_in_two_pieces_after_training(self, make, L):
        torch.manual_seed(0)
        model = chapter.DeepLSSL(2, 3, 6, 2, lambda: make(M=2, dropout=0.1))
        x, y = torch.randn(4, L, 2), torch.randint(3, (4,))
        optimizer = torch.optim.AdamW(chapter.parameter_groups(model, 1e-2))
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            whole = model.features(x)
            first, states = model.scan(x[:, : L // 2]) if L > 1 else (whole[:, :0], None)
            rest, states = model.scan(x[:, L // 2 :], states)
        torch.testing.assert_close(torch.cat([first, rest], dim=1), whole, rtol=1e-4, atol=1e-4)
        assert [s.shape for s in states] == [(4, 6, 8)] * 2

    def test_the_definition(self):
        torch.manual_seed(0)
        layer, u = fixed(M=3).eval(), torch.randn(2, 40, 6)
        Abar, Bbar = (x.float() for x in chapter.gbt(*hippo("legs", 8), layer.log_dt.detach().double().exp()))
        y, _ = chapter.recur(Abar, Bbar, layer.C, layer.D, u.mT)
        mixed = layer.mix(torch.nn.functional.gelu(y).permute(0, 3, 2, 1).reshape(2, 40, 18))
        torch.testing.assert_close(layer(u), mixed, rtol=1e-4, atol=1e-4)

    def test_what_trains_in_the_two_variants(self):
        def names(layer):
            return {n for n, p in layer.named_parameters() if p.requires_grad}

        common = {"C", "D", "mix.weight", "mix.bias"}
        assert names(fixed()) == common
        assert names(free()) == common | {"log_dt"} | {f"system.{n}" for n in chapter.StructuredSystem.names}
        model = chapter.DeepLSSL(1, 2, 6, 2, free)
        model(torch.randn(3, 40, 1)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    def test_a_learning_layer_keeps_no_stale_kernel(self):
        layer = free().eval()
        with torch.no_grad():
            before = layer.kernel(40)
            layer.log_dt += 1.0
            assert not torch.allclose(layer.kernel(40), before)
        assert not [n for n, _ in layer.named_buffers()]

    def test_the_cache_travels_with_the_weights(self):
        torch.manual_seed(0)
        one, two, u = fixed().eval(), fixed().eval(), torch.randn(2, 40, 6)
        two.load_state_dict(one.state_dict())
        assert torch.equal(one(u), two(u))

    def test_step_sizes_start_in_their_range(self):
        dt = fixed(H=500, dt=(0.01, 0.2)).log_dt.exp()
        assert 0.01 <= dt.min() < 0.015 and 0.15 < dt.max() <= 0.2
        assert 0.03 < dt.median() < 0.06  # uniform on a logarithmic scale

    def test_parameter_groups(self):
        model = chapter.DeepLSSL(1, 2, 6, 2, free)
        slow, dt, rest = chapter.parameter_groups(model, 0.01)
        assert (slow["lr"], dt["lr"], rest["lr"]) == (1e-4, 1e-3, 0.01)
        assert slow["weight_decay"] == dt["weight_decay"] == 0 and len(slow["params"]) == 14 and len(dt["params"]) == 2
        assert sum(len(g["params"]) for g in (slow, dt, rest)) == len(list(model.parameters()))
        assert len(chapter.parameter_groups(chapter.LSTMReader(1, 2, 4, "last"), 0.01)) == 1

    def test_errors(self):
        layer = fixed()
        for shape in ((2, 40, 5), (40, 6)):
            with pytest.raises(ValueError, match=r"expected u of shape \(batch, length, features=6\), got"):
                layer(torch.randn(*shape))
        with pytest.raises(ValueError, match="expected a length of at most 40, the cached kernel's, got 41"):
            layer(torch.randn(2, 41, 6))
        with pytest.raises(ValueError, match="expected rate > 0, got 0"):
            layer(torch.randn(2, 40, 6), rate=0)

    def test_rate_one_is_the_cache_and_a_higher_rate_reads_denser_data(self):
        torch.manual_seed(0)
        layer = fixed(N=16, L=100, dt=(2e-3, 2e-2)).eval()
        t = torch.arange(200) / 2
        dense = torch.sin(t / 9)[None, :, None] * torch.randn(6)
        torch.testing.assert_close(layer(dense[:, ::2], rate=1.0 + 1e-12), layer(dense[:, ::2]), rtol=1e-4, atol=1e-5)
        right, wrong = layer(dense, rate=2.0)[:, ::2], fixed(N=16, L=200).eval()
        wrong.load_state_dict(layer.state_dict() | {"cache": layer.states(200)})
        base = layer(dense[:, ::2])
        assert (right - base).abs().max() < 0.05 < (wrong(dense)[:, ::2] - base).abs().max()


class TestChecksCanFail:
    def verdict(self, check, wrong):
        return check.verdict(wrong)

    def test_gate(self):
        for wrong in (lambda dt: 1 / (1 + dt), lambda dt: 1 / (1 + math.exp(-dt)), lambda dt: 1 - math.exp(-dt)):
            assert chapter.check_gate_from_dt.verdict(wrong).startswith("not yet")

    def test_bucket_chain(self):
        def backwards(w):
            Abar, Bbar, C = chapter.solve_fir_as_ssm(w)
            return Abar, Bbar, C.flip(0)

        def ring(w):
            Abar, Bbar, C = chapter.solve_fir_as_ssm(w)
            Abar = Abar.clone()
            Abar[0, -1] = 1
            return Abar, Bbar, C

        def upside_down(w):
            Abar, Bbar, C = chapter.solve_fir_as_ssm(w)
            return Abar.T, Bbar, C

        for wrong in (backwards, ring, upside_down):
            assert chapter.check_fir_as_ssm.verdict(wrong).startswith("not yet")

    def test_doubling(self):
        def one_by_one(Abar, Bbar, L, matmul):
            columns = [Bbar[:, None]]
            while len(columns) < L:
                columns.append(matmul(Abar, columns[-1]))
            return torch.cat(columns, dim=1)

        def late(Abar, Bbar, L, matmul):
            return matmul(Abar, chapter.solve_krylov_doubling(Abar, Bbar, L, matmul))

        def powers_of_two_only(Abar, Bbar, L, matmul):
            X, P = Bbar[:, None], Abar
            while X.shape[1] < L:
                X, P = torch.cat([X, matmul(P, X)], dim=1), matmul(P, P)
            return X

        def forgot_to_square(Abar, Bbar, L, matmul):
            X = Bbar[:, None]
            while X.shape[1] < L:
                X = torch.cat([X, matmul(Abar, X)[:, : L - X.shape[1]]], dim=1)
            return X

        def without_matmul(Abar, Bbar, L, matmul):
            return krylov(Abar[None], Bbar[None], L)[0]

        for wrong in (one_by_one, late, powers_of_two_only, forgot_to_square, without_matmul):
            assert chapter.check_krylov_doubling.verdict(wrong).startswith("not yet"), wrong

    def test_another_clock(self):
        def unchanged(model, r):
            model = copy.deepcopy(model)
            for layer in model.layers:
                layer.cache = layer.states(r * layer.cache.shape[-1])
            return model

        def stale_cache(model, r):
            model = copy.deepcopy(model)
            for layer in model.layers:
                layer.log_dt.data -= math.log(r)
            return model

        def wrong_way(model, r):
            model = unchanged(model, r)
            for layer in model.layers:
                layer.log_dt.data += math.log(r)
                layer.cache = layer.states(layer.cache.shape[-1])
            return model

        def in_place(model, r):
            for layer in model.layers:
                layer.log_dt.data -= math.log(r)
                layer.cache = layer.states(r * layer.cache.shape[-1])
            return model

        for wrong in (unchanged, stale_cache, wrong_way, in_place):
            assert chapter.check_rescale_for_rate.verdict(wrong).startswith("not yet"), wrong

    def test_lagt(self):
        def no_correction(N):
            v = chapter.solve_lagt_vectors(N)
            return v[0], v[1], 0 * v[2], *v[3:]

        def other_sign(N):
            v = chapter.solve_lagt_vectors(N)
            return -v[0], v[1], v[2], -v[3], *v[4:]

        def single(N):
            return tuple(x.float() for x in chapter.solve_lagt_vectors(N))

        for wrong in (no_correction, other_sign, single, lambda N: chapter.structured_start("legs", N)):
            assert chapter.check_lagt_vectors.verdict(wrong).startswith("not yet")
        assert "up to the sign" in chapter.check_lagt_vectors.verdict(other_sign)
