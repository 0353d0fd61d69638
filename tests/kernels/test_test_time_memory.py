"""titans_linear and omega_linear: a token loop against chunks and kernels, each other and the delta rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import use
from seqarch.kernels.delta_rule import delta_rule
from seqarch.kernels.test_time_memory import cost, omega_linear, titans_linear

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

BACKENDS = ["reference", "parallel", "triton"]
ALL = pytest.mark.parametrize("backend", BACKENDS)
TITANS = ("q", "k", "v", "theta", "eta", "alpha", "W0", "S0")
OMEGA = ("phi_q", "phi_k", "v", "alpha", "eta", "theta", "gamma", "W0", "S0", "tail k", "tail v", "tail gamma")
LOOSE = ("theta", "eta", "alpha", "gamma", "tail gamma")
KINDS = ["normal", "ends", "same key", "no step"]


def omega_inputs(B, H, T, D, V, window=1, dtype=torch.float32, kind="normal", seed=0):
    """Random inputs in the order of OMEGA; steps so small that a window of equal keys does not overshoot."""
    g = torch.Generator().manual_seed(seed + 1)

    def normal(*shape):
        return torch.randn(B, H, *shape, generator=g, dtype=torch.float64)

    def gate(*shape):
        return torch.rand(B, H, *shape, generator=g, dtype=torch.float64)

    n = window - 1
    keys = torch.nn.functional.normalize(normal(n + T, D), dim=-1)
    if kind == "same key":
        keys = keys[..., :1, :].expand_as(keys)
    alpha, eta, theta = gate(T), gate(T) * 0.1 / window, gate(T)
    if kind == "ends":  # gates at and next to both ends of their range
        ends = torch.tensor([0.0, 1e-6, 1 - 1e-6, 1.0], dtype=torch.float64)
        alpha, theta = (ends[torch.randint(0, 4, alpha.shape, generator=g)] for _ in range(2))
    elif kind == "no step":
        eta = eta * 0
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tokens = [x.to(dtype) for x in (normal(T, D), keys[:, :, n:], normal(T, V))]
    gates = [x.to(wide) for x in (alpha, eta, theta, gate(T), normal(V, D), 0.1 * normal(V, D))]
    tail = [x.to(wide) for x in (keys[:, :, :n], normal(n, V), gate(n))]
    return [x.to(DEVICE) for x in (*tokens, *gates, *tail)]


def titans_inputs(*shape, **options):
    """Random inputs in the order of TITANS."""
    q, k, v, alpha, eta, theta, _, W, S, *_ = omega_inputs(*shape, **options)
    return [q, k, v, eta, theta, 1 - alpha, W, S]


def omega(backend, window=1, chunk=16):
    def run(*x):
        y, W, S, tail = omega_linear(
            *x[:9], window=window, chunk=chunk, tail=x[9:] if len(x) > 9 else None, backend=backend
        )
        return y, W, S, *tail

    return run


def titans(backend, chunk=16):
    return lambda *x: titans_linear(*x, chunk=chunk, backend=backend)


shapes = dict(
    rows=st.sampled_from([(1, 1), (2, 1), (1, 2)]),  # (B, H)
    T=st.one_of(st.sampled_from([1, 15, 16, 17, 32, 37]), st.integers(1, 40)),
    D=st.sampled_from([1, 4, 9]),
    V=st.sampled_from([1, 4, 7]),
    window_chunk=st.sampled_from([(1, 1), (1, 6), (1, 16), (1, 64), (2, 2), (4, 6), (4, 16), (8, 8)]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
)


kernel_shapes = shapes | {  # every step of the interpreter is slow
    "rows": st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 2)]),
    "T": st.one_of(st.integers(1, 20), st.sampled_from([16, 17, 33])),
}


def check_omega(dtype, rows, T, D, V, window_chunk, kind, seed, states, backend="parallel"):
    tensors = omega_inputs(*rows, T, D, V, window_chunk[0], dtype, kind, seed)
    tensors = tensors[: {"none": 7, "memory": 9, "all": 12}[states]]
    assert_agree(
        omega(backend, *window_chunk), omega("reference", *window_chunk), tensors,
        steps=T, names=OMEGA[: len(tensors)], loose=LOOSE, matmul=True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=60)
@given(**shapes, states=st.sampled_from(["none", "memory", "all"]))
def test_the_chunked_omega_rule_agrees(dtype, **case):
    check_omega(dtype, **case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=20)
@given(**shapes, states=st.sampled_from(["none", "memory", "all"]))
def test_the_chunked_omega_rule_agrees_in_half_precision(dtype, **case):
    check_omega(dtype, **case)


@settings(max_examples=60)
@given(**kernel_shapes, states=st.sampled_from(["none", "memory", "all"]))
def test_the_kernel_agrees_on_the_omega_rule(**case):
    check_omega(torch.float32, **case, backend="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=20)
@given(**kernel_shapes, states=st.sampled_from(["none", "memory", "all"]))
def test_the_kernel_agrees_on_the_omega_rule_in_half_precision(dtype, **case):
    check_omega(dtype, **case, backend="triton")


def check_titans(backend, dtype, rows, T, D, V, window_chunk, kind, seed, with_states):
    tensors = titans_inputs(*rows, T, D, V, dtype=dtype, kind=kind, seed=seed)[: 8 if with_states else 6]
    chunk = window_chunk[1]
    assert_agree(
        titans(backend, chunk), titans("reference", chunk), tensors,
        steps=T, names=TITANS[: len(tensors)], loose=LOOSE, matmul=True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=30)
@given(**shapes, with_states=st.booleans())
def test_the_chunked_titans_agree(dtype, **case):
    check_titans("parallel", dtype, **case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=20)
@given(**kernel_shapes, with_states=st.booleans())
def test_the_kernel_agrees_on_titans(dtype, **case):
    check_titans("triton", dtype, **case)


def test_more_values_keys_and_tokens_than_one_tile():
    """Two programs for 17 columns of values, 70 tokens of a chunk in five tiles, the last one ragged."""
    check_omega(torch.float32, (1, 1), 90, 20, 17, (4, 70), "normal", 0, "all", backend="triton")


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@pytest.mark.parametrize("T, window, chunk", [(1, 1, 1), (5, 2, 2), (7, 3, 4)])
@pytest.mark.parametrize("kind", ["normal", "ends"])
def test_gradcheck(backend, T, window, chunk, kind):
    tensors = [x.requires_grad_() for x in omega_inputs(1, 1, T, 2, 2, window, torch.float64, kind)]
    assert torch.autograd.gradcheck(omega(backend, window, chunk), tensors)
    tensors = [x.requires_grad_() for x in titans_inputs(1, 1, T, 2, 2, dtype=torch.float64, kind=kind)]
    assert torch.autograd.gradcheck(titans(backend, chunk), tensors)


def test_65536_tokens():
    """Rounding errors do not pile up: what a key holds is corrected, and forgotten."""
    tensors = titans_inputs(1, 1, 65536, 4, 2)
    with torch.no_grad():
        got, want = titans("parallel")(*tensors), titans("reference")(*(x.double() for x in tensors))
    assert all(error(x, y) < 1e-4 for x, y in zip(got, want, strict=True))


def test_memory_is_linear_in_length():
    assert_memory_is_linear(omega("parallel", 4), lambda T: omega_inputs(1, 1, T, 4, 4, 4), lengths=(1024, 2048, 4096))


@ALL
class TestLaws:
    def test_three_writes_by_hand(self, backend):
        k = torch.tensor([[1.0, 0], [0, 1], [1, 0]], device=DEVICE)[None, None]
        v = torch.tensor([[2.0, 0], [0, 4], [2, 0]], device=DEVICE)[None, None]
        theta, eta, alpha = torch.tensor([[0.5, 0.25, 0.5], [0.5, 0.5, 0], [0, 0.5, 0]], device=DEVICE)[:, None, None]
        expected = [([1, 0], [1, 0]), ([1, 1], [0.5, 1]), ([1.5, 1], [0.5, 0])]
        for n, (W, S) in enumerate(expected, start=1):
            tokens = [x[:, :, :n] for x in (k, k, v, theta, eta, alpha)]
            _, *states = titans_linear(*tokens, chunk=1, backend=backend)
            for got, diagonal in zip(states, (W, S), strict=True):
                torch.testing.assert_close(got[0, 0], torch.diag(torch.tensor(diagonal, device=DEVICE).float()))

    def test_without_momentum_and_decay_it_is_the_delta_rule(self, backend):
        q, k, v, theta, _, _, W, _ = titans_inputs(2, 1, 20, 4, 3)
        y, last, _ = titans_linear(q, k, v, theta, 0 * theta, 0 * theta, W, chunk=1, backend=backend)
        torch.testing.assert_close((y, last.mT), delta_rule(q, k, v, theta, None, W.mT), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("chunk", [1, 6])
    def test_a_window_of_one_is_titans_in_other_letters(self, backend, chunk):
        q, k, v, theta, eta, alpha, W, S = titans_inputs(1, 2, 20, 4, 3)
        want = titans_linear(q, k, v, theta, eta, alpha, W, S, chunk=chunk, backend=backend)
        one = torch.ones_like(theta)
        got = omega_linear(q, k, v, 1 - alpha, theta, eta, one, W, S, window=1, chunk=chunk, backend=backend)
        torch.testing.assert_close(got[:3], want)

    def test_one_write_and_its_echo(self, backend):
        """A single step with momentum eta changes the memory by its first step over 1 - eta in all."""
        q, k, v, theta, *_ = titans_inputs(1, 1, 60, 4, 3)
        theta = torch.zeros_like(theta).index_fill_(-1, torch.tensor([0], device=DEVICE), 0.3)
        y, W, _ = titans_linear(q, k, v, theta, torch.full_like(theta, 0.5), 0 * theta, backend=backend)
        first = 0.3 * v[..., 0, :, None] * k[..., 0, None, :]
        torch.testing.assert_close(W, first / (1 - 0.5), rtol=1e-5, atol=1e-6)

    def test_forgetting_everything_leaves_the_momentum(self, backend):
        q, k, v, theta, eta, alpha, W, S = titans_inputs(1, 1, 20, 4, 3)
        alpha[..., -1] = 1
        _, W, S = titans_linear(q, k, v, theta, eta, alpha, W, S, backend=backend)
        torch.testing.assert_close(W, S)

    def test_weights_of_zero_leave_only_the_decay(self, backend):
        x = omega_inputs(1, 1, 20, 4, 3)
        q, k, v, alpha, eta, theta, gamma, W, S = x[:9]
        _, last, _, _ = omega_linear(q, k, v, alpha, eta, theta, 0 * gamma, W, window=1, backend=backend)
        torch.testing.assert_close(last, alpha.prod(-1)[..., None, None] * W)

    @pytest.mark.parametrize("window, chunk, cut", [(1, 4, 8), (4, 4, 12), (3, 16, 16), (3, 4, 4), (4, 4, 20)])
    def test_two_pieces_equal_the_whole(self, backend, window, chunk, cut):
        x = omega_inputs(1, 2, 21, 4, 3, window)
        options = dict(window=window, chunk=chunk, backend=backend)
        y, *whole = omega_linear(*x[:9], **options, tail=x[9:])
        first, *middle = omega_linear(*(z[:, :, :cut] for z in x[:7]), *x[7:9], **options, tail=x[9:])
        second, *last = omega_linear(*(z[:, :, cut:] for z in x[:7]), *middle[:2], **options, tail=middle[2])
        torch.testing.assert_close(torch.cat([first, second], dim=2), y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last, whole, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("window, chunk", [(1, 1), (1, 8), (4, 16)])
    def test_later_tokens_cannot_change_earlier_outputs(self, backend, window, chunk):
        x = omega_inputs(1, 1, 37, 4, 3, window)
        y = omega(backend, window, chunk)(*x)[0]
        for t in (1, 16, 30):
            changed = [z.clone() for z in x]
            for z in changed[:7]:
                z[:, :, t] += 0.25
            other = omega(backend, window, chunk)(*changed)[0]
            assert torch.equal(y[:, :, :t], other[:, :, :t])
            assert not torch.equal(y[:, :, t], other[:, :, t])

    def test_strides_do_not_matter(self, backend):
        x = omega_inputs(2, 2, 20, 4, 4, 3)
        strided = [z.transpose(0, 2).contiguous().transpose(0, 2) for z in x]
        torch.testing.assert_close(omega(backend, 3)(*strided), omega(backend, 3)(*x))

    def test_two_runs_are_bit_identical(self, backend):
        results = []
        for _ in range(2):
            x = [z.requires_grad_() for z in omega_inputs(1, 2, 40, 4, 4, 3)]
            y = omega(backend, 3)(*x)[0]
            results.append((y, *torch.autograd.grad((y * y).sum(), x)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_empty_sequence_returns_the_states(self, backend):
        x = omega_inputs(2, 2, 0, 4, 3, 3)
        y, *states = omega(backend, 3)(*x)
        assert y.shape == (2, 2, 0, 3)
        assert all(torch.equal(a, b) for a, b in zip(states, x[7:], strict=True))
        y, W, S = titans(backend)(*titans_inputs(2, 2, 0, 4, 3))
        assert y.shape == (2, 2, 0, 3) and torch.equal(W, titans_inputs(2, 2, 0, 4, 3)[6])

    def test_the_output_has_the_dtype_of_v_and_the_states_are_float32(self, backend):
        y, *states = titans(backend)(*titans_inputs(1, 1, 8, 4, 4, dtype=torch.bfloat16))
        assert y.dtype == torch.bfloat16 and all(x.dtype == torch.float32 for x in states)


@pytest.mark.parametrize("backend", ["parallel", "triton"])
def test_compiled_without_graph_break(backend):
    x = [z.requires_grad_() for z in titans_inputs(1, 1, 20, 3, 3)]
    compiled = torch.compile(lambda *x: titans(backend)(*x)[0] * 2, backend="aot_eager", fullgraph=True)
    y, want = compiled(*x), titans(backend)(*x)[0] * 2
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(want.sum(), x, allow_unused=True))


def test_triton_says_why_it_cannot_run():
    with pytest.raises(ValueError, match="keys of size up to 128, got 129"):
        titans("triton")(*titans_inputs(1, 1, 3, 129, 2))
    with use("triton"), pytest.raises(ValueError, match="float64"):
        titans("auto")(*titans_inputs(1, 1, 3, 2, 2, dtype=torch.float64))
    titans("auto")(*titans_inputs(1, 1, 3, 129, 2))


def test_the_cost_model_counts_a_small_case():
    assert cost.bytes(1, 1, 16, 4, 8, chunk=16) == 16 * (2 * 12 * 4 + 3 * 4) + 2 * 4 * 8 * 4
    assert cost.bytes(1, 1, 16, 4, 8, backward=True) > cost.bytes(1, 1, 16, 4, 8)
    assert cost.flops(2, 3, 16, 4, 5) == 6 * cost.flops(1, 1, 16, 4, 5)
    assert cost.state_floats(2, 4, 8, 3) == sum(x.numel() for x in titans("auto")(*titans_inputs(2, 4, 5, 8, 3))[1:])


good = omega_inputs(2, 3, 8, 4, 5, 3)


def changed(position, value):
    return [*good[:position], value, *good[position + 1 :]]


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (changed(0, good[0][0]), {}, r"expected phi_q of shape \(B, H, T, D\), got \(3, 8, 4\)"),
        (changed(1, good[1][..., :3]), {}, r"expected phi_k of shape \(B, H, T, D\) with .* got \(2, 3, 8, 3\)"),
        (changed(2, good[2][:, :, :7]), {}, r"expected v of shape \(B, H, T, V\) with .* got \(2, 3, 7, 5\)"),
        (changed(6, good[6][:1]), {}, r"expected gamma of shape \(B, H, T\) with .* got \(1, 3, 8\)"),
        (changed(7, good[7].mT), {}, r"expected W0 of shape \(B, H, V, D\) with .* got \(2, 3, 4, 5\)"),
        (changed(1, good[1].double()), {}, "expected phi_k of dtype torch.float32 like v, got torch.float64"),
        (changed(3, good[3].long()), {}, "expected alpha of a floating-point dtype, got torch.int64"),
        (good, {"window": 0}, "expected window to be an integer from 1 to chunk = 16, got 0"),
        (good, {"window": 9, "chunk": 8}, "expected window to be an integer from 1 to chunk = 8, got 9"),
        (good, {"chunk": 0}, "expected chunk to be an integer of at least 1, got 0"),
        (good, {"tail": good[:2]}, r"expected tail to be a triple \(phi_k, v, gamma\), got list of length 2"),
        (good, {"window": 4, "tail": good[9:]}, r"expected tail phi_k of shape .* c-1 = 3, .* got \(2, 3, 2, 4\)"),
    ],
)
def test_errors_name_what_was_expected(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        omega_linear(*arguments[:9], **{"window": 3, **options})


def test_errors_of_titans_use_its_own_letters():
    q, k, v, theta, eta, alpha, W, S = titans_inputs(2, 3, 8, 4, 5)
    with pytest.raises(ValueError, match=r"expected k of shape \(B, H, T, K\) with .* got \(2, 3, 8, 3\)"):
        titans_linear(q, k[..., :3], v, theta, eta, alpha)
    with pytest.raises(ValueError, match=r"expected S0 of shape \(B, H, V, K\) with .* got \(2, 3, 4, 5\)"):
        titans_linear(q, k, v, theta, eta, alpha, W, S.mT)


def test_debug_names_the_input_with_nan():
    broken = good[6].clone()
    broken[0, 0, 2] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected gamma without NaN, got 1 NaN"):
        omega_linear(*changed(6, broken)[:9], window=3)
