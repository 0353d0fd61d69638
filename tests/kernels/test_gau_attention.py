"""gau_attention: one definition, three implementations, checked against a float64 loop and against one dense matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import use
from seqarch.kernels.gau_attention import cost, gau_attention

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

BACKENDS = ["reference", "parallel", "triton"]
ALL = pytest.mark.parametrize("backend", BACKENDS)
CAUSAL = pytest.mark.parametrize("causal", [False, True])
NAMES = ("quad_q", "quad_k", "lin_q", "lin_k", "v")
HALF = [torch.bfloat16, torch.float16]


def inputs(B, T, K, E, dtype=torch.float32, *, group=16, kind="normal", seed=0):
    """Random tensors; quad_q and quad_k grow with the group, so that scores divided by it are of order 1."""
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(B, T, K, generator=g, dtype=torch.float64) for _ in range(4)]
    tensors.append(torch.randn(B, T, E, generator=g, dtype=torch.float64))
    for x in tensors[:2]:
        x *= group**0.5 * (2 if kind == "large" else 1)
    if kind == "negative":  # all scores below 0: nothing is seen inside a group
        tensors[0].abs_()
        tensors[1].abs_().neg_()
    elif kind == "zero":  # all scores at the kink of relu
        tensors[0].zero_()
    elif kind == "identical":
        tensors = [x[:, :1].expand_as(x) for x in tensors]
    return [x.to(dtype).to(DEVICE) for x in tensors]


def runner(backend, **options):
    return lambda *tensors: [gau_attention(*tensors, backend=backend, **options)]


def compare(backends, tensors, **options):
    """Assert that the backends agree with the float64 loop."""
    for backend in backends:
        assert_agree(
            runner(backend, **options), runner("reference", **options), tensors,
            steps=tensors[0].shape[1], names=NAMES, matmul=True,
        )  # fmt: skip


shapes = dict(
    B=st.sampled_from([1, 1, 1, 2]),
    T=st.one_of(st.sampled_from([1, 2, 15, 16, 17, 33]), st.integers(1, 20)),
    K=st.sampled_from([1, 3, 16]),
    E=st.sampled_from([1, 5, 16]),
    group=st.sampled_from([7, 16, 20, 40]),
    causal=st.booleans(),
    kind=st.sampled_from(["normal", "normal", "negative", "zero", "identical", "large"]),
    seed=st.integers(0, 10**6),
)


def check_against_the_definition(backends, dtype, B, T, K, E, group, causal, kind, seed):
    tensors = inputs(B, T, K, E, dtype, group=group, kind=kind, seed=seed)
    compare(backends, tensors, group=group, causal=causal)


@settings(max_examples=60)
@given(**shapes)
def test_three_implementations_agree_in_float32(**case):
    check_against_the_definition(["parallel", "triton"], torch.float32, **case)


@pytest.mark.parametrize("dtype", HALF)
@settings(max_examples=20)
@given(**shapes)
def test_three_implementations_agree_in_half_precision(dtype, **case):
    check_against_the_definition(["parallel", "triton"], dtype, **case)


@settings(max_examples=60)
@given(**(shapes | {"T": st.integers(1, 130), "group": st.integers(1, 140)}))
def test_groups_agree_in_float64(**case):
    check_against_the_definition(["parallel"], torch.float64, **case)


@CAUSAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_tokens_and_columns_than_one_tile(causal, dtype):
    """A group is several tiles, and wide values are several blocks of columns."""
    compare(["triton"], inputs(1, 150, 70, 80, dtype, group=100), group=100, causal=causal)


@ALL
@CAUSAL
@pytest.mark.parametrize("T", [1, 20, 40, 53])
def test_is_one_dense_matrix(backend, causal, T):
    """Chapter 30: a table that says who is in whose group, and one for the linear part."""
    G = 20
    quad_q, quad_k, lin_q, lin_k, v = tensors = inputs(2, T, 4, 5, group=G)
    t, s = torch.arange(T, device=DEVICE)[:, None], torch.arange(T, device=DEVICE)
    local = (t // G == s // G) & ((s <= t) | (not causal))
    linear = (s // G < t // G) / G if causal else torch.full((T, T), 1 / T, device=DEVICE)
    A = torch.relu(quad_q.double() @ quad_k.double().mT / G) ** 2 * local
    want = (A + lin_q.double() @ lin_k.double().mT * linear) @ v.double()
    assert error(gau_attention(*tensors, G, causal, backend=backend), want) < 1e-5


@CAUSAL
@pytest.mark.parametrize("backend", ["reference", "parallel"])
@pytest.mark.parametrize("T, group", [(1, 4), (7, 3), (5, 8)])
def test_gradcheck(backend, causal, T, group):
    tensors = [x.requires_grad_() for x in inputs(1, T, 2, 2, torch.float64, group=group)]
    assert torch.autograd.gradcheck(runner(backend, group=group, causal=causal), tensors)


@ALL
class TestLaws:
    def test_later_tokens_cannot_change_earlier_outputs(self, backend):
        tensors = inputs(1, 60, 4, 3, group=20)
        o = gau_attention(*tensors, group=20, causal=True, backend=backend)
        for t in (5, 19, 40):
            changed = [x.clone() for x in tensors]
            for x in changed:
                x[:, t] *= 3
            after = gau_attention(*changed, group=20, causal=True, backend=backend)
            assert torch.equal(o[:, :t], after[:, :t])
            assert not torch.equal(o[:, t:], after[:, t:])

    def test_later_tokens_do_change_earlier_outputs_otherwise(self, backend):
        tensors = inputs(1, 60, 4, 3, group=20)
        o = gau_attention(*tensors, group=20, backend=backend)
        tensors[4][:, 59] += 3
        after = gau_attention(*tensors, group=20, backend=backend)
        assert (o != after).any(dim=2).all()

    def test_a_piece_equals_the_beginning_of_the_whole(self, backend):
        """Causal outputs do not depend on how long the sequence will be."""
        tensors = inputs(1, 60, 4, 3, group=20)
        whole = gau_attention(*tensors, group=20, causal=True, backend=backend)
        for stop in (1, 20, 33):
            part = gau_attention(*[x[:, :stop] for x in tensors], group=20, causal=True, backend=backend)
            torch.testing.assert_close(part, whole[:, :stop], rtol=1e-5, atol=1e-5)

    @CAUSAL
    def test_is_linear_in_the_values(self, backend, causal):
        """So [v, u] side by side give both outputs of the chapter's block in one call."""
        *rest, v = inputs(1, 30, 4, 3, group=8)
        u = v.flip(1)
        both = gau_attention(*rest, torch.cat([v, u], 2), 8, causal, backend=backend)
        for part, values in ((both[..., :3], v), (both[..., 3:], u)):
            alone = gau_attention(*rest, values, 8, causal, backend=backend)
            torch.testing.assert_close(part, alone, rtol=1e-5, atol=1e-5)

    def test_each_part_alone(self, backend):
        """Without linear queries groups are on their own; without quadratic ones only the linear part is left."""
        quad_q, quad_k, lin_q, lin_k, v = inputs(1, 40, 4, 3, group=20)
        local = gau_attention(quad_q, quad_k, 0 * lin_q, lin_k, v, 20, backend=backend)
        second = [x[:, 20:] for x in (quad_q, quad_k, 0 * lin_q, lin_k, v)]
        torch.testing.assert_close(local[:, 20:], gau_attention(*second, 20, backend=backend))
        linear = gau_attention(0 * quad_q, quad_k, lin_q, lin_k, v, 20, backend=backend)
        torch.testing.assert_close(linear, lin_q @ (lin_k.mT @ v) / 40, rtol=1e-5, atol=1e-5)

    def test_zero_tokens_at_the_end_have_no_influence(self, backend):
        """Only 1 / T changes, which linear queries that grow with T undo."""
        quad_q, quad_k, lin_q, lin_k, v = inputs(1, 33, 4, 3, group=20)
        o = gau_attention(quad_q, quad_k, lin_q, lin_k, v, 20, backend=backend)
        longer = [torch.nn.functional.pad(x, (0, 0, 0, 12)) for x in (quad_q, quad_k, lin_q * 45 / 33, lin_k, v)]
        after = gau_attention(*longer, 20, backend=backend)
        torch.testing.assert_close(after[:, :33], o, rtol=1e-5, atol=1e-5)

    @CAUSAL
    def test_strides_do_not_matter(self, backend, causal):
        tensors = inputs(2, 20, 4, 3, group=8)
        strided = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in tensors]
        got = gau_attention(*strided, 8, causal, backend=backend)
        torch.testing.assert_close(got, gau_attention(*tensors, 8, causal, backend=backend), rtol=1e-5, atol=1e-5)

    @CAUSAL
    def test_two_runs_are_bit_identical(self, backend, causal):
        results = []
        for _ in range(2):
            tensors = [x.requires_grad_() for x in inputs(2, 40, 4, 3, group=16)]
            o = gau_attention(*tensors, 16, causal, backend=backend)
            results.append((o, *torch.autograd.grad((o * o).sum(), tensors)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    @CAUSAL
    def test_empty_sequence(self, backend, causal):
        assert gau_attention(*inputs(2, 0, 4, 3), causal=causal, backend=backend).shape == (2, 0, 3)

    def test_the_output_has_the_dtype_of_v(self, backend):
        for dtype in HALF:
            assert gau_attention(*inputs(1, 5, 4, 3, dtype), backend=backend).dtype == dtype

    def test_small_weights_of_a_large_group_survive_in_float16(self, backend):
        """A score of 1/64 weighs 2e-4; all 32 of them together are no rounding error."""
        tensors = [torch.ones(1, 32, 1, dtype=torch.float16, device=DEVICE) for _ in range(5)]
        tensors[2] *= 0
        o = gau_attention(*tensors, 512, backend=backend)
        torch.testing.assert_close(o, torch.full_like(o, 32 / 512**2), rtol=2e-3, atol=0)


@CAUSAL
def test_65536_tokens(causal):
    tensors = inputs(1, 65536, 4, 4, group=64)
    got = gau_attention(*tensors, 64, causal, backend="parallel")
    want = gau_attention(*[x.double() for x in tensors], 64, causal, backend="reference")
    assert error(got, want) < 1e-5


@CAUSAL
def test_memory_is_linear_in_length(causal):
    assert_memory_is_linear(
        lambda *z: [gau_attention(*z, 64, causal, backend="parallel")],
        lambda T: [x.requires_grad_() for x in inputs(1, T, 4, 8)],
        lengths=(1024, 2048, 4096),
    )


@CAUSAL
def test_compiled_without_graph_break(causal):
    tensors = [x.requires_grad_() for x in inputs(1, 20, 4, 3, group=8)]
    run = torch.compile(
        lambda *z: gau_attention(*z, 8, causal, backend="triton") * 2, backend="aot_eager", fullgraph=True
    )
    got, want = run(*tensors), gau_attention(*tensors, 8, causal, backend="triton") * 2
    torch.testing.assert_close(got, want)
    for x, y in zip(*(torch.autograd.grad(o.sum(), tensors) for o in (got, want)), strict=True):
        torch.testing.assert_close(x, y)


def test_auto_on_the_cpu_is_parallel_and_use_overrides_it():
    tensors = inputs(1, 9, 2, 2, torch.float64)
    with use("triton"), pytest.raises(ValueError, match="float64"):
        gau_attention(*tensors)
    assert torch.equal(gau_attention(*tensors), gau_attention(*tensors, backend="parallel"))


@pytest.mark.parametrize("T", [1, 7, 20])
def test_the_cost_model_counts_a_small_case(T):
    t, s = torch.arange(T)[:, None], torch.arange(T)
    same = t // 6 == s // 6
    assert cost.pairs(T, 6) == same.sum() and cost.pairs(T, 6, causal=True) == (same & (s <= t)).sum()
    assert cost.flops(2, T, 3, 5, 6) == 2 * (cost.pairs(T, 6) * 2 * 8 + T * 4 * 15)
    assert cost.flops(1, T, 3, 5, 6, backward=True) > cost.flops(1, T, 3, 5, 6)
    assert cost.bytes(2, T, 3, 5, itemsize=2) == 2 * T * (4 * 3 + 2 * 5) * 2


q, k, lq, lk, v = inputs(2, 8, 4, 3)
wide = inputs(1, 4, 130, 3)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((q[0], k, lq, lk, v), {}, r"expected quad_q of shape \(B, T, K\), got \(8, 4\)"),
        ((q, k[:, :5], lq, lk, v), {}, r"expected quad_k of shape \(B, T, K\) with .*T = 8.*, got \(2, 5, 4\)"),
        ((q, k, lq[..., :2], lk, v), {}, r"expected lin_q of shape \(B, T, K\) with .*K = 4, got \(2, 8, 2\)"),
        ((q, k, lq, lk[:1], v), {}, r"expected lin_k of shape \(B, T, K\) with B = 2, .* got \(1, 8, 4\)"),
        ((q, k, lq, lk, v[:, :7]), {}, r"expected v of shape \(B, T, E\) with B = 2, T = 8, got \(2, 7, 3\)"),
        ((q, k, lq, lk.double(), v), {}, "expected lin_k of dtype torch.float32 like v, got torch.float64"),
        ((q, k, lq.to("meta"), lk, v), {}, "expected lin_q on .* like v, got meta"),
        ((q + 0j, k + 0j, lq + 0j, lk + 0j, v + 0j), {}, "expected v of a real dtype, got torch.complex64"),
        ((q, k, lq, lk, v), {"group": 0}, "expected group to be an integer of at least 1, got 0"),
        ((q, k, lq, lk, v), {"backend": "cuda"}, "expected backend to be one of auto, .* got 'cuda'"),
        (wide, {"backend": "triton"}, "it takes queries of at most 128 columns, got K = 130"),
    ],
)
def test_errors_name_what_was_expected(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        gau_attention(*arguments, **options)


def test_debug_names_the_input_with_nan():
    broken = lk.clone()
    broken[0, 2, 1] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected lin_k without NaN, got 1 NaN"):
        gau_attention(q, k, lq, broken, v)
