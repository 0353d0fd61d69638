"""Chapter 08: three forms of one system, the layer against the package's, and exercise checks against wrong answers."""

import math

import pytest
import torch
from torch import nn

from seqarch.layers import s4 as packaged
from tests.notebooks import load_definitions

chapter = load_definitions("08-structured-state-spaces")


@pytest.mark.parametrize("N", [2, 4, 64])
@pytest.mark.parametrize("L", [2, 7, 8, 64, 100])
def test_three_versions_of_the_kernel_are_the_loop(N, L):
    torch.manual_seed(0)
    lam, P, B, C, dt = system = chapter.example_system(N)
    want, Ct = chapter.by_the_loop(*system, L), chapter.tilde(*system, L)
    Abar, Bbar = chapter.bilinear(chapter.dplr(lam, P), chapter.full(B), dt)
    first = chapter.resolvent_kernel(Abar, Bbar, chapter.full(Ct), L)
    second = chapter.woodbury_kernel(*(chapter.full(x) for x in (lam, P, B, Ct)), dt, L)
    third = chapter.s4_kernel(lam, P, B, Ct, dt, L)
    assert first.imag.abs().max() < 1e-8 and second.imag.abs().max() < 1e-8 and not third.is_complex()
    for K, tolerance in ((first.real, 1e-9), (second.real, 1e-8), (third, 1e-9)):
        torch.testing.assert_close(K, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("L", [2, 7, 8, 64, 100])
def test_single_precision(L):
    torch.manual_seed(0)
    lam, P, B, C, dt = system = chapter.example_system(64, dtype=torch.complex64)
    wide = [x.to(torch.complex128) for x in system[:4]]
    want = chapter.by_the_loop(*wide, dt.double(), L)
    K = chapter.s4_kernel(lam, P, B, chapter.tilde(*system, L), dt, L)
    assert (K - want).abs().max() < 1e-4 * want.abs().max()


def test_any_rank_one_part_is_stable():
    for seed in range(5):
        torch.manual_seed(seed)
        lam = torch.complex(-torch.rand(1, 4, dtype=torch.float64) - 1e-3, torch.randn(1, 4, dtype=torch.float64))
        A = chapter.dplr(lam, 3 * torch.randn(1, 4, dtype=torch.complex128))
        assert (torch.linalg.eigvals(A).real < 0).all()


def test_growing_keeps_the_first_taps():
    torch.manual_seed(0)
    kernel = chapter.S4Kernel(3, 8, 10, dt=(0.01, 0.1)).double()
    with torch.no_grad():
        before = kernel(10)
        kernel.grow(25)
        assert int(kernel.built) == 40
        torch.testing.assert_close(kernel(10), before, rtol=0, atol=1e-6)
        torch.testing.assert_close(kernel(7), before[..., :7], rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [0.5, 2.0, 3.0])
def test_rescaled_steps_keep_the_system(factor):
    torch.manual_seed(0)
    kernel = chapter.S4Kernel(3, 8, 40, dt=(0.01, 0.1)).double()
    with torch.no_grad():
        lam, B, C, dt = kernel.parts()
        P, before = torch.view_as_complex(kernel.P), kernel.C.clone()
        true = chapter.change_read_out(lam, P, C, dt, 40, chapter.recovered)
        kernel.rescale(factor)
        torch.testing.assert_close(kernel(40), chapter.by_the_loop(lam, P, B, true, factor * dt, 40), rtol=0, atol=1e-6)
        kernel.rescale(1 / factor)
        torch.testing.assert_close(kernel.C, before, rtol=0, atol=1e-6)


def test_a_diagonal_filter_is_the_same_curve_at_every_rate():
    torch.manual_seed(0)
    kernel = chapter.S4DKernel(3, 8, (1e-4, 1e-3)).double()
    with torch.no_grad():
        fine = kernel(200)
        kernel.rescale(2)
        # steps this short sample a smooth curve: twice the step, every second value, twice the area
        torch.testing.assert_close(kernel(100) / 2, fine.unflatten(-1, (100, 2)).mean(-1), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("kind", ["S4", "S4D-Lin", "S4D-LegS", "S4D-Inv", "random"])
def test_a_model_walks_as_it_convolves(kind):
    torch.manual_seed(0)
    layer = lambda: chapter.S4Layer(chapter.make_kernel(kind, 6, 8, 30, (0.01, 0.3), 1), 6)  # noqa: E731
    model = chapter.S4Model(nn.Embedding(9, 6), layer, 2, 6, 9, "all", ffn=12).eval()
    tokens = torch.randint(9, (2, 30))
    with torch.no_grad():
        walk, states, walked = model.start(), None, []
        for token in tokens.unbind(1):
            y, states = walk(token, states)
            walked.append(y)
        torch.testing.assert_close(torch.stack(walked, 1), model(tokens), rtol=1e-3, atol=1e-3)
    assert [tuple(s.shape) for s in states] == [(2, 6, 4)] * 2


def test_the_cached_transformer_is_the_whole_one():
    torch.manual_seed(0)
    model = chapter.Transformer(nn.Embedding(9, 8), 9, 8, 2, 2, 20).eval()
    tokens = torch.randint(9, (2, 12))
    with torch.no_grad():
        states, stepped = None, []
        for t, token in enumerate(tokens.unbind(1)):
            y, states = model.step(token, states, t)
            stepped.append(y)
        torch.testing.assert_close(torch.stack(stepped, 1), model(tokens), rtol=1e-4, atol=1e-4)


def test_starts_are_those_of_the_package():
    for name in ("legs", "inv", "lin"):
        for ours, theirs in zip(chapter.diagonal_start(name, 16), packaged.diagonal_start(name, 16), strict=True):
            torch.testing.assert_close(ours, theirs)
    imag = chapter.nplr_legs(4)[0].imag
    torch.testing.assert_close(imag, torch.tensor([-4.6033, -0.5565, 0.5565, 4.6033]).double(), rtol=0, atol=5e-5)


def test_memory_parameters_train_slowly_and_without_decay():
    model = nn.ModuleDict({"layer": chapter.S4Layer(chapter.S4Kernel(4, 8, 10), 4)})
    slow, rest = chapter.parameter_groups(model, 1e-2)
    assert (slow["lr"], slow["weight_decay"], rest["lr"]) == (1e-3, 0.0, 1e-2)
    assert len(slow["params"]) == 5 and len(slow["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match="got 7: use 8"):
        chapter.S4DKernel(4, 7)
    with pytest.raises(ValueError, match="train log dt instead of dt"):
        chapter.bilinear(-torch.eye(2), torch.ones(2), torch.tensor([0.1, -0.1]))
    with pytest.raises(ValueError, match=r"call grow\(11\) first"):
        chapter.S4Kernel(4, 8, 10)(11)
    with pytest.raises(ValueError, match="real and imaginary parts as features"):
        chapter.S4Layer(chapter.S4Kernel(4, 8, 10), 4)(torch.zeros(1, 5, 4, dtype=torch.complex64))


def wrong_nodes(L):
    zeta = torch.tan(2 * math.pi / L * torch.arange((L + 1) // 2, dtype=torch.float64))  # the whole angle
    return torch.complex(torch.zeros_like(zeta), 2 * zeta)


def wrong_woodbury(lam, P, Q, g):
    G = 1 / (g - lam)
    return torch.diag(G) - torch.outer(G * P, Q * G) / (1 + (Q * G * P).sum())  # Q not conjugated


def wrong_s4d(lam, B, C, dt, L):
    return chapter.solve_s4d_bilinear(lam, B, C, dt, L) / 2  # one of the pair


def wrong_recover(Ct, Abar, L):
    return Ct  # the classical mistake


def wrong_legt(N):
    P = (2 * torch.arange(N, dtype=torch.float64) + 1).sqrt()
    return torch.stack([P / 2**0.5, P / 2**0.5])  # rank one in disguise


def wrong_last(Ct, B, dt):
    return dt / 2 * (Ct * B).sum(-1).real


@pytest.mark.parametrize(
    "check, wrong, solution",
    [
        ("check_nodes", wrong_nodes, "solve_nodes"),
        ("check_woodbury_inverse", wrong_woodbury, "solve_woodbury_inverse"),
        ("check_s4d_bilinear", wrong_s4d, "solve_s4d_bilinear"),
        ("check_recover_C", wrong_recover, "solve_recover_C"),
        ("check_nplr_legt", wrong_legt, "solve_nplr_legt"),
        ("check_last_value", wrong_last, "solve_last_value"),
    ],
)
def test_checks_refuse_plausible_mistakes(check, wrong, solution):
    check = getattr(chapter, check)
    assert check.verdict(getattr(chapter, solution)) == "correct"
    assert check.verdict(wrong).startswith("not yet")
