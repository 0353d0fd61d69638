"""vandermonde: one definition, three implementations, checked against exponentials in double precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import use
from seqarch.kernels.vandermonde import cost, vandermonde

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

BACKENDS = ["reference", "parallel", "triton"]
ALL = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("v", "w")


def inputs(R, S, dtype=torch.complex64, kind="damped", seed=0):
    """Random v and w; `kind` picks exponents that are hard in their own way."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    v = torch.complex(*torch.randn(2, R, S, generator=g, dtype=torch.float64))
    growth, angle = -0.1 * uniform(R, S), torch.pi * uniform(R, S)
    if kind == "undamped":
        growth = torch.zeros_like(growth)
    elif kind == "growing":
        growth = 0.02 * uniform(R, S)
    elif kind == "gone":  # decays beyond the smallest float within a few steps
        growth = -40 * uniform(R, S)
    elif kind == "turns":  # many turns in one step
        growth, angle = 0.01 * growth, 1000 * uniform(R, S)
    elif kind == "slow":
        growth, angle = 1e-6 * growth, 1e-6 * angle
    elif kind == "real":
        angle = torch.zeros_like(angle)
    elif kind == "constant":
        growth, angle = torch.zeros_like(growth), torch.zeros_like(angle)
    return [x.to(dtype).to(DEVICE) for x in (v, torch.complex(growth, angle))]


def runner(backend, L):
    return lambda v, w: [vandermonde(v, w, L, backend=backend)]


def check_against_the_definition(backends, dtype, L, **case):
    tensors = inputs(dtype=dtype, **case)
    for backend in backends:
        assert_agree(runner(backend, L), runner("reference", L), tensors, steps=L, names=NAMES)


shapes = dict(
    R=st.sampled_from([1, 2, 3]),
    S=st.sampled_from([1, 2, 15, 16, 17]),
    L=st.one_of(st.sampled_from([1, 2, 127, 128, 129, 256, 257]), st.integers(1, 130)),
    kind=st.sampled_from(["damped", "undamped", "growing", "gone", "turns", "slow", "real", "constant"]),
    seed=st.integers(0, 10**6),
)


@settings(max_examples=70)
@given(**shapes)
def test_three_implementations_agree_in_single_precision(**case):
    check_against_the_definition(["parallel", "triton"], torch.complex64, **case)


@settings(max_examples=70)
@given(**shapes)
def test_the_product_of_tables_agrees_in_double_precision(**case):
    check_against_the_definition(["parallel"], torch.complex128, **case)


@pytest.mark.parametrize("backend", ["parallel", "triton"])
@pytest.mark.parametrize("kind", ["undamped", "turns"])
def test_40000_samples(backend, kind):
    """Angles of up to forty million radians; the Triton path has several blocks of offsets and of chunks."""
    check_against_the_definition([backend], torch.complex64, 40_000, R=1, S=2, kind=kind)


@pytest.mark.parametrize("kind", ["undamped", "turns", "damped"])
def test_65536_samples(kind):
    check_against_the_definition(["parallel"], torch.complex64, 65_536, R=2, S=4, kind=kind)


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@pytest.mark.parametrize("L", [1, 5, 11])
def test_gradcheck(backend, L):
    tensors = [x.requires_grad_() for x in inputs(2, 3, torch.complex128)]
    assert torch.autograd.gradcheck(lambda v, w: vandermonde(v, w, L, backend=backend), tensors)


