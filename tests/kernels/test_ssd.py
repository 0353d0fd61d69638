"""ssd: one definition, three implementations, checked against a float64 loop and against the masked-matrix dual."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import linear_scan, use
from seqarch.kernels.ssd import cost, ssd, ssd_step

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

BACKENDS = ["reference", "parallel", "triton"]
ALL = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("x", "dt", "A", "B", "C", "D", "state")
LOOSE = ("dt", "A")  # what the decays are made of


def inputs(B, T, H, P, G, N, dtype=torch.float32, kind="normal", seed=0):
    """Random arguments of `ssd`, all of them; `kind` picks step sizes that are hard in their own way."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, write, read = normal(B, T, H, P), normal(B, T, G, N), normal(B, T, G, N)
    dt = 0.1 * torch.rand(B, T, H, generator=g, dtype=torch.float64)
    A = -1 - 15 * torch.rand(H, generator=g, dtype=torch.float64)
    if kind == "resets":  # decays of exactly 0 (dt 20, A -16) between ordinary ones
        A = torch.full_like(A, -16.0)
        dt = torch.where(torch.rand(B, T, H, generator=g) < 0.4, 20.0, 0.01 * dt)
    elif kind == "strong":  # decays of e^-50 beside decays of almost 1
        dt = torch.where(torch.rand(B, T, H, generator=g) < 0.5, 50.0 / -A, 1e-4 * dt)
    elif kind == "tiny":
        dt = 1e-5 * dt
    elif kind == "paused":
        dt = dt * (torch.rand(B, T, H, generator=g) < 0.5)
    elif kind == "identical":  # one token, over and over
        x, write, read, dt = (z[:, :1].expand_as(z).clone() for z in (x, write, read, dt))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, write, read = (z.to(dtype).to(DEVICE) for z in (x, write, read))
    dt, A, D, state = (z.to(wide).to(DEVICE) for z in (dt, A, normal(H), normal(B, H, N, P)))
    return [x, dt, A, write, read, D, state]


def runner(backend, with_D=True, with_state=True, **options):
    """A function of the tensors that are given."""

    def run(x, dt, A, B, C, *rest):
        rest = list(rest)
        D = rest.pop(0) if with_D else None
        return ssd(x, dt, A, B, C, D, rest.pop(0) if with_state else None, backend=backend, **options)

    return run


def compare(backends, tensors, with_D=True, with_state=True, **options):
    """Assert that the backends agree with the float64 loop."""
    kept = [z for z, keep in zip(tensors, [True] * 5 + [with_D, with_state], strict=True) if keep]
    names = [z for z, keep in zip(NAMES, [True] * 5 + [with_D, with_state], strict=True) if keep]
    reference = runner("reference", with_D, with_state)
    for backend in backends:
        assert_agree(
            runner(backend, with_D, with_state, **options), reference, kept,
            steps=tensors[0].shape[1], names=names, loose=LOOSE, matmul=True,
        )  # fmt: skip


shapes = dict(
    heads=st.sampled_from([(1, 1, 1), (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 2, 2)]),  # (B, H, G)
    T=st.one_of(st.sampled_from([1, 2, 15, 16, 17, 32, 33, 65]), st.integers(1, 20), st.integers(1, 20)),
    P=st.sampled_from([1, 3, 16, 18]),
    N=st.sampled_from([1, 4, 16, 18]),
    chunk=st.sampled_from([16, 32, 64, 64]),
    kind=st.sampled_from(["normal", "resets", "strong", "tiny", "paused", "identical"]),
    with_D=st.booleans(),
    with_state=st.booleans(),
    seed=st.integers(0, 10**6),
)


def check_against_the_definition(backends, dtype, heads, T, P, N, chunk, kind, with_D, with_state, seed):
    batch, H, G = heads
    compare(backends, inputs(batch, T, H, P, G, N, dtype, kind, seed), with_D, with_state, chunk=chunk)


