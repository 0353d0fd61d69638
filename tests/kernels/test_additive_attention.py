"""additive_scores: one definition, three implementations, checked against a float64 loop."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqarch.kernels.additive_attention import additive_scores
from seqarch.kernels.additive_attention.cost import broadcast_bytes

from .agreement import DEVICE, outputs_and_gradients

LIMITS = {  # outputs, gradients: errors in units of 1 + the largest entry
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 1e-4),
    torch.float16: (2e-3, 5e-3),
    torch.bfloat16: (1e-2, 2e-2),
}


def inputs(B, M, N, H, dtype=torch.float32, scale=1.0, seed=0):
    """Random q, k, v; a large `scale` saturates the tanh."""
    g = torch.Generator().manual_seed(seed)
    q, k = (scale * torch.randn(B, n, H, generator=g, dtype=torch.float64) for n in (M, N))
    v = torch.randn(H, generator=g, dtype=torch.float64) / max(H, 1) ** 0.5
    return [x.to(dtype).to(DEVICE) for x in (q, k, v)]


def random_mask(kind, B, N, seed):
    """None, ragged lengths, random holes, or one row without any key."""
    g = torch.Generator().manual_seed(seed + 1)
    if kind == "none":
        return None
    if kind == "lengths":
        mask = torch.arange(N) < torch.randint(1, N + 1, (B, 1), generator=g)
    else:
        mask = torch.rand(B, N, generator=g) < 0.6
    if kind == "empty row":
        mask[0] = False
    return mask.to(DEVICE)


def runner(backend, mask):
    """The finite scores; where the mask says so, -inf is checked here and then set to 0 for the comparison."""

    def run(q, k, v):
        scores = additive_scores(q, k, v, mask, backend=backend)
        if mask is None:
            return [scores]
        hidden = ~mask[:, None].expand_as(scores)
        assert (scores[hidden] == -torch.inf).all() and torch.isfinite(scores[~hidden]).all()
        return [scores.masked_fill(hidden, 0.0)]

    return run


def assert_agree(backend, mask, tensors):
    """Outputs and gradients against the definition in float64.

    The yardstick is 1 + max|ref|, not max|ref|: where every tanh is saturated the true gradient is next to nothing,
    and in float32 1 - t^2 has no digit of it.
    """
    dtype = tensors[0].dtype
    want = outputs_and_gradients(runner("reference", mask), [x.double() for x in tensors])
    got = outputs_and_gradients(runner(backend, mask), tensors)
    for kind, xs, refs, limit in zip(("output", "gradient"), got, want, LIMITS[dtype], strict=True):
        for name, x, ref in zip("qkv", xs, refs, strict=False):
            assert x.dtype == dtype and x.shape == ref.shape
            error = (x.double() - ref).abs().max() / (1 + ref.abs().max())
            assert error <= limit, f"{kind} {name}: error {error:.1e} > {limit:.1e}"
            if dtype in (torch.float16, torch.bfloat16) and ref.norm() > 0.1:
                cosine = torch.nn.functional.cosine_similarity(x.double().flatten(), ref.flatten(), dim=0)
                assert cosine > 0.9999, f"{kind} {name}: cosine {cosine:.6f}"


@pytest.mark.parametrize(
    "backend, dtype",
    [("triton", d) for d in (torch.float32, torch.bfloat16, torch.float16)]
    + [("parallel", d) for d in (torch.float32, torch.float64, torch.bfloat16)],
)
@settings(max_examples=70)
@given(
    B=st.integers(1, 3),
    M=st.one_of(st.sampled_from([1, 15, 16, 17, 33]), st.integers(1, 20)),
    N=st.one_of(st.sampled_from([1, 31, 32, 33, 65]), st.integers(1, 20)),
    H=st.sampled_from([1, 3, 16, 17, 32]),
    kind=st.sampled_from(["none", "lengths", "holes", "empty row"]),
    scale=st.sampled_from([0.1, 1.0, 40.0]),
    seed=st.integers(0, 10**6),
)
def test_agrees_with_the_definition(backend, dtype, B, M, N, H, kind, scale, seed):
    mask = random_mask(kind, B, N, seed)
    assert_agree(backend, mask, inputs(B, M, N, H, dtype, scale, seed))


@pytest.mark.parametrize("scale", [0.1, 1.0, 40.0])
def test_the_definition_is_the_formula(scale):
    q, k, v = inputs(2, 3, 4, 5, torch.float64, scale)
    scores = additive_scores(q, k, v, backend="reference")
    for b in range(2):
        for i in range(3):
            for j in range(4):
                torch.testing.assert_close(scores[b, i, j], (v * torch.tanh(q[b, i] + k[b, j])).sum())


@pytest.mark.parametrize("backend", ["parallel", "triton"])
def test_many_blocks(backend, monkeypatch):
    """More queries than one block of the parallel form holds, and several tiles of each kind on the GPU."""
    monkeypatch.setattr("seqarch.kernels.additive_attention.parallel.BLOCK", 500)
    mask = random_mask("lengths", 2, 70, 3)
    assert_agree(backend, mask, inputs(2, 41, 70, 20))


@pytest.mark.parametrize("backend", ["reference", "parallel"])
@pytest.mark.parametrize("kind", ["none", "holes", "empty row"])
def test_gradcheck(backend, kind):
    mask = random_mask(kind, 2, 5, 0)
    tensors = [x.requires_grad_() for x in inputs(2, 3, 5, 4, torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: runner(backend, mask)(*x)[0], tensors)


@pytest.mark.parametrize("backend", ["reference", "parallel", "triton"])
class TestLaws:
    def test_permuting_the_keys_permutes_the_scores(self, backend):
        q, k, v = inputs(2, 5, 9, 6)
        mask, order = (
            random_mask("holes", 2, 9, 0),
            torch.randperm(9, generator=torch.Generator().manual_seed(0)),
        )
        scores = additive_scores(q, k, v, mask, backend=backend)
        permuted = additive_scores(q, k[:, order], v, mask[:, order], backend=backend)
        torch.testing.assert_close(permuted, scores[..., order])

    def test_padding_changes_nothing(self, backend):
        q, k, v = inputs(1, 4, 7, 6)
        padded = torch.cat([k, torch.full_like(k[:, :3], 1e30)], dim=1)
        mask = torch.arange(10, device=DEVICE)[None] < 7
        scores = additive_scores(q, padded, v, mask, backend=backend)
        torch.testing.assert_close(scores[..., :7], additive_scores(q, k, v, backend=backend))
        assert (scores.softmax(-1)[..., 7:] == 0).all()

    def test_nan_behind_the_mask_does_not_leak(self, backend):
        q, k, v = inputs(2, 4, 6, 5)
        mask = random_mask("lengths", 2, 6, 2)
        mask[0, 3:] = False
        clean = [x.clone().requires_grad_() for x in (q, k, v)]
        dirty = [x.clone() for x in (q, k, v)]
        dirty[1][~mask] = torch.nan
        dirty = [x.requires_grad_() for x in dirty]
        results = []
        for leaves in (clean, dirty):
            p = additive_scores(*leaves, mask, backend=backend).softmax(-1)
            results.append([p, *torch.autograd.grad((p**2).sum(), leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
            assert torch.isfinite(a).all()

    def test_a_row_without_keys_spoils_no_gradient(self, backend):
        """Its softmax is NaN, and so is what comes back; neither the other rows nor the weights may notice."""
        leaves = [x.requires_grad_() for x in inputs(2, 3, 4, 5)]
        mask = torch.tensor([[True] * 4, [False] * 4], device=DEVICE)
        p = additive_scores(*leaves, mask, backend=backend).softmax(-1)
        gradients = torch.autograd.grad((p**2).sum(), leaves)
        assert all(torch.isfinite(g).all() for g in gradients)
        assert (gradients[0][1] == 0).all() and (gradients[1][1] == 0).all()

    def test_strides_do_not_matter(self, backend):
        q, k, v = inputs(3, 5, 6, 8)
        mask = random_mask("holes", 3, 6, 1)
        strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k)]
        wide = torch.stack([v, v], dim=1)[:, 0]
        tall = mask.t().contiguous().t()
        assert not any(x.is_contiguous() for x in (*strided, wide, tall))
        torch.testing.assert_close(
            additive_scores(*strided, wide, tall, backend=backend),
            additive_scores(q, k, v, mask, backend=backend),
        )

    def test_two_runs_are_bit_identical(self, backend):
        runs = []
        for _ in range(2):
            leaves = [x.requires_grad_() for x in inputs(2, 35, 40, 20)]
            scores = additive_scores(*leaves, backend=backend)
            runs.append([scores, *torch.autograd.grad((scores**2).sum(), leaves)])
        assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))

    @pytest.mark.parametrize("B, M, N, H", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
    def test_empty_sizes(self, backend, B, M, N, H):
        leaves = [x.requires_grad_() for x in inputs(B, M, N, H)]
        scores = additive_scores(*leaves, backend=backend)
        assert scores.shape == (B, M, N) and (scores == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(scores.sum(), leaves))


MEASURE = """
import torch
torch.set_num_threads(1)
from seqarch.kernels.additive_attention import additive_scores
def peak():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) / 1024
def run(B, M, N, H):
    q, k, v = (torch.randn(*s, requires_grad=True) for s in ((B, M, H), (B, N, H), (H,)))
    additive_scores(q, k, v, backend="parallel").square().sum().backward()
