"""lti_scan: chunks of matrix products against the loop over time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import use
from seqarch.kernels.fftconv import fftconv
from seqarch.kernels.krylov import krylov
from seqarch.kernels.lti_scan import cost, lti_scan, lti_scan_step

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error
from .test_krylov import hippo_legs

BACKENDS = ["reference", "parallel"]
ALL = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("Abar", "Bbar", "C", "D", "u", "x0")


def inputs(B, H, L, N, M=1, dtype=torch.float32, kind="rotation", seed=0):
    """The system, u and x0; `kind` picks transitions that are hard in their own way."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    A, b = torch.linalg.qr(normal(H, N, N))[0], normal(H, N) / N**0.5  # every eigenvalue on the unit circle
    if kind == "stable":
        A = 0.9 * A
    elif kind == "hippo":
        step = 10 ** (-3 + 2 * torch.rand(1, generator=g).item())
        A, b = (x.expand(H, *x.shape) for x in hippo_legs(N, step))
    elif kind == "zero":
        A = torch.zeros_like(A)
    elif kind == "identity":  # nothing is ever forgotten: the state is a running sum
        A = torch.eye(N, dtype=torch.float64).expand(H, N, N)
    system = [A, b, normal(H, M, N) / N**0.5, normal(H, M), normal(B, H, L)]
    state = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    return [x.to(dtype).to(DEVICE).contiguous() for x in system] + [normal(B, H, N).to(state).to(DEVICE)]


def runner(backend):
    return lambda *tensors: lti_scan(*tensors, backend=backend)


shapes = dict(
    B=st.integers(1, 2),
    H=st.sampled_from([1, 2]),
    L=st.one_of(st.sampled_from([1, 2, 63, 64, 65, 128, 130]), st.integers(1, 70)),
    N=st.sampled_from([1, 2, 8]),
    M=st.sampled_from([1, 3]),
    kind=st.sampled_from(["rotation", "stable", "hippo", "zero", "identity"]),
    with_x0=st.booleans(),
    seed=st.integers(0, 10**6),
)


def check_against_the_definition(dtype, with_x0, L, **case):
    tensors = inputs(L=L, dtype=dtype, **case)[: 6 if with_x0 else 5]
    names = NAMES[: len(tensors)]
    assert_agree(runner("parallel"), runner("reference"), tensors, steps=L, names=names, loose=("Abar",))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=60)
@given(**shapes)
def test_chunks_agree_with_the_loop(dtype, **case):
    check_against_the_definition(dtype, **case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=25)
# a gradient of one number, such as that of D with one feature, can be as small as the rounding of its terms
@given(**shapes | dict(B=st.just(2), H=st.sampled_from([2, 3]), L=st.sampled_from([17, 63, 64, 65, 130])))
def test_chunks_agree_in_half_precision(dtype, **case):
    check_against_the_definition(dtype, **case)


@pytest.mark.parametrize("kind", ["rotation", "hippo"])
def test_65536_steps(kind):
    tensors = inputs(1, 1, 65_536, 4, kind=kind)
    got = lti_scan(*tensors)
    want = lti_scan(*(x.double() for x in tensors), backend="reference")
    assert all(error(x, y) < 1e-4 for x, y in zip(got, want, strict=True))


@ALL
@pytest.mark.parametrize("L", [1, 6, 70])
def test_gradcheck(backend, L):
    tensors = [x.requires_grad_() for x in inputs(1, 1, L, 2, 2, torch.float64, kind="stable")]
    assert torch.autograd.gradcheck(runner(backend), tensors)


