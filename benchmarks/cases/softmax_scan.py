"""Prefix attention of one query against a running sum of exponentials."""

import torch

from seqarch.kernels.softmax_scan import cost, softmax_scan

from ..case import Case, ours


def case(B: int, H: int, T: int, E: int) -> Case:
    def make(device, dtype):
        return torch.randn(B, H, T, device=device), torch.randn(B, H, T, E, device=device, dtype=dtype)

    def cumsum(s, v):
        # safe only while all scores lie close together: weights are not rescaled as the maximum moves
        weights = (s - s.amax(-1, keepdim=True)).exp().unsqueeze(-1)
        return (weights * v).cumsum(-2) / weights.cumsum(-2)

    peers = {"cumsum (unsafe)": cumsum}
    shape = dict(B=B, H=H, T=T, E=E)
    return Case("softmax_scan", shape, make, ours(softmax_scan), cost.bytes, cost.flops, peers)


CASES = {
    "cpu": [case(8, 4, 4096, 32), case(1, 1, 65536, 32)],
    "cuda": [case(8, 16, 4096, 64), case(1, 16, 65536, 64)],
}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""
    for E in (16, 64, 128):
        yield softmax_scan, (x(1, 2, 100, dtype=torch.float32), x(1, 2, 100, E))