@settings(max_examples=60)
@given(**shapes)
def test_three_implementations_agree_in_float32(**case):
    check_against_the_definition(["parallel", "triton"], torch.float32, **case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=20)
@given(**shapes)
def test_three_implementations_agree_in_half_precision(dtype, **case):
    check_against_the_definition(["parallel", "triton"], dtype, **case)


@settings(max_examples=60)
@given(**(shapes | {"chunk": st.integers(1, 70), "T": st.integers(1, 130)}))
def test_the_chunked_form_agrees_in_float64(**case):
    check_against_the_definition(["parallel"], torch.float64, **case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_columns_and_chunks_than_one_block(dtype):
    """The Triton path splits wide P and N over programs, and adds their parts of the gradients."""
    compare(["triton"], inputs(1, 130, 1, 70, 1, 80, dtype))


def test_several_heads_in_several_groups():
    compare(["parallel", "triton"], inputs(2, 9, 6, 3, 3, 5))


@ALL
@pytest.mark.parametrize("T", [1, 63, 64, 65])
def test_is_a_product_with_one_masked_matrix(backend, T):
    """The dual form: a window that is never full leaves out nothing."""
    tensors = inputs(1, T, 2, 3, 1, 4)[:6]
    want, state = ssd(*[z.double() for z in tensors], window=T)
    got, last = ssd(*tensors, backend=backend)
    assert error(got, want) < 1e-5 and error(last, state) < 1e-5


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@pytest.mark.parametrize("T, chunk", [(1, 4), (9, 4), (8, 64)])
def test_gradcheck(backend, T, chunk):
    tensors = [z.requires_grad_() for z in inputs(1, T, 2, 2, 1, 3, torch.float64)]
    assert torch.autograd.gradcheck(runner(backend, chunk=chunk), tensors)


@ALL
class TestLaws:
    def test_two_pieces_equal_the_whole(self, backend):
        x, dt, A, B, C, D, state = tensors = [z.requires_grad_() for z in inputs(1, 50, 2, 3, 1, 4)]
        whole, last = ssd(*tensors, backend=backend)
        first, middle = ssd(x[:, :21], dt[:, :21], A, B[:, :21], C[:, :21], D, state, backend=backend)
        second, final = ssd(x[:, 21:], dt[:, 21:], A, B[:, 21:], C[:, 21:], D, middle, backend=backend)
        joined = torch.cat([first, second], dim=1)
        torch.testing.assert_close(joined, whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(final, last, rtol=1e-4, atol=1e-5)
        g = torch.randn_like(whole)
        got, want = torch.autograd.grad(joined, tensors, g), torch.autograd.grad(whole, tensors, g)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    def test_steps_equal_the_whole(self, backend):
        x, dt, A, B, C, D, state = inputs(1, 20, 2, 3, 1, 4)
        whole, last = ssd(x, dt, A, B, C, D, state, retain=0.9, insert=0.5, backend=backend)
        for t in range(20):
            y, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state, retain=0.9, insert=0.5)
            torch.testing.assert_close(y, whole[:, t], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)

    def test_later_tokens_cannot_change_earlier_outputs(self, backend):
        x, dt, A, B, C, *_ = inputs(1, 40, 1, 3, 1, 4)
        y, _ = ssd(x, dt, A, B, C, backend=backend)
        for t in (1, 20, 33):
            changed = [z.clone() for z in (x, dt, B, C)]
            for z in changed:
                z[:, t] += 1
            other, _ = ssd(*changed[:2], A, *changed[2:], backend=backend)
            assert torch.equal(y[:, :t], other[:, :t])
            assert not torch.equal(y[:, t], other[:, t])

    def test_a_step_of_zero_leaves_the_state_unchanged(self, backend):
        x, dt, A, B, C, D, state = inputs(1, 40, 1, 3, 1, 4)
        _, last = ssd(x, torch.zeros_like(dt), A, B, C, D, state, backend=backend)
        assert torch.equal(last, state)

    def test_a_reset_forgets_even_a_huge_past(self, backend):
        x, dt, A, B, C, _, state = inputs(1, 40, 1, 3, 1, 4)
        A[:], dt[:, 30] = -16.0, 20.0
        x[:, :30] *= 1e20
        got, last = ssd(x, dt, A, B, C, state=state, backend=backend)
        want, end = ssd(x[:, 30:], dt[:, 30:], A, B[:, 30:], C[:, 30:], backend=backend)
        torch.testing.assert_close(got[:, 30:], want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last, end, rtol=1e-4, atol=1e-5)

    def test_a_reset_has_no_gradient(self, backend):
        """Decays so strong that nothing is left: the gradient of the decay rate is exactly 0, not a rounding error."""
        x, dt, A, B, C, *_ = (z.requires_grad_() for z in inputs(1, 40, 1, 3, 1, 4))
        y, _ = ssd(x, 0 * dt + 20, A - 16, B, C, backend=backend)
        assert torch.equal(torch.autograd.grad((y * y).sum(), A)[0], torch.zeros_like(A))

    def test_a_constant_input_sums_up_a_geometric_series(self, backend):
        alpha, T = 0.97, 64
        one = torch.ones(1, T, 1, 1, device=DEVICE)
        A = torch.tensor([alpha], device=DEVICE).log()
        y, _ = ssd(one, one[..., 0], A, one, one, backend=backend)
        t = torch.arange(1, T + 1, device=DEVICE)
        torch.testing.assert_close(y.flatten(), (1 - alpha**t) / (1 - alpha), rtol=1e-4, atol=1e-5)

    def test_is_an_exponential_moving_average(self, backend):
        """Chapter 25: dt = -ln(1 - p), A = -1, x = z / dt, B = p, C = 1 give zb = p z + (1 - p) zb."""
        p, z = torch.rand(1, 40, 1, device=DEVICE) * 0.8 + 0.1, torch.randn(1, 40, 5, device=DEVICE)
        dt, A = -torch.log1p(-p), -torch.ones(1, device=DEVICE)
        y, _ = ssd((z / dt)[:, :, None], dt, A, p[..., None], torch.ones_like(p)[..., None], backend=backend)
        torch.testing.assert_close(y[:, :, 0], linear_scan(1 - p, p * z)[0], rtol=1e-4, atol=1e-5)

    def test_retain_and_insert_scale_decays_and_insertions(self, backend):
        x, dt, A, B, C, D, state = inputs(1, 20, 2, 3, 1, 4)
        dt = torch.full_like(dt, 0.05)  # with equal steps, retain is one more term of the rate
        got = ssd(x, dt, A, B, C, D, state, retain=0.9, insert=0.75, backend=backend)
        rate = A + torch.tensor(0.9).log().item() / 0.05
        torch.testing.assert_close(got, ssd(x, dt, rate, 0.75 * B, C, D, state), rtol=1e-4, atol=1e-5)
        plain = ssd(x, dt, A, B, C, D, state, backend=backend)
        options = dict(retain=1.0, insert=1.0, window=None)
        same = ssd(x, dt, A, B, C, D, state, backend=backend, **options)
        assert all(torch.equal(u, v) for u, v in zip(plain, same, strict=True))

    def test_strides_do_not_matter(self, backend):
        tensors = inputs(2, 20, 2, 3, 1, 4)
        strided = [z.transpose(0, -1).contiguous().transpose(0, -1) if z.ndim > 1 else z for z in tensors]
        want = ssd(*tensors, backend=backend)
        torch.testing.assert_close(ssd(*strided, backend=backend), want, rtol=1e-4, atol=1e-5)

    def test_two_runs_are_bit_identical(self, backend):
        results = []
        for _ in range(2):
            tensors = [z.requires_grad_() for z in inputs(1, 40, 2, 3, 1, 4)]
            y, last = ssd(*tensors, backend=backend)
            results.append((y, last, *torch.autograd.grad((y * y).sum(), tensors)))
        assert all(torch.equal(u, v) for u, v in zip(*results, strict=True))

    def test_empty_sequence_returns_the_state(self, backend):
        *tensors, state = inputs(2, 0, 2, 3, 1, 4)
        y, last = ssd(*tensors, state, backend=backend)
        assert y.shape == (2, 0, 2, 3) and torch.equal(last, state)

    def test_the_output_has_the_dtype_of_x_and_the_state_is_float32(self, backend):
        x, dt, A, B, C, D, state = tensors = inputs(1, 5, 1, 3, 1, 4, torch.bfloat16)
        y, last = ssd(*tensors, backend=backend)
        assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
        y, last = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state)
        assert y.dtype == torch.bfloat16 and last.dtype == torch.float32

    def test_a_state_beyond_the_range_of_float16(self, backend):
        x, dt, A, B, C, _, state = inputs(1, 20, 1, 3, 1, 4, torch.float16)
        tensors = [x, dt, A, B, (1e-3 * C.float()).half(), 1e6 * state]
        want, _ = ssd(*[z.double() for z in tensors[:5]], state=tensors[5].double())
        got, _ = ssd(*tensors[:5], state=tensors[5], backend=backend)
        assert error(got, want) < 2e-3


