"""block2_scan: one definition, three implementations, checked against a float64 loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import use
from seqarch.kernels.block2_scan import block2_scan, block2_scan_step
from seqarch.kernels.linear_scan import linear_scan

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

NAMES = ("J", "r", "h0")


def inputs(B, T, D, dtype=torch.float32, matrices="mixed", seed=0):
    """Random J, r, h0; `matrices` picks a kind that is hard in its own way."""
    g = torch.Generator().manual_seed(seed)
    J = torch.rand(B, T, D, 2, 2, generator=g, dtype=torch.float64) - 0.5  # row sums of at most 1: nothing grows
    angle = 6.3 * torch.rand(B, T, D, generator=g, dtype=torch.float64)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).unflatten(-1, (2, 2))
    if matrices == "turns":  # the state keeps its length for ever
        J = turn
    elif (
        matrices == "mixed"
    ):  # resets, exact keepers, an exchange of the components, a matrix without inverse, denormals
        identity, exchange = torch.eye(2), torch.eye(2).flip(0)
        special = torch.stack(
            [0 * identity, identity, exchange, torch.tensor([[0.5, 0.5], [0.0, 0.0]]), 1e-30 * exchange]
        )
        kind = torch.randint(0, 7, (B, T, D), generator=g)
        J = torch.where((kind < 5)[..., None, None], special.double()[kind.clamp(max=4)], J)
    r = torch.randn(B, T, D, 2, generator=g, dtype=torch.float64)
    h0 = torch.randn(B, D, 2, generator=g, dtype=torch.float64)
    state = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    return [J.to(dtype).to(DEVICE), r.to(dtype).to(DEVICE), h0.to(state).to(DEVICE)]


def runner(backend, reverse=False):
    return lambda J, r, h0=None: block2_scan(J, r, h0, reverse=reverse, backend=backend)


def compare(backend, tensors, reverse=False):
    assert_agree(
        runner(backend, reverse),
        runner("reference", reverse),
        tensors,
        steps=tensors[1].shape[1],
        names=NAMES[: len(tensors)],
        loose="J",
    )


@pytest.mark.parametrize(
    "backend, dtype, examples",
    [
        ("triton", torch.float32, 60),
        ("triton", torch.bfloat16, 25),
        ("triton", torch.float16, 25),
        ("parallel", torch.float64, 60),
        ("parallel", torch.float32, 40),
        ("parallel", torch.bfloat16, 20),
    ],
)
def test_agrees_with_the_definition(backend, dtype, examples):
    @settings(max_examples=examples)
    @given(
        B=st.sampled_from([1, 1, 2]),
        T=st.one_of(st.sampled_from([1, 2, 63, 64, 65]), st.integers(1, 62), st.integers(1, 62)),
        D=st.sampled_from([1, 3, 16]),
        reverse=st.booleans(),
        with_h0=st.booleans(),
        matrices=st.sampled_from(["mixed", "uniform", "turns"]),
        seed=st.integers(0, 10**6),
    )
    def check(B, T, D, reverse, with_h0, matrices, seed):
        compare(backend, inputs(B, T, D, dtype, matrices, seed)[: 3 if with_h0 else 2], reverse)

    check()


@pytest.mark.parametrize("T, D", [(130, 17), (520, 1)])
@pytest.mark.parametrize("reverse", [False, True])
def test_more_than_one_block(T, D, reverse):
    """More channels than a block and more steps than two tiles; few channels and many steps, cut into segments."""
    for backend in ("triton", "parallel"):
        compare(backend, inputs(1, T, D), reverse)


@pytest.mark.parametrize("T", [600, 1025])
@pytest.mark.parametrize("reverse", [False, True])
def test_many_chunks(T, reverse):
    compare("parallel", inputs(2, T, 3, torch.float64), reverse)


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(backend, reverse):
    tensors = [x.requires_grad_() for x in inputs(2, 17, 2, torch.float64, "uniform")]
    assert torch.autograd.gradcheck(runner(backend, reverse), tensors)


@pytest.mark.parametrize("matrices", ["mixed", "turns"])
def test_65536_steps(matrices):
    """Turns keep the length of every contribution: the state is a sum over the whole past."""
    tensors = inputs(1, 65536, 1, torch.float32, matrices)
    h, hT = block2_scan(*tensors, backend="parallel")
    with torch.no_grad():
        want, want_T = block2_scan(*[x.double() for x in tensors], backend="reference")
    assert error(h, want) < 1e-4 and error(hT, want_T) < 1e-4


def test_diagonal_matrices_are_two_linear_scans():
    J, r, h0 = inputs(2, 50, 3)
    J = J * torch.eye(2, device=DEVICE)
    h, hT = block2_scan(J, r, h0)
    for i in range(2):
        want, want_T = linear_scan(J[..., i, i].contiguous(), r[..., i].contiguous(), h0[..., i].contiguous())
        torch.testing.assert_close(h[..., i], want)
        torch.testing.assert_close(hT[..., i], want_T)


@pytest.mark.parametrize("backend", ["reference", "parallel", "triton"])
@pytest.mark.parametrize("reverse", [False, True])
class TestLaws:
    def test_two_pieces_equal_the_whole(self, backend, reverse):
        J, r, h0 = inputs(2, 41, 3)
        whole, last = block2_scan(J, r, h0, reverse=reverse, backend=backend)
        pieces = [slice(13, 41), slice(0, 13)] if reverse else [slice(0, 13), slice(13, 41)]
        state, parts = h0, []
        for piece in pieces:
            part, state = block2_scan(J[:, piece], r[:, piece], state, reverse=reverse, backend=backend)
            parts.append(part)
        torch.testing.assert_close(torch.cat(parts[::-1] if reverse else parts, dim=1), whole)
        torch.testing.assert_close(state, last)

    def test_later_inputs_cannot_change_earlier_states(self, backend, reverse):
        J, r, h0 = inputs(2, 40, 3, matrices="uniform")
        h, _ = block2_scan(J, r, h0, reverse=reverse, backend=backend)
        for changed in (0, 1):  # the matrix of one step, then its input
            tensors = [J.clone(), r.clone()]
            tensors[changed][:, 20] += 1
            g, _ = block2_scan(*tensors, h0, reverse=reverse, backend=backend)
            before = slice(21, None) if reverse else slice(0, 20)
            assert torch.equal(h[:, before], g[:, before])
            assert not torch.equal(h[:, 20], g[:, 20])

    def test_a_zero_matrix_forgets_even_a_huge_past(self, backend, reverse):
        J, r, h0 = inputs(1, 30, 2, matrices="turns")
        J[:, 15] = 0
        r[:, :15] *= 1e30
        r[:, 16:] *= 1e30
        h, _ = block2_scan(J, r, h0, reverse=reverse, backend=backend)
        torch.testing.assert_close(h[:, 15], r[:, 15])

    def test_strides_do_not_matter(self, backend, reverse):
        J, r, h0 = inputs(3, 20, 4)
        strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (J.mT.contiguous().mT, r, h0)]
        want = block2_scan(J, r, h0, reverse=reverse, backend=backend)
        torch.testing.assert_close(block2_scan(*strided, reverse=reverse, backend=backend), want)

    def test_two_runs_are_bit_identical(self, backend, reverse):
        runs = []
        for _ in range(2):
            leaves = [x.requires_grad_() for x in inputs(2, 70, 3)]
            outputs = block2_scan(*leaves, reverse=reverse, backend=backend)
            runs.append([*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves)])
        assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))

    def test_empty_sequence_returns_the_state(self, backend, reverse):
        J, r, h0 = inputs(2, 0, 3)
        h, hT = block2_scan(J, r, h0, reverse=reverse, backend=backend)
        assert h.shape == (2, 0, 3, 2) and torch.equal(hT, h0)


def test_stepping_equals_the_scan():
    J, r, h0 = inputs(2, 9, 3)
    h, _ = block2_scan(J, r, h0)
    state = h0
    for t in range(9):
        state = block2_scan_step(J[:, t], r[:, t], state)
        torch.testing.assert_close(state, h[:, t])


def test_half_precision_returns_a_float32_state():
    h, hT = block2_scan(*inputs(2, 5, 3, torch.bfloat16))
    assert h.dtype == torch.bfloat16 and hT.dtype == torch.float32


def test_memory_is_linear_in_length():
    assert_memory_is_linear(runner("parallel"), lambda T: inputs(1, T, 4), lengths=(1024, 2048, 4096))


def test_compiled_without_graph_break():
    J, r, h0 = inputs(2, 20, 3)
    scan = torch.compile(lambda J, r: block2_scan(J, r, backend="triton")[0] * 2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(scan(J, r), block2_scan(J, r)[0] * 2)


def test_use_overrides_auto_only_inside():
    tensors = inputs(1, 9, 2, torch.float64)
    with use("triton"), pytest.raises(ValueError, match="float64"):
        block2_scan(*tensors)
    block2_scan(*tensors)


good = inputs(2, 8, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((good[0], good[1][0]), r"expected r of shape \(B, T, D, 2\), got \(8, 4, 2\)"),
        ((good[0][:, :5], good[1]), r"expected J of shape \(B, T, D, 2, 2\) with B = 2, .* got \(2, 5, 4, 2, 2\)"),
        ((good[0], good[1][..., :1]), r"expected r of shape \(B, T, D, 2\), got \(2, 8, 4, 1\)"),
        ((*good[:2], good[2][:1]), r"expected h0 of shape \(B, D, 2\) with B = 2, D = 4.*, got \(1, 4, 2\)"),
        ((good[0].double(), good[1]), "expected J of dtype torch.float32 like r, got torch.float64"),
        ((good[0].long(), good[1].long()), "expected r of a floating-point dtype, got torch.int64"),
        (([1.0], good[1]), "expected J to be a tensor of shape .* got list"),
    ],
)
def test_errors_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        block2_scan(*arguments)


def test_error_for_an_unknown_backend():
    with pytest.raises(ValueError, match="expected backend to be one of auto, reference, parallel, triton, got 'cuda'"):
        block2_scan(*good, backend="cuda")


def test_debug_names_the_input_with_nan():
    J, r, h0 = inputs(1, 4, 2)
    J[0, 2, 1, 0, 0] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected J without NaN, got 1 NaN"):
        block2_scan(J, r, h0)
