"""ngram_attention: comparisons, sorting and tiles give the same averages; a dictionary and plain Python agree."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import use
from seqarch.kernels.ngram_attention import cost, ngram_attention, ngram_attention_step
from seqarch.kernels.ngram_attention.parallel import number_ngrams

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

BACKENDS = ["reference", "parallel", "triton"]
ALL = pytest.mark.parametrize("backend", BACKENDS)


def inputs(B, T, d, dtype=torch.float32, letters=3, seed=0):
    """Tokens from a small alphabet, so that most n-grams occur again and again, and vectors to read."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, letters - 1, (B, T), generator=g)
    return ids.to(DEVICE), torch.randn(B, T, d, generator=g, dtype=torch.float64).to(dtype).to(DEVICE)


def runner(backend, ids, n):
    """Take h; the count has no gradient and is compared on its own."""
    return lambda h: (ngram_attention(ids, h, n, backend=backend)[0],)


shapes = dict(
    B=st.integers(1, 2),
    T=st.one_of(st.sampled_from([1, 2, 31, 32, 33, 64, 65]), st.integers(1, 40), st.integers(1, 130)),
    d=st.sampled_from([1, 3, 16, 17]),
    n=st.integers(1, 4),
    letters=st.sampled_from([1, 2, 3, 9]),
    seed=st.integers(0, 10**6),
)
half_shapes = shapes | dict(T=st.integers(8, 70), d=st.sampled_from([16, 17]), letters=st.sampled_from([1, 2, 3]))


def check_against_the_definition(backends, dtype, B, T, d, n, letters, seed):
    ids, h = inputs(B, T, d, dtype, letters, seed)
    _, want = ngram_attention(ids, h, n, backend="reference")
    for backend in backends:
        out, count = ngram_attention(ids, h, n, backend=backend)
        assert torch.equal(count, want) and count.dtype == torch.int32
        assert (out[count == 0] == 0).all()
        assert_agree(
            runner(backend, ids, n), runner("reference", ids, n), [h], steps=T, names=("h",), matmul=backend == "triton"
        )


@settings(max_examples=80)
@given(**shapes)
def test_three_implementations_agree_in_float32(**case):
    check_against_the_definition(["parallel", "triton"], torch.float32, **case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=30)
@given(**half_shapes)
def test_three_implementations_agree_in_half_precision(dtype, **case):
    check_against_the_definition(["parallel", "triton"], dtype, **case)


@settings(max_examples=80)
@given(**shapes)
def test_sorting_agrees_in_float64(**case):
    check_against_the_definition(["parallel"], torch.float64, **case)


@settings(max_examples=40)
@given(ids=st.lists(st.integers(-2, 2), min_size=1, max_size=30), n=st.integers(1, 4))
def test_counts_are_those_of_slices_of_a_list(ids, n):
    """The definition in plain Python: j counts when the n tokens before it are the last n tokens up to i."""
    T = len(ids)
    want = [sum(ids[j - n : j] == ids[i - n + 1 : i + 1] for j in range(n, i)) for i in range(T)]
    for backend in BACKENDS:
        _, count = ngram_attention(
            torch.tensor([ids], device=DEVICE), torch.ones(1, T, 1, device=DEVICE), n, backend=backend
        )
        assert count[0].tolist() == want


@pytest.mark.parametrize("n", [1, 3])
def test_equal_numbers_mean_equal_ngrams(n):
    ids, _ = inputs(2, 60, 1, letters=3)
    grams, numbers = ids.unfold(1, n, 1), number_ngrams(ids, n)
    for b in range(2):
        same = (grams[b][:, None] == grams[b][None]).all(-1)
        assert torch.equal(numbers[b][:, None] == numbers[b][None], same)


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@pytest.mark.parametrize("n", [1, 2, 30])
def test_gradcheck(backend, n):
    ids, h = inputs(2, 17, 2, torch.float64, letters=2)
    assert torch.autograd.gradcheck(runner(backend, ids, n), [h.requires_grad_()])


