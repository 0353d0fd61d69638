"""segment_sum: one definition, three implementations, checked against a float64 loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import use
from seqarch.kernels.segment_sum import cost, segment_sum

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

BACKENDS = ["reference", "parallel", "triton"]
ALL = pytest.mark.parametrize("backend", BACKENDS)


def inputs(M, D, n, dtype=torch.float32, kind="sorted", seed=0):
    """Random rows and their segments; `kind` says how the segments are laid out."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(M, D, generator=g, dtype=torch.float64)
    index = torch.randint(0, n, (M,), generator=g)
    if kind == "sorted":
        index = index.sort().values
    elif kind == "one":  # all rows in the last segment, all others empty
        index = torch.full_like(index, n - 1)
    return values.to(dtype).to(DEVICE), index.to(DEVICE)


def runner(backend, index, n):
    return lambda values: [segment_sum(values, index, n, backend=backend)]


shapes = dict(
    M=st.one_of(st.sampled_from([1, 15, 16, 17, 33]), st.integers(1, 60)),
    D=st.sampled_from([1, 3, 16, 70]),
    n=st.integers(1, 9),
    kind=st.sampled_from(["sorted", "shuffled", "one"]),
    seed=st.integers(0, 10**6),
)


def check_against_the_definition(backends, dtype, M, D, n, kind, seed):
    values, index = inputs(M, D, n, dtype, kind, seed)
    for backend in backends:
        assert_agree(runner(backend, index, n), runner("reference", index, n), [values], steps=M, names=["values"])


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
@given(**shapes)
def test_the_parallel_form_agrees_in_float64(**case):
    check_against_the_definition(["parallel"], torch.float64, **case)


@pytest.mark.parametrize("backend", ["reference", "parallel"])
def test_gradcheck(backend):
    values, index = inputs(9, 2, 4, torch.float64, "shuffled")
    assert torch.autograd.gradcheck(runner(backend, index, 4), [values.requires_grad_()])


