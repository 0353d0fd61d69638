"""S4 and S4D: kernels against powers of dense matrices, two modes of one layer, growth, stability, errors."""

import math

import pytest
import torch

from seqarch.kernels import krylov
from seqarch.layers.hippo import hippo, nplr
from seqarch.layers.s4 import S4DKernel, S4DLayer, S4Kernel, S4Layer, diagonal_start, legs_start, parameter_groups


def full(x):
    """Both halves of a system."""
    return torch.cat([x, x.conj()], dim=-1)


def true_system(kernel):
    """Lam, P, B, dt of a kernel, full and in double precision."""
    lam = torch.complex(-kernel.log_neg_re.double().exp(), kernel.im.double())
    P, B = (torch.view_as_complex(getattr(kernel, n).double()) for n in ("P", "B"))
    return full(lam), full(P), full(B), kernel.log_dt.double().exp()


def dense_kernel(kernel, L):
    """The definition: C Abar^l Bbar with dense matrices, the true C from the recurrence."""
    lam, P, B, dt = true_system(kernel)
    A = torch.diag_embed(lam) - P[..., None] * P.conj()[:, None]
    half = dt[:, None, None] / 2
    eye = torch.eye(kernel.N, dtype=A.dtype)
    Abar = torch.linalg.solve(eye - half * A, eye + half * A)
    Bbar = torch.linalg.solve(eye - half * A, dt[:, None] * B)
    C = full(kernel.recurrence().C.to(A.dtype))
    K = torch.einsum("mhn,hnl->mhl", C, krylov(Abar, Bbar, L))
    assert K.imag.abs().max() < 1e-9 * max(1, K.abs().max())
    return K.real


