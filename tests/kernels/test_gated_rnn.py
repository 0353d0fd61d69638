"""rnn_scan, lstm_scan, gru_scan: one definition, three implementations, checked against a float64 loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import use
from seqarch.kernels.gated_rnn import gru_scan, lstm_scan, rnn_scan

from .agreement import DEVICE, assert_agree, error

CELLS = ("tanh", "relu", "lstm", "gru")
BLOCKS = {"tanh": 1, "relu": 1, "lstm": 4, "gru": 3}
NAMES = {
    "tanh": ("xp", "w_h", "h0"),
    "relu": ("xp", "w_h", "h0"),
    "lstm": ("xp", "w_h", "h0", "s0"),
    "gru": ("xp", "w_h", "b_h", "h0"),
}


def runner(cell, backend):
    """A function of the inputs, in the order of NAMES (states may be left out), that returns h and the final states."""
    if cell == "lstm":

        def run(*inputs):
            h, (hT, sT) = lstm_scan(*inputs, backend=backend)
            return h, hT, sT

        return run
    if cell == "gru":
        return lambda *inputs: gru_scan(*inputs, backend=backend)
    return lambda xp, w_h, h0=None: rnn_scan(xp, w_h, h0, cell, backend=backend)


def inputs(cell, B, T, H, dtype=torch.float32, saturated=False, seed=0):
    """Random inputs; saturated: a fifth of the pre-activations are thrown to +-40."""
    g = torch.Generator().manual_seed(seed)
    k = BLOCKS[cell]
    xp = torch.randn(B, T, k * H, generator=g, dtype=torch.float64)
    if saturated:
        xp += 40 * torch.randint(-2, 3, xp.shape, generator=g).div(2, rounding_mode="trunc")
    scale = 0.5 if cell == "relu" else 1.0  # a ReLU network with larger weights explodes, rightly
    w_h = (2 * torch.rand(k * H, H, generator=g, dtype=torch.float64) - 1) * scale / H**0.5
    state = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    tensors = [xp.to(dtype), w_h.to(dtype)]
    if cell == "gru":
        tensors.append(torch.randn(3 * H, generator=g, dtype=torch.float64).to(dtype))
    for _ in range(2 if cell == "lstm" else 1):
        tensors.append((2 * torch.rand(B, H, generator=g, dtype=torch.float64) - 1).to(state))
    return [x.to(DEVICE) for x in tensors]


def without_state(cell, tensors):
    return tensors[: 3 if cell == "gru" else 2]


shapes = dict(
    cell=st.sampled_from(CELLS),
    B=st.one_of(st.integers(1, 4), st.just(17)),
    T=st.one_of(st.sampled_from([1, 2, 3]), st.integers(1, 14)),
    H=st.sampled_from([1, 2, 5, 16, 17, 24]),
    with_state=st.booleans(),
    saturated=st.booleans(),
    seed=st.integers(0, 10**6),
)


# In half precision a gradient that is one sum of a few cancelling terms has no meaningful relative error: draw no tiny ones.
half_shapes = shapes | dict(B=st.integers(2, 4), T=st.integers(2, 10), H=st.sampled_from([16, 17, 24]))


def compare(backend, dtype, cell, B, T, H, with_state, saturated, seed):
    tensors = inputs(cell, B, T, H, dtype, saturated, seed)
    tensors = tensors if with_state else without_state(cell, tensors)
    names = NAMES[cell][: len(tensors)]
    assert_agree(
        runner(cell, backend),
        runner(cell, "reference"),
        tensors,
        steps=T,
        names=names,
        loose=names,
        matmul=True,
    )


@settings(max_examples=140)
@given(**shapes)
def test_triton_agrees_with_the_definition(cell, B, T, H, with_state, saturated, seed):
    compare("triton", torch.float32, cell, B, T, H, with_state, saturated, seed)


@pytest.mark.parametrize(
    "backend, dtype",
    [
        ("parallel", torch.float32),
        ("parallel", torch.float64),
        ("reference", torch.float32),
    ],
)
@settings(max_examples=40)
@given(**shapes)
def test_agrees_with_the_definition(backend, dtype, cell, B, T, H, with_state, saturated, seed):
    compare(backend, dtype, cell, B, T, H, with_state, saturated, seed)


@pytest.mark.parametrize("backend", ["triton", "parallel"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@settings(max_examples=30)
@given(**half_shapes)
def test_half_precision(backend, dtype, cell, B, T, H, with_state, saturated, seed):
    compare(backend, dtype, cell, B, T, H, with_state, saturated, seed)


def with_flags(backend, cont):
    def run(*tensors):
        h, (hT, sT) = lstm_scan(*tensors, cont=cont, backend=backend)
        return h, hT, sT

    return run


@pytest.mark.parametrize(
    "backend, dtype, cases",
    [("triton", torch.float32, 40), ("parallel", torch.float32, 30), ("parallel", torch.float64, 30)],
)
def test_continuation_flags_agree_with_the_definition(backend, dtype, cases):
    @settings(max_examples=cases)
    @given(
        **{name: shapes[name] for name in ("B", "T", "H", "saturated", "seed")}, share=st.sampled_from([0.0, 0.5, 1.0])
    )
    def check(B, T, H, saturated, seed, share):
        tensors = inputs("lstm", B, T, H, dtype, saturated, seed)
        cont = (torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < share).to(DEVICE)
        names = NAMES["lstm"]
        assert_agree(
            with_flags(backend, cont),
            with_flags("reference", cont),
            tensors,
            steps=T,
            names=names,
            loose=names,
            matmul=True,
        )

    check()


@pytest.mark.parametrize("backend", ["reference", "parallel"])
def test_gradcheck_with_continuation_flags(backend):
    cont = torch.tensor([[1, 0, 1], [0, 1, 0]], device=DEVICE)
    assert torch.autograd.gradcheck(
        with_flags(backend, cont), [x.requires_grad_() for x in inputs("lstm", 2, 3, 2, torch.float64)]
    )


@pytest.mark.parametrize("backend", ["reference", "parallel", "triton"])
class TestContinuation:
    def test_packed_sequences_equal_separate_ones(self, backend):
        xp, w_h, h0, s0 = inputs("lstm", 2, 12, 5)
        cont = torch.ones(2, 12, device=DEVICE)
        cont[:, [0, 7]] = 0
        h, (hT, sT) = lstm_scan(xp, w_h, h0, s0, cont, backend=backend)
        first, _ = lstm_scan(xp[:, :7], w_h, backend=backend)
        second, final = lstm_scan(xp[:, 7:], w_h, backend=backend)
        torch.testing.assert_close(h, torch.cat([first, second], dim=1))
        torch.testing.assert_close((hT, sT), final)
        assert not torch.allclose(lstm_scan(xp, w_h, backend=backend)[0][:, 7:], second, atol=1e-3)

    def test_flags_of_one_change_nothing(self, backend):
        tensors = inputs("lstm", 2, 9, 5)
        h, final = lstm_scan(*tensors, torch.ones(2, 9, dtype=torch.bool, device=DEVICE), backend=backend)
        want, wanted = lstm_scan(*tensors, backend=backend)
        assert torch.equal(h, want) and all(torch.equal(x, y) for x, y in zip(final, wanted, strict=True))

    def test_no_gradient_crosses_a_zero(self, backend):
        xp, w_h, h0, s0 = (x.requires_grad_() for x in inputs("lstm", 1, 8, 3))
        cont = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1]], device=DEVICE)
        h, _ = lstm_scan(xp, w_h, h0, s0, cont, backend=backend)
        before = torch.autograd.grad(h[:, 3:].sum(), (xp, h0, s0))
        assert (before[0][:, :3] == 0).all() and (before[0][:, 4:] != 0).all()
        assert (before[1] == 0).all() and (before[2] == 0).all()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("B, T, H", [(1, 1, 1), (2, 40, 17), (2, 3, 64), (1, 2, 128), (33, 2, 3), (1, 130, 4)])
def test_sizes_at_the_edges(cell, B, T, H):
    """More rows than a tile, the largest hidden size, a long walk: forward 1e-5, gradients 1e-4."""
    tensors = inputs(cell, B, T, H)
    for backend in ("triton", "parallel"):
        assert_agree(
            runner(cell, backend), runner(cell, "reference"), tensors, steps=T, names=NAMES[cell], loose=NAMES[cell],
            matmul=True,
        )  # fmt: skip


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("H", [130, 200])
def test_any_hidden_size_in_pytorch(cell, H):
    tensors = inputs(cell, 2, 9, H)
    assert_agree(
        runner(cell, "parallel"), runner(cell, "reference"), tensors, steps=9, names=NAMES[cell], loose=NAMES[cell],
        matmul=True,
    )  # fmt: skip
    if DEVICE == "cuda":  # auto falls back instead of raising
        assert error(runner(cell, "auto")(*tensors)[0], runner(cell, "parallel")(*tensors)[0]) == 0.0


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(backend, cell):
    tensors = [x.requires_grad_() for x in inputs(cell, 2, 5, 3, torch.float64)]
    assert torch.autograd.gradcheck(runner(cell, backend), tensors)


@pytest.mark.parametrize("cell", CELLS)
def test_agrees_with_torch_nn(cell):
    """PyTorch's own layers, with the same weights and their two biases."""
    B, T, D, H, k = 3, 11, 4, 6, BLOCKS[cell]
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(cell, torch.nn.RNN)
    theirs = kind(D, H, batch_first=True, dtype=torch.float64, **({"nonlinearity": cell} if k == 1 else {}))
    x = torch.randn(B, T, D, dtype=torch.float64)
    want, _ = theirs(x)
    xp, w_h = x @ theirs.weight_ih_l0.T + theirs.bias_ih_l0, theirs.weight_hh_l0
    if cell == "gru":
        got, _ = gru_scan(xp, w_h, theirs.bias_hh_l0)
    else:
        got = runner(cell, "parallel")(xp + theirs.bias_hh_l0, w_h)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "parallel", "triton"])
