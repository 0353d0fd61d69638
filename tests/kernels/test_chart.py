"""The chart: softmax_mix against a loop over rows, the gathers against loops over cells, and passes that count trees."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import use
from seqarch.kernels.chart import cost, gather_children, gather_parents, put_cells, softmax_mix
from seqarch.kernels.chart.reference import gather_children_reference, gather_parents_reference

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

BACKENDS = ["reference", "parallel", "triton"]
ALL = pytest.mark.parametrize("backend", BACKENDS)


def inputs(R, K, d, dtype=torch.float32, kind="normal", seed=0):
    """Random t and c; `kind` picks scores that are hard in their own way."""
    g = torch.Generator().manual_seed(seed)
    t = torch.randn(R, K, generator=g, dtype=torch.float64)
    if kind == "equal":
        t = torch.full_like(t, -3.25)
    elif kind == "dominant" and K:
        t[:, K // 2] += 1e4
    elif kind == "large":
        t = t * 100 + 1e4  # their gradients depend on differences of s - t: few of the digits that float32 has
    elif kind == "holes":  # candidates without a score, in some rows all of them
        t = torch.where(torch.rand(R, K, generator=g) < 0.5, -torch.inf, t)
        t[::3] = -torch.inf
    c = torch.randn(R, K, d, generator=g, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return t.to(wide).to(DEVICE), c.to(dtype).to(DEVICE)


def runner(backend, mask=None, index=None):
    """Take (c, t): the first input's dtype sets the tolerance."""

    def run(c, t):
        e, s, w = softmax_mix(t, c, mask, index, backend=backend)
        return e, s, w, 0 * c  # the last one gives a gradient to differentiate where every place is empty

    return run


def ragged(R, K, seed):
    """A mask, and an index that draws R * K candidates without repetition from a longer list, with empty places."""
    g = torch.Generator().manual_seed(seed + 1)
    mask = torch.rand(R, K, generator=g) < 0.7
    index = torch.randperm(R * K + 3, generator=g)[: R * K].view(R, K)
    index = torch.where(torch.rand(R, K, generator=g) < 0.3, -1, index)
    return mask.to(DEVICE), index.to(DEVICE)


shapes = dict(
    R=st.integers(1, 5),
    K=st.one_of(st.integers(1, 9), st.sampled_from([16, 33])),
    d=st.sampled_from([1, 3, 64, 70]),
    kind=st.sampled_from(["normal", "equal", "dominant", "large", "holes"]),
    masked=st.booleans(),
    indexed=st.booleans(),
    seed=st.integers(0, 10**6),
)


def check_against_the_definition(backends, dtype, R, K, d, kind, masked, indexed, seed):
    mask, index = ragged(R, K, seed)
    mask, index = mask if masked else None, index if indexed else None
    t, c = inputs(R, K, d, dtype, kind, seed)
    if indexed:
        more, others = inputs(1, 3, d, dtype, seed=seed + 2)  # in the list, and in no row
        t, c = torch.cat([t.flatten(), more.flatten()]), torch.cat([c.flatten(0, 1), others.flatten(0, 1)])
    for backend in backends:
        assert_agree(
            runner(backend, mask, index), runner("reference", mask, index), [c, t],
            steps=1, names=("c", "t"), loose=("t",), matmul=True,
        )  # fmt: skip


@settings(max_examples=100)
@given(**shapes)
def test_three_implementations_agree_in_float32(**case):
    check_against_the_definition(["parallel", "triton"], torch.float32, **case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=40)
@given(**shapes)
def test_three_implementations_agree_in_half_precision(dtype, **case):
    check_against_the_definition(["parallel", "triton"], dtype, **case)


@settings(max_examples=80)
@given(**shapes)
def test_all_rows_at_once_agree_in_float64(**case):
    check_against_the_definition(["parallel"], torch.float64, **case)


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@pytest.mark.parametrize("with_index", [False, True])
def test_gradcheck(backend, with_index):
    mask, index = ragged(3, 4, 0)
    t, c = inputs(3, 4, 2, torch.float64)
    if with_index:
        t, c = torch.cat([t.flatten(), t[0]]), torch.cat([c.flatten(0, 1), c[0]])
    run = runner(backend, mask, index if with_index else None)
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in (c, t)])


