"""tridiag: elimination in blocks against Thomas' algorithm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import use
from seqarch.kernels.tridiag import cost, tridiag

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

BACKENDS = ["reference", "parallel"]
ALL = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("dl", "d", "du", "rhs")


def inputs(batch, N, K, dtype=torch.float32, kind="dominant", seed=0):
    """dl, d, du, rhs; `kind` picks matrices that are hard in their own way."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=wide)

    dl, du, d = normal(*batch, N - 1), normal(*batch, N - 1), normal(*batch, N)
    if kind == "dominant":
        beside = torch.nn.functional.pad(dl.abs(), (1, 0)) + torch.nn.functional.pad(du.abs(), (0, 1))
        d = torch.where(d.real < 0, -1.0, 1.0) * (1.2 * beside + 0.5)
    elif kind == "legs":  # chapter 07: the inverse is the triangle of ones
        dl, d, du = -torch.ones_like(dl), torch.ones_like(d), torch.zeros_like(du)
    elif kind == "legt":  # chapter 07: zeros on the diagonal, skew-symmetric but for its ends
        dl, d, du = -0.5 * torch.ones_like(dl), torch.zeros_like(d), 0.5 * torch.ones_like(du)
        d[..., 0] += 0.5
        d[..., -1] += 0.5
    elif kind == "heat":  # an implicit step of diffusion, at four scales
        rate = 10 ** (4 * torch.rand(*batch, 1, generator=g, dtype=torch.float64) - 3)
        dl, du, d = -rate.expand(dl.shape), -rate.expand(du.shape), 1 + 2 * rate.expand(d.shape)
    return [x.to(dtype).to(DEVICE).contiguous() for x in (dl, d, du, normal(*batch, N, K))]


def dense(dl, d, du):
    return torch.diag_embed(d) + torch.diag_embed(dl, -1) + torch.diag_embed(du, 1)


def runner(backend):
    return lambda *tensors: [tridiag(*tensors, backend=backend)]


shapes = dict(
    batch=st.sampled_from([(), (1,), (2,), (2, 3)]),
    N=st.one_of(st.sampled_from([1, 2, 31, 32, 33, 64, 65, 130]), st.integers(1, 70)),
    K=st.sampled_from([1, 2, 5]),
    kind=st.sampled_from(["dominant", "legs", "legt", "heat"]),
    seed=st.integers(0, 10**6),
)


def check_against_the_definition(dtype, **case):
    assert_agree(
        runner("parallel"), runner("reference"), inputs(dtype=dtype, **case), steps=1, names=NAMES, matmul=True
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32, torch.complex64])
@settings(max_examples=60)
@given(**shapes)
def test_blocks_agree_with_the_loop(dtype, **case):
    check_against_the_definition(dtype, **case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=25)
# a gradient of few numbers can be as small as the rounding of its terms
@given(**shapes | dict(batch=st.sampled_from([(2,), (2, 3)]), N=st.sampled_from([31, 32, 33, 64, 65, 97])))
def test_blocks_agree_in_half_precision(dtype, **case):
    check_against_the_definition(dtype, **case)


@pytest.mark.parametrize("kind", ["dominant", "heat"])
def test_65536_rows(kind):
    tensors = inputs((), 65_536, 1, kind=kind)
    want = tridiag(*(x.double() for x in tensors), backend="reference")
    assert error(tridiag(*tensors), want) < 1e-5


@ALL
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("N", [1, 4, 35])
def test_gradcheck(backend, dtype, N):
    tensors = [x.requires_grad_() for x in inputs((1,), N, 1, dtype)]
    assert torch.autograd.gradcheck(runner(backend), tensors)


