"""para_gru and para_lstm: one definition, three implementations, checked against a float64 loop."""

import functools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.memory import peak_bytes
from seqarch.kernels import use
from seqarch.kernels.nonlinear_rnn import para_gru, para_gru_step, para_lstm, para_lstm_step, parallel

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

CELLS = ("gru", "lstm")
NAMES = {"gru": ("w", "a", "h0"), "lstm": ("w", "a", "p", "c0", "h0")}
LOOSE = ("a", "p")
WEIGHTS = {"gru": 2, "lstm": 3}  # how many of the inputs are no states


def inputs(cell, B, T, D, dtype=torch.float32, size=0.5, saturated=False, seed=0):
    """Random inputs with diagonals in [-size, size]; saturated: diagonals of +-size, a fifth of the gates at +-40."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return 2 * torch.rand(*shape, generator=g, dtype=torch.float64) - 1

    w = torch.randn(B, T, 3, D, generator=g, dtype=torch.float64)
    diagonals = [size * rand(k, D) for k in (3, 2)]
    if saturated:
        w += 40 * torch.randint(-2, 3, w.shape, generator=g).div(2, rounding_mode="trunc")
        diagonals = [size * x.sign() for x in diagonals]
    state = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    states = [rand(B, D).to(state) for _ in range(WEIGHTS[cell] - 1)]
    return [x.to(DEVICE) for x in (w.to(dtype), *(x.to(dtype) for x in diagonals[: len(states)]), *states)]


def runner(cell, backend, iters=5, **options):
    """A function of the inputs, in the order of NAMES (states may be left out), that returns states and final states."""
    if cell == "gru":
        return functools.partial(para_gru, iters=iters, backend=backend, **options)

    def run(w, a, p, *states):
        h, c, final, *rest = para_lstm(w, a, p, states or None, iters=iters, backend=backend, **options)
        return h, c, *final, *rest

    return run


def compare(cell, backend, tensors, iters=5):
    names = NAMES[cell][: len(tensors)]
    assert_agree(
        runner(cell, backend, iters),
        runner(cell, "reference"),
        tensors,
        steps=tensors[0].shape[1],
        names=names,
        loose=LOOSE,
    )


def parity(L, noise=0.0, seed=0):
    """A GRU that computes parity: at a 1 the state becomes minus its sign, at a 0 it stays. Flipping does not contract."""
    g = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2, (1, L, 1), generator=g)
    w_c = noise * torch.randn(1, L, 1, generator=g)  # noise too weak to change a flip, which yet misleads the start
    w = torch.stack([16.0 * bits - 8, torch.full(bits.shape, 8.0), w_c], dim=2)
    a = torch.tensor([[0.0], [0.0], [-8.0]])
    return [x.to(DEVICE) for x in (w, a, torch.ones(1, 1))], bits.to(DEVICE)


@pytest.mark.parametrize(
    "backend, dtype, examples",
    [
        ("triton", torch.float32, 60),
        ("triton", torch.bfloat16, 20),
        ("triton", torch.float16, 20),
        ("parallel", torch.float64, 60),
        ("parallel", torch.float32, 40),
        ("parallel", torch.bfloat16, 20),
    ],
)
def test_agrees_with_the_definition(backend, dtype, examples):
    half = dtype in (torch.float16, torch.bfloat16)
    converged = {torch.float64: 7, torch.float32: 4}.get(dtype, 3)
    # in half precision a gradient that is one sum of a few cancelling terms has no meaningful relative error
    lengths = st.integers(20, 30) if half else st.one_of(st.sampled_from([1, 2, 63, 64, 65]), *2 * [st.integers(1, 30)])

    @settings(max_examples=examples)
    @given(
        cell=st.sampled_from(CELLS),
        B=st.sampled_from([1, 1, 1, 2]),
        T=lengths,
        D=st.sampled_from([16] if half else [1, 3, 16]),
        iters=st.sampled_from([converged, converged, "sequential"]),
        with_state=st.booleans(),
        saturated=st.booleans(),
        seed=st.integers(0, 10**6),
    )
    def check(cell, B, T, D, iters, with_state, saturated, seed):
        tensors = inputs(cell, B, T, D, dtype, saturated=saturated, seed=seed)
        compare(cell, backend, tensors if with_state else tensors[: WEIGHTS[cell]], iters)

    check()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("iters", [5, "sequential"])
def test_more_than_one_block(cell, iters):
    """More channels than a block, more steps than two tiles."""
    compare(cell, "triton", inputs(cell, 1, 130, 33), iters)


@pytest.mark.parametrize("cell", CELLS)
def test_many_tiles_on_a_cpu(cell, monkeypatch):
    monkeypatch.setattr(parallel, "TILE", 1)
    compare(cell, "parallel", inputs(cell, 2, 300, 3, torch.float64), 7)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("L", [1, 2, 3, 17, 64, 100, 257])
def test_three_newton_steps_are_enough_within_the_clip(cell, L):
    tensors = inputs(cell, 2, L, 16, seed=L)
    want = runner(cell, "reference")(*[x.double() for x in tensors])
    for x, ref in zip(runner(cell, "parallel", 3)(*tensors), want, strict=True):
        assert error(x, ref) <= 1e-5
    if L > 2:  # the start makes two states nearly exact, so that the test above would pass without Newton
        assert error(runner(cell, "parallel", 0)(*tensors)[0], want[0]) > 1e-3


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", ["parallel", "triton"])
def test_as_many_newton_steps_as_states_solve_any_cell(cell, backend):
    """After k steps k + 1 states are exact, whatever the diagonals."""
    tensors = inputs(cell, 1, 17, 16, size=6.0)
    want = runner(cell, "reference")(*[x.double() for x in tensors])[0]
    run = runner(cell, backend, 16)
    assert error(run(*tensors)[0], want) <= 1e-5
    assert error(runner(cell, backend, 3)(*tensors)[0], want) > 1e-3
    for k in (0, 5):
        assert error(runner(cell, backend, k)(*tensors)[0][:, : k + 1], want[:, : k + 1]) <= 1e-5


class TestParity:
    """The cell on which Newton struggles."""

    def test_the_loop_computes_parity(self):
        tensors, bits = parity(64, noise=1.0)
        for backend in ("reference", "parallel", "triton"):
            h, _ = para_gru(*tensors, iters="sequential", backend=backend)
            assert torch.equal(h < 0, bits.cumsum(1) % 2 == 1)

    @pytest.mark.parametrize("backend", ["parallel", "triton"])
    def test_few_steps_fail_and_say_so(self, backend):
        tensors, _ = parity(64, noise=1.0)
        want, _ = para_gru(*tensors, iters="sequential")
        h, _, residual = para_gru(*tensors, return_residual=True, backend=backend)
        assert error(h, want) > 0.1 and (residual > 1e-2).all()
        with use(debug=True), pytest.warns(UserWarning, match="para_gru has not converged: after 3 Newton steps"):
            para_gru(*tensors, backend=backend)
        h, _, residual = para_gru(*tensors, iters=63, return_residual=True, backend=backend)
        assert error(h, want) <= 1e-5 and (residual < 1e-5).all()

    @pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the very point
    @pytest.mark.parametrize("backend, L", [("parallel", 1024), ("triton", 130)])
    def test_projected_iterates_stay_finite(self, backend, L):
        """Where every step flips, Jacobians of -8 multiply to overflow; projected iterates survive that."""
        (w, a, h0), _ = parity(L)
        w[:, :, 0] = 8.0
        *_, residual = para_gru(w, a, h0, backend=backend, return_residual=True, project=False, iters=1)
        assert (residual > 1e6).all()
        for iters in (1, 3):
            h, hT, residual = para_gru(w, a, h0, backend=backend, return_residual=True, iters=iters)
            assert h.abs().max() <= 1 and hT.abs().max() <= 1 and residual.max() <= 2


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", ["parallel", "triton"])
def test_converged_cells_do_not_warn(cell, backend):
    tensors = inputs(cell, 2, 40, 16)
    with use(debug=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        *_, residual = runner(cell, backend, 3, return_residual=True)(*tensors)
    assert residual.shape == (2,) and residual.max() < 1e-5 and not residual.requires_grad
    *_, residual = runner(cell, backend, 0, return_residual=True)(*tensors)
    after = runner(cell, backend, 1)(*tensors)[0]
    assert residual.min() > 1e-3 and after.isfinite().all()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("project", [True, False])
def test_a_state_that_starts_far_out(cell, project):
    """The bound of the projection follows the given state, so it never cuts off the solution."""
    tensors = inputs(cell, 1, 70, 3)
    tensors[WEIGHTS[cell] :] = [8 * x for x in tensors[WEIGHTS[cell] :]]
    want = runner(cell, "reference")(*[x.double() for x in tensors])[0]
    for backend in ("parallel", "triton"):
        assert error(runner(cell, backend, 10, project=project)(*tensors)[0], want) <= 1e-5


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend, iters", [("reference", 0), ("parallel", 8), ("parallel", "sequential")])
def test_gradcheck(cell, backend, iters):
    tensors = [x.requires_grad_() for x in inputs(cell, 2, 9, 2, torch.float64)]
    assert torch.autograd.gradcheck(runner(cell, backend, iters), tensors)


@pytest.mark.parametrize("cell", CELLS)
def test_65536_steps(cell):
    tensors = inputs(cell, 1, 65536, 1)
    with torch.no_grad():
        want = runner(cell, "reference")(*[x.double() for x in tensors])
    for x, ref in zip(runner(cell, "parallel", 4)(*tensors), want, strict=True):
        assert error(x, ref) < 1e-5


@pytest.mark.parametrize("backend", ["reference", "parallel", "triton"])
@pytest.mark.parametrize("cell", CELLS)
class TestLaws:
    def test_two_pieces_equal_the_whole(self, backend, cell):
        w, *rest = inputs(cell, 2, 20, 3)
        weights = rest[: WEIGHTS[cell] - 1]
        run, states = runner(cell, backend), len(rest) - len(weights)
        whole = run(w, *rest)
        first = run(w[:, :7], *rest)
        second = run(w[:, 7:], *weights, *first[-states:])
        for x, y, both in zip(first[:states], second[:states], whole[:states], strict=True):
            torch.testing.assert_close(torch.cat([x, y], dim=1), both)
        for x, y in zip(second[states:], whole[states:], strict=True):
            torch.testing.assert_close(x, y)

    @pytest.mark.parametrize("iters", [3, "sequential"])
    def test_later_inputs_cannot_change_earlier_states(self, backend, cell, iters):
        w, *rest = inputs(cell, 2, 40, 3)
        changed = w.clone()
        changed[:, 20] += 1
        h, g = (runner(cell, backend, iters)(x, *rest)[0] for x in (w, changed))
        assert torch.equal(h[:, :20], g[:, :20])
        assert not torch.equal(h[:, 20], g[:, 20])

    def test_strides_do_not_matter(self, backend, cell):
        """Neither those of inputs and gradients, nor what lies behind the end of a piece of a longer tensor."""
        tensors = inputs(cell, 2, 12, 4)
        strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
        strided[0] = torch.cat([strided[0], strided[0][:, :3] * torch.nan], dim=1)[:, :12]
        run = runner(cell, backend)
        for x, y in zip(run(*strided), run(*tensors), strict=True):
            torch.testing.assert_close(x, y)
        leaf = tensors[0].clone().requires_grad_()
        h = run(leaf, *tensors[1:])[0]
        weight = torch.randn(12, 2, 4, device=h.device).transpose(0, 1)
        want = torch.autograd.grad((h * weight.contiguous()).sum(), leaf, retain_graph=True)[0]
        torch.testing.assert_close(torch.autograd.grad(h, leaf, weight)[0], want)

    def test_two_runs_are_bit_identical(self, backend, cell):
        runs = []
        for _ in range(2):
            leaves = [x.requires_grad_() for x in inputs(cell, 2, 20, 3)]
            outputs = runner(cell, backend)(*leaves)
            runs.append([*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves)])
        assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))

    def test_empty_sequence_returns_the_state(self, backend, cell):
        tensors = inputs(cell, 2, 0, 3)
        outputs = runner(cell, backend, return_residual=True)(*tensors)
        states = tensors[WEIGHTS[cell] :]
        assert outputs[0].shape == (2, 0, 3)
        assert all(torch.equal(x, y) for x, y in zip(outputs[len(states) : -1], states, strict=True))
        assert torch.equal(outputs[-1], torch.zeros(2, device=DEVICE))

    def test_saturated_gates_stay_finite(self, backend, cell):
        leaves = inputs(cell, 2, 20, 3)
        leaves[0] = 1e4 * leaves[0].sign()
        leaves = [x.requires_grad_() for x in leaves]
        outputs = runner(cell, backend)(*leaves)
        gradients = torch.autograd.grad(sum(o.sum() for o in outputs), leaves)
        assert all(torch.isfinite(x).all() for x in (*outputs, *gradients))


def test_stepping_equals_the_sequence():
    w, a, h = inputs("gru", 2, 9, 3)
    whole, _ = para_gru(w, a, h)
    for t in range(9):
        h = para_gru_step(w[:, t], a, h)
        torch.testing.assert_close(h, whole[:, t])
    w, a, p, *state = inputs("lstm", 2, 9, 3)
    h, c, _ = para_lstm(w, a, p, tuple(state))
    for t in range(9):
        state = para_lstm_step(w[:, t], a, p, state)
        torch.testing.assert_close(state, (c[:, t], h[:, t]))


@pytest.mark.parametrize("cell", CELLS)
def test_half_precision_returns_a_float32_state(cell):
    h, *_, hT = runner(cell, "auto")(*inputs(cell, 2, 5, 3, torch.bfloat16))
    assert h.dtype == torch.bfloat16 and hT.dtype == torch.float32


@pytest.mark.parametrize("cell", CELLS)
def test_memory(cell):
    """Linear in the length, and the same for any number of Newton steps: nothing of the iterations is kept."""
    assert_memory_is_linear(
        runner(cell, "parallel"), lambda T: inputs(cell, 1, T, 64)[: WEIGHTS[cell]], lengths=(1024, 2048, 4096)
    )

    def peak(iters):
        leaves = [x.requires_grad_() for x in inputs(cell, 1, 500, 16)]
        run = runner(cell, "parallel", iters)
        return peak_bytes(lambda: torch.autograd.grad(run(*leaves)[0].sum(), leaves))

    assert peak(3) == peak(8)


@pytest.mark.parametrize("cell", CELLS)
def test_compiled_without_graph_break(cell):
    tensors = inputs(cell, 2, 6, 4)
    run = runner(cell, "triton")
    compiled = torch.compile(lambda *t: run(*t)[0] * 2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), run(*tensors)[0] * 2)


def test_use_overrides_auto_only_inside():
    tensors = inputs("gru", 1, 4, 2, torch.float64)
    with use("triton"), pytest.raises(ValueError, match="float64"):
        para_gru(*tensors)
    para_gru(*tensors)


w, a, p, c0, h0 = inputs("lstm", 2, 6, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: para_gru(w.flatten(2), a), r"expected w of shape \(B, L, 3, D\), got \(2, 6, 12\)"),
        (lambda: para_gru(w.transpose(2, 3), a), r"expected w of shape \(B, L, 3, D\), got \(2, 6, 4, 3\)"),
        (lambda: para_gru(w, a[:, :3]), r"expected a of shape \(3, D\) with .*D = 4, got \(3, 3\)"),
        (lambda: para_gru(w, a, h0[:1]), r"expected h0 of shape \(B, D\) with B = 2, D = 4, got \(1, 4\)"),
        (lambda: para_lstm(w, a, p[:1]), r"expected p of shape \(2, D\) .* got \(1, 4\)"),
        (lambda: para_lstm(w, a, p, h0), r"expected the state to be a pair \(c, h\), got Tensor of length 2"),
        (lambda: para_lstm(w, a, p, (c0[:1], h0)), r"expected c of shape \(B, D\) with .* got \(1, 4\)"),
        (lambda: para_gru(w.long(), a), "expected w of a floating-point dtype, got torch.int64"),
        (lambda: para_gru([1.0], a), r"expected w to be a tensor of shape \(B, L, 3, D\), got list"),
        (lambda: para_gru(w, a, iters=-1), 'expected iters to be a number of .* or "sequential", got -1'),
        (lambda: para_lstm(w, a, p, iters="newton"), "expected iters to be a number of .* got 'newton'"),
        (lambda: para_gru(w, a, backend="cuda"), "expected backend to be one of .* got 'cuda'"),
    ],
)
def test_errors_name_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_debug_names_the_input_with_nan():
    bad = w.clone()
    bad[0, 2, 1, 0] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected w without NaN, got 1 NaN"):
        para_gru(bad, a)