@ALL
class TestLaws:
    def test_weights_add_up_and_the_score_is_their_mean(self, backend):
        t, c = inputs(5, 7, 3)
        e, s, w = softmax_mix(t, c, backend=backend)
        torch.testing.assert_close(w.sum(1), torch.ones(5, device=DEVICE))
        torch.testing.assert_close(s, (t * t.softmax(1)).sum(1))
        torch.testing.assert_close(e, torch.einsum("rk,rkd->rd", t.softmax(1), c))

    def test_ties_give_the_mean_and_a_common_shift_moves_only_the_score(self, backend):
        t, c = inputs(4, 6, 3, kind="equal")
        e, s, _ = softmax_mix(t, c, backend=backend)
        torch.testing.assert_close(e, c.mean(1))
        for shift in (1e4, -1e4):  # exact in float32: the scores are multiples of 1/4
            moved, score, _ = softmax_mix(t + shift, c, backend=backend)
            assert torch.equal(moved, e)
            torch.testing.assert_close(score, s + shift)

    def test_one_dominant_split_takes_all(self, backend):
        t, c = (x.requires_grad_() for x in inputs(3, 5, 4, kind="dominant"))
        e, s, w = softmax_mix(t, c, backend=backend)
        assert torch.equal(e, c[:, 2]) and torch.equal(s, t[:, 2]) and torch.equal(w[:, 2], torch.ones_like(s))
        dt, dc = torch.autograd.grad(e.sum() + s.sum(), (t, c))
        assert torch.equal(dt[:, 2], torch.ones_like(s)) and dt.sum() == 3
        assert torch.equal(dc[:, 2], torch.ones_like(e)) and dc.sum() == e.numel()

    def test_nothing_left_gives_zero_and_no_nan(self, backend):
        t, c = (x.requires_grad_() for x in inputs(4, 5, 3))
        mask = torch.arange(4, device=DEVICE)[:, None].expand(4, 5) > 1
        e, s, w = softmax_mix(t, c, mask, backend=backend)
        assert (e[:2] == 0).all() and (s[:2] == 0).all() and (w[:2] == 0).all()
        none_scored = torch.full_like(t, -torch.inf).requires_grad_()
        outputs = (e, s, w, *softmax_mix(none_scored, c, backend=backend))
        assert all((x == 0).all() for x in outputs[3:])
        grads = torch.autograd.grad(sum(x.sum() for x in outputs), (t, c, none_scored), materialize_grads=True)
        assert all(torch.isfinite(g).all() for g in grads) and (grads[0][:2] == 0).all() and (grads[1][:2] == 0).all()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_left_out_cannot_leak(self, backend, value):
        t, c = inputs(3, 5, 4)
        mask, _ = ragged(3, 5, 3)
        results = []
        for fill in (0.0, value):
            x, y = (torch.where(m, z, fill).requires_grad_() for m, z in ((mask, t), (mask[..., None], c)))
            outputs = softmax_mix(x, y, mask, backend=backend)
            results.append((*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), (x, y))))
        assert all(torch.equal(a, b) and torch.isfinite(a).all() for a, b in zip(*results, strict=True))

    def test_an_index_is_a_gather(self, backend):
        t, c = inputs(4, 5, 70)
        order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        got = softmax_mix(t.flatten(), c.flatten(0, 1), index=order.view(4, 5), backend=backend)
        want = softmax_mix(t.flatten()[order].view(4, 5), c.flatten(0, 1)[order].view(4, 5, 70), backend=backend)
        torch.testing.assert_close(got, want)

    def test_rows_do_not_see_each_other(self, backend):
        t, c = inputs(6, 5, 3)
        whole = softmax_mix(t, c, backend=backend)
        parts = [softmax_mix(t[part], c[part], backend=backend) for part in (slice(2), slice(2, 6))]
        torch.testing.assert_close(tuple(torch.cat(x) for x in zip(*parts, strict=True)), whole)
        c = c.clone()
        c[3:] += 7
        assert torch.equal(softmax_mix(t, c, backend=backend)[0][:3], whole[0][:3])

    def test_strides_do_not_matter(self, backend):
        t, c = inputs(3, 5, 4)
        strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (t, c)]
        torch.testing.assert_close(softmax_mix(*strided, backend=backend), softmax_mix(t, c, backend=backend))

    def test_two_runs_are_bit_identical(self, backend):
        results = []
        for _ in range(2):
            t, c = (x.requires_grad_() for x in inputs(3, 5, 70))
            outputs = softmax_mix(t, c, backend=backend)
            results.append((*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), (t, c))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    @pytest.mark.parametrize("R, K, d", [(0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 0, 0)])
    def test_empty(self, backend, R, K, d):
        t, c = (x.requires_grad_() for x in inputs(R, K, d))
        e, s, w = softmax_mix(t, c, backend=backend)
        assert e.shape == (R, d) and s.shape == (R,) and w.shape == (R, K)
        assert K > 0 or ((e == 0).all() and (s == 0).all())
        torch.autograd.grad(e.sum() + s.sum() + w.sum(), (t, c), allow_unused=True)

    def test_the_mixture_has_the_dtype_of_c_and_the_scores_are_float32(self, backend):
        t, c = inputs(2, 3, 4, torch.bfloat16)
        e, s, w = softmax_mix(t.bfloat16(), c, backend=backend)
        assert e.dtype == torch.bfloat16 and s.dtype == w.dtype == torch.float32


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_gathers_equal_loops_over_cells(n):
    g = torch.Generator().manual_seed(n)
    e, b = torch.randn(2, 2, n, n, 3, generator=g).to(DEVICE).unbind()
    s, o = torch.randn(2, 2, n, n, generator=g).to(DEVICE).unbind()
    for length in range(2, n + 1):
        torch.testing.assert_close(gather_children(e, s, length), gather_children_reference(e, s, length))
    for length in range(1, n):
        got, want = gather_parents(e, s, b, o, length), gather_parents_reference(e, s, b, o, length)
        torch.testing.assert_close(got, want)
    # a word has no parts, the whole sentence has no parent
    assert gather_children(e, s, 1)[0].shape == (2, n, 0, 3)
    assert gather_parents(e, s, b, o, n)[0].shape == (2, 1, 0, 3)


