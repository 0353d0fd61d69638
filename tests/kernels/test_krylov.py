"""krylov: doubling against one product after the other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import use
from seqarch.kernels.krylov import cost, krylov

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

BACKENDS = ["reference", "parallel"]
ALL = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("Abar", "Bbar")


def hippo_legs(N, step):
    """The transition and input of chapter 07's HiPPO-LegS system, discretised by the bilinear rule."""
    n = torch.arange(N, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    A = -torch.tril(root[:, None] * root, -1) - torch.diag(n + 1)
    one = torch.eye(N, dtype=torch.float64)
    solved = torch.linalg.solve(one - step / 2 * A, torch.cat([one + step / 2 * A, step * root[:, None]], dim=1))
    return solved[:, :N], solved[:, N]


def inputs(H, N, dtype=torch.float32, kind="rotation", seed=0):
    """Abar and Bbar; `kind` picks matrices that are hard in their own way."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    A = torch.linalg.qr(torch.randn(H, N, N, generator=g, dtype=wide))[0]  # every eigenvalue on the unit circle
    B = torch.randn(H, N, generator=g, dtype=wide)
    if kind == "stable":
        A = 0.9 * A
    elif kind == "hippo":
        step = 10 ** (-3 + 2 * torch.rand(1, generator=g).item())
        A, B = (x.expand(H, *x.shape).to(wide) for x in hippo_legs(N, step))
    elif kind == "shift":  # nilpotent: exact zeros after N steps
        A = torch.diag(torch.ones(N - 1, dtype=wide), -1).expand(H, N, N)
    elif kind == "zero":
        A = torch.zeros_like(A)
    return [x.to(dtype).to(DEVICE).contiguous() for x in (A, B)]


def runner(backend, L):
    return lambda A, B: [krylov(A, B, L, backend=backend)]


shapes = dict(
    H=st.integers(1, 3),
    N=st.sampled_from([1, 2, 5, 16]),
    L=st.one_of(st.sampled_from([1, 2, 63, 64, 65, 130]), st.integers(1, 70)),
    kind=st.sampled_from(["rotation", "stable", "hippo", "shift", "zero"]),
    seed=st.integers(0, 10**6),
)


def check_against_the_definition(dtype, L, **case):
    assert_agree(
        runner("parallel", L), runner("reference", L), inputs(dtype=dtype, **case), steps=L, names=NAMES, loose="Abar"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32, torch.complex64])
@settings(max_examples=60)
@given(**shapes)
def test_doubling_agrees_with_the_loop(dtype, **case):
    check_against_the_definition(dtype, **case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=30)
@given(**shapes)
def test_doubling_agrees_in_half_precision(dtype, **case):
    check_against_the_definition(dtype, **(case | {"kind": case["kind"].replace("rotation", "stable")}))


@pytest.mark.parametrize("kind", ["rotation", "hippo"])
def test_65536_columns(kind):
    A, B = inputs(1, 4, kind=kind)
    want = krylov(A.double(), B.double(), 65_536, backend="reference")
    assert error(krylov(A, B, 65_536), want) < 1e-4


@ALL
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("L", [1, 6, 8])
def test_gradcheck(backend, dtype, L):
    tensors = [x.requires_grad_() for x in inputs(2, 3, dtype)]
    assert torch.autograd.gradcheck(runner(backend, L), tensors)


@ALL
class TestLaws:
    def test_columns_are_matrix_powers(self, backend):
        A, B = inputs(2, 5)
        X = krylov(A, B, 21, backend=backend)
        for l in (0, 1, 2, 7, 20):
            want = torch.linalg.matrix_power(A, l) @ B[..., None]
            torch.testing.assert_close(X[..., l], want.squeeze(-1), rtol=1e-4, atol=1e-5)

    def test_two_pieces_equal_the_whole(self, backend):
        """The second piece starts from the vector one step after the end of the first."""
        A, B = inputs(2, 5)
        whole, first = krylov(A, B, 40, backend=backend), krylov(A, B, 13, backend=backend)
        second = krylov(A, (A @ first[..., -1:]).squeeze(-1), 27, backend=backend)
        torch.testing.assert_close(torch.cat([first, second], dim=-1), whole, rtol=1e-4, atol=1e-5)

    def test_a_shorter_matrix_is_the_start_of_a_longer_one(self, backend):
        A, B = inputs(2, 5)
        long = krylov(A, B, 64, backend=backend)
        for L in (1, 5, 8, 13, 63):
            torch.testing.assert_close(krylov(A, B, L, backend=backend), long[..., :L], rtol=1e-5, atol=1e-6)

    def test_a_shift_gives_the_identity(self, backend):
        A, B = inputs(1, 6, kind="shift")
        B = torch.zeros_like(B)
        B[:, 0] = 1
        want = torch.zeros(1, 6, 11, device=DEVICE)
        want[0, range(6), range(6)] = 1
        assert torch.equal(krylov(A, B, 11, backend=backend), want)

    def test_strides_do_not_matter(self, backend):
        A, B = inputs(3, 4)
        strided = A.mT.contiguous().mT, B.T.contiguous().T
        torch.testing.assert_close(krylov(*strided, 20, backend=backend), krylov(A, B, 20, backend=backend))

    def test_two_runs_are_bit_identical(self, backend):
        results = []
        for _ in range(2):
            A, B = (x.requires_grad_() for x in inputs(2, 5))
            X = krylov(A, B, 70, backend=backend)
            results.append((X, *torch.autograd.grad((X * X).sum(), (A, B))))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    def test_no_columns(self, backend):
        assert krylov(*inputs(2, 3), 0, backend=backend).shape == (2, 3, 0)


def test_memory_is_linear_in_length():
    def run(A, B, length):
        return [krylov(A, B, len(length), backend="parallel")]

    assert_memory_is_linear(run, lambda L: [*inputs(2, 4), torch.zeros(L, dtype=torch.bool)])


def test_compiled_without_graph_break():
    A, B = (x.requires_grad_() for x in inputs(2, 3))
    run = torch.compile(lambda A, B: krylov(A, B, 20) * 2, backend="aot_eager", fullgraph=True)
    got, want = run(A, B), krylov(A, B, 20) * 2
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(y.square().sum(), (A, B)) for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_triton_is_refused_with_the_reason_and_auto_is_parallel():
    A, B = inputs(1, 2)
    with pytest.raises(ValueError, match="cannot run here: there is no Triton kernel for krylov"):
        krylov(A, B, 9, backend="triton")
    assert torch.equal(krylov(A, B, 9), krylov(A, B, 9, backend="parallel"))


def test_the_cost_model_counts_a_small_case():
    assert cost.bytes(2, 3, 10) == 4 * (sum(x.numel() for x in inputs(2, 3)) + krylov(*inputs(2, 3), 10).numel())
    assert cost.bytes(2, 3, 10, backward=True) > cost.bytes(2, 3, 10)
    assert cost.flops(1, 3, 1) == 0 and cost.flops(2, 3, 11) == 2 * 10 * 2 * 9
    assert cost.flops(2, 3, 10, backward=True) == 2 * cost.flops(2, 3, 10)


A, B = inputs(2, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((A, B[0], 4), r"expected Bbar of shape \(H, N\), got \(3,\)"),
        ((A[:, :2], B, 4), r"expected Abar of shape \(H, N, N\) with H = 2, N = 3.* got \(2, 2, 3\)"),
        ((A.double(), B, 4), "expected Abar of dtype torch.float32 like Bbar, got torch.float64"),
        ((A.long(), B.long(), 4), "expected Bbar to be of a floating-point or complex dtype, got torch.int64"),
        ((A.to("meta"), B, 4), "expected Abar on .* like Bbar, got meta"),
        (([1.0], B, 4), "expected Abar to be a tensor of shape .* got list"),
        ((A, B, -1), "expected L to be an integer of at least 0, got -1"),
    ],
)
def test_errors_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        krylov(*arguments)


def test_debug_names_the_input_with_nan():
    broken = B.clone()
    broken[0, 1] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected Bbar without NaN, got 1 NaN"):
        krylov(A, broken, 4)