@pytest.mark.parametrize("window", [1, 5, 16])
class TestWindow:
    def test_is_the_state_without_what_an_older_state_still_holds(self, window):
        """Chapter 12: the state minus what is left of the state of `window` tokens ago."""
        x, dt, A, B, C, D, _ = inputs(1, 30, 2, 3, 1, 4, torch.float64)
        y, last = ssd(x, dt, A, B, C, D, window=window)
        states, state = [torch.zeros_like(last)], None
        for t in range(30):
            _, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state)
            states.append(state)
            left = torch.exp(dt[:, max(0, t + 1 - window) : t + 1].sum(1) * A)
            kept = state - left[..., None, None] * states[max(0, t + 1 - window)]
            want = torch.einsum("bn,bhnp->bhp", C[:, t, 0], kept) + D[:, None] * x[:, t]
            torch.testing.assert_close(y[:, t], want)
        torch.testing.assert_close(last, kept)

    def test_gradcheck(self, window):
        tensors = [z.requires_grad_() for z in inputs(1, 7, 2, 2, 1, 2, torch.float64)[:6]]
        assert torch.autograd.gradcheck(lambda *z: ssd(*z, window=window), tensors)


@pytest.mark.parametrize("kind", ["normal", "strong"])
def test_65536_steps(kind):
    tensors = inputs(1, 65536, 1, 4, 1, 4, kind=kind)
    y, last = ssd(*tensors, backend="parallel")
    want, end = ssd(*[z.double() for z in tensors], backend="reference")
    assert error(y, want) < 1e-5 and error(last, end) < 1e-5


