"""delta_rule: one definition, three implementations, checked against a float64 loop, plain and gated."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import use
from seqarch.kernels.delta_rule import cost, delta_rule, delta_rule_step

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

BACKENDS = ["reference", "parallel", "triton"]
ALL = pytest.mark.parametrize("backend", BACKENDS)
GATED = pytest.mark.parametrize("gated", [True, False])
NAMES = {True: ("q", "k", "v", "beta", "log_decay", "state"), False: ("q", "k", "v", "beta", "state")}
LOOSE = ("beta", "log_decay")
KINDS = ["normal", "same key", "reflect", "forget", "short keys"]


def inputs(B, H, T, K, V, dtype=torch.float32, kind="normal", gated=True, seed=0):
    """Random q, k, v, beta, (log_decay,) state; `kind` picks steps and decays that are hard in their own way."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k, v = normal(B, H, T, K), normal(B, H, T, K), normal(B, H, T, V)
    k = torch.nn.functional.normalize(k, dim=-1)
    beta = torch.rand(B, H, T, generator=g, dtype=torch.float64)
    log_decay = -(torch.rand(B, H, T, generator=g, dtype=torch.float64) ** 3)
    if kind == "same key":  # every token overwrites the last one: I + A is as badly conditioned as it gets
        k, beta, log_decay = k[..., :1, :].expand_as(k), torch.ones_like(beta), log_decay * 0
    elif kind == "reflect":
        beta = beta * 2
    elif kind == "forget":  # nearly everything, everything, and hardly anything, next to each other
        at = torch.randint(0, 4, beta.shape, generator=g)
        log_decay = torch.tensor([-1e-4, -30.0, -torch.inf, -300.0], dtype=torch.float64)[at]
    elif kind == "short keys":
        k = k * 0.1
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gates = [beta, log_decay] if gated else [beta]
    tensors = [x.to(dtype) for x in (q, k, v)] + [x.to(wide) for x in (*gates, normal(B, H, K, V))]
    return [x.to(DEVICE) for x in tensors]


def runner(backend, gated=True):
    """Take what `inputs` makes, with or without the state at the end."""

    def run(q, k, v, beta, *rest):
        log_decay, *state = rest if gated else (None, *rest)
        return delta_rule(q, k, v, beta, log_decay, *state, backend=backend)

    return run


def check_against_the_definition(backends, dtype, rows, T, K, V, kind, gated, with_state, seed):
    if kind == "same key":  # a key of one number leaves no other direction for the decays to act on: gradients of 0
        K = max(K, 2)
    tensors = inputs(*rows, T, K, V, dtype, kind, gated, seed)
    if not with_state and kind != "same key":  # from zero, one key alone leaves nothing for the decays to change
        tensors = tensors[:-1]
    for backend in backends:
        assert_agree(
            runner(backend, gated), runner("reference", gated), tensors,
            steps=T, names=NAMES[gated][: len(tensors)], loose=LOOSE, matmul=True,
        )  # fmt: skip


def shapes(T, sizes):
    """What hypothesis draws: lengths from T, widths of keys and values from `sizes`."""
    return dict(
        rows=st.sampled_from([(1, 1), (1, 1), (1, 1), (1, 1), (1, 2), (2, 1)]),  # (B, H)
        T=T,
        K=st.sampled_from(sizes),
        V=st.sampled_from(sizes),
        kind=st.sampled_from(KINDS),
        gated=st.booleans(),
        with_state=st.booleans(),
        seed=st.integers(0, 10**6),
    )


@settings(max_examples=60)
@given(**shapes(st.one_of(st.sampled_from([1, 15, 16, 17, 32, 33]), st.integers(1, 24)), [1, 5, 16, 17]))
def test_three_implementations_agree_in_float32(**case):
    check_against_the_definition(["parallel", "triton"], torch.float32, **case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=20)
@given(**shapes(st.one_of(st.sampled_from([31, 32, 33]), st.integers(1, 40)), [8, 16]))
def test_three_implementations_agree_in_half_precision(dtype, **case):
    check_against_the_definition(["parallel", "triton"], dtype, **case)


