"""fftconv: the transform against the direct sum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import use
from seqarch.kernels.fftconv import cost, fftconv
from seqarch.kernels.fftconv.parallel import fast_length

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

BACKENDS = ["reference", "parallel"]
ALL = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("u", "k", "D")


def inputs(B, H, L, K=None, M=None, dtype=torch.float32, kind="normal", shared=False, seed=0):
    """Random u, k, D; `kind` picks kernels that are hard in their own way."""
    g = torch.Generator().manual_seed(seed)
    K = L if K is None else K
    kernels, channels = ((M, H, K), (M, H)) if M else ((H, K), (H,))
    k = torch.randn(kernels, generator=g, dtype=torch.float64)
    if kind == "decay":
        k = torch.exp(-0.1 * torch.arange(K, dtype=torch.float64)).expand(kernels).clone()
    elif kind == "sum":  # a running sum: the output grows
        k = torch.ones_like(k)
    elif kind == "delay":  # only the last tap
        k = torch.zeros_like(k)
        k[..., -1] = 1
    u = torch.randn(B, 1 if shared else H, L, generator=g, dtype=torch.float64)
    D = torch.randn(channels, generator=g, dtype=torch.float64)
    return [x.to(dtype).to(DEVICE) for x in (u, k, D)]


def runner(backend):
    return lambda u, k, D=None: [fftconv(u, k, D, backend=backend)]


shapes = dict(
    B=st.integers(1, 2),
    H=st.sampled_from([2, 3]),  # the gradient of a single number can be as small as its rounding
    L=st.one_of(st.sampled_from([1, 2, 63, 64, 65, 130]), st.integers(1, 70)),
    K=st.sampled_from([None, None, 1, 2, 17, 200]),
    M=st.sampled_from([None, 1, 2]),
    kind=st.sampled_from(["normal", "decay", "sum", "delay"]),
    shared=st.booleans(),
    with_D=st.booleans(),
    seed=st.integers(0, 10**6),
)


def check_against_the_definition(dtype, with_D, L, **case):
    tensors = inputs(L=L, dtype=dtype, **case)[: 3 if with_D else 2]
    assert_agree(runner("parallel"), runner("reference"), tensors, steps=L, names=NAMES[: len(tensors)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=80)
@given(**shapes)
def test_the_transform_agrees_with_the_direct_sum(dtype, **case):
    check_against_the_definition(dtype, **case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=30)
@given(**shapes)
def test_the_transform_agrees_in_half_precision(dtype, **case):
    check_against_the_definition(dtype, **case)


def test_65536_steps_with_4096_taps():
    u, k, D = inputs(1, 1, 65_536, 4096)
    want = fftconv(*(x.double() for x in (u, k, D)), backend="reference")
    assert error(fftconv(u, k, D), want) < 1e-4


def test_65536_steps_with_as_many_taps():
    """A kernel of powers is a recurrence: y_t = a y_{t-1} + u_t."""
    u, *_ = inputs(1, 1, 65_536)
    a = 0.9999
    k = (a ** torch.arange(65_536, dtype=torch.float64, device=DEVICE)).float()[None]
    y, want = 0.0, []
    for x in u[0, 0].tolist():
        y = a * y + x
        want.append(y)
    assert error(fftconv(u, k)[0, 0], torch.tensor(want, dtype=torch.float64, device=DEVICE)) < 1e-4


@ALL
@pytest.mark.parametrize("M", [None, 2])
def test_gradcheck(backend, M):
    tensors = [x.requires_grad_() for x in inputs(2, 2, 7, 5, M, torch.float64)]
    assert torch.autograd.gradcheck(runner(backend), tensors)


@ALL
class TestLaws:
    def test_is_torch_convolution_with_the_kernel_reversed(self, backend):
        u, k, _ = inputs(2, 3, 50, 20)
        padded = torch.nn.functional.pad(u, (19, 0))
        want = torch.nn.functional.conv1d(padded, k.flip(-1)[:, None], groups=3)
        torch.testing.assert_close(fftconv(u, k, backend=backend), want, rtol=1e-4, atol=1e-4)

    def test_an_impulse_reads_out_the_kernel(self, backend):
        _, k, _ = inputs(1, 3, 40)
        u = torch.zeros(1, 3, 40, device=DEVICE)
        u[..., 0] = 1
        torch.testing.assert_close(fftconv(u, k, backend=backend)[0], k, rtol=0, atol=1e-5)

    def test_a_late_impulse_does_not_come_round_to_the_start(self, backend):
        """A transform shorter than L + K - 1 would add the end of the kernel to the first outputs."""
        for L in (5, 8, 33, 64):
            _, k, _ = inputs(1, 1, L)
            u = torch.zeros(1, 1, L, device=DEVICE)
            u[..., -1] = 1
            y = fftconv(u, k, backend=backend)[0, 0]
            assert y[:-1].abs().max() < 1e-6
            torch.testing.assert_close(y[-1], k[0, 0], rtol=0, atol=1e-5)

    def test_later_inputs_cannot_change_earlier_outputs(self, backend):
        """Bit for bit in the definition; in the transform up to its rounding."""
        u, k, D = inputs(2, 2, 70, dtype=torch.float64)
        changed = u.clone()
        changed[..., 40] += 1
        y, x = fftconv(u, k, D, backend=backend), fftconv(changed, k, D, backend=backend)
        difference = (y - x).abs()
        assert difference[..., :40].max() <= (0 if backend == "reference" else 1e-13)
        assert (difference[..., 40] > 0.01).all()

    def test_a_delayed_input_gives_a_delayed_output(self, backend):
        u, k, D = inputs(2, 3, 50)
        late = torch.nn.functional.pad(u, (7, 0))[..., :50]
        y, shifted = (fftconv(x, k, D, backend=backend) for x in (u, late))
        torch.testing.assert_close(shifted[..., 7:], y[..., :-7], rtol=1e-4, atol=1e-4)

    def test_two_pieces_add_up_to_the_whole(self, backend):
        """The convolution is linear: an input cut in two, each part with zeros in the place of the other."""
        u, k, _ = inputs(2, 3, 50)
        early, late = u.clone(), u.clone()
        early[..., 21:], late[..., :21] = 0, 0
        whole, first, second = (fftconv(x, k, backend=backend) for x in (u, early, late))
        torch.testing.assert_close(first + second, whole, rtol=1e-4, atol=1e-4)

    def test_one_channel_shared_by_all_kernels(self, backend):
        u, k, D = inputs(2, 3, 30, shared=True)
        want = fftconv(u.expand(2, 3, 30), k, D, backend=backend)
        torch.testing.assert_close(fftconv(u, k, D, backend=backend), want)

    def test_many_kernels_equal_one_after_the_other(self, backend):
        u, k, D = inputs(2, 3, 30, M=2)
        want = torch.stack([fftconv(u, k[m], D[m], backend=backend) for m in range(2)], dim=1)
        y = fftconv(u, k, D, backend=backend)
        assert y.shape == (2, 2, 3, 30)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)

    def test_taps_beyond_the_sequence_change_nothing_and_get_no_gradient(self, backend):
        u, k, _ = inputs(2, 3, 20, 50)
        k.requires_grad_()
        y = fftconv(u, k, backend=backend)
        assert torch.equal(y, fftconv(u, k[:, :20], backend=backend))
        (g,) = torch.autograd.grad(y.sum(), k)
        assert g[:, :20].abs().min() > 0 and g[:, 20:].abs().max() == 0

    def test_strides_do_not_matter(self, backend):
        u, k, D = inputs(3, 2, 20)
        strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (u, k)]
        want = fftconv(u, k, D, backend=backend)
        torch.testing.assert_close(fftconv(*strided, D, backend=backend), want)

    def test_two_runs_are_bit_identical(self, backend):
        results = []
        for _ in range(2):
            u, k, D = (x.requires_grad_() for x in inputs(2, 2, 70))
            y = fftconv(u, k, D, backend=backend)
            results.append((y, *torch.autograd.grad((y * y).sum(), (u, k, D))))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    @pytest.mark.parametrize("M", [None, 2])
    def test_empty_sequence(self, backend, M):
        u, k, D = inputs(2, 3, 0, 5, M)
        assert fftconv(u, k, D, backend=backend).shape == ((2, M, 3, 0) if M else (2, 3, 0))

    def test_half_precision_is_convolved_in_single(self, backend):
        """4,096 ones summed in bfloat16 would stop growing at 256."""
        u = torch.ones(1, 1, 4096, dtype=torch.bfloat16, device=DEVICE)
        y = fftconv(u, torch.ones(1, 4096, device=DEVICE), backend=backend)
        assert y.dtype == torch.bfloat16 and y[0, 0, -1] == 4096


def test_memory_is_linear_in_length():
    assert_memory_is_linear(runner("parallel"), lambda L: inputs(1, 2, L))


@pytest.mark.parametrize("least", [1, 2, 3, 15, 16, 17, 100, 1000, 4095, 4097])
def test_the_fast_length_is_long_enough_and_not_much_longer(least):
    assert least <= fast_length(least) <= max(5, 1.34 * least)


def test_compiled_without_graph_break():
    u, k, D = (x.requires_grad_() for x in inputs(1, 2, 20))
    run = torch.compile(lambda u, k, D: fftconv(u, k, D) * 2, backend="aot_eager", fullgraph=True)
    got, want = run(u, k, D), fftconv(u, k, D) * 2
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(y.square().sum(), (u, k, D)) for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_triton_is_refused_with_the_reason_and_auto_is_parallel():
    u, k, D = inputs(1, 2, 9)
    with pytest.raises(ValueError, match="cannot run here: there is no Triton kernel for fftconv"):
        fftconv(u, k, D, backend="triton")
    assert torch.equal(fftconv(u, k, D), fftconv(u, k, D, backend="parallel"))


def test_the_cost_model_counts_a_small_case():
    assert cost.bytes(2, 3, 10) == 4 * sum(x.numel() for x in inputs(2, 3, 10)[:2]) + 4 * 2 * 3 * 10
    assert cost.bytes(2, 3, 10, backward=True) > cost.bytes(2, 3, 10)
    assert cost.flops(2, 6, 16) == 2 * cost.flops(2, 3, 16)
    assert cost.flops(2, 3, 16, backward=True) > cost.flops(2, 3, 16)


u, k, D = inputs(2, 3, 8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((u, k[0]), r"expected k of shape \(H, K\), got \(8,\)"),
        ((u[0], k), r"expected u of shape \(B, H, L\) with H = 3, got \(3, 8\)"),
        ((u[:, :2], k), r"expected u of shape \(B, H, L\) with H = 3, got \(2, 2, 8\)"),
        ((u, k[:, :0]), r"expected k with K of at least 1, got \(3, 0\)"),
        ((u, k, D[:1]), r"expected D of shape \(H\) with H = 3, got \(1,\)"),
        ((u, k[None], D), r"expected D of shape \(M, H\) with M = 1, H = 3, got \(3,\)"),
        ((u + 0j, k), "expected u of a real floating-point dtype, got torch.complex64"),
        ((u, k.long()), "expected k of a real floating-point dtype, got torch.int64"),
        ((u, k.to("meta")), "expected k on .* like u, got meta"),
        (([1.0], k), "expected u to be a tensor of shape .* got list"),
    ],
)
def test_errors_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        fftconv(*arguments)


def test_debug_names_the_input_with_nan():
    broken = k.clone()
    broken[0, 1] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected k without NaN, got 1 NaN"):
        fftconv(u, broken)