def test_memory_is_linear_in_length():
    assert_memory_is_linear(
        lambda *z: ssd(*z, backend="parallel"),
        lambda T: [z.requires_grad_() for z in inputs(1, T, 2, 4, 1, 4)],
        lengths=(1024, 2048, 4096),
    )


def test_compiled_without_graph_break():
    tensors = inputs(1, 20, 2, 3, 1, 4)
    run = torch.compile(lambda *z: ssd(*z, backend="triton")[0] * 2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(*tensors), ssd(*tensors)[0] * 2, rtol=1e-4, atol=1e-5)


def test_auto_on_the_cpu_is_parallel_and_use_overrides_it():
    tensors = inputs(1, 9, 1, 2, 1, 2, torch.float64)
    with use("triton"), pytest.raises(ValueError, match="float64"):
        ssd(*tensors)
    assert torch.equal(ssd(*tensors)[0], ssd(*tensors, backend="parallel")[0])


def test_the_cost_model_counts_a_small_case():
    tokens = (2 * 2 * 3 + 2 * 1 * 5) * 2 + 2 * 4
    assert cost.bytes(1, 64, 2, 3, 1, 5, itemsize=2) == 64 * tokens + 2 * 2 * 5 * 3 * 4
    assert cost.bytes(1, 64, 2, 3, 1, 5, backward=True) > cost.bytes(1, 64, 2, 3, 1, 5)
    assert cost.flops(2, 64, 2, 3, 1, 5) == 2 * cost.flops(1, 64, 2, 3, 1, 5)
    assert cost.state_floats(2, 4, 8, 3) == ssd(*inputs(2, 5, 4, 8, 1, 3)[:5])[1].numel()