@ALL
class TestLaws:
    def test_a_periodic_text_is_read_off(self, backend):
        """In abcabc... every bigram has one follower: what is read is what comes next."""
        ids = torch.arange(30, device=DEVICE)[None] % 3
        h = torch.nn.functional.one_hot(ids, 3).float()
        out, count = ngram_attention(ids, h, 2, backend=backend)
        assert (count[0, :4] == 0).all() and (count[0, 4:] > 0).all()
        torch.testing.assert_close(out[:, 4:-1], h[:, 5:])

    def test_the_position_itself_is_not_read(self, backend):
        """In aaaa... position i has its own predecessor as an equal; j = i would make the count i, not i - 1."""
        ids, h = torch.zeros(1, 9, dtype=torch.int64, device=DEVICE), torch.randn(1, 9, 2, device=DEVICE)
        _, count = ngram_attention(ids, h, 1, backend=backend)
        assert count[0].tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7]

    def test_later_inputs_cannot_change_earlier_outputs(self, backend):
        ids, h = inputs(2, 80, 3, letters=2)
        out, count = ngram_attention(ids, h, 2, backend=backend)
        changed, moved = ids.clone(), h.clone()
        changed[:, 50:] += 7
        moved[:, 50:] += 1
        for arguments in ((changed, h), (ids, moved), (changed, moved)):
            got, found = ngram_attention(*arguments, 2, backend=backend)
            assert torch.equal(got[:, :50], out[:, :50]) and torch.equal(found[:, :50], count[:, :50])
        assert not torch.equal(ngram_attention(ids, moved, 2, backend=backend)[0], out)

    def test_names_of_tokens_do_not_matter(self, backend):
        ids, h = inputs(2, 50, 3)
        want = ngram_attention(ids, h, 2, backend=backend)
        for renamed in (ids * 2**40 + 5, ids.to(torch.int8)):
            got = ngram_attention(renamed, h, 2, backend=backend)
            torch.testing.assert_close(got, want)

    def test_strides_do_not_matter(self, backend):
        ids, h = inputs(3, 40, 4)
        strided = ids.T.contiguous().T, h.transpose(0, 2).contiguous().transpose(0, 2)
        torch.testing.assert_close(
            ngram_attention(*strided, 2, backend=backend), ngram_attention(ids, h, 2, backend=backend)
        )

    def test_two_runs_are_bit_identical(self, backend):
        runs = []
        for _ in range(2):
            ids, h = inputs(2, 70, 3)
            out, _ = ngram_attention(ids, h.requires_grad_(), 1, backend=backend)
            runs.append((out, *torch.autograd.grad(out.square().sum(), h)))
        assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))

    @pytest.mark.parametrize("T", [0, 1])
    def test_nothing_to_read(self, backend, T):
        out, count = ngram_attention(*inputs(2, T, 3), 2, backend=backend)
        assert out.shape == (2, T, 3) and count.shape == (2, T) and not out.any() and not count.any()

    def test_an_order_above_the_length_matches_nothing(self, backend):
        out, count = ngram_attention(*inputs(2, 6, 3, letters=1), 10**9, backend=backend)
        assert not out.any() and not count.any()


@pytest.mark.parametrize("n", [1, 3])
def test_stepping_equals_the_whole(n):
    ids, h = inputs(2, 40, 3, letters=2)
    out, count = ngram_attention(ids, h, n)
    state = None
    for t in range(40):
        got, found, state = ngram_attention_step(ids[:, t], h[:, t], n, state)
        torch.testing.assert_close(got, out[:, t])
        assert torch.equal(found, count[:, t])


def test_65536_tokens():
    """Compared with the dictionary in double precision: the quadratic definition would take hours."""
    ids, h = inputs(1, 65536, 1, letters=4)
    out, count = ngram_attention(ids, h, 3, backend="parallel")
    state, want, found = None, [], []
    for t in range(65536):
        o, c, state = ngram_attention_step(ids[:, t], h[:, t].double(), 3, state)
        want.append(o)
        found.append(c)
    assert error(out, torch.stack(want, 1)) < 1e-4
    assert torch.equal(count, torch.stack(found, 1))


def test_memory_is_linear_in_length():
    def run(h):
        ids = torch.arange(h.shape[1])[None] * 7 % 5
        return (ngram_attention(ids, h, 2, backend="parallel")[0],)

    # the number of doubling steps grows with log2 T: lengths between two powers of two have the same
    assert_memory_is_linear(run, lambda T: [torch.randn(1, T, 8)], lengths=(2500, 3000, 4000))


def test_compiled_without_graph_break():
    ids, h = inputs(2, 20, 3)
    read = torch.compile(
        lambda h: ngram_attention(ids, h, 2, backend="triton")[0] * 2, backend="aot_eager", fullgraph=True
    )
    leaves = [h.clone().requires_grad_() for _ in range(2)]
    out, want = read(leaves[0]), ngram_attention(ids, leaves[1], 2)[0] * 2
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(*(torch.autograd.grad(o.sum(), x)[0] for o, x in zip((out, want), leaves, strict=True)))


def test_use_overrides_auto_only_inside():
    ids, h = inputs(1, 9, 2, torch.float64)
    with use("triton"), pytest.raises(ValueError, match="float64"):
        ngram_attention(ids, h, 1)
    ngram_attention(ids, h, 1)


def test_cost_model_counts_pairs():
    assert cost.flops(2, 10, 3, 2) == 2 * 45 * (2 * 3 + 2)
    assert cost.bytes(2, 10, 3, 2) == 2 * 10 * (2 * 3 * 4 + 12)
    assert cost.sorted_flops(1, 4096, 8) == 4096 * 8 * 12


ids, h = inputs(2, 8, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((ids[0], h, 1), r"expected ids of shape \(B, T\), got \(8,\)"),
        ((ids, h[:, :5], 1), r"expected h of shape \(B, T, d\) with B = 2, T = 8, got \(2, 5, 4\)"),
        ((ids.float(), h, 1), "expected ids of an integer dtype, got torch.float32"),
        ((ids, h.long(), 1), "expected h of a floating-point dtype, got torch.int64"),
        ((ids.to("meta"), h, 1), "expected ids on .* like h, got meta"),
        ((ids, h, 0), "expected n to be an integer of at least 1, got 0"),
        ((ids, h, 1.0), "expected n to be an integer of at least 1, got 1.0"),
    ],
)
def test_errors_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        ngram_attention(*arguments)


def test_error_for_a_state_of_another_batch():
    with pytest.raises(ValueError, match="expected a state of B = 2 memories, got 0"):
        ngram_attention_step(ids[:, 0], h[:, 0], 1, [])


def test_error_for_an_unknown_backend():
    with pytest.raises(ValueError, match="expected backend to be one of auto, reference, parallel, triton, got 'cuda'"):
        ngram_attention(ids, h, 1, backend="cuda")


def test_debug_names_the_input_with_nan():
    bad = h.clone()
    bad[0, 2, 1] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected h without NaN, got 1 NaN"):
        ngram_attention(ids, bad, 1)
