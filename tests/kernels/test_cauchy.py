"""cauchy: one definition, three implementations, checked against a complex128 loop over poles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import use
from seqarch.kernels.cauchy import cauchy, cost

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

BACKENDS = ["reference", "parallel", "triton"]
ALL = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("v", "w")


def inputs(R, S, L, dtype=torch.complex64, kind="damped", shared=True, seed=0):
    """Random v, z_imag, w; `kind` picks poles that are hard in their own way."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    v = torch.complex(*torch.randn(2, R, S, generator=g, dtype=torch.float64))
    z = 2 * torch.tan(torch.pi * torch.arange(L, dtype=torch.float64) / (2 * max(L, 1)))  # the nodes of chapter 08
    z = z if shared else z * (0.5 + uniform(R, 1))
    real = dtype.to_real()
    z = z.to(real).double()
    a, b = -0.01 - uniform(R, S), 6 * uniform(R, S)
    if kind == "near" and L > 0:  # next to a point: 1e-6 to the left of the contour, and about as far off along it
        chosen = z.expand(R, L).gather(1, torch.randint(0, L, (R, S), generator=g))
        a, b = -1e-6 * (1 + uniform(R, S)), chosen + 1e-6 * uniform(R, S)
    elif kind == "undamped":
        a, b = torch.full_like(a, -1e-9), b + 1e-3
    elif kind == "wide":  # the spread of step sizes and frequencies in one layer
        a, b = a * 10 ** (-4 * uniform(R, S)), b * 10 ** (2 - 4 * uniform(R, S))
    return [x.to(t).to(DEVICE) for x, t in ((v, dtype), (z, real), (torch.complex(a, b), dtype))]


def runner(backend, z):
    """Take (v, w): z_imag gets no gradient, so it is not among the leaves."""
    return lambda v, w: [cauchy(v, z.to(v.real.dtype), w, backend=backend)]


def check_against_the_definition(backends, dtype, L, **case):
    v, z, w = inputs(L=L, dtype=dtype, **case)
    for backend in backends:
        assert_agree(runner(backend, z), runner("reference", z), [v, w], steps=L, names=NAMES)


shapes = dict(
    R=st.sampled_from([1, 2, 3]),
    S=st.sampled_from([1, 2, 7, 8, 9, 20]),
    L=st.one_of(st.sampled_from([1, 2, 127, 128, 129, 255, 256, 257]), st.integers(1, 130)),
    kind=st.sampled_from(["damped", "near", "undamped", "wide"]),
    shared=st.booleans(),
    seed=st.integers(0, 10**6),
)


@settings(max_examples=70)
@given(**shapes)
def test_three_implementations_agree_in_single_precision(**case):
    check_against_the_definition(["parallel", "triton"], torch.complex64, **case)


@settings(max_examples=70)
@given(**shapes)
def test_the_real_form_agrees_in_double_precision(**case):
    check_against_the_definition(["parallel"], torch.complex128, **case)


@pytest.mark.parametrize("backend", ["parallel", "triton"])
@pytest.mark.parametrize("R, S, L", [(1, 2, 1700), (2, 40, 300)])
def test_more_points_and_poles_than_one_program(backend, R, S, L):
    """The Triton path cuts long rows into parts, and many poles into blocks."""
    check_against_the_definition([backend], torch.complex64, L, R=R, S=S, kind="wide")


@pytest.mark.parametrize("R, S, L", [(3, 5, 70_000), (300, 64, 20)])
def test_blocks_of_rows_and_poles(R, S, L):
    check_against_the_definition(["parallel"], torch.complex64, L, R=R, S=S, kind="wide")


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@pytest.mark.parametrize("shared", [True, False])
def test_gradcheck(backend, shared):
    v, z, w = inputs(2, 3, 5, torch.complex128, shared=shared)
    assert torch.autograd.gradcheck(
        lambda v, w: cauchy(v, z, w, backend=backend), [v.requires_grad_(), w.requires_grad_()]
    )


