"""depthwise_conv1d: one definition, three implementations, checked against a float64 loop and against torch's conv1d."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from seqarch.kernels import use
from seqarch.kernels.depthwise_conv1d import cost, depthwise_conv1d, depthwise_conv1d_step

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

BACKENDS = ["reference", "parallel", "triton"]
ALL = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("x", "w", "bias", "state")


def inputs(B, T, D, k, dilation=1, dtype=torch.float32, seed=0):
    """Random x, w, bias and state."""
    g = torch.Generator().manual_seed(seed)
    shapes = (B, T, D), (D, k), (D,), (B, (k - 1) * dilation, D)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).to(DEVICE) for s in shapes]


def runner(backend, dilation=1, causal=True, activation=None, with_bias=True):
    """Take (x, w), (x, w, bias), (x, w, bias, state) or (x, w, state): outputs, and the last state if causal."""

    def run(x, w, *rest):
        bias, state = (rest[0] if with_bias else None), (rest[-1] if len(rest) > with_bias else None)
        y = depthwise_conv1d(
            x, w, bias, dilation, causal, state, activation=activation, return_state=causal, backend=backend
        )
        return y if causal else (y,)

    return run


shapes = dict(
    B=st.integers(1, 2),
    T=st.one_of(st.sampled_from([1, 2, 63, 64, 65, 130]), st.integers(1, 70)),
    D=st.sampled_from([1, 3, 32, 65]),
    k=st.sampled_from([1, 2, 3, 4, 5, 7]),
    dilation=st.sampled_from([1, 1, 2, 3, 16, 50]),
    causal=st.booleans(),
    with_bias=st.booleans(),
    with_state=st.booleans(),
    activation=st.sampled_from([None, "silu"]),
    seed=st.integers(0, 10**6),
)


@pytest.mark.parametrize(
    "backend, dtype, cases",
    [("triton", torch.float32, 80), ("triton", torch.bfloat16, 30), ("triton", torch.float16, 30)]
    + [("parallel", d, 60) for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)],
)
def test_agrees_with_the_definition(backend, dtype, cases):
    @settings(max_examples=cases)
    @given(**shapes)
    def check(B, T, D, k, dilation, causal, with_bias, with_state, activation, seed):
        k = k if causal else k | 1
        x, w, bias, state = inputs(B, T, D, k, dilation, dtype, seed)
        kept = [True, True, with_bias, with_state and causal and k > 1]
        names = [n for n, keep in zip(NAMES, kept, strict=True) if keep]
        tensors = [t for t, keep in zip((x, w, bias, state), kept, strict=True) if keep]
        options = dict(dilation=dilation, causal=causal, activation=activation, with_bias=with_bias)
        assert_agree(runner(backend, **options), runner("reference", **options), tensors, steps=T, names=names)

    check()


@ALL
@pytest.mark.parametrize("k, dilation", [(1, 1), (4, 1), (5, 3), (3, 40)])
def test_is_a_grouped_convolution(backend, k, dilation):
    """torch computes correlations, so its weights are ours reversed; the last case reaches back beyond the start."""
    x, w, bias, _ = inputs(2, 37, 6, k, dilation)
    for causal in (True, False) if k % 2 else (True,):
        reach = (k - 1) * dilation
        padded = F.pad(x.mT, (reach, 0) if causal else (reach // 2, reach // 2))
        want = F.conv1d(padded, w.flip(1)[:, None], bias, dilation=dilation, groups=6).mT
        assert error(depthwise_conv1d(x, w, bias, dilation, causal, backend=backend), want) < 1e-6
        got = depthwise_conv1d(x, w, bias, dilation, causal, activation="silu", backend=backend)
        assert error(got, F.silu(want)) < 1e-6


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@pytest.mark.parametrize("causal, activation", [(True, None), (True, "silu"), (False, "silu")])
@pytest.mark.parametrize("T", [1, 11])
def test_gradcheck(backend, causal, activation, T):
    tensors = inputs(2, T, 2, 3, 2, torch.float64)[: 4 if causal else 3]
    run = runner(backend, 2, causal, activation)
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in tensors])


@ALL
class TestLaws:
    @pytest.mark.parametrize("k, dilation, cut", [(4, 1, 13), (4, 1, 2), (3, 10, 15), (1, 1, 5), (3, 10, 0)])
    def test_two_pieces_equal_the_whole(self, backend, k, dilation, cut):
        x, w, bias, state = inputs(2, 41, 3, k, dilation)
        options = dict(activation="silu", return_state=True, backend=backend)
        whole, last = depthwise_conv1d(x, w, bias, dilation, state=state, **options)
        first, between = depthwise_conv1d(x[:, :cut], w, bias, dilation, state=state, **options)
        second, final = depthwise_conv1d(x[:, cut:], w, bias, dilation, state=between, **options)
        torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
        assert torch.equal(final, last)

    def test_no_state_is_a_state_of_zeros(self, backend):
        x, w, bias, state = inputs(2, 9, 3, 4, 5)
        y, last = depthwise_conv1d(x, w, bias, 5, return_state=True, backend=backend)
        zeros = torch.zeros_like(state)
        want, want_last = depthwise_conv1d(x, w, bias, 5, state=zeros, return_state=True, backend=backend)
        torch.testing.assert_close(y, want)
        assert torch.equal(last, want_last)
        assert torch.equal(last, torch.cat([zeros, x], dim=1)[:, -15:])

    def test_steps_equal_the_whole(self, backend):
        x, w, bias, _ = inputs(2, 20, 3, 3, 4)
        whole, last = depthwise_conv1d(x, w, bias, 4, activation="silu", return_state=True, backend=backend)
        state = None
        for t in range(20):
            y, state = depthwise_conv1d_step(x[:, t], w, bias, 4, state, activation="silu")
            torch.testing.assert_close(y, whole[:, t])
        assert torch.equal(state, last)

    def test_later_inputs_cannot_change_earlier_outputs(self, backend):
        x, w, bias, _ = inputs(1, 70, 3, 4, 3)
        y = depthwise_conv1d(x, w, bias, 3, backend=backend)
        for t in (1, 31, 64):
            changed = x.clone()
            changed[:, t] += 1
            z = depthwise_conv1d(changed, w, bias, 3, backend=backend)
            reached = (y != z).any(-1)[0].nonzero().flatten().tolist()
            assert reached == [s for s in range(t, t + 12, 3) if s < 70]  # the current step and three more, no other

    def test_a_centred_convolution_is_the_causal_one_read_later(self, backend):
        x, w, bias, _ = inputs(1, 70, 3, 5, 3)
        longer = F.pad(x, (0, 0, 0, 6))
        late = depthwise_conv1d(longer, w, bias, 3, backend=backend)[:, 6:]
        torch.testing.assert_close(depthwise_conv1d(x, w, bias, 3, causal=False, backend=backend), late)

    def test_mirrored_taps_on_a_mirrored_sequence(self, backend):
        x, w, bias, _ = inputs(1, 70, 3, 5, 3)
        y = depthwise_conv1d(x, w, bias, 3, causal=False, backend=backend)
        mirrored = depthwise_conv1d(x.flip(1), w.flip(1), bias, 3, causal=False, backend=backend)
        torch.testing.assert_close(mirrored.flip(1), y)

    def test_one_tap_of_one_copies_its_input_late(self, backend):
        x, _, _, _ = inputs(2, 70, 3, 4)
        w = torch.eye(4, device=DEVICE)[2].expand(3, 4)
        y = depthwise_conv1d(x, w, dilation=10, backend=backend)
        assert torch.equal(y[:, 20:], x[:, :-20]) and (y[:, :20] == 0).all()

    def test_a_nan_reaches_only_the_outputs_that_see_it(self, backend):
        x, w, _, _ = inputs(1, 70, 3, 4)
        x[:, 66] = torch.nan
        y = depthwise_conv1d(x, w, backend=backend)
        assert torch.isfinite(y[:, :66]).all() and y[:, 66:].isnan().all()

    def test_strides_do_not_matter(self, backend):
        x, w, bias, state = inputs(3, 20, 4, 4)
        channels_first = x.mT.contiguous().mT  # what a caller with (B, D, T) passes
        strided = [channels_first, w.T.contiguous().T, bias[None].expand(2, -1)[0], state.mT.contiguous().mT]
        options = dict(activation="silu", return_state=True, backend=backend)
        want = depthwise_conv1d(x, w, bias, state=state, **options)
        x, w, bias, state = strided
        torch.testing.assert_close(depthwise_conv1d(x, w, bias, state=state, **options), want)

    def test_two_runs_are_bit_identical(self, backend):
        results = []
        for _ in range(2):
            tensors = [x.requires_grad_() for x in inputs(2, 70, 3, 4)]
            y, _ = runner(backend, activation="silu")(*tensors)
            results.append((y, *torch.autograd.grad((y * y).sum(), tensors)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    def test_empty_sequence_returns_the_state(self, backend):
        x, w, bias, state = inputs(2, 0, 3, 4, 2)
        y, last = depthwise_conv1d(x, w, bias, 2, state=state, return_state=True, backend=backend)
        assert y.shape == (2, 0, 3) and torch.equal(last, state)
        assert depthwise_conv1d(x, w[:, :3], causal=False, backend=backend).shape == (2, 0, 3)

    def test_taps_may_be_more_precise_than_the_sequence(self, backend):
        x, w, bias, _ = inputs(1, 20, 3, 4)
        leaves = [x.bfloat16().requires_grad_(), w.requires_grad_(), bias.requires_grad_()]
        y = depthwise_conv1d(*leaves, backend=backend)
        assert y.dtype == torch.bfloat16
        assert error(y, depthwise_conv1d(x.bfloat16().float(), w, bias)) < 1e-2
        gradients = torch.autograd.grad(y.float().sum(), leaves)
        assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]


def test_blocks_of_a_wide_sequence():
    """More elements than one block of the parallel form holds, with a ragged last block."""
    x, w, bias, state = inputs(1, 1100, 1000, 3, 2)
    whole = [x, w, bias, state]
    assert_agree(runner("parallel", 2), runner("reference", 2), whole, steps=1100, names=NAMES)


def test_65536_steps():
    x, w, bias, _ = inputs(1, 65536, 4, 4, 4000)
    y = depthwise_conv1d(x, w, bias, 4000, backend="parallel")
    want = depthwise_conv1d(x.double(), w.double(), bias.double(), 4000, backend="reference")
    assert error(y, want) < 1e-6


@pytest.mark.parametrize("activation", [None, "silu"])
def test_memory_is_linear_in_length(activation):
    def make(T):
        return inputs(1, T, 8, 4, 3)

    assert_memory_is_linear(runner("parallel", 3, activation=activation), make, lengths=(1024, 2048, 4096))


def test_compiled_without_graph_break():
    x, w, bias, state = inputs(2, 20, 3, 4)

    def run(x, w, bias, state):
        y, last = depthwise_conv1d(x, w, bias, state=state, activation="silu", return_state=True, backend="triton")
        return y * 2, last

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, w, bias, state), run(x, w, bias, state))
    leaves = [t.clone().requires_grad_() for t in (x, w, bias, state)]
    got, want = (torch.autograd.grad(f(*leaves)[0].sum(), leaves) for f in (compiled, run))
    torch.testing.assert_close(got, want)


@ALL
def test_many_taps(backend):
    x, w, bias, _ = inputs(1, 20, 2, 65)
    assert_agree(runner(backend), runner("reference"), [x, w, bias], steps=65, names=NAMES[:3])


def test_auto_on_the_cpu_is_parallel_and_use_overrides_it():
    x, w, _, _ = inputs(1, 9, 2, 3, dtype=torch.float64)
    with use("triton"), pytest.raises(ValueError, match="float64"):
        depthwise_conv1d(x, w)
    depthwise_conv1d(x, w)


def test_the_cost_model_counts_a_small_case():
    assert cost.bytes(2, 10, 3, 4) == 2 * (2 * 10 * 3) * 4
    assert cost.bytes(2, 10, 3, 4, itemsize=2, backward=True) == 3 * (2 * 10 * 3) * 2
    assert cost.flops(2, 10, 3, 4) == 2 * cost.flops(1, 10, 3, 4)
    x, w, _, state = inputs(2, 5, 3, 4, 6)
    assert cost.state_floats(2, 3, 4, 6) == state.numel()
    assert depthwise_conv1d(x, w, dilation=6, return_state=True)[1].numel() == state.numel()


x, w, bias, state = inputs(2, 8, 4, 3, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((x[0], w), r"expected x of shape \(B, T, D\), got \(8, 4\)"),
        ((x, w[:3]), r"expected w of shape \(D, k\) with D = 4, got \(3, 3\)"),
        ((x, w[:, :0]), r"expected w with at least one tap, got \(4, 0\)"),
        ((x, w, bias[:2]), r"expected bias of shape \(D\) with D = 4, got \(2,\)"),
        ((x, w, bias, 0), "expected dilation to be an integer of at least 1, got 0"),
        ((x, w, bias, 2.0), "expected dilation to be an integer of at least 1, got 2.0"),
        ((x, w[:, :2], bias, 2, False), "expected an odd number of taps k with causal=False, got 2"),
        ((x, w, bias, 2, False, state), "expected neither state nor return_state with causal=False"),
        (
            (x, w, bias, 2, True, state[:, 1:]),
            r"expected state of shape \(B, \(k-1\)\*dilation, D\) with B = 2, \(k-1\)\*dilation = 4, D = 4, got \(2, 3, 4\)",
        ),
        ((x.long(), w), "expected x of a floating-point dtype, got torch.int64"),
        ((x, w.to("meta")), "expected w on .* like x, got meta"),
        (([1.0], w), "expected x to be a tensor of shape .* got list"),
    ],
)
def test_errors_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv1d(*arguments)


def test_errors_of_options_and_of_a_step():
    with pytest.raises(ValueError, match="expected activation to be None or 'silu', got 'relu'"):
        depthwise_conv1d(x, w, activation="relu")
    with pytest.raises(ValueError, match=r"expected x of shape \(B, D\), got \(2, 8, 4\)"):
        depthwise_conv1d_step(x, w)
    with pytest.raises(ValueError, match=r"expected state of shape .* got \(2, 3, 4\)"):
        depthwise_conv1d_step(x[:, 0], w, bias, 2, state[:, 1:])


def test_debug_names_the_input_with_nan():
    broken = w.clone()
    broken[1, 1] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected w without NaN, got 1 NaN"):
        depthwise_conv1d(x, broken)