@pytest.mark.parametrize("cell", CELLS)
class TestLaws:
    def test_two_pieces_equal_the_whole(self, backend, cell):
        xp, *rest = inputs(cell, 2, 20, 5)
        states = slice(2, None) if cell == "gru" else slice(1, None)
        run = runner(cell, backend)
        h, *final = run(xp, *rest)
        first, *middle = run(xp[:, :7], *rest)
        weights = rest[: states.start]
        second, *end = run(xp[:, 7:], *weights, *middle)
        torch.testing.assert_close(torch.cat([first, second], dim=1), h)
        for x, y in zip(end, final, strict=True):
            torch.testing.assert_close(x, y)

    def test_later_inputs_cannot_change_earlier_states(self, backend, cell):
        xp, *rest = inputs(cell, 2, 12, 5)
        changed = xp.clone()
        changed[:, 6] += 1
        h, g = (runner(cell, backend)(x, *rest)[0] for x in (xp, changed))
        assert torch.equal(h[:, :6], g[:, :6])
        assert not torch.equal(h[:, 6], g[:, 6])

    def test_strides_do_not_matter(self, backend, cell):
        tensors = inputs(cell, 3, 8, 4)
        strided = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 1 else x for x in tensors]
        run = runner(cell, backend)
        names = NAMES[cell]
        for x, y in zip(run(*strided), run(*tensors), strict=True):
            torch.testing.assert_close(x, y)
        for i, name in enumerate(names):  # and neither do those of the incoming gradient
            if tensors[i].ndim < 2:
                continue
            leaf = tensors[i].clone().requires_grad_()
            h = run(*tensors[:i], leaf, *tensors[i + 1 :])[0]
            weight = torch.randn(8, 3, 4, device=h.device).transpose(0, 1)
            want = torch.autograd.grad((h * weight.contiguous()).sum(), leaf, retain_graph=True)[0]
            got = torch.autograd.grad(h, leaf, weight)[0]
            torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")

    def test_two_runs_are_bit_identical(self, backend, cell):
        runs = []
        for _ in range(2):
            leaves = [x.requires_grad_() for x in inputs(cell, 3, 9, 5)]
            outputs = runner(cell, backend)(*leaves)
            runs.append([*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves)])
        assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))

    def test_empty_sequence_returns_the_state(self, backend, cell):
        tensors = inputs(cell, 2, 0, 3)
        h, *final = runner(cell, backend)(*tensors)
        assert h.shape == (2, 0, 3)
        states = tensors[-len(final) :]
        assert all(torch.equal(x, y) for x, y in zip(final, states, strict=True))

    def test_saturated_gates_stay_finite(self, backend, cell):
        """Pre-activations of +-40 and far beyond: no overflow, no NaN, in either direction."""
        for size in (40.0, 1e4):
            leaves = inputs(cell, 2, 6, 4)
            leaves[0] = size * leaves[0].sign() if cell != "relu" else leaves[0].sign() * 40
            leaves = [x.requires_grad_() for x in leaves]
            outputs = runner(cell, backend)(*leaves)
            gradients = torch.autograd.grad(sum(o.sum() for o in outputs), leaves)
            assert all(torch.isfinite(x).all() for x in (*outputs, *gradients))