@ALL
class TestLaws:
    def test_is_a_product_with_a_matrix_of_zeros_and_ones(self, backend):
        values, index = inputs(40, 5, 7, kind="shuffled")
        table = torch.nn.functional.one_hot(index, 7).T.double()
        assert error(segment_sum(values, index, 7, backend=backend), table @ values.double()) < 1e-6

    def test_the_gradient_is_a_gather(self, backend):
        values, index = inputs(40, 5, 7, kind="shuffled")
        sums = segment_sum(values.requires_grad_(), index, 7, backend=backend)
        g = torch.randn_like(sums)
        assert torch.equal(torch.autograd.grad(sums, values, g)[0], g[index])

    def test_relabelled_segments_are_permuted_sums(self, backend):
        values, index = inputs(40, 5, 7)
        new = torch.randperm(7, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        sums = segment_sum(values, index, 7, backend=backend)
        assert torch.equal(segment_sum(values, new[index], 7, backend=backend)[new], sums)

    def test_rows_of_one_segment_do_not_touch_another(self, backend):
        values, index = inputs(40, 5, 7, kind="shuffled")
        broken = torch.where((index == 3)[:, None], torch.nan, values)
        other = torch.arange(7, device=DEVICE) != 3
        got, want = (segment_sum(z, index, 7, backend=backend) for z in (broken, values))
        assert torch.equal(got[other], want[other]) and got[3].isnan().all()

    def test_segments_without_rows_are_zero(self, backend):
        values, _ = inputs(6, 3, 1)
        sums = segment_sum(values, torch.full((6,), 2, device=DEVICE), 5, backend=backend)
        assert (sums[[0, 1, 3, 4]] == 0).all() and (sums[2] != 0).all()

    def test_nothing_to_sum(self, backend):
        values, index = inputs(0, 3, 1)
        assert torch.equal(segment_sum(values, index, 4, backend=backend), torch.zeros(4, 3, device=DEVICE))
        assert segment_sum(values, index, 0, backend=backend).shape == (0, 3)
        assert segment_sum(values[:, :0], index, 4, backend=backend).shape == (4, 0)

    def test_half_precision_is_added_up_in_float32(self, backend):
        """4096 ones: float16 alone would stop counting at 2048, bfloat16 at 256."""
        for dtype in (torch.float16, torch.bfloat16):
            values = torch.ones(4096, 1, dtype=dtype, device=DEVICE)
            sums = segment_sum(values, torch.zeros(4096, dtype=torch.int32, device=DEVICE), 1, backend=backend)
            assert sums.dtype == dtype and sums.item() == 4096

    def test_strides_do_not_matter(self, backend):
        values, index = inputs(20, 6, 4, kind="shuffled")
        strided, every_other = values.T.contiguous().T, index.repeat_interleave(2)[::2]
        want = segment_sum(values, index, 4, backend=backend)
        assert torch.equal(segment_sum(strided, every_other, 4, backend=backend), want)

    def test_two_runs_are_bit_identical(self, backend):
        values, index = inputs(60, 6, 4, kind="shuffled")
        first, second = (segment_sum(values, index, 4, backend=backend) for _ in range(2))
        assert torch.equal(first, second)


def test_65536_rows():
    values, index = inputs(65536, 2, 50, kind="shuffled")
    got = segment_sum(values, index, 50, backend="parallel")
    assert error(got, segment_sum(values.double(), index, 50, backend="reference")) < 1e-5


def test_memory_is_linear_in_length():
    assert_memory_is_linear(
        lambda values: [segment_sum(values, torch.arange(len(values), device=DEVICE) // 4, 8192, backend="parallel")],
        lambda M: [inputs(M, 8, 1)[0].requires_grad_()],
        lengths=(1024, 2048, 4096),
    )


def test_compiled_without_graph_break():
    values, index = inputs(20, 3, 4)
    run = torch.compile(lambda v, i: segment_sum(v, i, 4, backend="triton") * 2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(values, index), segment_sum(values, index, 4) * 2)


def test_auto_on_the_cpu_is_parallel_and_use_overrides_it():
    values, index = inputs(9, 2, 3, torch.float64)
    with use("triton"), pytest.raises(ValueError, match="float64"):
        segment_sum(values, index, 3)
    segment_sum(values, index, 3)


def test_the_cost_model_counts_a_small_case():
    assert cost.bytes(10, 4, 3) == cost.bytes(10, 4, 3, backward=True) == (10 + 3) * 4 * 4 + 80
    assert cost.flops(10, 4, 3) == 40 and cost.flops(10, 4, 3, backward=True) == 0


values, index = inputs(8, 3, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((values[0], index, 4), r"expected values of shape \(M, D\), got \(3,\)"),
        ((values, index[:5], 4), r"expected index of shape \(M\) with M = 8, got \(5,\)"),
        ((values.long(), index, 4), "expected values of a floating-point dtype, got torch.int64"),
        ((values, index.float(), 4), "expected index of dtype torch.int64 or torch.int32, got torch.float32"),
        ((values, index.to("meta"), 4), "expected index on .* like values, got meta"),
        ((values, index, 0), "expected n to be an integer of at least 1, got 0"),
        ((values, index, 2.0), "expected n to be an integer of at least 1, got 2.0"),
        (([1.0], index, 4), "expected values to be a tensor of shape .* got list"),
    ],
)
def test_errors_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        segment_sum(*arguments)


def test_debug_checks_values_and_the_range_of_the_index():
    broken = values.clone()
    broken[2, 1] = float("nan")
    with use(debug=True):
        with pytest.raises(ValueError, match="expected values without NaN, got 1 NaN"):
            segment_sum(broken, index, 4)
        with pytest.raises(ValueError, match=r"expected index from 0 to 3, got 9 at position 5"):
            segment_sum(values, torch.where(torch.arange(8, device=DEVICE) == 5, 9, index), 4)