@pytest.mark.parametrize("L", [1, 2, 7, 8, 64, 100])
@pytest.mark.parametrize("N", [2, 4, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_is_the_powers_of_the_matrix(L, N, dtype):
    torch.manual_seed(0)
    kernel = S4Kernel(3, N, L, dt=(1e-2, 1e-1), M=2).to(dtype)
    with torch.no_grad():
        K, want = kernel(), dense_kernel(kernel, L)
    assert K.shape == (2, 3, L) and K.dtype == dtype
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert (K.double() - want).abs().max() < tolerance * max(1.0, want.abs().max())


def test_it_begins_at_hippo():
    torch.manual_seed(0)
    kernel = S4Kernel(2, 8, 32, dt=(0.05, 0.05)).double()
    lam, P, B, V = nplr("legs", 8)
    half = slice(4, None)
    C = (full(kernel.recurrence().C[0]) @ torch.cat([V[:, half], V[:, half].conj()], dim=1).mH).real
    A, B = hippo("legs", 8)
    eye = torch.eye(8, dtype=A.dtype)
    Abar = torch.linalg.solve(eye - 0.025 * A, eye + 0.025 * A)
    Bbar = torch.linalg.solve(eye - 0.025 * A, 0.05 * B)
    want = torch.einsum("hn,nl->hl", C, krylov(Abar[None], Bbar[None], 32)[0])
    torch.testing.assert_close(kernel()[0].detach(), want, rtol=1e-5, atol=1e-5)  # parameters were rounded to float32


def test_growing_keeps_the_first_taps_and_adds_the_next_ones():
    torch.manual_seed(0)
    kernel = S4Kernel(3, 8, 10, dt=(0.01, 0.1)).double()
    with torch.no_grad():
        before, want = kernel(), dense_kernel(kernel, 40)
        kernel.grow(35)
        assert int(kernel.built) == 40
        torch.testing.assert_close(kernel(10), before, rtol=0, atol=1e-9)
        torch.testing.assert_close(kernel(), want, rtol=0, atol=1e-9)
        kernel.grow(35)
        assert int(kernel.built) == 40


@pytest.mark.parametrize("start", ["legs", "inv", "lin"])
def test_the_diagonal_kernel_is_the_definition(start):
    torch.manual_seed(0)
    kernel = S4DKernel(3, 8, dt=(1e-2, 1e-1), M=2, start=start).double()
    lam, dt = kernel.eigenvalues().detach(), kernel.log_dt.exp().detach()[:, None]
    B, C = (torch.view_as_complex(x.detach()) for x in (kernel.B, kernel.C))
    step = torch.exp(dt * lam)
    terms = [2 * (C * B * (step - 1) / lam * step**l).sum(-1).real for l in range(50)]
    torch.testing.assert_close(kernel(50).detach(), torch.stack(terms, dim=-1), rtol=0, atol=1e-10)


def test_starts():
    lam, B = diagonal_start("lin", 6)
    assert lam.real.tolist() == [-0.5] * 3 and B.tolist() == [1] * 3
    torch.testing.assert_close(lam.imag, math.pi * torch.arange(3, dtype=torch.float64))
    lam, _ = diagonal_start("inv", 4)
    want = torch.tensor([4 / math.pi * 3, 4 / math.pi * (4 / 3 - 1)], dtype=torch.float64)
    torch.testing.assert_close(lam.imag, want)
    lam, _, B = legs_start(4)
    torch.testing.assert_close(lam.imag, torch.tensor([0.5565, 4.6033], dtype=torch.float64), rtol=0, atol=5e-5)
    assert torch.equal(diagonal_start("legs", 4)[1], B / 2)


LAYERS = {
    "S4": lambda **how: S4Layer(6, 8, 40, dt=(1e-2, 1e-1), **how),
    "S4D": lambda **how: S4DLayer(6, 8, dt=(1e-2, 1e-1), **how),
}
layers = pytest.mark.parametrize("name", list(LAYERS))


@layers
@pytest.mark.parametrize("how", [{}, dict(M=2), dict(glu=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_walking_equals_convolving(name, how, dtype):
    torch.manual_seed(0)
    layer, u = LAYERS[name](**how).to(dtype).eval(), torch.randn(2, 33, 6, dtype=dtype)
    state, ys = None, []
    with torch.no_grad():
        for token in u.unbind(1):
            y, state = layer.step(token, state)
            ys.append(y)
        want = layer(u)
    tolerance = 1e-8 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(torch.stack(ys, dim=1), want, rtol=tolerance, atol=tolerance)
    assert state[1].shape == (2, 6, 4)


@layers
def test_causal_unless_bidirectional(name):
    torch.manual_seed(0)
    u = torch.randn(2, 40, 6)
    changed = u.clone()
    changed[:, 20] += 1
    for bidirectional in (False, True):
        layer = LAYERS[name](bidirectional=bidirectional).eval()
        with torch.no_grad():
            moved = (layer(changed) - layer(u)).abs().amax((0, 2))
        assert moved[20:].min() > 0
        assert (moved[:20].max() > 1e-3) == bidirectional
    with pytest.raises(ValueError, match="expected a causal layer, got bidirectional=True"):
        layer.step(u[:, 0])


def test_the_second_kernel_reads_backwards():
    torch.manual_seed(0)
    layer, u = LAYERS["S4"](bidirectional=True).double().eval(), torch.randn(1, 9, 6, dtype=torch.float64)
    layer.mix = torch.nn.Identity()
    ahead, behind = layer.kernel(9).detach()
    for t in range(9):
        want = layer.D[0] * u[0, t] + sum(
            (ahead[:, t - s] if s <= t else behind[:, s - t - 1]) * u[0, s] for s in range(9)
        )
        torch.testing.assert_close(layer(u)[0, t], torch.nn.functional.gelu(want), rtol=0, atol=1e-10)


@layers
def test_after_training_it_is_stable_and_both_modes_still_agree(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    optimizer = torch.optim.AdamW(parameter_groups(layer, 1e-2))
    u = torch.randn(4, 40, 6)
    for _ in range(50):
        optimizer.zero_grad()
        (layer(u)[:, 1:] - u[:, :-1]).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    layer.eval()
    assert (layer.kernel.eigenvalues().real < 0).all()
    with torch.no_grad():
        ys, state = [], None
        for token in u.unbind(1):
            y, state = layer.step(token, state)
            ys.append(y)
        torch.testing.assert_close(torch.stack(ys, dim=1), layer(u), rtol=1e-3, atol=1e-3)
        largest = 0.0
        for _ in range(10_000):
            y, state = layer.step(u[:, 0], state)
            largest = max(largest, y.abs().max().item())
    assert math.isfinite(largest) and largest < 1e3


def test_dropout_is_tied_over_time():
    torch.manual_seed(0)
    layer = LAYERS["S4"](dropout=0.5).train()
    layer.mix = torch.nn.Identity()
    zero = layer(torch.randn(3, 40, 6)) == 0
    assert zero.any() and (zero.all(1) == zero.any(1)).all()


def test_parameter_groups():
    model = torch.nn.Sequential(LAYERS["S4"](), LAYERS["S4D"]())
    slow, rest = parameter_groups(model, 1e-2)
    assert (slow["lr"], slow["weight_decay"], rest["lr"], rest["weight_decay"]) == (1e-3, 0.0, 1e-2, 0.01)
    assert len(slow["params"]) == 5 + 4
    assert len(slow["params"]) + len(rest["params"]) == len(list(model.parameters()))
    model[0].kernel.im.requires_grad_(False)
    assert len(parameter_groups(model, 1e-4)[0]["params"]) == 8 and parameter_groups(model, 1e-4)[0]["lr"] == 1e-4
    assert len(parameter_groups(torch.nn.Linear(2, 2), 1e-2)) == 1


def test_a_checkpoint_remembers_the_built_length():
    torch.manual_seed(0)
    one, two, u = LAYERS["S4"]().eval(), S4Layer(6, 8, 7).eval(), torch.randn(2, 40, 6)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(u), two(u))


def test_errors():
    with pytest.raises(ValueError, match="expected N to be even and at least 2 .* got 7"):
        S4DLayer(4, 7, start="lin")
    with pytest.raises(ValueError, match="expected N to be even and at least 2 .* got 7"):
        S4Layer(4, 7, 10)
    for dt in ((0.0, 0.1), (-0.1, 0.1), (0.2, 0.1)):
        with pytest.raises(ValueError, match=r"expected steps 0 < dt\[0\] <= dt\[1\], got"):
            S4Layer(4, 8, 10, dt=dt)
    with pytest.raises(ValueError, match="expected a built length L of at least 1, got 0"):
        S4Layer(4, 8, 0)
    with pytest.raises(ValueError, match="expected start to be one of legs, inv, lin, got 'fout'"):
        S4DLayer(4, 8, start="fout")
    with pytest.raises(ValueError, match="expected N / 2 = 4 eigenvalues with a negative real part, got"):
        S4DLayer(4, 8, start=(torch.ones(4, dtype=torch.complex64), torch.ones(4)))
    layer = S4Layer(4, 8, 10)
    with pytest.raises(ValueError, match=r"at most 10, the built length, got 11: call grow\(11\) first"):
        layer(torch.randn(1, 11, 4))
    with pytest.raises(
        ValueError, match=r"expected real u of shape \(batch, length, features = 4\), got torch.complex64"
    ):
        layer(torch.randn(1, 5, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match="expected real u of shape"):
        layer(torch.randn(1, 5, 3))