@settings(max_examples=80)
@given(**shapes(st.one_of(st.sampled_from([1, 31, 32, 33, 64, 65, 130]), st.integers(1, 130)), [1, 5, 32, 33]))
def test_the_chunked_form_agrees_in_float64(**case):
    check_against_the_definition(["parallel"], torch.float64, **case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_more_chunks_and_columns_than_one_block(dtype):
    """The Triton path splits values over programs, keys over programs of the backward pass, and walks over chunks."""
    check_against_the_definition(
        ["triton"], dtype, rows=(1, 1), T=70, K=40, V=40, kind="reflect", gated=True, with_state=True, seed=1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_130_tokens(kind):
    check_against_the_definition(
        ["parallel", "triton"],
        torch.float32,
        rows=(1, 1),
        T=130,
        K=8,
        V=4,
        kind=kind,
        gated=True,
        with_state=True,
        seed=2,
    )


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@GATED
@pytest.mark.parametrize("T", [1, 5, 35])
def test_gradcheck(backend, gated, T):
    tensors = [x.requires_grad_() for x in inputs(1, 1, T, 2, 2, torch.float64, gated=gated)]
    assert torch.autograd.gradcheck(runner(backend, gated), tensors)


@GATED
def test_65536_tokens(gated):
    """Rounding errors do not pile up: what a key holds is replaced, not added to."""
    tensors = inputs(1, 1, 65536, 4, 2, gated=gated)
    got = runner("parallel", gated)(*tensors)
    with torch.no_grad():
        want = runner("reference", gated)(*(x.double() for x in tensors))
    assert all(error(x, y) < 1e-4 for x, y in zip(got, want, strict=True))


def test_memory_is_linear_in_length():
    assert_memory_is_linear(runner("parallel"), lambda T: inputs(1, 1, T, 4, 4), lengths=(1024, 2048, 4096))


@ALL
class TestLaws:
    @GATED
    def test_two_pieces_equal_the_whole(self, backend, gated):
        *tokens, state = (x.requires_grad_() for x in inputs(1, 2, 37, 4, 3, gated=gated))
        run = runner(backend, gated)
        whole, last = run(*tokens, state)
        first, middle = run(*(x[:, :, :18] for x in tokens), state)
        second, end = run(*(x[:, :, 18:] for x in tokens), middle)
        joined = torch.cat([first, second], dim=2)
        torch.testing.assert_close((joined, end), (whole, last), rtol=1e-5, atol=1e-5)
        g = torch.randn_like(whole)
        got, want = (torch.autograd.grad(o, [*tokens, state], g) for o in (joined, whole))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    @GATED
    def test_steps_equal_the_whole(self, backend, gated):
        *tokens, state = inputs(2, 1, 20, 4, 3, kind="forget", gated=gated)
        whole, last = runner(backend, gated)(*tokens, state)
        for t in range(20):
            q, k, v, beta, *decay = (x[:, :, t] for x in tokens)
            o, state = delta_rule_step(q, k, v, beta, decay[0] if gated else None, state)
            torch.testing.assert_close(o, whole[:, :, t], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)

    def test_later_tokens_cannot_change_earlier_outputs(self, backend):
        tensors = inputs(1, 1, 50, 4, 4)
        o, _ = runner(backend)(*tensors)
        for t in (1, 16, 40):
            changed = [x.clone() for x in tensors]
            for x in changed[:-1]:
                x[:, :, t] -= 0.25
            other, _ = runner(backend)(*changed)
            assert torch.equal(o[:, :, :t], other[:, :, :t])
            assert not torch.equal(o[:, :, t], other[:, :, t])

    def test_a_full_step_with_a_unit_key_stores_the_value(self, backend):
        q, k, v, beta, state = inputs(1, 2, 40, 8, 3, gated=False)
        o, _ = delta_rule(k, k, v, torch.ones_like(beta), None, state, backend=backend)
        torch.testing.assert_close(o, v, rtol=1e-4, atol=1e-4)

    def test_a_step_of_zero_leaves_the_memory_alone(self, backend):
        q, k, v, beta, state = inputs(1, 1, 40, 4, 3, gated=False)
        o, last = delta_rule(q, k, v, 0 * beta, None, state, backend=backend)
        assert torch.equal(last, state)
        torch.testing.assert_close(o, q @ state)

    def test_no_decay_equals_decays_of_one(self, backend):
        q, k, v, beta, state = inputs(1, 1, 40, 4, 3, gated=False)
        plain = delta_rule(q, k, v, beta, None, state, backend=backend)
        gated = delta_rule(q, k, v, beta, torch.zeros_like(beta), state, backend=backend)
        torch.testing.assert_close(plain, gated)

    def test_a_decay_of_zero_starts_anew(self, backend):
        q, k, v, beta, log_decay, state = inputs(1, 1, 40, 4, 3)
        log_decay[..., 21] = -torch.inf
        o, last = delta_rule(q, k, v, beta, log_decay, state, backend=backend)
        rest = [x[:, :, 21:] for x in (q, k, v, beta, log_decay)]
        fresh, end = delta_rule(*rest, backend=backend)
        torch.testing.assert_close((o[:, :, 21:], last), (fresh, end), rtol=1e-5, atol=1e-5)

    def test_unit_keys_and_steps_up_to_two_never_enlarge_the_state(self, backend):
        q, k, v, beta, state = inputs(1, 1, 60, 4, 3, kind="reflect", gated=False)
        _, last = delta_rule(q, k, 0 * v, beta, None, state, backend=backend)
        assert torch.linalg.matrix_norm(last, 2) <= torch.linalg.matrix_norm(state, 2) * (1 + 1e-5)

    def test_strides_do_not_matter(self, backend):
        tensors = inputs(2, 2, 20, 4, 4)
        strided = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in tensors]
        torch.testing.assert_close(runner(backend)(*strided), runner(backend)(*tensors))

    def test_two_runs_are_bit_identical(self, backend):
        results = []
        for _ in range(2):
            tensors = [x.requires_grad_() for x in inputs(1, 2, 40, 4, 4)]
            o, _ = runner(backend)(*tensors)
            results.append((o, *torch.autograd.grad((o * o).sum(), tensors)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    def test_empty_sequence_returns_the_state(self, backend):
        tensors = inputs(2, 2, 0, 4, 3)
        o, last = runner(backend)(*tensors)
        assert o.shape == (2, 2, 0, 3)
        assert torch.equal(last, tensors[-1])

    def test_the_output_has_the_dtype_of_v_and_the_state_is_float32(self, backend):
        q, k, v, beta, log_decay, _ = inputs(1, 1, 8, 4, 4, torch.bfloat16)
        o, state = delta_rule(q, k, v, beta, log_decay, backend=backend)
        assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
        o, state = delta_rule_step(*(x[:, :, 0] for x in (q, k, v, beta)))
        assert o.dtype == torch.bfloat16 and state.dtype == torch.float32


@GATED
def test_compiled_without_graph_break(gated):
    tensors = [x.requires_grad_() for x in inputs(1, 1, 20, 3, 3, gated=gated)]
    scan = torch.compile(lambda *x: runner("triton", gated)(*x)[0] * 2, backend="aot_eager", fullgraph=True)
    o, want = scan(*tensors), runner("triton", gated)(*tensors)[0] * 2
    torch.testing.assert_close(o, want)
    torch.testing.assert_close(torch.autograd.grad(o.sum(), tensors), torch.autograd.grad(want.sum(), tensors))


def test_auto_on_the_cpu_is_parallel_and_use_overrides_it():
    tensors = inputs(1, 1, 9, 2, 2, torch.float64)
    with use("triton"), pytest.raises(ValueError, match="float64"):
        delta_rule(*tensors)
    delta_rule(*tensors)


def test_triton_says_why_it_cannot_take_long_keys():
    with pytest.raises(ValueError, match="keys of size up to 128, got 129"):
        runner("triton")(*inputs(1, 1, 3, 129, 2))


def test_the_cost_model_counts_a_small_case():
    assert cost.bytes(1, 1, 64, 4, 8) == 64 * (2 * 12 * 4 + 8) + 4 * 8 * 4
    assert cost.bytes(1, 1, 64, 4, 8, backward=True) > cost.bytes(1, 1, 64, 4, 8)
    assert cost.flops(2, 3, 10, 4, 5) == 6 * cost.flops(1, 1, 10, 4, 5)
    assert cost.state_floats(2, 4, 8, 3) == runner("parallel")(*inputs(2, 4, 5, 8, 3))[1].numel()


q, k, v, beta, log_decay, state = inputs(2, 3, 8, 4, 5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((q[0], k, v, beta), r"expected q of shape \(B, H, T, K\), got \(3, 8, 4\)"),
        ((q, k[..., :3], v, beta), r"expected k of shape \(B, H, T, K\) with .* got \(2, 3, 8, 3\)"),
        ((q, k, v[:, :, :7], beta), r"expected v of shape \(B, H, T, V\) with B = 2, H = 3, T = 8, got \(2, 3, 7, 5\)"),
        ((q, k, v, beta[..., None]), r"expected beta of shape \(B, H, T\) with .* got \(2, 3, 8, 1\)"),
        ((q, k, v, beta, log_decay[:1]), r"expected log_decay of shape \(B, H, T\) with .* got \(1, 3, 8\)"),
        (
            (q, k, v, beta, log_decay, state.mT),
            r"expected state of shape \(B, H, K, V\) with .* got \(2, 3, 5, 4\)",
        ),
        ((q, k.double(), v, beta), "expected k of dtype torch.float32 like v, got torch.float64"),
        ((q, k, v, beta.long()), "expected beta of a floating-point dtype, got torch.int64"),
        ((q, k, v, beta.to("meta")), "expected beta on .* like v, got meta"),
        ((q, k, v, 1.0), "expected beta to be a tensor of shape .* got float"),
    ],
)
def test_errors_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        delta_rule(*arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((q, k[:, :, 0], v[:, :, 0], beta[:, :, 0]), r"expected q of shape \(B, H, K\), got \(2, 3, 8, 4\)"),
        ((q[:, :, 0], k[:, :, 0], v[:, :, 0], beta), r"expected beta of shape \(B, H\) with .* got \(2, 3, 8\)"),
    ],
)
def test_errors_of_a_step(arguments, message):
    with pytest.raises(ValueError, match=message):
        delta_rule_step(*arguments)


def test_debug_names_the_input_with_nan():
    broken = v.clone()
    broken[0, 0, 2, 1] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected v without NaN, got 1 NaN"):
        delta_rule(q, k, broken, beta)
