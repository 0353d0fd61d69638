"""Additive scores against the one-line broadcast, which stores (B, M, N, H) numbers."""

import torch

from seqarch.kernels.additive_attention import additive_scores, cost

from ..case import Case, ours


def case(B: int, M: int, N: int, H: int) -> Case:
    def make(device, dtype):
        shapes = (B, M, H), (B, N, H), (H,)
        return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]

    def broadcast(q, k, v):
        return torch.tanh(q[:, :, None] + k[:, None]) @ v

    shape, peers = dict(B=B, M=M, N=N, H=H), {"broadcast": broadcast}
    return Case("additive_scores", shape, make, ours(additive_scores), cost.bytes, cost.flops, peers, steps=M)


CASES = {"cpu": [case(8, 512, 512, 128)], "cuda": [case(8, 512, 512, 128), case(32, 1024, 1024, 256)]}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""
    yield additive_scores, (x(2, 50, 128), x(2, 40, 128), x(128))
    yield additive_scores, (x(2, 50, 128), x(2, 40, 128), x(128), torch.ones(2, 40, dtype=torch.bool))
