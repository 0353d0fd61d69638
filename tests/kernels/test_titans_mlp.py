"""titans_mlp: a token loop against chunks, autograd and itself in pieces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from seqarch.kernels import titans_mlp, use
from seqarch.kernels.test_time_memory import cost

from .agreement import DEVICE, assert_agree, assert_memory_is_linear, error

NAMES = ("q", "k", "v", "theta", "eta", "alpha", "W1", "W2", "S1", "S2")
LOOSE = ("theta", "eta", "alpha")
ALL = pytest.mark.parametrize("backend", ["reference", "parallel"])
KINDS = ["normal", "ends", "same key", "no step"]


def inputs(B, H, T, e, m, dtype=torch.float32, kind="normal", seed=0):
    """Random inputs in the order of NAMES; steps small enough for a chunk of equal keys."""
    g = torch.Generator().manual_seed(seed + 1)

    def normal(*shape):
        return torch.randn(B, H, *shape, generator=g, dtype=torch.float64)

    k = F.normalize(normal(T, e), dim=-1)
    k = k[..., :1, :].expand_as(k) if kind == "same key" else k
    theta, eta, alpha = torch.rand(3, B, H, T, generator=g, dtype=torch.float64)
    theta = theta * (0.0 if kind == "no step" else 0.02)
    if kind == "ends":
        ends = torch.tensor([0.0, 1e-6, 1 - 1e-6, 1.0], dtype=torch.float64)
        eta, alpha = (ends[torch.randint(0, 4, eta.shape, generator=g)] for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    states = normal(m, e) / e**0.5, normal(e, m) / m**0.5, 0.1 * normal(m, e), 0.1 * normal(e, m)
    tokens = [x.to(dtype) for x in (normal(T, e), k, normal(T, e))]
    return [x.to(DEVICE) for x in (*tokens, *(x.to(wide) for x in (theta, eta, alpha, *states)))]


def run(backend, chunk=16):
    def call(*x):
        y, W, S = titans_mlp(*x[:6], x[6:8], x[8:10] or None, chunk=chunk, backend=backend)
        return y, *W, *S

    return call


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=50)
@given(
    rows=st.sampled_from([(1, 1), (2, 1), (1, 3)]), T=st.integers(1, 40), e=st.sampled_from([2, 4, 7]),
    m=st.sampled_from([1, 4, 9]), chunk=st.sampled_from([1, 2, 4, 16, 64]), kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6), with_momentum=st.booleans(),
)  # fmt: skip
def test_chunks_agree_with_the_token_loop(dtype, rows, T, e, m, chunk, kind, seed, with_momentum):
    tensors = inputs(*rows, T, e, m, dtype, kind, seed)[: 10 if with_momentum else 8]
    assert_agree(
        run("parallel", chunk), run("reference", chunk), tensors,
        steps=T, names=NAMES[: len(tensors)], loose=LOOSE, matmul=True,
    )  # fmt: skip


@ALL
@pytest.mark.parametrize("T, chunk", [(1, 1), (5, 2), (7, 4)])
@pytest.mark.parametrize("kind", ["normal", "ends"])
def test_gradcheck(backend, T, chunk, kind):
    tensors = [x.requires_grad_() for x in inputs(1, 1, T, 2, 3, torch.float64, kind)]
    assert torch.autograd.gradcheck(run(backend, chunk), tensors)


def test_65536_tokens():
    tensors = inputs(1, 1, 65536, 2, 4)
    with torch.no_grad():
        got, want = run("parallel", 64)(*tensors), run("reference", 64)(*(x.double() for x in tensors))
    assert all(x.isfinite().all() and error(x, y) < 1e-4 for x, y in zip(got, want, strict=True))


def test_memory_is_linear_in_length():
    assert_memory_is_linear(run("parallel"), lambda T: inputs(1, 1, T, 4, 8), lengths=(1024, 2048, 4096))


@ALL
class TestLaws:
    def test_a_write_is_a_step_of_autograd(self, backend):
        q, k, v, theta, eta, alpha, W1, W2, S1, S2 = inputs(1, 1, 1, 5, 8, torch.float64)
        W = [x[0, 0].clone().requires_grad_() for x in (W1, W2)]

        def memory(x, W):
            return x + W[1] @ F.silu(W[0] @ x)

        loss = (memory(k[0, 0, 0], W) - v[0, 0, 0]).square().sum() / 2
        S = [
            eta.item() * s[0, 0] - theta.item() * d for s, d in zip((S1, S2), torch.autograd.grad(loss, W), strict=True)
        ]
        W = [(1 - alpha.item()) * w + s for w, s in zip(W, S, strict=True)]
        y, *states = run(backend)(q, k, v, theta, eta, alpha, W1, W2, S1, S2)
        torch.testing.assert_close(y[0, 0, 0], memory(q[0, 0, 0], W))
        for got, want in zip(states, (*W, *S), strict=True):
            torch.testing.assert_close(got[0, 0], want)

    @pytest.mark.parametrize("chunk, cut", [(1, 5), (4, 8), (4, 4)])
    def test_two_pieces_equal_the_whole(self, backend, chunk, cut):
        x = inputs(1, 2, 11, 3, 5, torch.float64)
        y, *states = run(backend, chunk)(*x)
        first, *middle = run(backend, chunk)(*(t[:, :, :cut] for t in x[:6]), *x[6:])
        second, *last = run(backend, chunk)(*(t[:, :, cut:] for t in x[:6]), *middle)
        torch.testing.assert_close(torch.cat([first, second], dim=2), y)
        torch.testing.assert_close(last, states)

    @pytest.mark.parametrize("chunk", [1, 4])
    def test_later_tokens_cannot_change_earlier_outputs(self, backend, chunk):
        x = inputs(1, 1, 10, 3, 5)
        y = run(backend, chunk)(*x)[0]
        for i in range(6):
            other = [t.clone() for t in x]
            other[i][:, :, 6] = 0.9 - other[i][:, :, 6]
            moved = run(backend, chunk)(*other)[0]
            assert torch.equal(moved[:, :, :6], y[:, :, :6])
            assert not torch.equal(moved[:, :, 6:], y[:, :, 6:])

    def test_strides_do_not_matter(self, backend):
        x = inputs(2, 2, 9, 3, 5)
        strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in x]
        torch.testing.assert_close(run(backend, 4)(*strided), run(backend, 4)(*x))

    def test_empty_sequence_returns_the_states(self, backend):
        x = inputs(1, 1, 4, 3, 5)
        y, *states = run(backend)(*(t[:, :, :0] for t in x[:6]), *x[6:])
        assert y.shape == (1, 1, 0, 3) and all(torch.equal(a, b) for a, b in zip(states, x[6:], strict=True))

    def test_the_output_has_the_dtype_of_v_and_the_states_are_float32(self, backend):
        y, *states = run(backend)(*inputs(1, 1, 4, 3, 5, torch.bfloat16))
        assert y.dtype == torch.bfloat16 and all(s.dtype == torch.float32 for s in states)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.__setitem__(2, x[2][..., :2]), "expected v of the size of k, 3, got 2"),
        (lambda x: x.__setitem__(6, x[6][:, :, :4]), r"expected W0 of layer 2 of shape \(B, H, V, m\)"),
        (lambda x: x.__setitem__(3, x[3][..., :2]), r"expected theta of shape \(B, H, T\)"),
    ],
)
def test_errors_name_what_was_expected(change, message):
    x = inputs(1, 1, 4, 3, 5)
    change(x)
    with pytest.raises(ValueError, match=message):
        run("parallel")(*x)


def test_other_errors():
    x = inputs(1, 1, 4, 3, 5)
    with pytest.raises(ValueError, match="expected chunk to be an integer of at least 1, got 0"):
        run("parallel", 0)(*x)
    with pytest.raises(ValueError, match="expected W0 to be a pair of matrices, got Tensor of length 1"):
        titans_mlp(*x[:6], x[6])
    with pytest.raises(ValueError, match="titans_mlp has no Triton kernel"), use("triton"):
        titans_mlp(*x[:6], x[6:8])


def test_the_cost_model_counts_a_small_case():
    """Four tokens, two chunks of two, e = 2, m = 3."""
    tokens = 4 * (4 * 2 * 4 + 3 * 4)  # read q, k, v, write y, and three gates
    assert cost.mlp_bytes(1, 1, 4, 2, 3, chunk=2) == tokens + 2 * 4 * 2 * 3 * 4  # both matrices and momenta, each chunk
    assert cost.mlp_flops(1, 1, 4, 2, 3, chunk=2) == 4 * (9 * 2 * 6 + 4 * 2 * 5 + 8)
    assert cost.mlp_flops(1, 1, 4, 2, 3, backward=True) == 3 * cost.mlp_flops(1, 1, 4, 2, 3)
