"""block_attention: one definition, three implementations, checked against a float64 loop and against masked softmax."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import use
from seqarch.kernels.block_attention import block_attention, cost

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

BACKENDS = ["reference", "parallel", "triton"]
ALL = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("q", "k", "v", "bias")
HALF = [torch.bfloat16, torch.float16]


def inputs(B, H, T, d, dtype=torch.float32, *, G=None, S=None, E=None, scores="normal", seed=0):
    """Random q, k and v; `scores` picks products <q, k> that are hard in their own way."""
    g = torch.Generator().manual_seed(seed)
    G, S, E = G or H, T if S is None else S, E or d
    q, k, v = (
        torch.randn(B, n, length, width, generator=g, dtype=torch.float64)
        for n, length, width in ((H, T, d), (G, S, d), (G, S, E))
    )
    if scores == "equal":
        k = torch.zeros_like(k)
    elif scores == "spike":  # one key that most queries see before all others
        k[:, :, S // 2] *= 30
    return [x.to(dtype).to(DEVICE) for x in (q, k, v)]


@st.composite
def problems(draw, longest):
    """The shapes and options of one call, every kind alike."""
    kind = draw(st.sampled_from(["full", "causal", "window", "chunk", "prefix", "varlen", "mask"]))
    length = st.one_of(st.sampled_from([1, 2, 17, 32, 33]), st.integers(1, longest))
    T = draw(length)
    S = T if kind == "varlen" or draw(st.booleans()) else draw(length)
    heads = draw(st.sampled_from([(1, 1), (1, 1), (1, 1), (2, 1), (2, 2)]))
    return dict(
        kind=kind, B=draw(st.sampled_from([1, 1, 1, 2])), H=heads[0], G=heads[1], T=T, S=S,
        d=draw(st.sampled_from([1, 3, 16, 20])), E=draw(st.sampled_from([1, 5, 16, 33])),
        width=draw(st.integers(1, 40)), causal=draw(st.booleans()), n_global=draw(st.sampled_from([0, 0, 1, 3])),
        padded=draw(st.booleans()), bias=draw(st.sampled_from([None, None, "shared", "per head", "holes"])),
        scores=draw(st.sampled_from(["normal", "normal", "equal", "spike"])), seed=draw(st.integers(0, 10**6)),
    )  # fmt: skip


def build(case, dtype):
    """The tensors (q, k, v and perhaps a bias) and the options of a drawn problem."""
    c, g = case, torch.Generator().manual_seed(case["seed"] + 1)
    kind, B, T, S = c["kind"], c["B"], c["T"], c["S"]
    tensors = inputs(B, c["H"], T, c["d"], dtype, G=c["G"], S=S, E=c["E"], scores=c["scores"], seed=c["seed"])
    options = dict(kind=kind)
    if kind == "window":
        options |= dict(window=2 * c["width"], n_global=c["n_global"])
    elif kind == "chunk":
        options |= dict(chunk=c["width"])
    elif kind == "prefix":
        options |= dict(prefix_len=c["width"])
    elif kind == "varlen":
        options |= dict(cu_seqlens=torch.randint(0, S + 1, (5,), generator=g).sort().values.to(DEVICE))
    elif kind == "mask":
        shape = (B, T, S // 2) if c["causal"] else (T, S)
        options |= dict(mask=(torch.rand(shape, generator=g) < 0.5).to(DEVICE))
    if kind in ("window", "chunk", "varlen"):
        options |= dict(causal=c["causal"])
    if c["padded"]:
        options |= dict(key_mask=(torch.rand(B, S, generator=g) < 0.7).to(DEVICE))
    if c["bias"]:
        shape = (c["width"], c["width"]) if kind == "chunk" else (T, S)
        bias = torch.randn(*([c["H"]] if c["bias"] == "per head" else []), *shape, generator=g, dtype=torch.float64)
        if c["bias"] == "holes":
            bias = bias.masked_fill(torch.rand(bias.shape, generator=g) < 0.3, -torch.inf)
        tensors.append(bias.to(dtype).to(DEVICE))
    return tensors, options


def runner(backend, *, with_lse=True, **options):
    """Take (q, k, v) or (q, k, v, bias); lse of a query that sees nothing, -inf, counts as 0 in the comparison.

    A query that sees one key only has no gradient but that of lse, and a check relative to the largest gradient needs
    one: lse enters the loss four times. In the gradient of a bias even these can cancel, as it is a sum over sequences
    and chunks; so the finite entries of the bias are an output too.
    """

    def run(q, k, v, bias=None):
        result = block_attention(q, k, v, bias=bias, return_lse=with_lse, backend=backend, **options)
        if not with_lse:
            return [result]
        o, lse = result
        blind = lse == -torch.inf
        assert (o.detach()[blind] == 0).all()
        outputs = [o, 4 * lse.masked_fill(blind, 0.0)]
        return outputs if bias is None else [*outputs, bias.masked_fill(bias == -torch.inf, 0.0)]

    return run


def check_against_the_definition(backends, dtype, case):
    tensors, options = build(case, dtype)
    for backend in backends:
        assert_agree(
            runner(backend, **options), runner("reference", **options), tensors,
            steps=case["T"], names=NAMES[: len(tensors)], matmul=True,
        )  # fmt: skip


@settings(max_examples=60)
@given(case=problems(longest=40))
def test_three_implementations_agree_in_float32(case):
    check_against_the_definition(["parallel", "triton"], torch.float32, case)


@pytest.mark.parametrize("dtype", HALF)
@settings(max_examples=20)
@given(case=problems(longest=40))
def test_three_implementations_agree_in_half_precision(dtype, case):
    check_against_the_definition(["parallel", "triton"], dtype, case)


@settings(max_examples=80)
@given(case=problems(longest=130))
def test_tiles_agree_in_float64(case):
    check_against_the_definition(["parallel"], torch.float64, case)


OPTIONS = {
    "full": dict(kind="full"),
    "causal": dict(kind="causal"),
    "window": dict(kind="window", window=40),
    "window, both sides, global": dict(kind="window", window=20, causal=False, n_global=2),
    "window, sinks": dict(kind="window", window=9, n_global=3),
    "chunk": dict(kind="chunk", chunk=48),
    "chunk, both sides": dict(kind="chunk", chunk=33, causal=False),
    "prefix": dict(kind="prefix", prefix_len=70),
}
PATTERNS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def table(T, S, kind, window=0, chunk=1, prefix_len=0, causal=True, n_global=0):
    """Which keys are seen, ``(T, S)``: the kinds written down a second time, for all queries at once."""
    p, j = torch.arange(S - T, S, device=DEVICE)[:, None], torch.arange(S, device=DEVICE)
    past = j <= p
    if kind == "full":
        return torch.ones_like(past)
    if kind == "causal":
        return past
    if kind == "prefix":
        return past | (j < prefix_len)
    if kind == "chunk":
        seen = p.div(chunk, rounding_mode="floor") == j.div(chunk, rounding_mode="floor")
    else:
        seen = p - j < window if causal else (p - j).abs() <= window // 2
        seen = seen | (j < n_global) | ((p < n_global) & (p >= 0))
    return seen & past if causal else seen


@ALL
@PATTERNS
@pytest.mark.parametrize("T, S", [(100, 100), (40, 100)])
def test_is_masked_softmax_attention(backend, options, T, S):
    """More than one tile of queries and of keys, in every kind."""
    tensors = inputs(1, 2, T, 8, G=1, S=S)
    bias = torch.zeros(T, S, dtype=torch.float64, device=DEVICE).masked_fill(~table(T, S, **options), -torch.inf)

    def masked_softmax(q, k, v):
        return [((q @ k.mT * 8**-0.5 + bias).softmax(-1) @ v)]

    assert_agree(
        runner(backend, with_lse=False, **options), masked_softmax, tensors, steps=T, names=NAMES[:3], matmul=True
    )


@pytest.mark.parametrize("backend", ["parallel", "triton"])
def test_more_value_columns_than_one_block(backend):
    """The Triton path splits wide values over programs, and adds their shares of the gradients of q, k and bias."""
    tensors = [*inputs(1, 2, 20, 4, G=1, E=150), torch.randn(20, 20, device=DEVICE)]
    assert_agree(runner(backend), runner("reference"), tensors, steps=20, names=NAMES, matmul=True)


@pytest.mark.parametrize("backend", ["parallel", "triton"])
def test_the_bias_of_many_chunks_and_sequences(backend):
    """Its gradient sums over all of them, in several programs."""
    tensors = [*inputs(3, 1, 35, 4, S=40), torch.randn(10, 10, device=DEVICE)]
    options = dict(kind="chunk", chunk=10)
    assert_agree(
        runner(backend, **options), runner("reference", **options), tensors, steps=35, names=NAMES, matmul=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("kind", ["causal", "full", "chunk", "mask"])
def test_where_pytorch_has_the_same_attention_it_is_called(kind, dtype):
    options = {"chunk": dict(chunk=16), "mask": dict(mask=torch.rand(40, 30, device=DEVICE) < 0.3)}.get(kind, {})
    tensors = inputs(2, 4, 40, 16, dtype, G=2)
    run, definition = (runner(b, kind=kind, with_lse=False, **options) for b in ("parallel", "reference"))
    assert_agree(run, definition, tensors, steps=40, names=NAMES[:3], matmul=True)
    with torch.profiler.profile() as profile:
        run(*tensors)
    assert any("scaled_dot_product" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@PATTERNS
def test_gradcheck(backend, options):
    """In small: windows, chunks and the prefix are a fifteenth as long."""
    small = {n: max(1, x // 15) if n in ("chunk", "prefix_len") else x for n, x in options.items()}
    small |= {"window": 4} if "window" in options else {}
    size = small.get("chunk")
    bias = torch.randn(2, *((size, size) if size else (5, 6)), dtype=torch.float64, device=DEVICE)
    tensors = [*inputs(1, 2, 5, 2, torch.float64, G=1, S=6, E=2), bias]
    assert torch.autograd.gradcheck(runner(backend, **small), [x.requires_grad_() for x in tensors])


@ALL
class TestLaws:
    @pytest.mark.parametrize("options", [OPTIONS[name] for name in ("causal", "window", "window, sinks", "chunk")])
    def test_later_tokens_cannot_change_earlier_outputs(self, backend, options):
        q, k, v = inputs(1, 1, 70, 4)
        o = block_attention(q, k, v, backend=backend, **options)
        for t in (31, 64):
            changed = [x.clone() for x in (q, k, v)]
            for x in changed:
                x[:, :, t] += 3
            after = block_attention(*changed, backend=backend, **options)
            assert torch.equal(o[:, :, :t], after[:, :, :t])
            assert not torch.equal(o[:, :, t], after[:, :, t])

    def test_pieces_of_the_queries_equal_the_whole(self, backend):
        """The keys so far are the state of attention: a piece of queries with them is one step of decoding."""
        q, k, v = inputs(1, 1, 70, 4)
        for options in (dict(kind="causal"), dict(kind="window", window=9, n_global=2), dict(kind="chunk", chunk=32)):
            whole = block_attention(q, k, v, backend=backend, **options)
            for start, stop in ((0, 33), (33, 69), (69, 70)):
                piece = [q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]]
                part = block_attention(*piece, backend=backend, **options)
                torch.testing.assert_close(part, whole[:, :, start:stop])

    def test_two_sets_of_keys_can_be_merged(self, backend):
        """Gradients too: they pass through lse."""
        tensors = inputs(1, 1, 40, 4)

        def merged(q, k, v):
            first, l1 = block_attention(q, k[:, :, :13], v[:, :, :13], kind="full", return_lse=True, backend=backend)
            second, l2 = block_attention(q, k[:, :, 13:], v[:, :, 13:], kind="full", return_lse=True, backend=backend)
            lse = torch.logaddexp(l1, l2)
            return [torch.exp(l1 - lse)[..., None] * first + torch.exp(l2 - lse)[..., None] * second]

        whole = runner("reference", with_lse=False, kind="full")
        assert_agree(merged, whole, tensors, steps=40, names=NAMES[:3], matmul=True)

    def test_chunks_do_not_see_each_other(self, backend):
        q, k, v = inputs(1, 1, 60, 4)
        o = block_attention(q, k, v, kind="chunk", chunk=20, causal=False, backend=backend)
        alone = [x[:, :, 20:40] for x in (q, k, v)]
        torch.testing.assert_close(o[:, :, 20:40], block_attention(*alone, kind="full", backend=backend))

    def test_segments_do_not_see_each_other_and_padding_is_not_seen(self, backend):
        tensors = inputs(1, 1, 60, 4)
        edges = torch.tensor([3, 23, 23, 50], device=DEVICE)
        clean = block_attention(*tensors, kind="varlen", cu_seqlens=edges, backend=backend)
        alone = [x[:, :, 23:50] for x in tensors]
        torch.testing.assert_close(clean[:, :, 23:50], block_attention(*alone, kind="causal", backend=backend))
        assert (clean[:, :, :3] == 0).all() and (clean[:, :, 50:] == 0).all()
        self.check_no_leak(tensors, clean, slice(50, None), backend, kind="varlen", cu_seqlens=edges)

    def test_nothing_of_a_masked_key_leaks(self, backend):
        tensors = inputs(2, 1, 40, 4)
        keep = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
        keep[:, 35:] = False
        clean = block_attention(*tensors, kind="full", key_mask=keep, backend=backend)
        whole = [x[:, :, :35] for x in tensors]
        torch.testing.assert_close(clean[:, :, :35], block_attention(*whole, kind="full", backend=backend))
        self.check_no_leak(tensors, clean, slice(35, None), backend, kind="full", key_mask=keep)

    @staticmethod
    def check_no_leak(tensors, clean, hidden, backend, **options):
        for bad in (float("nan"), float("inf")):
            q, k, v = (x.clone() for x in tensors)
            k[:, :, hidden] = v[:, :, hidden] = bad
            leaves = [x.requires_grad_() for x in (q, k, v)]
            o = block_attention(*leaves, backend=backend, **options)
            assert torch.equal(o, clean)
            for x in torch.autograd.grad((o * o).sum(), leaves):
                assert torch.isfinite(x).all()
                assert x is not leaves[0] and torch.isfinite(x).all()

    def test_a_query_that_sees_nothing_gets_zero(self, backend):
        q, k, v = (x.requires_grad_() for x in inputs(1, 1, 20, 4, S=15))  # positions -5 to 14
        bias = torch.zeros(20, 15, device=DEVICE)
        bias[10] = -torch.inf
        o, lse = block_attention(q, k, v, bias=bias, return_lse=True, backend=backend)
        blind = torch.tensor([*range(5), 10], device=DEVICE)
        assert (o[:, :, blind] == 0).all() and (lse[:, :, blind] == -torch.inf).all()
        seeing = torch.isfinite(lse)
        assert seeing.sum() == 14
        dq, dk, dv = torch.autograd.grad(o.sum() + lse[seeing].sum(), (q, k, v))
        assert (dq[:, :, blind] == 0).all() and all(torch.isfinite(x).all() for x in (dq, dk, dv))

    @pytest.mark.parametrize("size", [1e4, -1e4])
    def test_huge_scores(self, backend, size):
        """A common shift of all scores changes nothing, and a difference of 1e4 picks one key."""
        q, k, v = inputs(1, 1, 40, 4)
        bias = torch.full((40, 40), size, device=DEVICE)
        q = (q * 4).round() / 64  # products that stay exact next to 1e4 need few digits
        plain = block_attention(q, k, v, kind="full", backend=backend)
        shifted = block_attention(q, k, v, kind="full", bias=bias, backend=backend)
        torch.testing.assert_close(shifted, plain, rtol=0, atol=5e-3)
        bias[:, 7] += 1e4
        only = block_attention(q, k, v, kind="full", bias=bias, backend=backend)
        torch.testing.assert_close(only, v[:, :, 7:8].expand_as(only))

    def test_one_key_gives_its_value(self, backend):
        q, k, v = inputs(2, 2, 1, 4)
        for options in (dict(kind="causal"), dict(kind="window", window=1), dict(kind="chunk", chunk=7)):
            torch.testing.assert_close(block_attention(q, k, v, backend=backend, **options), v)

    def test_strides_do_not_matter(self, backend):
        q, k, v = inputs(2, 3, 20, 4)
        strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        torch.testing.assert_close(
            block_attention(*strided, backend=backend), block_attention(q, k, v, backend=backend)
        )

    def test_two_runs_are_bit_identical(self, backend):
        results = []
        for _ in range(2):
            tensors = [
                *inputs(2, 2, 40, 4, G=1),
                torch.randn(20, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE),
            ]
            q, k, v, bias = leaves = [x.requires_grad_() for x in tensors]
            o = block_attention(q, k, v, kind="chunk", chunk=20, bias=bias, backend=backend)
            results.append((o, *torch.autograd.grad((o * o).sum(), leaves)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    @pytest.mark.parametrize("T, S", [(0, 0), (0, 5), (5, 0)])
    def test_nothing_to_do(self, backend, T, S):
        tensors = [x.requires_grad_() for x in inputs(2, 2, T, 3, S=S)]
        for options in (dict(kind="causal"), dict(kind="chunk", chunk=4), dict(kind="window", window=4)):
            o, lse = block_attention(*tensors, return_lse=True, backend=backend, **options)
            assert o.shape == (2, 2, T, 3) and (o == 0).all() and (lse == -torch.inf).all()
            assert all((x == 0).all() for x in torch.autograd.grad(o.sum(), tensors))

    def test_dtypes_of_the_outputs(self, backend):
        for dtype in HALF:
            o, lse = block_attention(*inputs(1, 1, 8, 4, dtype), return_lse=True, backend=backend)
            assert o.dtype == dtype and lse.dtype == torch.float32


@pytest.mark.parametrize("kind, width", [("window", 100), ("chunk", 128)])
def test_65536_tokens(kind, width):
    """All outputs are finite; three stretches of queries are compared with the definition, over the keys so far."""
    T, options = 65536, {"kind": kind, kind: width}
    q, k, v = inputs(1, 1, T, 8)
    o = block_attention(q, k, v, backend="parallel", **options)
    assert torch.isfinite(o).all()
    for stop in (130, 40000, T):
        first = (
            max(0, stop - 300) // width * width
        )  # enough keys for the queries compared, and a whole number of chunks
        wide = [x[:, :, first:stop].double() for x in (q, k, v)]
        want = block_attention(wide[0][:, :, -100:], *wide[1:], backend="reference", **options)
        assert error(o[:, :, stop - 100 : stop], want) < 1e-5


@pytest.mark.parametrize(
    "options", [dict(kind="window", window=128), dict(kind="chunk", chunk=128), dict(kind="causal")]
)
@pytest.mark.parametrize("with_lse", [False, True])
def test_memory_is_linear_in_length(options, with_lse):
    """No kind keeps a table of scores, whether PyTorch's attention is called or not."""

    def run(q, k, v):
        o = block_attention(q, k, v, return_lse=with_lse, backend="parallel", **options)
        return o if with_lse else [o]

    assert_memory_is_linear(run, lambda T: inputs(1, 1, T, 8), lengths=(1024, 2048, 4096))