def test_a_closed_cell_keeps_its_state_exactly():
    """i = 0 and f = 1: the constant error carousel. The cell state comes out as it went in, after any number of steps."""
    xp, w_h, h0, s0 = inputs("lstm", 2, 200, 4)
    xp[..., :4], xp[..., 4:8] = -1e4, 1e4
    for backend in ("reference", "parallel"):
        s0 = s0.detach().requires_grad_()
        _, (_, sT) = lstm_scan(xp, w_h, h0, s0, backend=backend)
        assert torch.equal(sT, s0)
        assert torch.equal(torch.autograd.grad(sT.sum(), s0)[0], torch.ones_like(s0))


def test_half_precision_returns_a_float32_state():
    h, (hT, sT) = lstm_scan(*inputs("lstm", 2, 5, 3, torch.bfloat16))
    assert h.dtype == torch.bfloat16 and hT.dtype == sT.dtype == torch.float32


@pytest.mark.parametrize("cell", CELLS)
def test_compiled_without_graph_break(cell):
    tensors = inputs(cell, 2, 6, 4)
    run = runner(cell, "triton")
    compiled = torch.compile(lambda *t: run(*t)[0] * 2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), run(*tensors)[0] * 2)


def test_use_overrides_auto_only_inside():
    tensors = inputs("gru", 1, 4, 2, torch.float64)
    with use("triton"), pytest.raises(ValueError, match="float64"):
        gru_scan(*tensors)
    gru_scan(*tensors)