@ALL
class TestLaws:
    @pytest.mark.parametrize("kind", ["dominant", "legs", "legt", "heat"])
    def test_is_the_dense_solve(self, backend, kind):
        *diagonals, rhs = inputs((2, 3), 70, 4, torch.float64, kind)
        got, want = tridiag(*diagonals, rhs, backend=backend), torch.linalg.solve(dense(*diagonals), rhs)
        assert error(got, want) < 1e-10

    def test_the_product_with_the_matrix_gives_the_right_side_back(self, backend):
        *diagonals, rhs = inputs((2,), 100, 3)
        s = tridiag(*diagonals, rhs, backend=backend)
        torch.testing.assert_close(dense(*diagonals) @ s, rhs, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("N", [1, 2, 7, 40])
    def test_the_inverses_of_chapter_07(self, backend, N):
        """For LegS the triangle of ones; for LegT ones below the diagonal and alternating signs above."""
        one = torch.eye(N, dtype=torch.float64, device=DEVICE)
        for kind, above in (("legs", 0), ("legt", -1)):
            *diagonals, _ = inputs((), N, 1, torch.float64, kind)
            n = torch.arange(N, device=DEVICE)
            signs = torch.tensor(float(above), dtype=torch.float64, device=DEVICE) ** (n[None] - n[:, None]).clamp(
                min=1
            )
            want = torch.where(n[:, None] >= n[None], 1.0, signs)
            torch.testing.assert_close(tridiag(*diagonals, one, backend=backend), want, rtol=0, atol=1e-10)

    def test_columns_and_systems_do_not_mix(self, backend):
        *diagonals, rhs = inputs((3,), 40, 4)
        changed = rhs.clone()
        changed[1, :, 2] += 1
        s, x = (tridiag(*diagonals, r, backend=backend) for r in (rhs, changed))
        same = torch.ones(3, 4, dtype=torch.bool, device=DEVICE)
        same[1, 2] = False
        torch.testing.assert_close(s.transpose(1, 2)[same], x.transpose(1, 2)[same])
        assert not torch.equal(s[1, :, 2], x[1, :, 2])

    def test_a_lower_triangle_is_causal(self, backend):
        """Without du, later right-hand sides cannot change earlier solutions."""
        dl, d, du, rhs = inputs((2,), 70, 1)
        changed = rhs.clone()
        changed[:, 40] += 1
        s, x = (tridiag(dl, d, torch.zeros_like(du), r, backend=backend) for r in (rhs, changed))
        assert torch.equal(s[:, :40], x[:, :40]) and not torch.equal(s[:, 40], x[:, 40])

    def test_strides_do_not_matter(self, backend):
        tensors = inputs((3,), 40, 4)
        strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in tensors]
        torch.testing.assert_close(tridiag(*strided, backend=backend), tridiag(*tensors, backend=backend))

    def test_two_runs_are_bit_identical(self, backend):
        results = []
        for _ in range(2):
            tensors = [x.requires_grad_() for x in inputs((2,), 70, 3)]
            s = tridiag(*tensors, backend=backend)
            results.append((s, *torch.autograd.grad((s * s).sum(), tensors)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    @pytest.mark.parametrize("batch, K", [((2,), 0), ((0,), 3)])
    def test_nothing_to_solve(self, backend, batch, K):
        assert tridiag(*inputs(batch, 5, K), backend=backend).shape == (*batch, 5, K)


def test_memory_is_linear_in_the_number_of_rows():
    assert_memory_is_linear(runner("parallel"), lambda N: inputs((), N, 2))


def test_compiled_without_graph_break():
    tensors = [x.requires_grad_() for x in inputs((2,), 40, 3)]
    run = torch.compile(lambda *x: tridiag(*x) * 2, backend="aot_eager", fullgraph=True)
    got, want = run(*tensors), tridiag(*tensors) * 2
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(y.square().sum(), tensors) for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_triton_is_refused_with_the_reason_and_auto_is_parallel():
    tensors = inputs((), 9, 2)
    with pytest.raises(ValueError, match="cannot run here: there is no Triton kernel for tridiag"):
        tridiag(*tensors, backend="triton")
    assert torch.equal(tridiag(*tensors), tridiag(*tensors, backend="parallel"))


def test_the_cost_model_counts_a_small_case():
    tensors = inputs((2,), 10, 3)
    assert cost.bytes(2, 10, 3) == 4 * (sum(x.numel() for x in tensors) + tridiag(*tensors).numel())
    assert cost.bytes(2, 10, 3, backward=True) > cost.bytes(2, 10, 3)
    assert cost.flops(2, 10, 3) == 20 * cost.flops(1, 1, 3)
    assert cost.flops(2, 10, 3, backward=True) > cost.flops(2, 10, 3)


dl, d, du, rhs = inputs((2,), 8, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((dl, d[:, :0], du, rhs), r"expected d of shape \(\.\.\., N\) with N of at least 1, got \(2, 0\)"),
        ((d, d, du, rhs), r"expected dl of shape \(\.\.\., N-1\) = \(2, 7\), got \(2, 8\)"),
        ((dl, d, du[0], rhs), r"expected du of shape \(\.\.\., N-1\) = \(2, 7\), got \(7,\)"),
        ((dl, d, du, rhs[..., 0]), r"expected rhs of shape \(\.\.\., N, K\) = \(2, 8, K\), got \(2, 8\)"),
        ((dl, d, du, rhs[:1]), r"expected rhs of shape \(\.\.\., N, K\) = \(2, 8, K\), got \(1, 8, 3\)"),
        ((dl.double(), d, du, rhs), "expected dl of dtype torch.float32 like rhs, got torch.float64"),
        ((dl, d.to("meta"), du, rhs), "expected d on .* like rhs, got meta"),
        (([1.0], d, du, rhs), "expected dl to be a tensor, got list"),
        (
            tuple(x.long() for x in (dl, d, du, rhs)),
            "expected rhs to be of a floating-point or complex dtype, got torch.int64",
        ),
    ],
)
def test_errors_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        tridiag(*arguments)


def test_debug_names_the_input_with_nan():
    broken = rhs.clone()
    broken[0, 1, 2] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected rhs without NaN, got 1 NaN"):
        tridiag(dl, d, du, broken)
