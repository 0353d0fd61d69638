"""linear_scan: one definition, three implementations, checked against a float64 loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels import linear_scan, linear_scan_step, use

from .agreement import DEVICE, assert_agree, error

NAMES = ("a", "b", "h0")


def inputs(B, T, D, dtype=torch.float32, shared=False, gates="mixed", seed=0):
    """Random a, b, h0; `gates` picks a range of decays that is hard in its own way."""
    g = torch.Generator().manual_seed(seed)
    shape = (B, T, 1 if shared else D)
    a = torch.rand(shape, generator=g, dtype=torch.float64)
    if gates == "mixed":  # resets, exact keepers, tiny and negative gates in one sequence
        kind = torch.randint(0, 6, shape, generator=g)
        special = torch.tensor([0.0, 1.0, -1.0, 1e-30, 1.001, 0.0], dtype=torch.float64)[kind]
        a = torch.where(kind == 5, a, special)
    elif gates != "uniform":
        a = torch.full(shape, float(gates), dtype=torch.float64)
    b = torch.randn(B, T, D, generator=g, dtype=torch.float64)
    h0 = torch.randn(B, D, generator=g, dtype=torch.float64)
    if dtype.is_complex:
        a = torch.polar(a.abs(), 6.3 * torch.rand(shape, generator=g, dtype=torch.float64))
        b, h0 = torch.complex(b, b.roll(1, -1)), torch.complex(h0, -h0)
    state = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    return [a.to(dtype).to(DEVICE), b.to(dtype).to(DEVICE), h0.to(state).to(DEVICE)]


def runner(backend, reverse=False):
    return lambda a, b, h0=None: linear_scan(a, b, h0, reverse=reverse, backend=backend)


shapes = dict(
    B=st.integers(1, 2),
    T=st.one_of(st.sampled_from([1, 2, 63, 64, 65, 130]), st.integers(1, 70)),
    D=st.sampled_from([1, 3, 32]),
    shared=st.booleans(),
    reverse=st.booleans(),
    with_h0=st.booleans(),
    gates=st.sampled_from(["mixed", "uniform", "0", "1"]),
    seed=st.integers(0, 10**6),
)


@pytest.mark.parametrize(
    "backend, dtype",
    [
        ("triton", torch.float32),
        ("triton", torch.complex64),
        ("triton", torch.bfloat16),
        ("triton", torch.float16),
    ]
    + [("parallel", d) for d in (torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bfloat16)],
)
@settings(max_examples=50)
@given(**shapes)
def test_agrees_with_the_definition(backend, dtype, B, T, D, shared, reverse, with_h0, gates, seed):
    tensors = inputs(B, T, D, dtype, shared, gates, seed)[: 3 if with_h0 else 2]
    assert_agree(
        runner(backend, reverse),
        runner("reference", reverse),
        tensors,
        steps=T,
        names=NAMES[: len(tensors)],
        loose="a",
    )


@pytest.mark.parametrize("T, D", [(600, 5), (1025, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_segments_of_a_long_sequence(T, D, dtype):
    """Few channels and many steps: the Triton path cuts the sequence, the parallel one uses many chunks."""
    tensors = inputs(1, T, D, dtype)
    for backend in ("triton", "parallel"):
        for reverse in (False, True):
            assert_agree(
                runner(backend, reverse),
                runner("reference", reverse),
                tensors,
                steps=T,
                names=NAMES,
                loose="a",
            )


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(backend, dtype, reverse):
    tensors = [x.requires_grad_() for x in inputs(2, 17, 2, dtype, gates="uniform")]
    assert torch.autograd.gradcheck(runner(backend, reverse), tensors)


@pytest.mark.parametrize("gate", ["1", "-1", "1.0001"])
def test_65536_steps(gate):
    """Gates of modulus one keep everything: the state is a sum over the whole past."""
    tensors = inputs(1, 65536, 4, torch.float32, gates=gate)
    h, hT = linear_scan(*tensors, backend="parallel")
    want, want_T = linear_scan(*[x.double() for x in tensors], backend="reference")
    assert error(h, want) < 1e-4 and error(hT, want_T) < 1e-4


@pytest.mark.parametrize("backend", ["reference", "parallel", "triton"])
@pytest.mark.parametrize("reverse", [False, True])
class TestLaws:
    def test_two_pieces_equal_the_whole(self, backend, reverse):
        a, b, h0 = inputs(2, 41, 3)
        whole, last = linear_scan(a, b, h0, reverse=reverse, backend=backend)
        pieces = [slice(13, 41), slice(0, 13)] if reverse else [slice(0, 13), slice(13, 41)]
        state, parts = h0, []
        for piece in pieces:
            part, state = linear_scan(a[:, piece], b[:, piece], state, reverse=reverse, backend=backend)
            parts.append(part)
        joined = torch.cat(parts[::-1] if reverse else parts, dim=1)
        torch.testing.assert_close(joined, whole)
        torch.testing.assert_close(state, last)

    def test_later_inputs_cannot_change_earlier_states(self, backend, reverse):
        a, b, h0 = inputs(2, 40, 3)
        h, _ = linear_scan(a, b, h0, reverse=reverse, backend=backend)
        changed = b.clone()
        changed[:, 20] += 1
        g, _ = linear_scan(a, changed, h0, reverse=reverse, backend=backend)
        before = slice(21, None) if reverse else slice(0, 20)
        assert torch.equal(h[:, before], g[:, before])
        assert not torch.equal(h[:, 20], g[:, 20])

    def test_a_zero_gate_forgets_even_a_huge_past(self, backend, reverse):
        a, b, h0 = inputs(1, 30, 2, gates="1")
        a[:, 15] = 0
        b[:, :15] *= 1e30
        b[:, 16:] *= 1e30
        h, _ = linear_scan(a, b, h0, reverse=reverse, backend=backend)
        torch.testing.assert_close(h[:, 15], b[:, 15])

    def test_strides_do_not_matter(self, backend, reverse):
        a, b, h0 = inputs(3, 20, 4)
        strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (a, b)]
        want = linear_scan(a, b, h0, reverse=reverse, backend=backend)
        torch.testing.assert_close(linear_scan(*strided, h0, reverse=reverse, backend=backend), want)

    def test_two_runs_are_bit_identical(self, backend, reverse):
        first = linear_scan(*inputs(2, 70, 3), reverse=reverse, backend=backend)
        second = linear_scan(*inputs(2, 70, 3), reverse=reverse, backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))

    def test_empty_sequence_returns_the_state(self, backend, reverse):
        a, b, h0 = inputs(2, 0, 3)
        h, hT = linear_scan(a, b, h0, reverse=reverse, backend=backend)
        assert h.shape == (2, 0, 3) and torch.equal(hT, h0)


def test_stepping_equals_the_scan():
    a, b, h0 = inputs(2, 9, 3)
    h, _ = linear_scan(a, b, h0)
    state = h0
    for t in range(9):
        state = linear_scan_step(a[:, t], b[:, t], state)
        torch.testing.assert_close(state, h[:, t])


def test_memory_is_linear_in_length():
    """Saved for backward: the gates, the states and h0, nothing that grows faster than T."""
    sizes = []
    for T in (1000, 2000, 4000):
        saved = 0

        def pack(x):
            nonlocal saved
            saved += x.numel()
            return x

        a, b, h0 = (x.requires_grad_() for x in inputs(1, T, 2))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            linear_scan(a, b, h0, backend="parallel")
        sizes.append(saved)
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])


def test_compiled_without_graph_break():
    a, b, h0 = inputs(2, 20, 3)
    scan = torch.compile(lambda a, b: linear_scan(a, b, backend="triton")[0] * 2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(scan(a, b), linear_scan(a, b)[0] * 2)


def test_use_overrides_auto_only_inside():
    a, b, h0 = inputs(1, 9, 2, torch.float64)
    with use("triton"), pytest.raises(ValueError, match="float64"):
        linear_scan(a, b, h0)
    linear_scan(a, b, h0)


good = inputs(2, 8, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((good[0], good[1][0]), r"expected b of shape \(B, T, D\), got \(8, 4\)"),
        (
            (good[0][:, :5], good[1]),
            r"expected a of shape \(B, T, D\) with B = 2, T = 8, D = 4, got \(2, 5, 4\)",
        ),
        ((good[0][..., :2], good[1]), r"expected a of shape .*got \(2, 8, 2\)"),
        ((*good[:2], good[2][:1]), r"expected h0 of shape \(B, D\) with B = 2, D = 4, got \(1, 4\)"),
        ((good[0].double(), good[1]), "expected a of dtype torch.float32 like b, got torch.float64"),
        (
            (good[0].long(), good[1].long()),
            "expected b to be of a floating-point or complex dtype, got torch.int64",
        ),
        ((*good[:2], good[2] + 0j), "expected h0 real like b, got torch.complex64"),
        (([1.0], good[1]), "expected a to be a tensor of shape .* got list"),
    ],
)
def test_errors_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_scan(*arguments)


def test_error_for_an_unknown_backend():
    with pytest.raises(ValueError, match="expected backend to be one of auto, reference, parallel, triton, got 'cuda'"):
        linear_scan(*good, backend="cuda")


def test_debug_names_the_input_with_nan():
    a, b, h0 = inputs(1, 4, 2)
    b[0, 2, 1] = float("nan")
    with use(debug=True), pytest.raises(ValueError, match="expected b without NaN, got 1 NaN"):
        linear_scan(a, b, h0)