@pytest.mark.parametrize("with_lse", [False, True])
def test_compiled_without_graph_break(with_lse):
    tensors = [x.requires_grad_() for x in inputs(1, 2, 20, 3)]

    def attend(q, k, v):
        result = block_attention(q, k, v, kind="window", window=5, return_lse=with_lse, backend="triton")
        return (result[0] * 2 + result[1][..., None]) if with_lse else result * 2

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    got, want = compiled(*tensors), attend(*tensors)
    torch.testing.assert_close(got, want)
    for x, y in zip(*(torch.autograd.grad(o.sum(), tensors) for o in (got, want)), strict=True):
        torch.testing.assert_close(x, y)


def test_auto_on_the_cpu_is_parallel_and_use_overrides_it():
    tensors = inputs(1, 1, 9, 2, torch.float64)
    with use("triton"), pytest.raises(ValueError, match="float64"):
        block_attention(*tensors)
    block_attention(*tensors)


def test_heads_too_wide_for_triton():
    tensors = inputs(1, 1, 9, 130)
    block_attention(*tensors)
    with pytest.raises(ValueError, match="heads of at most 128 columns, got d = 130"):
        block_attention(*tensors, backend="triton")


@pytest.mark.parametrize("T", [1, 7, 20])
@pytest.mark.parametrize("kind, width", [("full", 0), ("causal", 0), ("window", 5), ("chunk", 6), ("prefix", 4)])
def test_the_cost_model_counts_the_pairs_that_are_seen(kind, width, T):
    options = {{"prefix": "prefix_len"}.get(kind, kind): width} if width else {}
    assert cost.pairs(T, width, kind) == table(T, T, kind, **options).sum()
    assert cost.flops(2, 3, T, 8, width, kind=kind) == 4 * 6 * 8 * cost.pairs(T, width, kind)
    assert cost.bytes(2, 3, T, 8) == 6 * T * (4 * 8 * 4 + 4)
    with pytest.raises(ValueError, match="expected kind to be one of .*, got 'tree'"):
        cost.pairs(T, width, "tree")


