"""lif: the same spikes bit for bit from three implementations, and the gradient of the surrogate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import use
from seqarch.kernels.lif import cost, lif, lif_step
from seqarch.kernels.lif.reference import surrogate

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

BACKENDS = ["reference", "parallel", "triton"]
ALL = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("x", "v0")


def inputs(B, C, N, dtype=torch.float32, kind="normal", seed=0):
    """Random currents and first voltages; `kind` picks currents that are hard in their own way."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, C, N, generator=g, dtype=torch.float64) * 1.5 + 0.7
    if kind == "coarse":  # few bits: voltages land on the threshold exactly, again and again
        x = (x * 2).round() / 2
    elif kind == "silent":
        x = x.clamp(max=0.83)
    elif kind == "busy":
        x = x.abs() + 2.5
    v0 = torch.randn(B, C, generator=g, dtype=torch.float64) * 2  # some of them above the threshold
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [x.to(dtype).to(DEVICE), v0.to(wide).to(DEVICE)]


def runner(backend, tau=2.0, v_th=1.0, v_reset=0.0, alpha=4.0):
    return lambda x, v0=None: lif(x, tau, v_th, v_reset, alpha, v0, backend=backend)


shapes = dict(
    rows=st.sampled_from([(1, 1), (2, 3), (1, 3), (1, 33)]),  # (B, C); a Triton program takes 32 rows
    N=st.one_of(st.sampled_from([1, 2, 31, 32, 33, 65]), st.integers(1, 40), st.integers(1, 130)),
    tau=st.sampled_from([1.0, 2.0, 3.0, 4.0, 10.5]),
    v_th=st.sampled_from([1.0, 0.5, 0.3]),
    v_reset=st.sampled_from([0.0, -0.25, 0.1]),
    alpha=st.sampled_from([4.0, 2.0]),
    with_v0=st.booleans(),
    kind=st.sampled_from(["normal", "coarse", "silent", "busy"]),
    seed=st.integers(0, 10**6),
)


@pytest.mark.parametrize(
    "backend, dtype, cases",
    [("triton", torch.float32, 60), ("triton", torch.bfloat16, 25), ("triton", torch.float16, 25)]
    + [("parallel", d, 60) for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)],
)
def test_agrees_with_the_definition(backend, dtype, cases):
    """Spikes and voltage bit for bit with the loop in the same precision; all else against the loop in float64."""

    @settings(max_examples=cases)
    @given(**shapes)
    def check(rows, N, tau, v_th, v_reset, alpha, with_v0, kind, seed):
        if dtype.itemsize == 2:  # the slope is stored in two bytes: with one neuron, all that is left of its gradient
            rows = (2, 17)  # after it cancels against that of the voltage may be the rounding
        tensors = inputs(*rows, N, dtype, kind, seed)[: 2 if with_v0 else 1]
        options = dict(tau=tau, v_th=v_th, v_reset=v_reset, alpha=alpha)
        for got, want in zip(
            runner(backend, **options)(*tensors), runner("reference", **options)(*tensors), strict=True
        ):
            assert torch.equal(got, want)
        assert_agree(
            runner(backend, **options), runner("reference", **options), tensors, steps=N, names=NAMES[: len(tensors)]
        )

    check()


def relaxed(x, v, tau, v_th, v_reset, alpha):
    """The function whose true derivative the surrogate is: spikes read through a sigmoid, resets as they were."""
    spikes = []
    for x_t in x.unbind(-1):
        h = v + (x_t - (v - v_reset)) / tau
        spikes.append(torch.sigmoid(alpha * (h - v_th)))
        v = torch.where(h >= v_th, v_reset, h)
    return torch.stack(spikes, dim=-1), v