xp, w_h, h0, s0 = inputs("lstm", 2, 6, 3)
b_h = torch.zeros(9, device=DEVICE)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lstm_scan(xp[0], w_h), r"expected xp of shape \(B, T, 4H\), got \(6, 12\)"),
        (lambda: lstm_scan(xp[..., :8], w_h), r"expected w_h of shape \(4H, H\) with 4H = 8, got \(12, 3\)"),
        (
            lambda: lstm_scan(xp, w_h[:, :2]),
            r"expected w_h of shape \(4H, H\): 4 blocks of H = 2 .* got \(12, 2\)",
        ),
        (
            lambda: lstm_scan(xp, w_h, h0[:1]),
            r"expected h0 of shape \(B, H\) with B = 2, H = 3, got \(1, 3\)",
        ),
        (
            lambda: lstm_scan(xp, w_h, h0, s0[:, :2]),
            r"expected s0 of shape \(B, H\) with B = 2, H = 3, got \(2, 2\)",
        ),
        (
            lambda: gru_scan(xp[..., :9], w_h[:9], b_h[:6]),
            r"expected b_h of shape \(3H\) with 3H = 9, got \(6,\)",
        ),
        (lambda: rnn_scan(xp[..., :3], w_h), r"expected w_h of shape \(H, H\) with H = 3.* got \(12, 3\)"),
        (
            lambda: rnn_scan(xp[..., :3].long(), w_h[:3]),
            "expected xp to be of a floating-point .* got torch.int64",
        ),
        (lambda: rnn_scan([1.0], w_h), r"expected xp to be a tensor of shape \(B, T, H\), got list"),
        (
            lambda: rnn_scan(xp[..., :3], w_h[:3], activation="sigmoid"),
            "expected activation to be one of tanh, relu, got 'sigmoid'",
        ),
        (
            lambda: lstm_scan(xp, w_h, cont=xp[:, :5, 0]),
            r"expected cont of shape \(B, T\) with B = 2, T = 6, got \(2, 5\)",
        ),
        (
            lambda: lstm_scan(xp, w_h, cont=torch.full((2, 6), 2)),
            "expected cont to hold only 0 .* and 1 .* got other values",
        ),
        (lambda: lstm_scan(xp, w_h, cont=torch.ones(2, 6, device="meta")), "expected cont on .* like xp, got meta"),
        (lambda: lstm_scan(xp, w_h, backend="cuda"), "expected backend to be one of .* got 'cuda'"),
        (
            lambda: rnn_scan(
                torch.zeros(1, 1, 129, device=DEVICE), torch.zeros(129, 129, device=DEVICE), backend="triton"
            ),
            "hidden sizes up to 128, got 129",
        ),
    ],
)
def test_errors_name_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_debug_names_the_input_with_nan():
    bad = xp.clone()
    bad[0, 2, 1] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected xp without NaN, got 1 NaN"):
        lstm_scan(bad, w_h)
