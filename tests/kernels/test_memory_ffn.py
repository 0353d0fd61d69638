"""memory_ffn: one definition, three implementations, checked against a float64 loop and against one wider layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from seqarch.kernels import use
from seqarch.kernels.memory_ffn import cost, memory_ffn

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

BACKENDS = ["reference", "parallel", "triton"]
ALL = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("x", "bank_in", "bank_out", "bank_gate", "w")


def inputs(B, L, d, r, M, k, dtype=torch.float32, picks="any", seed=0):
    """x, the banks (the gate last, so that it can be left out), w, and idx; `picks` says which blocks are shared."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype).to(DEVICE)

    idx = torch.randint(0, M, (B, k), generator=g)
    if picks == "one":  # every slot of every sequence: the last block, all others unused
        idx = torch.full_like(idx, M - 1)
    elif picks == "rows":  # a sequence repeats its own block
        idx = idx[:, :1].expand(B, k).contiguous()
    x, within, out = normal(B, L, d), normal(M, r, d, scale=d**-0.5), normal(M, d, r, scale=r**-0.5)
    gate, w = normal(M, r, d, scale=d**-0.5), normal(B, k)
    if dtype.itemsize == 2:  # two picks of one block whose weights cancel leave nothing but their rounding
        w = w.abs()
    return [x, within, out, gate, w], idx.to(DEVICE)


def runner(backend, idx, gated=True, weighted=True, sparse_grad=False):
    """A function of x, bank_in, bank_out and, where they are used, bank_gate and w."""

    def run(x, bank_in, bank_out, *rest):
        rest = list(rest)
        gate = rest.pop(0) if gated else None
        w = rest.pop(0) if weighted else None
        return [memory_ffn(x, bank_in, gate, bank_out, idx, w, sparse_grad=sparse_grad, backend=backend)]

    return run


def used(tensors, gated=True, weighted=True):
    return [z for z, keep in zip(tensors, (True, True, True, gated, weighted), strict=True) if keep]


def compare(backends, tensors, idx, gated=True, weighted=True):
    """Assert that the backends agree with the float64 loop."""
    for backend in backends:
        assert_agree(
            runner(backend, idx, gated, weighted), runner("reference", idx, gated, weighted),
            used(tensors, gated, weighted), steps=1, names=used(NAMES, gated, weighted), loose=("w",), matmul=True,
        )  # fmt: skip


shapes = dict(
    B=st.integers(1, 2),
    L=st.one_of(st.integers(1, 20), st.sampled_from([1, 31, 33])),
    d=st.sampled_from([3, 4, 16, 18]),  # a gradient of one number may cancel to nothing: tested by itself
    r=st.sampled_from([1, 3, 16, 18]),
    M=st.integers(1, 3),
    k=st.sampled_from([1, 1, 2]),
    picks=st.sampled_from(["any", "one", "rows"]),
    gated=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 10**6),
)


def check_against_the_definition(backends, dtype, B, L, d, r, M, k, picks, gated, weighted, seed):
    compare(backends, *inputs(B, L, d, r, M, k, dtype, picks, seed), gated, weighted)


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
@given(**(shapes | {"L": st.integers(1, 130), "B": st.integers(1, 4), "k": st.integers(1, 4)}))
def test_the_batched_form_agrees_in_float64(**case):
    check_against_the_definition(["parallel"], torch.float64, **case)