run(1, 2, 2, 8)  # load every library before the count starts
before = peak()
run(8, 512, 512, 128)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory():
    """Forward and backward at B = 8, M = N = 512, H = 128: under 200 MB; the (B, M, N, H) tensor alone has 1 GB."""
    assert broadcast_bytes(8, 512, 512, 128) == 2**30
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < 200


def test_compiled_graph_without_break():
    q, k, v = inputs(2, 5, 6, 4)
    score = torch.compile(lambda *x: additive_scores(*x, backend="triton") * 2, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(score(q, k, v), additive_scores(q, k, v) * 2)


good = inputs(2, 3, 5, 4)
good_mask = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((good[0][0], *good[1:]), r"expected q of shape \(B, M, H\), got \(3, 4\)"),
        (
            (good[0], good[1][:1], good[2]),
            r"expected k of shape \(B, N, H\) with B = 2, H = 4, got \(1, 5, 4\)",
        ),
        ((good[0], good[1][..., :2], good[2]), r"expected k of shape .*got \(2, 5, 2\)"),
        ((*good[:2], good[2][:3]), r"expected v of shape \(H\) with H = 4, got \(3,\)"),
        ((*good[:2], [1.0]), "expected v to be a tensor of shape .* got list"),
        ((good[0], good[1].double(), good[2]), "expected k of dtype torch.float32 like q, got torch.float64"),
        ([x.long() for x in good], "expected q to be of a floating-point or complex dtype, got torch.int64"),
        ([x + 0j for x in good], "expected q of a real dtype, got torch.complex64"),
        ((*good, good_mask[:, :4]), r"expected mask of shape \(B, N\) with B = 2, N = 5, got \(2, 4\)"),
        (
            (*good, good_mask.long()),
            "expected mask of dtype torch.bool, True where a key may be chosen, got torch.int64",
        ),
    ],
)
def test_errors_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        additive_scores(*arguments)


def test_errors_for_backends():
    with pytest.raises(ValueError, match="expected backend to be one of auto, reference, parallel, triton, got 'gpu'"):
        additive_scores(*good, backend="gpu")
    with pytest.raises(ValueError, match='backend="triton" cannot run here: .*float64'):
        additive_scores(*[x.double() for x in good], backend="triton")
