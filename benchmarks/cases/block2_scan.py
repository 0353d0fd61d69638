"""The 2 x 2 block scan. No packaged peer computes it; the elementwise scan of as many numbers is the lower bound."""

import torch

from seqarch.kernels.block2_scan import block2_scan, cost
from seqarch.kernels.linear_scan import linear_scan

from ..case import Case, ours


def diagonal(J, r):
    """Only the diagonals of the matrices: two elementwise scans side by side, a third of the bytes."""
    gates = torch.diagonal(J, dim1=-2, dim2=-1).flatten(2)
    return linear_scan(gates, r.flatten(2))[0].unflatten(2, (-1, 2))


def case(B: int, T: int, D: int) -> Case:
    def make(device, dtype):
        J = torch.rand(B, T, D, 2, 2, device=device, dtype=dtype) - 0.5  # row sums of at most 1: nothing grows
        return J, torch.randn(B, T, D, 2, device=device, dtype=dtype)

    peers = {"linear_scan (diagonals only)": diagonal}
    return Case("block2_scan", dict(B=B, T=T, D=D), make, ours(block2_scan), cost.bytes, cost.flops, peers, exact=False)


CASES = {
    "cpu": [case(1, 4096, 64), case(1, 65536, 16)],
    "cuda": [case(8, 4096, 2048), case(1, 65536, 512)],
}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""
    for T in (100, 3000):  # one segment, many segments
        yield block2_scan, (x(1, T, 20, 2, 2), x(1, T, 20, 2), x(1, 20, 2, dtype=torch.float32))