@ALL
class TestLaws:
    def test_from_rest_it_is_a_convolution(self, backend):
        """The second of the three faces of chapter 07: K_l = C A^l B, and D."""
        A, b, C, D, u, _ = inputs(2, 3, 90, 4, 2)
        K = (C @ krylov(A, b, 90)).transpose(0, 1)  # (M, H, L)
        y, _ = lti_scan(A, b, C, D, u, backend=backend)
        torch.testing.assert_close(y, fftconv(u, K, D.T), rtol=1e-4, atol=1e-4)

    def test_without_input_the_state_rings_out(self, backend):
        A, b, C, D, u, x0 = inputs(2, 3, 70, 4)
        y, xL = lti_scan(A, b, C, D, torch.zeros_like(u), x0, backend=backend)
        for k in (0, 1, 63, 64, 69):
            x = torch.einsum("hnm,bhm->bhn", torch.linalg.matrix_power(A, k + 1), x0)
            want = torch.einsum("hmn,bhn->bmh", C, x)
            torch.testing.assert_close(y[..., k], want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(xL, x, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("cut", [1, 13, 64, 99])
    def test_two_pieces_equal_the_whole(self, backend, cut):
        *system, u, x0 = inputs(2, 2, 100, 3, 2)
        whole, last = lti_scan(*system, u, x0, backend=backend)
        first, state = lti_scan(*system, u[..., :cut], x0, backend=backend)
        second, state = lti_scan(*system, u[..., cut:], state, backend=backend)
        torch.testing.assert_close(torch.cat([first, second], dim=-1), whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)

    def test_steps_equal_the_whole(self, backend):
        *system, u, x0 = inputs(2, 2, 70, 3, 2)
        whole, last = lti_scan(*system, u, x0, backend=backend)
        state = x0
        for k in range(70):
            y, state = lti_scan_step(*system, u[..., k], state)
            torch.testing.assert_close(y, whole[..., k], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)

    def test_later_inputs_cannot_change_earlier_outputs(self, backend):
        *system, u, x0 = inputs(2, 2, 150, 3)
        y, _ = lti_scan(*system, u, x0, backend=backend)
        for k in (1, 40, 64, 100):
            changed = u.clone()
            changed[..., k] += 1
            x, _ = lti_scan(*system, changed, x0, backend=backend)
            assert torch.equal(y[..., :k], x[..., :k])
            assert not torch.equal(y[..., k], x[..., k])

    def test_systems_do_not_mix(self, backend):
        *system, u, x0 = inputs(2, 3, 70, 3)
        changed = u.clone()
        changed[:, 1] += 1
        y, x = (lti_scan(*system, v, x0, backend=backend)[0] for v in (u, changed))
        assert torch.equal(y[:, :, [0, 2]], x[:, :, [0, 2]])

    def test_strides_do_not_matter(self, backend):
        tensors = inputs(3, 2, 70, 4, 2)
        strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in tensors]
        want = lti_scan(*tensors, backend=backend)
        torch.testing.assert_close(lti_scan(*strided, backend=backend), want, rtol=1e-4, atol=1e-5)

    def test_two_runs_are_bit_identical(self, backend):
        results = []
        for _ in range(2):
            tensors = [x.requires_grad_() for x in inputs(2, 2, 70, 3)]
            y, xL = lti_scan(*tensors, backend=backend)
            results.append((y, xL, *torch.autograd.grad((y * y).sum() + xL.sum(), tensors)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    def test_empty_sequence_returns_the_state(self, backend):
        *system, u, x0 = inputs(2, 3, 0, 4, 2)
        y, xL = lti_scan(*system, u, x0, backend=backend)
        assert y.shape == (2, 2, 3, 0) and torch.equal(xL, x0)

    def test_half_precision_keeps_its_state_in_single(self, backend):
        """4,096 ones summed in bfloat16 would stop growing at 256."""
        A, b, C, D, u, _ = inputs(1, 1, 4096, 1, dtype=torch.bfloat16, kind="identity")
        y, xL = lti_scan(A, torch.ones_like(b), C, D, torch.ones_like(u), backend=backend)
        assert y.dtype == torch.bfloat16 and xL.dtype == torch.float32 and xL.item() == 4096


def test_memory_is_linear_in_length():
    assert_memory_is_linear(runner("parallel"), lambda L: inputs(8, 2, L, 4))


def test_compiled_without_graph_break():
    tensors = [x.requires_grad_() for x in inputs(1, 2, 70, 3)]
    run = torch.compile(lambda *x: lti_scan(*x)[0] * 2, backend="aot_eager", fullgraph=True)
    got, want = run(*tensors), lti_scan(*tensors)[0] * 2
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(y.square().sum(), tensors) for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_triton_is_refused_with_the_reason_and_auto_is_parallel():
    tensors = inputs(1, 2, 9, 3)
    with pytest.raises(ValueError, match="cannot run here: there is no Triton kernel for lti_scan"):
        lti_scan(*tensors, backend="triton")
    assert torch.equal(lti_scan(*tensors)[0], lti_scan(*tensors, backend="parallel")[0])


def test_the_cost_model_counts_a_small_case():
    *tensors, _ = inputs(2, 3, 10, 4, 5)
    assert cost.bytes(2, 3, 10, 4, 5) == 4 * (sum(x.numel() for x in tensors) + lti_scan(*tensors)[0].numel())
    assert cost.bytes(2, 3, 10, 4, 5, backward=True) > cost.bytes(2, 3, 10, 4, 5)
    assert cost.flops(2, 3, 10, 4, 5) == 60 * cost.flops(1, 1, 1, 4, 5)
    assert cost.flops(2, 3, 10, 4, 5, backward=True) > cost.flops(2, 3, 10, 4, 5)


A, b, C, D, u, x0 = inputs(2, 3, 8, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((A, b, C, D, u[0]), r"expected u of shape \(B, H, L\), got \(3, 8\)"),
        ((A, b[:1], C, D, u), r"expected Bbar of shape \(H, N\) with H = 3, got \(1, 4\)"),
        ((A[:, :2], b, C, D, u), r"expected Abar of shape \(H, N, N\) with H = 3, N = 4.* got \(3, 2, 4\)"),
        ((A, b, C[:, 0], D, u), r"expected C of shape \(H, M, N\) with H = 3, N = 4, got \(3, 4\)"),
        ((A, b, C, D.T, u), r"expected D of shape \(H, M\) with H = 3, M = 1, got \(1, 3\)"),
        ((A, b, C, D, u, x0[:1]), r"expected x0 of shape \(B, H, N\) with B = 2, H = 3, N = 4, got \(1, 3, 4\)"),
        ((A.double(), b, C, D, u), "expected Abar of dtype torch.float32 like u, got torch.float64"),
        ((A, b, C, D, u + 0j), "expected u of a real floating-point dtype, got torch.complex64"),
        ((A, b, C, D.to("meta"), u), "expected D on .* like u, got meta"),
        ((A, b, [1.0], D, u), "expected C to be a tensor of shape .* got list"),
    ],
)
def test_errors_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        lti_scan(*arguments)


def test_errors_of_a_step():
    with pytest.raises(ValueError, match=r"expected u of shape \(B, H\), got \(2, 3, 8\)"):
        lti_scan_step(A, b, C, D, u, x0)
    with pytest.raises(ValueError, match=r"expected x of shape \(B, H, N\) with B = 2, H = 3, N = 4, got \(2, 3, 1\)"):
        lti_scan_step(A, b, C, D, u[..., 0], x0[..., :1])


def test_debug_names_the_input_with_nan():
    broken = u.clone()
    broken[0, 1, 2] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected u without NaN, got 1 NaN"):
        lti_scan(A, b, C, D, broken)