@ALL
class TestLaws:
    def test_a_pair_of_poles_is_a_second_order_system(self, backend):
        """With v = 1 / (w - conj w) the pair is 1 / ((z - w)(z - conj w)): an oscillator."""
        _, z, w = inputs(2, 1, 60)
        y = cauchy(1 / (w - w.conj()), z, w, backend=backend)
        wide, s = w.to(torch.complex128), 1j * z.double()
        assert error(y, 1 / (s * s - 2 * s * wide.real + wide.abs() ** 2)) < 1e-5

    def test_is_the_laplace_transform_of_the_impulse_response(self, backend):
        """The integral of 2 Re v e^{wt} e^{-zt} over all t >= 0, by the trapezoid rule."""
        v, z, w = inputs(1, 3, 9)
        w = torch.complex(w.real - 1, w.imag)
        t = torch.linspace(0, 30, 200_001, dtype=torch.float64, device=DEVICE)
        h = 2 * (v.cdouble()[..., None] * torch.exp(w.cdouble()[..., None] * t)).real.sum(1)
        z = z[:6]  # the slow ones: the rule must resolve the oscillation
        want = torch.trapezoid(h[:, None] * torch.exp(-1j * z.double()[:, None] * t), t)
        assert error(cauchy(v, z, w, backend=backend), want) < 1e-5

    def test_the_mirrored_point_gives_the_conjugate(self, backend):
        v, z, w = inputs(2, 5, 40)
        torch.testing.assert_close(
            cauchy(v, -z, w, backend=backend), cauchy(v, z, w, backend=backend).conj(), rtol=1e-5, atol=1e-6
        )

    def test_twice_the_residues_twice_the_sum(self, backend):
        v, z, w = inputs(2, 5, 40)
        assert torch.equal(cauchy(2 * v, z, w, backend=backend), 2 * cauchy(v, z, w, backend=backend))

    def test_poles_of_one_row_do_not_reach_another(self, backend):
        v, z, w = inputs(3, 5, 40)
        changed = w.clone()
        changed[1] -= 1
        y, x = cauchy(v, z, w, backend=backend), cauchy(v, z, changed, backend=backend)
        assert torch.equal(y[[0, 2]], x[[0, 2]]) and not torch.equal(y[1], x[1])

    def test_shared_points_equal_repeated_points(self, backend):
        v, z, w = inputs(3, 5, 140)
        many = z.repeat(3, 1)
        assert torch.equal(cauchy(v, z, w, backend=backend), cauchy(v, many, w, backend=backend))

    def test_points_get_no_gradient(self, backend):
        v, z, w = (x.requires_grad_() for x in inputs(2, 3, 10))
        (g,) = torch.autograd.grad(cauchy(v, z, w, backend=backend).real.sum(), z, allow_unused=True)
        assert g is None

    def test_the_node_at_infinity_is_finite(self, backend):
        """2 tan(pi / 2) in floating point is about 1e16: the sum there is next to nothing, and not nan."""
        v, z, w = inputs(1, 3, 4)
        z[-1] = 2 * torch.tan(torch.tensor(torch.pi / 2, dtype=torch.float64))
        y = cauchy(v, z, w, backend=backend)
        assert torch.isfinite(torch.view_as_real(y)).all() and y[0, -1].abs() < 1e-6

    def test_strides_do_not_matter(self, backend):
        v, z, w = inputs(3, 5, 40, shared=False)
        strided = [x.T.contiguous().T for x in (v, z, w)]
        torch.testing.assert_close(cauchy(*strided, backend=backend), cauchy(v, z, w, backend=backend))
        lazy, resolved = (v.conj(), z, w.conj()), (v.conj().resolve_conj(), z, w.conj().resolve_conj())
        torch.testing.assert_close(cauchy(*lazy, backend=backend), cauchy(*resolved, backend=backend))

    def test_two_runs_are_bit_identical(self, backend):
        results = []
        for _ in range(2):
            v, z, w = inputs(2, 9, 600)
            y = cauchy(v.requires_grad_(), z, w.requires_grad_(), backend=backend)
            results.append((y, *torch.autograd.grad(y.abs().sum(), (v, w))))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    @pytest.mark.parametrize("R, S, L", [(2, 3, 0), (2, 0, 4), (0, 3, 4)])
    def test_nothing_to_sum(self, backend, R, S, L):
        v, z, w = inputs(R, S, L)
        y = cauchy(v, z, w, backend=backend)
        assert torch.equal(y, torch.zeros(R, L, dtype=torch.complex64, device=DEVICE))


def test_memory_is_linear_in_the_number_of_points():
    v, _, w = inputs(4, 16, 1)
    z = torch.linspace(0, 5, 40_000)

    def run(v, w, points):
        y = cauchy(torch.view_as_complex(v), points, torch.view_as_complex(w), backend="parallel")
        return [torch.view_as_real(y)]

    # beyond one block of points: below it the tables grow up to the size of the cache
    assert_memory_is_linear(
        run, lambda L: [torch.view_as_real(v), torch.view_as_real(w), z[:L]], (10_000, 20_000, 40_000)
    )


@pytest.mark.parametrize("backend", ["parallel", "triton"])
def test_compiled_without_graph_break(backend):
    v, z, w = inputs(2, 3, 20)
    v, w = v.requires_grad_(), w.requires_grad_()
    run = torch.compile(lambda v, w: cauchy(v, z, w, backend=backend) * 2, backend="aot_eager", fullgraph=True)
    got, want = run(v, w), cauchy(v, z, w) * 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(y.real.sum(), (v, w)) for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_auto_on_the_cpu_takes_double_precision_and_triton_does_not():
    v, z, w = inputs(1, 2, 9, torch.complex128)
    with use("triton"), pytest.raises(ValueError, match="complex128"):
        cauchy(v, z, w)
    assert cauchy(v, z, w).dtype == torch.complex128


def test_the_cost_model_counts_a_small_case():
    assert cost.bytes(1, 3, 10) == 4 * (2 * (3 + 3 + 10) + 10)
    assert cost.bytes(1, 3, 10, backward=True) > cost.bytes(1, 3, 10)
    assert cost.flops(2, 3, 10) == 6 * cost.flops(1, 1, 10)
    assert cost.flops(2, 3, 10, backward=True) > cost.flops(2, 3, 10)


v, z, w = inputs(2, 3, 8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((v[0], z, w), r"expected v of shape \(R, S\), got \(3,\)"),
        ((v, z, w[:, :2]), r"expected w of shape \(R, S\) with R = 2, S = 3, got \(2, 2\)"),
        ((v, z.expand(3, 8), w), r"expected z_imag of shape \(R, L\) with R = 2, got \(3, 8\)"),
        ((v.real, z, w), "expected v of dtype torch.complex64 or torch.complex128, got torch.float32"),
        ((v, z, w.cdouble()), "expected w of dtype torch.complex64 like v, got torch.complex128"),
        ((v, z + 0j, w), "expected z_imag of a real floating-point dtype, got torch.complex64"),
        ((v, z.to("meta"), w), "expected z_imag on .* like v, got meta"),
        ((v, [1.0], w), "expected z_imag to be a tensor of shape .* got list"),
    ],
)
def test_errors_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        cauchy(*arguments)


def test_debug_names_the_input_with_nan():
    broken = w.clone()
    broken[0, 1] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected w without NaN, got 1 NaN"):
        cauchy(v, z, broken)