@ALL
@pytest.mark.parametrize("tau, v_reset", [(2.0, 0.0), (3.0, -0.3), (1.0, 0.0)])
def test_the_gradient_is_that_of_the_relaxed_spikes(backend, tau, v_reset):
    """A threshold has no derivative to check numerically. Its relaxation has one: measured there, compared here."""
    x, v0 = inputs(1, 3, 12, torch.float64)
    gs, gv = torch.randn_like(x), torch.randn_like(v0)

    def loss(x, v0):
        spikes, v = relaxed(x, v0, tau, 1.0, v_reset, 4.0)
        return (spikes * gs).sum() + (v * gv).sum()

    wide = torch.float32 if backend == "triton" else torch.float64
    leaves = [t.to(wide).requires_grad_() for t in (x, v0)]
    got = torch.autograd.grad(runner(backend, tau, v_reset=v_reset)(*leaves), leaves, [gs.to(wide), gv.to(wide)])
    step = 1e-6
    for i, gradient in enumerate(got):
        numerical = torch.zeros_like((x, v0)[i])
        for j in range(numerical.numel()):
            moved = [[t.clone() for t in (x, v0)] for _ in range(2)]
            moved[0][i].view(-1)[j] += step
            moved[1][i].view(-1)[j] -= step
            numerical.view(-1)[j] = (loss(*moved[0]) - loss(*moved[1])) / (2 * step)
        assert error(gradient, numerical) < (1e-5 if backend == "triton" else 1e-7)


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@pytest.mark.parametrize("N", [1, 9])
def test_gradcheck_of_the_voltage(backend, N):
    """Between two spikes the last voltage is a smooth function of all that went in; the spikes themselves never are."""
    tensors = [t.requires_grad_() for t in inputs(2, 3, N, torch.float64)]
    assert torch.autograd.gradcheck(lambda x, v0: runner(backend, 3.0, v_reset=-0.2)(x, v0)[1], tensors)


