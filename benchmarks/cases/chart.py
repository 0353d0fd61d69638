"""Mixing the candidates of chart cells against the same formula by torch's softmax and einsum."""

import torch

from seqarch.kernels.chart import cost, softmax_mix

from ..case import Case, ours


def case(R: int, K: int, d: int) -> Case:
    def make(device, dtype):
        return torch.randn(R, K, device=device), torch.randn(R, K, d, device=device, dtype=dtype)

    def softmax_then_einsum(t, c):
        return torch.einsum("rk,rkd->rd", t.softmax(-1).to(c.dtype), c)

    peers = {"softmax + einsum": softmax_then_einsum}
    return Case("chart", dict(R=R, K=K, d=d), make, ours(softmax_mix), cost.bytes, cost.flops, peers, steps=R * K)


# R is batch x cells of one length: 32 sentences of 64 words, spans of 32 words and of 6
CASES = {
    "cpu": [case(1024, 4, 48), case(16384, 4, 48)],
    "cuda": [case(32 * 33, 31, 768), case(32 * 59, 5, 768)],
}


def indexed(t, c, index, backend="auto"):
    """`softmax_mix` with its candidates in a list."""
    return softmax_mix(t, c, index=index, backend=backend)


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""
    for K in (1, 5, 33, 64):
        yield softmax_mix, (x(3, K, dtype=torch.float32), x(3, K, 70))
    yield softmax_mix, (x(3, 64, dtype=torch.float32), x(3, 64, 70), torch.ones(3, 64, dtype=torch.bool))
    yield indexed, (x(192, dtype=torch.float32), x(192, 70), torch.arange(192).view(3, 64))
