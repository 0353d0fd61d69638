"""newton_schulz: the iteration matrix by matrix against the batched one, and against singular values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.memory import peak_bytes
from seqarch.kernels import use
from seqarch.kernels.newton_schulz import COEFFICIENTS, cost, newton_schulz

from .agreement import DEVICE, assert_agree, error

BACKENDS = ["reference", "parallel"]
ALL = pytest.mark.parametrize("backend", BACKENDS)


def matrices(*shape, dtype=torch.float32, kind="normal", seed=0):
    """Random matrices; `kind` picks spectra that are hard in their own way."""
    generator = torch.Generator().manual_seed(seed + 1)  # the weights of the outputs are drawn with seed 0
    G = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if kind == "rank one":
        G = G[..., :, :1] * G[..., :1, :]
    elif kind == "large":
        G = G * 1e4
    elif kind == "small":
        G = G * 1e-3
    elif kind == "orthogonal":
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        G = U @ Vh
    return G.to(dtype).to(DEVICE)


def runner(backend, steps=5):
    return lambda G: [newton_schulz(G, steps, backend=backend)]


shapes = dict(
    batch=st.sampled_from([(), (1,), (3,), (2, 2)]),
    m=st.integers(1, 24),
    n=st.integers(2, 24),  # the gradient of a matrix with one entry is nothing but rounding
    kind=st.sampled_from(["normal", "rank one", "large", "small", "orthogonal"]),
    steps=st.integers(0, 6),
    seed=st.integers(0, 10**6),
)


def check_against_the_definition(dtype, batch, m, n, kind, steps, seed):
    G = matrices(*batch, m, n, dtype=dtype, kind=kind, seed=seed)
    # the slope of the iterated polynomial is itself steep: the gradient feels a rounding error more than the output does
    assert_agree(
        runner("parallel", steps), runner("reference", steps), [G], steps=steps, names=["G"], loose=["G"], matmul=True
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=60)
@given(**shapes)
def test_the_batched_form_agrees(dtype, **case):
    if dtype != torch.float64 and case["kind"] == "rank one":
        case["kind"] = "normal"  # the next test says why
    if dtype in (torch.float16, torch.bfloat16) and case["kind"] in ("large", "small"):
        case["kind"] = "normal"  # their gradients leave the range of float16
    check_against_the_definition(dtype, **case)


@ALL
def test_rounding_in_empty_directions_grows_with_every_step(backend):
    """Where the singular value is zero, a rounding error is enlarged by up to 3.4445 a step, and by no more."""
    G = matrices(20, 6, 9, kind="rank one")
    X, want = newton_schulz(G, backend=backend), newton_schulz(G.double(), backend="reference")
    assert error(X, want) < 8 * torch.finfo(torch.float32).eps * COEFFICIENTS[0] ** 5


@ALL
@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (2, 3, 3), (2, 4), (4, 2)])
def test_gradcheck(backend, shape):
    G = matrices(*shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda G: newton_schulz(G, 3, backend=backend), G)


@ALL
class TestLaws:
    @pytest.mark.parametrize("m, n", [(6, 6), (4, 9), (9, 4)])
    def test_singular_values_follow_the_polynomial_and_vectors_stay(self, backend, m, n):
        G = matrices(m, n, dtype=torch.float64)
        U, s, Vh = torch.linalg.svd(G, full_matrices=False)
        s = s / (s.norm() + 1e-7)
        a, b, c = COEFFICIENTS
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        torch.testing.assert_close(newton_schulz(G, backend=backend), U @ torch.diag(s) @ Vh)

    def test_singular_values_end_near_one_and_tiny_ones_lag(self, backend):
        U, _, Vh = torch.linalg.svd(matrices(8, 8, dtype=torch.float64))
        G = U @ torch.diag(torch.logspace(0, -2, 8, dtype=torch.float64, device=DEVICE)) @ Vh
        s = torch.linalg.svdvals(newton_schulz(G, backend=backend))
        assert s.max() < 1.2 and s.min() > 0.65
        tiny = U @ torch.diag(torch.tensor([1.0] * 7 + [1e-6], dtype=torch.float64, device=DEVICE)) @ Vh
        s = torch.linalg.svdvals(newton_schulz(tiny, backend=backend))
        assert s[-1] < 1e-6 * COEFFICIENTS[0] ** 5 and s[-2] > 0.65

    def test_two_by_two(self, backend):
        X = newton_schulz(torch.diag(torch.tensor([3.0, 4.0], device=DEVICE)), backend=backend)
        torch.testing.assert_close(X, torch.diag(torch.tensor([0.7229, 1.1192], device=DEVICE)), rtol=0, atol=5e-5)

    @pytest.mark.parametrize("factor", [1e-3, 1e5])
    def test_the_scale_does_not_matter(self, backend, factor):
        G = matrices(5, 7)
        torch.testing.assert_close(
            newton_schulz(factor * G, backend=backend), newton_schulz(G, backend=backend), rtol=1e-3, atol=1e-4
        )

    def test_the_gradient_is_orthogonal_to_the_matrix(self, backend):
        G = matrices(5, 7, dtype=torch.float64).requires_grad_()
        X = newton_schulz(G, eps=1e-30, backend=backend)
        (g,) = torch.autograd.grad((X * torch.randn_like(X)).sum(), G)
        assert (g * G).sum().abs() < 1e-10 * g.norm() * G.norm()

    def test_zero_stays_zero_with_a_finite_gradient(self, backend):
        G = torch.zeros(2, 3, 4, device=DEVICE, requires_grad=True)
        X = newton_schulz(G, backend=backend)
        assert (X == 0).all()
        assert torch.isfinite(torch.autograd.grad(X.sum(), G)[0]).all()

    def test_transposing_commutes(self, backend):
        G = matrices(2, 4, 7, dtype=torch.float64)
        torch.testing.assert_close(newton_schulz(G.mT, backend=backend).mT, newton_schulz(G, backend=backend))

    def test_no_steps_only_normalise(self, backend):
        G = matrices(3, 4, 7)
        X = newton_schulz(G, 0, backend=backend)
        torch.testing.assert_close(X.flatten(1).norm(dim=1), torch.ones(3, device=DEVICE))

    def test_matrices_are_taken_one_by_one(self, backend):
        G = matrices(4, 5, 6)
        whole = newton_schulz(G, backend=backend)
        torch.testing.assert_close(whole[2], newton_schulz(G[2], backend=backend))
        broken = G.clone()
        broken[1] = float("nan")
        assert torch.equal(newton_schulz(broken, backend=backend)[2:], whole[2:])

    def test_strides_do_not_matter(self, backend):
        G = matrices(3, 5, 6)
        strided = G.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        torch.testing.assert_close(newton_schulz(strided, backend=backend), newton_schulz(G, backend=backend))

    def test_two_runs_are_bit_identical(self, backend):
        results = []
        for _ in range(2):
            G = matrices(3, 5, 6).requires_grad_()
            X = newton_schulz(G, backend=backend)
            results.append((X, *torch.autograd.grad((X * X).sum(), G)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    @pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
    def test_nothing_in_nothing_out(self, backend, shape):
        assert newton_schulz(torch.zeros(shape, device=DEVICE), backend=backend).shape == shape


def test_the_gradient_keeps_one_matrix_a_step():
    """Wide matrices: what is square and small does not count, so a step more costs one matrix more."""
    G = matrices(4, 1000)
    size = G.numel() * G.element_size()

    def both(steps):
        leaf = G.clone().requires_grad_()
        return lambda: torch.autograd.grad(newton_schulz(leaf, steps).sum(), leaf)

    peaks = [peak_bytes(both(steps)) for steps in (8, 16, 24)]
    assert all(later - earlier <= 8 * size * 1.05 for earlier, later in zip(peaks, peaks[1:], strict=False))


def test_compiled_without_graph_break():
    G = matrices(2, 4, 6).requires_grad_()
    compiled = torch.compile(lambda G: newton_schulz(G) * 2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(G), newton_schulz(G) * 2)


def test_triton_says_why_there_is_no_kernel():
    with pytest.raises(ValueError, match="newton_schulz has no Triton kernel"):
        newton_schulz(matrices(3, 3), backend="triton")


def test_auto_is_parallel():
    G = matrices(2, 3, 4)
    with use("parallel"):
        want = newton_schulz(G)
    assert torch.equal(newton_schulz(G), want)
    assert error(newton_schulz(G, backend="reference"), want) < 1e-5


def test_the_cost_model_counts_a_small_case():
    assert cost.flops(1, 2, 3, steps=1) == 2 * (2 * 2 * 2 * 3) + 2 * 2**3
    assert cost.flops(3, 5, 4) == 3 * cost.flops(1, 4, 5)
    assert cost.flops(1, 4, 5, backward=True) > cost.flops(1, 4, 5)
    assert cost.bytes(2, 3, 4, steps=1) == 2 * 2 * 12 * 4
    assert cost.bytes(2, 3, 4, backward=True) > cost.bytes(2, 3, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.ones(3),), r"expected G to be a tensor of shape \(\.\.\., m, n\), got \(3,\)"),
        (([[1.0]],), "expected G to be a tensor of shape .* got list"),
        ((torch.ones(2, 2).long(),), "expected G to be of a floating-point or complex dtype, got torch.int64"),
        ((torch.ones(2, 2) + 0j,), "expected G of a floating-point dtype, got torch.complex64"),
        ((torch.ones(2, 2), -1), "expected steps to be an integer of at least 0, got -1"),
        ((torch.ones(2, 2), 2.0), "expected steps to be an integer of at least 0, got 2.0"),
    ],
)
def test_errors_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        newton_schulz(*arguments)


def test_eps_must_be_positive():
    with pytest.raises(ValueError, match="expected eps to be positive, got 0"):
        newton_schulz(torch.ones(2, 2), eps=0)


def test_debug_names_the_input_with_nan():
    with use(debug=True), pytest.raises(ValueError, match="expected G without NaN, got 1 NaN"):
        newton_schulz(torch.tensor([[1.0, float("nan")]]))