@ALL
class TestLaws:
    def test_is_the_output_of_a_diagonal_recurrence(self, backend):
        """x_l = e^w x_{l-1} from x_0 = v, read out by 2 Re of the sum."""
        v, w = inputs(2, 3)
        x, factor, samples = v.cdouble(), torch.exp(w.cdouble()), []
        for _ in range(140):
            samples.append(2 * x.sum(1).real)
            x = factor * x
        assert error(vandermonde(v, w, 140, backend=backend), torch.stack(samples, 1)) < 1e-5

    def test_spectrum_is_a_geometric_series(self, backend):
        """The Fourier transform of one term is v (1 - e^{wL}) / (1 - e^w omega): a Cauchy sum (chapter 08)."""
        (v, w), L = inputs(2, 3), 150
        omega = torch.exp(-2j * torch.pi * torch.arange(L, dtype=torch.float64, device=DEVICE) / L)
        spectrum = 0
        for a, p in ((v.cdouble(), w.cdouble()), (v.cdouble().conj(), w.cdouble().conj())):
            spectrum = spectrum + ((a * (1 - torch.exp(p * L)))[..., None] / (1 - torch.exp(p)[..., None] * omega)).sum(
                1
            )
        K = vandermonde(v, w, L, backend=backend)
        assert error(torch.fft.fft(K.double()), spectrum) < 1e-5

    def test_two_pieces_equal_the_whole(self, backend):
        """The second piece starts from amplitudes that have turned and decayed for 61 steps."""
        v, w = inputs(2, 3)
        whole = vandermonde(v, w, 150, backend=backend)
        later = (v.cdouble() * torch.exp(61 * w.cdouble())).to(v.dtype)
        pieces = vandermonde(v, w, 61, backend=backend), vandermonde(later, w, 89, backend=backend)
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)

    def test_swapping_a_term_with_its_conjugate_changes_nothing(self, backend):
        v, w = inputs(2, 3, kind="turns")
        got, want = (vandermonde(x, y, 500, backend=backend) for x, y in ((v.conj(), w.conj()), (v, w)))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    def test_real_exponents_are_sums_of_decays(self, backend):
        w = torch.tensor([[-0.5, -0.01]], device=DEVICE) + 0j
        K = vandermonde(torch.ones_like(w), w, 130, backend=backend)
        l = torch.arange(130, device=DEVICE)
        torch.testing.assert_close(K[0], 2 * torch.exp(-0.5 * l) + 2 * torch.exp(-0.01 * l))

    def test_large_growth_does_not_reach_samples_in_range(self, backend):
        """e^{10 l} overflows soon after the last sample; gradients stay finite."""
        v, w = inputs(1, 2)
        w = torch.complex(torch.full_like(w.real, 10.0), w.imag).requires_grad_()
        K = vandermonde(v.requires_grad_(), w, 8, backend=backend)
        grads = torch.autograd.grad(K.sum(), (v, w))
        assert torch.isfinite(K).all() and all(torch.isfinite(torch.view_as_real(g)).all() for g in grads)

    def test_strides_do_not_matter(self, backend):
        v, w = inputs(3, 5)
        want = vandermonde(v, w, 40, backend=backend)
        torch.testing.assert_close(vandermonde(v.T.contiguous().T, w.T.contiguous().T, 40, backend=backend), want)
        lazy, resolved = (v.conj(), w.conj()), (v.conj().resolve_conj(), w.conj().resolve_conj())
        torch.testing.assert_close(vandermonde(*lazy, 40, backend=backend), vandermonde(*resolved, 40, backend=backend))

    def test_two_runs_are_bit_identical(self, backend):
        results = []
        for _ in range(2):
            v, w = (x.requires_grad_() for x in inputs(2, 9))
            K = vandermonde(v, w, 300, backend=backend)
            results.append((K, *torch.autograd.grad((K * K).sum(), (v, w))))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    @pytest.mark.parametrize("R, S, L", [(2, 3, 0), (2, 0, 4), (0, 3, 4)])
    def test_nothing_to_sum(self, backend, R, S, L):
        v, w = inputs(R, S)
        K = vandermonde(v, w, L, backend=backend)
        assert torch.equal(K, torch.zeros(R, L, device=DEVICE))


def test_memory_is_at_most_linear_in_length():
    def run(v, w, length):
        return [vandermonde(torch.view_as_complex(v), torch.view_as_complex(w), len(length), backend="parallel")]

    tensors = [torch.view_as_real(x) for x in inputs(2, 4)]
    assert_memory_is_linear(run, lambda L: [*tensors, torch.zeros(L, dtype=torch.bool)])


@pytest.mark.parametrize("backend", ["parallel", "triton"])
def test_compiled_without_graph_break(backend):
    v, w = (x.requires_grad_() for x in inputs(2, 3))
    run = torch.compile(lambda v, w: vandermonde(v, w, 40, backend=backend) * 2, backend="aot_eager", fullgraph=True)
    got, want = run(v, w), vandermonde(v, w, 40) * 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(y.sum(), (v, w)) for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)


def test_auto_on_the_cpu_takes_double_precision_and_triton_does_not():
    v, w = inputs(1, 2, torch.complex128)
    with use("triton"), pytest.raises(ValueError, match="complex128"):
        vandermonde(v, w, 5)
    assert vandermonde(v, w, 5).dtype == torch.float64


def test_the_cost_model_counts_a_small_case():
    assert cost.bytes(1, 3, 10) == 4 * (4 * 3 + 10)
    assert cost.bytes(1, 3, 10, backward=True) == 4 * (8 * 3 + 10)
    assert cost.flops(2, 3, 10) == 6 * cost.flops(1, 1, 10)
    assert cost.flops(2, 3, 10, backward=True) == 2 * cost.flops(2, 3, 10)


v, w = inputs(2, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((v[0], w, 4), r"expected v of shape \(R, S\), got \(3,\)"),
        ((v, w[:, :2], 4), r"expected w of shape \(R, S\) with R = 2, S = 3, got \(2, 2\)"),
        ((v.real, w, 4), "expected v of dtype torch.complex64 or torch.complex128, got torch.float32"),
        ((v, w.cdouble(), 4), "expected w of dtype torch.complex64 like v, got torch.complex128"),
        ((v, w.to("meta"), 4), "expected w on .* like v, got meta"),
        ((v, [1.0], 4), "expected w to be a tensor of shape .* got list"),
        ((v, w, -1), "expected L to be an integer of at least 0, got -1"),
        ((v, w, 4.0), "expected L to be an integer of at least 0, got 4.0"),
    ],
)
def test_errors_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        vandermonde(*arguments)


def test_debug_names_the_input_with_nan():
    broken = w.clone()
    broken[0, 1] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected w without NaN, got 1 NaN"):
        vandermonde(v, broken, 4)