@pytest.mark.parametrize("gated", [True, False])
def test_blocks_of_one_number(gated):
    """One token and one pick: no sum that could cancel."""
    for seed in range(5):
        compare(["parallel", "triton"], *inputs(1, 1, 1, 1, 2, 1, seed=seed), gated=gated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_tokens_rows_and_columns_than_one_tile(dtype):
    compare(["triton"], *inputs(2, 70, 80, 70, 3, 2, dtype))


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("picks", ["any", "one"])
def test_gradcheck(backend, gated, picks):
    tensors, idx = inputs(2, 3, 2, 3, 3, 2, torch.float64, picks)
    tensors = [z.requires_grad_() for z in used(tensors, gated)]
    assert torch.autograd.gradcheck(runner(backend, idx, gated), tensors)


@ALL
class TestLaws:
    def test_a_fetched_block_widens_a_layer(self, backend):
        """A feed-forward layer plus the memory is one layer with the rows of all blocks stacked."""
        (x, within, out, gate, _), idx = inputs(2, 9, 8, 5, 4, 2)
        g = torch.Generator().manual_seed(1)
        W_in, W_gate, W_out = (torch.randn(*s, generator=g).to(DEVICE) for s in ((6, 8), (6, 8), (8, 6)))
        base = (F.silu(x @ W_gate.T) * (x @ W_in.T)) @ W_out.T
        y = base + memory_ffn(x, within, gate, out, idx, backend=backend)
        for b, picks in enumerate(idx):
            rows, gates = torch.cat([W_in, *within[picks]]), torch.cat([W_gate, *gate[picks]])
            wide = (F.silu(x[b] @ gates.T) * (x[b] @ rows.T)) @ torch.cat([W_out, *out[picks]], dim=1).T
            assert error(y[b], wide) < 1e-5

    def test_a_bank_that_writes_zero_changes_nothing(self, backend):
        """How a memory starts: exactly nothing is added, and yet its output matrices get a gradient."""
        (x, within, out, gate, _), idx = inputs(2, 9, 8, 5, 4, 2)
        out = torch.zeros_like(out).requires_grad_()
        y = memory_ffn(x, within, gate, out, idx, sparse_grad=False, backend=backend)
        assert torch.equal(x + y, x)
        assert torch.autograd.grad(y.sum(), out)[0].abs().sum() > 0

    def test_a_repeated_pick_counts_twice(self, backend):
        (x, within, out, gate, _), idx = inputs(2, 9, 8, 5, 4, 1)
        twice = memory_ffn(x, within, gate, out, idx.repeat(1, 2), backend=backend)
        weighted = memory_ffn(x, within, gate, out, idx, torch.full_like(idx, 2, dtype=x.dtype), backend=backend)
        once = memory_ffn(x, within, gate, out, idx, backend=backend)
        torch.testing.assert_close(twice, 2 * once, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(weighted, 2 * once, rtol=1e-5, atol=1e-5)

    def test_gradients_of_the_banks_hold_the_picked_blocks_only(self, backend):
        tensors, _ = inputs(3, 5, 4, 3, 6, 2)
        idx = torch.tensor([[4, 1], [1, 1], [4, 1]], device=DEVICE)  # blocks 0, 2, 3 and 5 are not picked
        grads = {}
        for sparse_grad in (True, False):
            leaves = [z.clone().requires_grad_() for z in tensors]
            (y,) = runner(backend, idx, sparse_grad=sparse_grad)(*leaves)
            (y * y).sum().backward()
            grads[sparse_grad] = [z.grad for z in leaves]
        for name, sparse, dense in zip(NAMES, *grads.values(), strict=True):
            assert sparse.is_sparse == name.startswith("bank") and not dense.is_sparse
            if sparse.is_sparse:
                sparse = sparse.coalesce()
                assert sparse.indices().tolist() == [[1, 4]]
                sparse = sparse.to_dense()
                assert (dense[[0, 2, 3, 5]] == 0).all() and (dense[[1, 4]] != 0).all()
            assert error(sparse, dense) < 1e-6

    def test_an_optimiser_step_leaves_other_blocks_alone(self, backend):
        (x, *banks), idx = inputs(2, 5, 4, 3, 6, 1, picks="one")
        leaves = [z.clone().requires_grad_() for z in banks[:3]]
        (y,) = runner(backend, idx, weighted=False, sparse_grad=True)(x, *leaves)
        y.sum().backward()
        torch.optim.SparseAdam(leaves, lr=0.1).step()
        for before, after in zip(banks[:3], leaves, strict=True):
            assert torch.equal(before[:5], after[:5]) and not torch.equal(before[5], after[5])

    def test_sequences_and_tokens_are_independent(self, backend):
        (x, within, out, gate, w), idx = inputs(3, 20, 8, 5, 4, 2)
        y = memory_ffn(x, within, gate, out, idx, w, backend=backend)
        broken = x.clone()
        broken[1, 7:] = torch.nan
        other = memory_ffn(broken, within, gate, out, idx, w, backend=backend)
        assert torch.equal(other[[0, 2]], y[[0, 2]]) and torch.equal(other[1, :7], y[1, :7])
        assert other[1, 7:].isnan().all()

    def test_blocks_that_are_not_picked_are_not_read(self, backend):
        (x, *banks, w), idx = inputs(3, 5, 8, 5, 4, 2, picks="one")
        within, out, gate = banks
        y = memory_ffn(x, within, gate, out, idx, w, backend=backend)
        for bank in banks:
            bank[:3] = torch.nan
        assert torch.equal(memory_ffn(x, within, gate, out, idx, w, backend=backend), y)

    def test_pieces_of_a_sequence_equal_the_whole(self, backend):
        (x, within, out, gate, w), idx = inputs(2, 40, 8, 5, 4, 2)
        whole = memory_ffn(x, within, gate, out, idx, w, backend=backend)
        pieces = [memory_ffn(z, within, gate, out, idx, w, backend=backend) for z in (x[:, :1], x[:, 1:34], x[:, 34:])]
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)

    def test_saturated_gates(self, backend):
        """Gates of hundreds: silu is the identity there, or zero, and nothing overflows."""
        tensors, idx = inputs(2, 9, 8, 5, 4, 2)
        tensors[3] *= 300
        compare([backend], tensors, idx)

    def test_strides_do_not_matter(self, backend):
        (x, within, out, gate, w), idx = inputs(2, 20, 8, 5, 4, 2)
        want = memory_ffn(x, within, gate, out, idx, w, backend=backend)
        strided = [z.transpose(0, -1).contiguous().transpose(0, -1) for z in (x, within, gate, out, idx, w)]
        torch.testing.assert_close(memory_ffn(*strided, backend=backend), want, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("sparse_grad", [True, False])
    def test_two_runs_are_bit_identical(self, backend, sparse_grad):
        results = []
        for _ in range(2):
            tensors, idx = inputs(3, 20, 8, 5, 2, 2)
            leaves = [z.requires_grad_() for z in tensors]
            (y,) = runner(backend, idx, sparse_grad=sparse_grad)(*leaves)
            grads = torch.autograd.grad((y * y).sum(), leaves)
            results.append([y, *(g.to_dense() for g in grads)])
        assert all(torch.equal(u, v) for u, v in zip(*results, strict=True))

    @pytest.mark.parametrize("B, L, r, k", [(2, 3, 5, 0), (2, 0, 5, 2), (0, 3, 5, 2), (2, 3, 0, 2)])
    @pytest.mark.parametrize("sparse_grad", [True, False])
    def test_nothing_fetched_gives_zero(self, backend, B, L, r, k, sparse_grad):
        (x, within, out, gate, w), idx = inputs(B, L, 4, max(r, 1), 3, k)
        leaves = [z.requires_grad_() for z in (x, within[:, :r], out[:, :, :r], gate[:, :r], w)]
        (y,) = runner(backend, idx, sparse_grad=sparse_grad)(*leaves)
        assert torch.equal(y, torch.zeros_like(x))
        grads = torch.autograd.grad((x + y).sum(), leaves, allow_unused=True)
        assert torch.equal(grads[0], torch.ones_like(x))
        assert all(g is None or (g.to_dense() == 0).all() for g in grads[1:])

    def test_the_output_has_the_dtype_of_x(self, backend):
        (x, within, out, gate, w), idx = inputs(1, 5, 4, 3, 2, 2, torch.bfloat16)
        assert memory_ffn(x, within, gate, out, idx, w.float(), backend=backend).dtype == torch.bfloat16


def test_65536_tokens():
    (x, within, out, gate, w), idx = inputs(1, 65536, 4, 3, 3, 2)
    want = memory_ffn(*(z.double() for z in (x, within, gate, out)), idx, w.double(), backend="reference")
    assert error(memory_ffn(x, within, gate, out, idx, w, backend="parallel"), want) < 1e-5


def test_memory_is_linear_in_length():
    _, idx = inputs(2, 1, 4, 3, 3, 2)
    assert_memory_is_linear(runner("parallel", idx), lambda L: inputs(2, L, 4, 3, 3, 2)[0])


@pytest.mark.parametrize("weighted", [True, False])
def test_compiled_without_graph_break(weighted):
    tensors, idx = inputs(2, 20, 8, 5, 4, 2)
    leaves = [z.requires_grad_() for z in used(tensors, weighted=weighted)]
    run = runner("triton", idx, weighted=weighted)
    compiled = torch.compile(lambda *z: run(*z)[0] * 2, backend="aot_eager", fullgraph=True)
    y, want = compiled(*leaves), run(*leaves)[0] * 2
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(want.sum(), leaves))


def test_auto_on_the_cpu_is_parallel_and_use_overrides_it():
    (x, within, out, gate, _), idx = inputs(2, 5, 4, 3, 3, 2, torch.float64)
    with use("triton"), pytest.raises(ValueError, match="float64"):
        memory_ffn(x, within, gate, out, idx)
    want = memory_ffn(x, within, gate, out, idx, backend="parallel")
    assert torch.equal(memory_ffn(x, within, gate, out, idx), want)


def test_the_cost_model_counts_a_small_case():
    tensors, _ = inputs(2, 5, 4, 3, 6, 1)
    assert cost.parameters(4, 3) == sum(z[0].numel() for z in tensors[1:4])
    assert cost.parameters(4, 3, gated=False) == sum(z[0].numel() for z in tensors[1:3])
    assert cost.bytes(2, 5, 4, 3, 6, 1, itemsize=2) == 2 * (2 * tensors[0].numel() + 2 * cost.parameters(4, 3))
    assert cost.bytes(9, 5, 4, 3, 2, 1) - cost.bytes(9, 5, 4, 3, 1, 1) == 4 * cost.parameters(
        4, 3
    )  # shared blocks: once
    assert cost.flops(2, 5, 4, 3, 6, 2) == 2 * cost.flops(2, 5, 4, 3, 6, 1)
    assert cost.flops(2, 5, 4, 3, 6, 1, backward=True) == 2 * cost.flops(2, 5, 4, 3, 6, 1)


(x, within, out, gate, w), idx = inputs(2, 5, 8, 3, 4, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((x[0], within, gate, out, idx), r"expected x of shape \(B, L, d\), got \(5, 8\)"),
        ((x, within[..., :7], gate, out, idx), r"expected bank_in of shape \(M, r, d\) with d = 8, got \(4, 3, 7\)"),
        ((x, within, gate[:, :2], out, idx), r"expected bank_gate of shape \(M, r, d\) with .* got \(4, 2, 8\)"),
        ((x, within, gate, out.mT, idx), r"expected bank_out of shape \(M, d, r\) with .* got \(4, 3, 8\)"),
        ((x, within, gate, out, idx[:1]), r"expected idx of shape \(B, k\) with B = 2, got \(1, 2\)"),
        ((x, within, gate, out, idx, w[:, :1]), r"expected w of shape \(B, k\) with B = 2, k = 2, got \(2, 1\)"),
        ((x.long(), within, gate, out, idx), "expected x of a floating-point dtype, got torch.int64"),
        ((x, within.double(), gate, out, idx), "expected bank_in of dtype torch.float32 like x, got torch.float64"),
        ((x, within, gate, out, idx.int()), "expected idx of dtype torch.int64, got torch.int32"),
        ((x, within, gate, out, idx.to("meta")), "expected idx on .* like x, got meta"),
        (([1.0], within, gate, out, idx), "expected x to be a tensor of shape .* got list"),
    ],
)
def test_errors_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        memory_ffn(*arguments)


@ALL
@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_index_outside_the_bank_is_an_error(backend, wrong):
    with use(debug=True), pytest.raises(ValueError, match=f"expected idx from 0 to 3, .* got {wrong}"):
        memory_ffn(x, within, gate, out, torch.full_like(idx, wrong), backend=backend)


def test_debug_names_the_input_with_nan():
    broken = gate.clone()
    broken[0, 2, 1] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected bank_gate without NaN, got 1 NaN"):
        memory_ffn(x, within, broken, out, idx)
