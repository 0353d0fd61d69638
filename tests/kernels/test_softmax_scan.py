"""softmax_scan: one definition, three implementations, checked against a float64 loop and against masked softmax."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import use
from seqarch.kernels.softmax_scan import cost, softmax_scan, softmax_scan_step

from .agreement import DEVICE, assert_agree, error

BACKENDS = ["reference", "parallel", "triton"]
ALL = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("v", "s", "u", "w")
LOOSE = ("s", "u")  # their gradients are differences of two larger terms


def inputs(B, H, T, E, dtype=torch.float32, kind="normal", seed=0):
    """Random s, v and state (m, u, w); `kind` picks scores that are hard in their own way."""
    g = torch.Generator().manual_seed(seed)
    s = torch.randn(B, H, T, generator=g, dtype=torch.float64) * 3
    if kind == "tent":  # up to +1e4 and down to -1e4
        s = s + 1e4 * torch.linspace(-1, 1, T, dtype=torch.float64).mul(3.2).sin()
    elif kind == "equal":
        s = torch.full_like(s, 0.7)
    elif kind == "holes":  # tokens left out, among them the first ones
        s = torch.where(torch.rand(B, H, T, generator=g) < 0.5, -torch.inf, s)
        s[..., : max(1, T // 3)] = -torch.inf
    elif kind == "spike":
        s[..., T // 2] += 50
    v = torch.randn(B, H, T, E, generator=g, dtype=torch.float64)
    m = torch.randn(B, H, generator=g, dtype=torch.float64)
    u = 1 + torch.rand(B, H, generator=g, dtype=torch.float64)
    w = torch.randn(B, H, E, generator=g, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [s.to(wide).to(DEVICE), v.to(dtype).to(DEVICE), *(x.to(wide).to(DEVICE) for x in (m, u, w))]


def runner(backend, m=None):
    """Take (v, s) or (v, s, u, w): m gets no gradient, so it is not among the leaves."""

    def run(v, s, u=None, w=None):
        o, (_, last_u, last_w) = softmax_scan(s, v, None if u is None else (m.to(s), u, w), backend=backend)
        return o, last_u, last_w

    return run


def masked_softmax(s, v):
    """What the scan computes, said differently: a T x T table of scores, the future masked, softmax over each row."""
    T = s.shape[-1]
    table = (
        s[..., None, :].expand(*s.shape, T).masked_fill(torch.ones(T, T, device=s.device).triu(1).bool(), -torch.inf)
    )
    return table.softmax(-1) @ v


shapes = dict(
    rows=st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 2)]),  # (B, H)
    T=st.one_of(st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 130]), st.integers(1, 70)),
    E=st.sampled_from([1, 3, 16, 33]),
    kind=st.sampled_from(["normal", "tent", "equal", "holes", "spike"]),
    with_state=st.booleans(),
    seed=st.integers(0, 10**6),
)


def check_against_the_definition(backends, dtype, rows, T, E, kind, with_state, seed):
    s, v, m, u, w = inputs(*rows, T, E, dtype, kind, seed)
    tensors = [v, s, u, w] if with_state else [v, s]
    for backend in backends:
        assert_agree(
            runner(backend, m), runner("reference", m), tensors,
            steps=T, names=NAMES[: len(tensors)], loose=LOOSE, matmul=True,
        )  # fmt: skip
        top = softmax_scan(s, v, (m, u, w) if with_state else None, backend=backend)[1][0]
        assert torch.equal(top, torch.maximum(s.amax(-1), m) if with_state else s.amax(-1))


@settings(max_examples=120)
@given(**shapes)
def test_three_implementations_agree_in_float32(**case):
    check_against_the_definition(["parallel", "triton"], torch.float32, **case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=40)
@given(**shapes)
def test_three_implementations_agree_in_half_precision(dtype, **case):
    check_against_the_definition(["parallel", "triton"], dtype, **case)


@settings(max_examples=100)
@given(**shapes)
def test_the_chunked_form_agrees_in_float64(**case):
    check_against_the_definition(["parallel"], torch.float64, **case)


@ALL
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("E", [1, 16, 33])
def test_is_masked_softmax_attention(backend, T, E):
    s, v, *_ = inputs(1, 2, T, E)
    x, y = (
        [a.detach().clone().requires_grad_() for a in (s, v)],
        [a.double().requires_grad_() for a in (s, v)],
    )
    got, want = softmax_scan(*x, backend=backend)[0], masked_softmax(*y)
    g = torch.randn_like(got)
    assert error(got, want) < 1e-5
    grads, wanted = torch.autograd.grad(got, x, g), torch.autograd.grad(want, y, g.double())
    for a, b in zip(grads, wanted, strict=True):  # with one token the gradient of s is 0: an absolute bound too
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@ALL
def test_more_columns_than_one_block(backend):
    """The Triton path splits wide values over programs, and adds their parts of the gradient of s."""
    s, v, m, u, w = inputs(1, 1, 70, 150)
    assert_agree(
        runner(backend, m),
        runner("reference", m),
        [v, s, u, w],
        steps=70,
        names=NAMES,
        loose=LOOSE,
        matmul=True,
    )


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@pytest.mark.parametrize("T", [1, 5, 37])
def test_gradcheck(backend, T):
    """Numerical differences see m move; the output, and the state used as a state, do not depend on it."""
    s, v, m, u, w = inputs(1, 2, T, 2, torch.float64)

    def use_it(s, v, u, w):
        o, state = softmax_scan(s, v, (m, u, w), backend=backend)
        next_o, _ = softmax_scan(s[..., :1], v[..., :1, :], state, backend=backend)
        return o, next_o, state[2] / state[1][..., None]

    assert torch.autograd.gradcheck(use_it, [x.requires_grad_() for x in (s, v, u, w)])


@ALL
class TestLaws:
    def test_two_pieces_equal_the_whole(self, backend):
        s, v, *_ = (x.requires_grad_() for x in inputs(2, 2, 71, 3))
        whole, last = softmax_scan(s, v, backend=backend)
        first, state = softmax_scan(s[..., :33], v[..., :33, :], backend=backend)
        second, state = softmax_scan(s[..., 33:], v[..., 33:, :], state, backend=backend)
        joined = torch.cat([first, second], dim=2)
        torch.testing.assert_close(joined, whole)
        torch.testing.assert_close(state, last)
        g = torch.randn_like(whole)
        got, want = torch.autograd.grad(joined, (s, v), g), torch.autograd.grad(whole, (s, v), g)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    def test_steps_equal_the_whole(self, backend):
        s, v, *_ = inputs(2, 2, 40, 3, kind="holes")
        whole, last = softmax_scan(s, v, backend=backend)
        state = None
        for t in range(40):
            o, state = softmax_scan_step(s[..., t], v[..., t, :], state)
            torch.testing.assert_close(o, whole[..., t, :])
        torch.testing.assert_close(state, last)

    def test_later_tokens_cannot_change_earlier_outputs(self, backend):
        s, v, *_ = inputs(1, 2, 70, 4)
        o, _ = softmax_scan(s, v, backend=backend)
        for t in (1, 31, 40, 64):
            scores, values = s.clone(), v.clone()
            scores[..., t] += 30
            values[..., t, :] -= 5
            changed, _ = softmax_scan(scores, values, backend=backend)
            assert torch.equal(o[..., :t, :], changed[..., :t, :])
            assert not torch.equal(o[..., t, :], changed[..., t, :])

    @pytest.mark.parametrize("shift", [1e4, -1e4])
    def test_a_common_shift_of_the_scores_changes_nothing(self, backend, shift):
        s, v, *_ = inputs(1, 2, 70, 4)
        s = (s * 64).round() / 64  # exact also next to 1e4 in float32
        torch.testing.assert_close(
            softmax_scan(s + shift, v, backend=backend)[0],
            softmax_scan(s, v, backend=backend)[0],
            rtol=0,
            atol=1e-4,
        )

    def test_equal_scores_give_the_running_mean(self, backend):
        _, v, *_ = inputs(1, 2, 100, 4)
        o, _ = softmax_scan(torch.full((1, 2, 100), -3.0, device=DEVICE), v, backend=backend)
        mean = v.cumsum(2) / torch.arange(1, 101, device=DEVICE)[:, None]
        torch.testing.assert_close(o, mean, rtol=1e-4, atol=1e-5)

    def test_one_score_fifty_above_the_rest_takes_over(self, backend):
        s, v, *_ = inputs(1, 1, 90, 4, kind="equal")
        s[..., 40] += 50
        o, _ = softmax_scan(s, v, backend=backend)
        torch.testing.assert_close(o[..., 40:, :], v[..., 40:41, :].expand(-1, -1, 50, -1))

    def test_nothing_seen_gives_zero_and_no_nan(self, backend):
        s, v, *_ = (x.requires_grad_() for x in inputs(1, 2, 70, 3))
        hidden = torch.arange(70, device=DEVICE) < 65
        o, state = softmax_scan(s.masked_fill(hidden, -torch.inf), v, backend=backend)
        assert torch.equal(o[..., :65, :], torch.zeros_like(o[..., :65, :]))
        torch.testing.assert_close(o[..., 65:, :], softmax_scan(s[..., 65:], v[..., 65:, :], backend=backend)[0])
        grads = torch.autograd.grad(o.sum() + state[1].sum() + state[2].sum(), (s, v))
        assert all(torch.isfinite(g).all() for g in grads)
        assert torch.equal(grads[1][..., :65, :], torch.zeros_like(grads[1][..., :65, :]))
        o, (m, u, w) = softmax_scan(torch.full((1, 2, 70), -torch.inf, device=DEVICE), v, backend=backend)
        assert (o == 0).all() and (m == -torch.inf).all() and (u == 0).all() and (w == 0).all()

    def test_strides_do_not_matter(self, backend):
        s, v, *state = inputs(3, 2, 20, 4)
        strided = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (s, v)]
        want = softmax_scan(s, v, state, backend=backend)
        torch.testing.assert_close(softmax_scan(*strided, state, backend=backend), want)

    def test_two_runs_are_bit_identical(self, backend):
        results = []
        for _ in range(2):
            s, v, *_ = (x.requires_grad_() for x in inputs(1, 2, 70, 3))
            o, _ = softmax_scan(s, v, backend=backend)
            results.append((o, *torch.autograd.grad((o * o).sum(), (s, v))))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    def test_empty_sequence_returns_the_state(self, backend):
        s, v, *state = inputs(2, 2, 0, 3)
        o, last = softmax_scan(s, v, state, backend=backend)
        assert o.shape == (2, 2, 0, 3)
        assert all(torch.equal(x, y) for x, y in zip(last, state, strict=True))

    def test_the_output_has_the_dtype_of_v_and_the_state_is_float32(self, backend):
        s, v, *_ = inputs(1, 1, 8, 4, torch.bfloat16)
        o, state = softmax_scan(s, v, backend=backend)
        assert o.dtype == torch.bfloat16 and all(x.dtype == torch.float32 for x in state)
        o, state = softmax_scan_step(s[..., 0].bfloat16(), v[..., 0, :])
        assert o.dtype == torch.bfloat16 and all(x.dtype == torch.float32 for x in state)


def test_thousands_of_tokens_in_half_precision():
    """Sums of thousands of exponentials stay exact because they are kept in float32."""
    s, v, *_ = inputs(1, 1, 8192, 2, torch.float16, kind="equal")
    o, _ = softmax_scan(s, v)
    assert error(o[..., -1, :], v.double().mean(2)) < 2e-3


def test_memory_is_linear_in_length():
    sizes = []
    for T in (1000, 2000, 4000):
        saved = 0

        def pack(x):
            nonlocal saved
            saved += x.numel()
            return x

        s, v, *_ = (x.requires_grad_() for x in inputs(1, 1, T, 2))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            softmax_scan(s, v, backend="parallel")
        sizes.append(saved)
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])


def test_compiled_without_graph_break():
    s, v, *_ = inputs(1, 2, 20, 3)
    scan = torch.compile(lambda s, v: softmax_scan(s, v, backend="triton")[0] * 2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(scan(s, v), softmax_scan(s, v)[0] * 2)


def test_auto_on_the_cpu_is_parallel_and_use_overrides_it():
    s, v, *_ = inputs(1, 1, 9, 2, torch.float64)
    with use("triton"), pytest.raises(ValueError, match="float64"):
        softmax_scan(s, v)
    softmax_scan(s, v)


def test_the_cost_model_counts_a_small_case():
    assert cost.bytes(1, 1, 10, 4) == 10 * (2 * 4 + 3) * 4
    assert cost.bytes(1, 1, 10, 4, backward=True) > cost.bytes(1, 1, 10, 4)
    assert cost.flops(2, 3, 10, 4) == 6 * cost.flops(1, 1, 10, 4)
    assert cost.state_floats(2, 4, 8) == sum(x.numel() for x in softmax_scan(*inputs(2, 4, 5, 8)[:2])[1])


s, v, *state = inputs(2, 3, 8, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((s[0], v), r"expected s of shape \(B, H, T\), got \(3, 8\)"),
        (
            (s, v[:, :, :5]),
            r"expected v of shape \(B, H, T, E\) with B = 2, H = 3, T = 8, got \(2, 3, 5, 4\)",
        ),
        ((s, v[..., :0]), r"expected v with E of at least 1, got \(2, 3, 8, 0\)"),
        ((s.long(), v), "expected s of a floating-point dtype, got torch.int64"),
        ((s, v + 0j), "expected v of a floating-point dtype, got torch.complex64"),
        ((s, v, state[:2]), r"expected state to be a triple \(m, u, w\), got list of length 2"),
        ((s, v, 3), r"expected state to be a triple \(m, u, w\), got int"),
        (
            (s, v, (state[0][:1], *state[1:])),
            r"expected state m of shape \(B, H\) with B = 2, H = 3, got \(1, 3\)",
        ),
        (
            (s, v, (*state[:2], state[2][..., :1])),
            r"expected state w of shape \(B, H, E\) with .* got \(2, 3, 1\)",
        ),
        ((s.to("meta"), v), "expected s on .* like v, got meta"),
        (([1.0], v), "expected s to be a tensor of shape .* got list"),
    ],
)
def test_errors_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        softmax_scan(*arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((s, v[:, :, 0]), r"expected s of shape \(B, H\), got \(2, 3, 8\)"),
        ((s[..., 0], v), r"expected v of shape \(B, H, E\) with B = 2, H = 3, got \(2, 3, 8, 4\)"),
    ],
)
def test_errors_of_a_step(arguments, message):
    with pytest.raises(ValueError, match=message):
        softmax_scan_step(*arguments)


def test_debug_names_the_input_with_nan():
    broken = v.clone()
    broken[0, 0, 2, 1] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected v without NaN, got 1 NaN"):
        softmax_scan(s, broken)