def test_gradient_of_the_gathers():
    e, b = torch.randn(2, 1, 4, 4, 2, dtype=torch.float64, device=DEVICE).unbind()
    s, o = torch.randn(2, 1, 4, 4, dtype=torch.float64, device=DEVICE).unbind()
    tensors = [x.clone().requires_grad_() for x in (e, s, b, o)]
    assert torch.autograd.gradcheck(lambda e, s, b, o: gather_children(e, s, 3), tensors)
    assert torch.autograd.gradcheck(lambda *x: gather_parents(*x, 2)[:3], tensors)
    assert torch.autograd.gradcheck(lambda e, s, b, o: put_cells(e, b[:, :3, 0], 2), tensors)


def test_put_cells_leaves_the_old_chart_alone():
    chart = torch.zeros(2, 4, 4, 3, device=DEVICE)
    new = put_cells(chart, torch.ones(2, 3, 3, device=DEVICE), 2)
    assert (chart == 0).all() and (new[:, :3, 1] == 1).all() and new.sum() == 2 * 3 * 3


def passes(n, backend, kind=torch.float64):
    """Inside and outside passes in which every composition counts: e = number of trees, with flat scores.

    A composition of trees is a product of counts, and softmax_mix of K equal scores is a mean: K times the mean adds up.
    """
    e, s = (torch.zeros(1, n, n, *size, dtype=kind, device=DEVICE) for size in ((1,), ()))
    e[:, :, 0] = 1
    for length in range(2, n + 1):
        left, right, score = gather_children(e, s, length)
        mixed, _, _ = softmax_mix(score.flatten(0, 1), (left * right).flatten(0, 1), backend=backend)
        e = put_cells(e, (mixed * (length - 1)).view(1, -1, 1), length)
    b, o = torch.zeros_like(e), torch.zeros_like(s)
    b[:, 0, n - 1] = 1
    for length in range(n - 1, 0, -1):
        parent, sibling, score, _ = gather_parents(e, s, b, o, length)
        mixed, _, _ = softmax_mix(score.flatten(0, 1), (parent * sibling).flatten(0, 1), backend=backend)
        b = put_cells(b, (mixed * (n - length)).view(1, -1, 1), length)
    return e[0, ..., 0], b[0, ..., 0]


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_passes_count_trees(backend, n):
    """Inside counts the trees over a span (Catalan numbers); inside x outside the trees of the sentence that contain it."""
    e, b = passes(n, backend)
    catalan = [math.comb(2 * w, w) // (w + 1) for w in range(n)]
    for length in range(1, n + 1):
        cells = n - length + 1
        torch.testing.assert_close(e[:cells, length - 1], torch.full((cells,), float(catalan[length - 1])).to(e))
        # contract the span to one word: what is left is a tree over n - length + 1 words
        torch.testing.assert_close(b[:cells, length - 1], torch.full((cells,), float(catalan[n - length])).to(e))
    trees_with = (e * b)[[i for w in range(n) for i in range(n - w)], [w for w in range(n) for _ in range(n - w)]]
    # every tree over n words has 2 n - 1 spans
    torch.testing.assert_close(trees_with.sum(), torch.tensor((2 * n - 1.0) * catalan[n - 1]).to(e))


def test_passes_on_triton_equal_the_passes_on_the_cpu():
    for x, y in zip(passes(4, "triton", torch.float32), passes(4, "parallel", torch.float32), strict=True):
        torch.testing.assert_close(x, y)


def test_memory_is_linear_in_the_number_of_rows():
    assert_memory_is_linear(lambda t, c: softmax_mix(t, c, backend="parallel"), lambda R: inputs(R, 6, 8))


def test_many_rows_in_float32():
    t, c = inputs(65536, 5, 2)
    want = torch.einsum("rk,rkd->rd", t.double().softmax(1), c.double())
    assert error(softmax_mix(t, c)[0], want) < 1e-6


@pytest.mark.parametrize("indexed", [False, True])
def test_compiled_without_graph_break(indexed):
    t, c = inputs(3, 4, 2)
    index = None
    if indexed:
        t, c, index = t.flatten(), c.flatten(0, 1), torch.arange(12, device=DEVICE).view(3, 4)
    mix = torch.compile(
        lambda t, c: softmax_mix(t, c, index=index, backend="triton")[0] * 2, backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(mix(t, c), softmax_mix(t, c, index=index)[0] * 2)


def test_what_triton_cannot_take():
    with use("triton"), pytest.raises(ValueError, match="float64"):
        softmax_mix(*inputs(2, 3, 4, torch.float64))
    with pytest.raises(ValueError, match="takes K up to 64, got 65"):
        softmax_mix(*inputs(2, 65, 4), backend="triton")


def test_the_cost_model_counts_a_small_case():
    assert cost.bytes(3, 4, 5) == 3 * 4 * (4 * 5 + 5 + 2 * 4 + 1)
    assert cost.bytes(3, 4, 5, backward=True) > cost.bytes(3, 4, 5)
    assert cost.flops(3, 4, 5, backward=True) > cost.flops(3, 4, 5) == 12 * cost.flops(1, 1, 5)
    for n in (1, 2, 8):
        chart, scores = torch.zeros(1, n, n, 1), torch.zeros(1, n, n)
        assert cost.compositions(n) == sum(gather_children(chart, scores, w)[2].numel() for w in range(1, n + 1))


t, c = inputs(3, 4, 5)
e, s = torch.zeros(2, 4, 4, 3), torch.zeros(2, 4, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: softmax_mix(t[0], c), r"expected t of shape \(R, K\), got \(4,\)"),
        (lambda: softmax_mix(t, c[:, :2]), r"expected c of shape \(R, K, d\) with R = 3, K = 4, got \(3, 2, 5\)"),
        (lambda: softmax_mix(t, c, t), "expected mask of dtype torch.bool, True where .* got torch.float32"),
        (lambda: softmax_mix(t, c, t[:2] > 0), r"expected mask of shape \(R, K\) with R = 3, K = 4, got \(2, 4\)"),
        (lambda: softmax_mix(t, c, index=t.long()), r"expected t of shape \(P\), got \(3, 4\)"),
        (lambda: softmax_mix(t[0], c[0], index=t), "expected index of dtype torch.int64, got torch.float32"),
        (
            lambda: softmax_mix(t[0, :0], c[0, :0], index=t.long()),
            "expected c with at least one candidate for an index",
        ),
        (lambda: softmax_mix(t.long(), c), "expected t of a floating-point dtype, got torch.int64"),
        (lambda: softmax_mix(t, c + 0j), "expected c of a floating-point dtype, got torch.complex64"),
        (lambda: softmax_mix(t.to("meta"), c), "expected t on .* like c, got meta"),
        (lambda: gather_children(e[:, :3], s, 2), r"expected e of shape \(B, n, n, d\), got \(2, 3, 4, 3\)"),
        (lambda: gather_children(e, s[0], 2), r"expected s of shape \(B, n, n\) with .*, got \(4, 4\)"),
        (lambda: gather_children(e, s, 5), "expected length to be an integer from 1 to n = 4, got 5"),
        (lambda: gather_parents(e, s, e, s, 0), "expected length to be an integer from 1 to n = 4, got 0"),
        (
            lambda: gather_parents(e, s, e[..., :2], s, 2),
            r"expected b of shape \(B, n, n, d\) with .*, got \(2, 4, 4, 2\)",
        ),
        (lambda: gather_parents(e, s, e, s[:1], 2), r"expected o of shape \(B, n, n\) with .*, got \(1, 4, 4\)"),
        (lambda: put_cells(e[0, 0, 0], e, 2), r"expected chart of shape \(B, n, n, ...\), got \(3,\)"),
        (lambda: put_cells(e, e, 2), r"expected cells of shape \(2, 3, 3\) for length 2, got \(2, 4, 4, 3\)"),
        (lambda: put_cells(e, e, 1.0), "expected length to be an integer from 1 to n = 4, got 1.0"),
    ],
)
def test_errors_name_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_debug_names_the_input_with_nan():
    broken = c.clone()
    broken[1, 2, 0] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected c without NaN, got 1 NaN"):
        softmax_mix(t, broken)