def test_the_surrogate_is_the_derivative_of_a_sigmoid():
    z = torch.linspace(-40, 40, 101, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(torch.sigmoid(3 * z).sum(), z)
    torch.testing.assert_close(surrogate(z.detach(), 3.0), want)


@ALL
class TestLaws:
    def test_two_pieces_equal_the_whole(self, backend):
        x, v0 = inputs(2, 5, 41, kind="coarse")
        whole, last = lif(x, v0=v0, backend=backend)
        first, v = lif(x[..., :13], v0=v0, backend=backend)
        second, v = lif(x[..., 13:], v0=v, backend=backend)
        assert torch.equal(torch.cat([first, second], dim=-1), whole) and torch.equal(v, last)

    def test_the_gradient_crosses_from_one_piece_to_the_other(self, backend):
        tensors = [t.requires_grad_() for t in inputs(2, 5, 41, kind="silent")]
        x, v0 = tensors
        whole, last = lif(x, v0=v0, backend=backend)
        first, v = lif(x[..., :13], v0=v0, backend=backend)
        second, v = lif(x[..., 13:], v0=v, backend=backend)
        g = torch.randn_like(whole)
        want = torch.autograd.grad([whole, last], tensors, [g, torch.ones_like(last)])
        got = torch.autograd.grad([torch.cat([first, second], dim=-1), v], tensors, [g, torch.ones_like(v)])
        torch.testing.assert_close(got, want)

    def test_steps_equal_the_whole(self, backend):
        x, v0 = inputs(2, 5, 30)
        whole, last = lif(x, 3.0, 0.7, -0.1, v0=v0, backend=backend)
        v = v0
        for t in range(30):
            spikes, v = lif_step(x[..., t], v, 3.0, 0.7, -0.1)
            assert torch.equal(spikes, whole[..., t])
        assert torch.equal(v, last)

    def test_later_inputs_cannot_change_earlier_spikes(self, backend):
        x, v0 = inputs(2, 5, 40)
        spikes, _ = lif(x, v0=v0, backend=backend)
        changed = x.clone()
        changed[..., 20] += 5
        others, _ = lif(changed, v0=v0, backend=backend)
        assert torch.equal(spikes[..., :20], others[..., :20])
        assert not torch.equal(spikes[..., 20], others[..., 20])

    def test_rows_do_not_mix(self, backend):
        x, v0 = inputs(2, 40, 20)
        spikes, v = lif(x, v0=v0, backend=backend)
        alone, v_alone = lif(x[1:, 7:8], v0=v0[1:, 7:8], backend=backend)
        assert torch.equal(spikes[1:, 7:8], alone) and torch.equal(v[1:, 7:8], v_alone)

    def test_a_voltage_exactly_at_the_threshold_spikes(self, backend):
        x = torch.tensor([[[2.0, 2.0 - 2**-23, 2.0]]], device=DEVICE)
        spikes, v = lif(x, backend=backend)
        assert spikes.flatten().tolist() == [1, 0, 1] and v.item() == 0

    def test_constant_drive_spikes_at_a_constant_period(self, backend):
        """x = 1.5: h = 0.75, then 1.125 and a spike; x below the threshold never spikes."""
        x = torch.tensor([1.5, 0.9], device=DEVICE).view(1, 2, 1).expand(1, 2, 10)
        spikes, v = lif(x, backend=backend)
        assert spikes[0, 0].tolist() == [0, 1] * 5 and spikes[0, 1].sum() == 0
        assert 0.89 < v[0, 1] < 0.9

    def test_without_memory_the_input_itself_is_compared(self, backend):
        x, v0 = inputs(2, 5, 40, kind="coarse")
        spikes, _ = lif(x, 1.0, v0=v0, backend=backend)
        assert torch.equal(spikes[..., 1:], (x[..., 1:] >= 1).float())

    def test_a_first_voltage_above_the_threshold_may_leak_below_it(self, backend):
        v0 = torch.tensor([[1.5, 2.5]], device=DEVICE)
        spikes, v = lif(torch.zeros(1, 2, 1, device=DEVICE), v0=v0, backend=backend)
        assert spikes.flatten().tolist() == [0, 1] and v.flatten().tolist() == [0.75, 0]

    def test_no_gradient_crosses_a_spike(self, backend):
        x, _ = inputs(1, 4, 20, kind="silent")
        x[..., 10] = 100.0
        x.requires_grad_()
        spikes, v = lif(x, backend=backend)
        (before,) = torch.autograd.grad(v.sum() + spikes[..., 11:].sum(), x)
        assert (before[..., :11] == 0).all() and (before[..., 11:] != 0).all()

    def test_half_precision_keeps_the_spikes(self, backend):
        """Currents that float16 can hold give the spike train of float32, however long it runs."""
        x, _ = inputs(2, 8, 120, torch.float16)
        spikes, v = lif(x, 3.0, backend=backend)
        want, want_v = lif(x.float(), 3.0, backend="reference")
        assert spikes.dtype == torch.float16 and v.dtype == torch.float32
        assert torch.equal(spikes.float(), want) and torch.equal(v, want_v)

    def test_a_nan_stays_in_its_row(self, backend):
        x, v0 = inputs(1, 40, 10)
        want, _ = lif(x, v0=v0, backend=backend)
        x[0, 3, 4] = torch.nan
        spikes, v = lif(x, v0=v0, backend=backend)
        others = torch.arange(40, device=DEVICE) != 3
        assert torch.equal(spikes[:, others], want[:, others]) and torch.isfinite(v[:, others]).all()

    def test_strides_do_not_matter(self, backend):
        x, v0 = inputs(3, 4, 20)
        strided = [x.transpose(0, 2).contiguous().transpose(0, 2), v0.T.contiguous().T]
        want = lif(x, v0=v0, backend=backend)
        torch.testing.assert_close(lif(strided[0], v0=strided[1], backend=backend), want)

    def test_two_runs_are_bit_identical(self, backend):
        results = []
        for _ in range(2):
            tensors = [t.requires_grad_() for t in inputs(2, 5, 70)]
            spikes, v = runner(backend)(*tensors)
            results.append((spikes, v, *torch.autograd.grad(spikes.sum() + (v * v).sum(), tensors)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    def test_empty_sequence_returns_the_voltage(self, backend):
        x, v0 = inputs(2, 5, 0)
        spikes, v = lif(x, v0=v0, backend=backend)
        assert spikes.shape == (2, 5, 0) and torch.equal(v, v0)
        assert (lif(x, v_reset=-0.5, backend=backend)[1] == -0.5).all()


def test_many_rows_in_pieces_of_time():
    """More elements than one piece of the parallel form's backward pass holds."""
    x, v0 = inputs(1, 9000, 40)
    assert_agree(runner("parallel"), runner("reference"), [x, v0], steps=40, names=NAMES)


def test_65536_steps():
    """The spikes of float32 are compared with the loop in float32: one rounding may decide one, and then the rest."""
    x, _ = inputs(1, 1, 65536)
    spikes, v = lif(x, 3.0, backend="parallel")
    want, want_v = lif(x, 3.0, backend="reference")
    assert torch.equal(spikes, want) and torch.equal(v, want_v)
    silent, _ = inputs(1, 2, 65536, kind="silent")
    _, v = lif(silent, 50.0, v_th=1e9, backend="parallel")
    assert error(v, lif(silent.double(), 50.0, v_th=1e9, backend="reference")[1]) < 1e-6


def test_memory_is_linear_in_length():
    assert_memory_is_linear(runner("parallel"), lambda N: inputs(1, 8, N), lengths=(1024, 2048, 4096))


def test_compiled_without_graph_break():
    x, v0 = inputs(2, 5, 20)

    def run(x, v0):
        spikes, v = lif(x, v0=v0, backend="triton")
        return spikes * 2, v

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, v0), run(x, v0))
    leaves = [t.clone().requires_grad_() for t in (x, v0)]
    got, want = (torch.autograd.grad(f(*leaves)[0].sum(), leaves) for f in (compiled, run))
    torch.testing.assert_close(got, want)


def test_auto_on_the_cpu_is_parallel_and_use_overrides_it():
    x, _ = inputs(1, 2, 9, torch.float64)
    with use("triton"), pytest.raises(ValueError, match="float64"):
        lif(x)
    lif(x)


def test_the_cost_model_counts_a_small_case():
    assert cost.bytes(2, 3, 10) == 2 * (2 * 3 * 10) * 4
    assert cost.bytes(2, 3, 10, itemsize=2, backward=True) == 3 * (2 * 3 * 10) * 2
    assert cost.flops(2, 3, 10) == 2 * cost.flops(1, 3, 10)


x, v0 = inputs(2, 3, 8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(x=x[0]), r"expected x of shape \(B, C, N\), got \(3, 8\)"),
        (dict(x=x, v0=v0[:1]), r"expected v0 of shape \(B, C\) with B = 2, C = 3, got \(1, 3\)"),
        (dict(x=x, tau=0.5), "expected tau of at least 1, got 0.5"),
        (dict(x=x, tau=float("nan")), "expected tau of at least 1, got nan"),
        (dict(x=x, alpha=0.0), "expected alpha above 0, got 0.0"),
        (dict(x=x.long()), "expected x of a floating-point dtype, got torch.int64"),
        (dict(x=x, v0=v0.to("meta")), "expected v0 on .* like x, got meta"),
        (dict(x=[1.0]), "expected x to be a tensor of shape .* got list"),
    ],
)
def test_errors_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        lif(**arguments)


def test_errors_of_a_step():
    with pytest.raises(ValueError, match=r"expected x of shape \(B, C\), got \(2, 3, 8\)"):
        lif_step(x)
    with pytest.raises(ValueError, match=r"expected v of shape \(B, C\) with B = 2, C = 3, got \(2, 3, 8\)"):
        lif_step(x[..., 0], x)


def test_debug_names_the_input_with_nan():
    broken = x.clone()
    broken[0, 1, 2] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected x without NaN, got 1 NaN"):
        lif(broken)