q, k, v = inputs(2, 4, 8, 4, G=2)
mask = torch.ones(8, 8, dtype=torch.bool, device=DEVICE)
edges = torch.tensor([0, 8], device=DEVICE)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((q[0], k, v), {}, r"expected q of shape \(B, H, T, d\), got \(4, 8, 4\)"),
        ((q, k[..., :3], v), {}, r"expected k of shape \(B, G, S, d\) with B = 2, d = 4, got \(2, 2, 8, 3\)"),
        ((q, k, v[:, :, :5]), {}, r"expected v of shape \(B, G, S, E\) with .*S = 8, got \(2, 2, 5, 4\)"),
        ((q[:, :3], k, v), {}, "expected H of q to be a multiple of G of k, got H = 3 and G = 2"),
        ((q[..., :0], k[..., :0], v), {}, "expected q, k and v with heads and columns"),
        ((q, k.double(), v), {}, "expected k of dtype torch.float32 like q, got torch.float64"),
        ((q + 0j, k + 0j, v + 0j), {}, "expected q of a real dtype, got torch.complex64"),
        ((q, k, v), dict(kind="tree"), "expected kind to be one of full, .*, got 'tree'"),
        ((q, k, v), dict(kind="window"), 'expected window with kind="window", got None'),
        ((q, k, v), dict(window=3), 'expected window only with kind="window", got it with kind="causal"'),
        ((q, k, v), dict(n_global=1), 'expected n_global only with kind="window", got 1 with kind="causal"'),
        ((q, k, v), dict(kind="window", window=4, n_global=-1), "expected n_global of at least 0, got -1"),
        ((q, k, v), dict(kind="window", window=0), "expected window of at least 1, got 0"),
        ((q, k, v), dict(kind="window", window=3, causal=False), "expected an even window with causal=False.* got 3"),
        ((q, k, v), dict(kind="chunk", chunk=0), "expected chunk of at least 1, got 0"),
        ((q, k, v), dict(kind="prefix", prefix_len=-1), "expected prefix_len of at least 0, got -1"),
        ((q, k, v), dict(kind="varlen", cu_seqlens=edges[None]), r"expected cu_seqlens of shape \(n\), got \(1, 2\)"),
        ((q, k, v), dict(kind="varlen", cu_seqlens=edges.float()), r"n \+ 1 integers, got 2 of torch.float32"),
        ((q[:, :, :5], k, v), dict(kind="varlen", cu_seqlens=edges), "expected T = S .*, got T = 5 and S = 8"),
        ((q, k, v), dict(kind="mask", mask=mask[:5]), r"expected mask of shape \(T, N\) with T = 8, got \(5, 8\)"),
        ((q, k, v), dict(kind="mask", mask=mask.repeat(1, 2)), "with N of at most S = 8, got 16"),
        ((q, k, v), dict(kind="mask", mask=mask.int()), "expected mask of dtype torch.bool, .* got torch.int32"),
        ((q, k, v), dict(key_mask=mask), r"expected key_mask of shape \(B, S\) with B = 2, S = 8, got \(8, 8\)"),
        ((q, k, v), dict(bias=q[0, 0]), r"expected bias of shape \(T, S\) with T = 8, S = 8, got \(8, 4\)"),
        ((q, k, v), dict(kind="chunk", chunk=4, bias=q[0]), r"expected bias of shape \(H, chunk, chunk\) with"),
        ((q, k.to("meta"), v), {}, "expected k on .* like q, got meta"),
    ],
)
def test_errors_name_what_was_expected(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        block_attention(*arguments, **options)


def test_debug_names_the_input_with_nan():
    broken = v.clone()
    broken[0, 0, 2, 1] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected v without NaN, got 1 NaN"):
        block_attention(q, k, broken)