x, dt, A, B, C, D, state = inputs(2, 8, 4, 3, 2, 5)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((x[0], dt, A, B, C), {}, r"expected x of shape \(B, T, H, P\), got \(8, 4, 3\)"),
        ((x, dt[:, :5], A, B, C), {}, r"expected dt of shape \(B, T, H\) with B = 2, T = 8, H = 4, got \(2, 5, 4\)"),
        ((x, dt, A[:1], B, C), {}, r"expected A of shape \(H\) with H = 4, got \(1,\)"),
        ((x, dt, A, B, C[..., :1]), {}, r"expected C of shape \(B, T, G, N\) with .* N = 5, got \(2, 8, 2, 1\)"),
        ((x, dt, A, B, C, D[:1]), {}, r"expected D of shape \(H\) with H = 4, got \(1,\)"),
        ((x, dt, A, B, C, D, state[:1]), {}, r"expected state of shape \(B, H, N, P\) with .* got \(1, 4, 5, 3\)"),
        ((x[:, :, :3], dt[..., :3], A[:3], B, C), {}, "expected H to be a multiple of G, got H = 3, G = 2"),
        ((x, dt, A, B.double(), C), {}, "expected B of dtype torch.float32 like x, got torch.float64"),
        ((x, dt.long(), A, B, C), {}, "expected dt of a floating-point dtype, got torch.int64"),
        ((x, dt, A.to("meta"), B, C), {}, "expected A on .* like x, got meta"),
        (([1.0], dt, A, B, C), {}, "expected x to be a tensor of shape .* got list"),
        ((x, dt, A, B, C), {"chunk": 0}, "expected chunk to be an integer of at least 1, got 0"),
        ((x, dt, A, B, C), {"retain": 0.0}, "expected retain to be above 0, got 0.0"),
        ((x, dt, A, B, C), {"window": 0}, "expected window to be None or an integer of at least 1, got 0"),
        (
            (x, dt, A, B, C),
            {"window": 3, "backend": "parallel"},
            'expected backend "auto" or "reference" with a window',
        ),
        ((x, dt, A, B, C, D, state), {"window": 3}, "expected no state with a window"),
        ((x, dt, A, B, C), {"chunk": 50, "backend": "triton"}, "it takes chunks of 16, 32, 64, got 50"),
        ((x, dt, A, B, C), {"backend": "cuda"}, "expected backend to be one of auto, .* got 'cuda'"),
    ],
)
def test_errors_name_what_was_expected(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ssd(*arguments, **options)


def test_errors_of_a_step():
    with pytest.raises(ValueError, match=r"expected x of shape \(B, H, P\), got \(2, 8, 4, 3\)"):
        ssd_step(x, dt[:, 0], A, B[:, 0], C[:, 0])
    with pytest.raises(ValueError, match=r"expected B of shape \(B, G, N\) with B = 2, got \(2, 8, 2, 5\)"):
        ssd_step(x[:, 0], dt[:, 0], A, B, C[:, 0])


def test_debug_checks_values():
    broken = x.clone()
    broken[0, 2, 1, 0] = float("nan")
    with use(debug=True):
        with pytest.raises(ValueError, match="expected x without NaN, got 1 NaN"):
            ssd(broken, dt, A, B, C)
        with pytest.raises(ValueError, match="expected A to be negative, got a largest value of"):
            ssd(x, dt, -A, B, C)
