"""Attention that sees a part of the keys against PyTorch's own, which needs a table of T x T for that."""

import functools

import torch
import torch.nn.functional as F

from seqarch.kernels.block_attention import block_attention, cost

from ..case import Case, ours

LONGEST_TABLE = 16384  # a table of T x T bytes of this length takes 256 MB


def case(kind: str, B: int, H: int, T: int, d: int, width: int = 0) -> Case:
    def make(device, dtype):
        return [torch.randn(B, H, T, d, device=device, dtype=dtype) for _ in range(3)]

    @functools.cache
    def seen(device):
        i, j = torch.arange(T, device=device)[:, None], torch.arange(T, device=device)
        return (j <= i) & (j > i - width if kind == "window" else j // width == i // width)

    def masked(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen(q.device))

    def causal(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    if kind == "causal":
        peers, options = {"torch SDPA": causal}, {}
    else:
        peers = {"torch SDPA, T x T mask": masked if T <= LONGEST_TABLE else "the mask would be too large"}
        options = {kind: width}
    # one query after the other is a loop of T steps, each of which indexes into k and v
    backends = ("parallel", "triton") if kind == "causal" else ("reference", "parallel", "triton")
    run = ours(block_attention, backends, kind=kind, **options)
    shape = dict(B=B, H=H, T=T, d=d) | ({kind: width} if width else {})
    counts = (functools.partial(f, kind=kind) for f in (cost.bytes, cost.flops))
    return Case("block_attention", shape, make, run, *counts, peers)


CASES = {
    "cpu": [
        case("causal", 1, 4, 4096, 64),
        case("window", 1, 4, 4096, 64, 256),
        case("chunk", 1, 4, 4096, 64, 128),
        case("window", 1, 1, 65536, 32, 128),
    ],
    "cuda": [
        case("causal", 4, 16, 4096, 64),
        case("window", 4, 16, 4096, 64, 512),
        case("chunk", 4, 16, 4096, 64, 128),
        case("window", 1, 16, 65536, 64, 512),
    ],
}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with, with and without bias, mask and padding."""
    if capability < 80 and dtype != torch.float32:
        return  # refused there, see `block_attention`

    def biased(q, k, v, bias, **options):
        return block_attention(q, k, v, bias=bias, **options)

    padded = dict(
        kind="mask", mask=torch.ones(100, 30, dtype=torch.bool), key_mask=torch.ones(1, 100, dtype=torch.bool)
    )
    for d, E in ((64, 64), (128, 128), (64, 300)):
        q, k, v = x(1, 2, 100, d), x(1, 1, 100, d), x(1, 1, 100, E)
        yield functools.partial(block_attention, kind="window", window=40, n_global=1), (q, k, v)
        if E <= 128:
            yield functools.partial(biased, **padded), (q, k, v, x(2, 100, 100))
