"""The elementwise scan against accelerated-scan, which takes (B, D, T) and lengths that are powers of two."""

import torch

from seqarch.kernels.linear_scan import cost, linear_scan

from ..case import ABSENT, Case, Run, installed, ours


def case(B: int, T: int, D: int) -> Case:
    def make(device, dtype):
        return torch.rand(B, T, D, device=device, dtype=dtype), torch.randn(B, T, D, device=device, dtype=dtype)

    peers: dict[str, Run | str] = {"accelerated-scan": ABSENT}
    if installed("accelerated_scan"):

        def accelerated(a, b):
            from accelerated_scan.triton import scan

            return scan(a.transpose(1, 2).contiguous(), b.transpose(1, 2).contiguous()).transpose(1, 2)

        peers["accelerated-scan"] = accelerated
    return Case("linear_scan", dict(B=B, T=T, D=D), make, ours(linear_scan), cost.bytes, cost.flops, peers)


CASES = {"cpu": [case(8, 4096, 256), case(1, 65536, 64)], "cuda": [case(8, 4096, 2048), case(1, 65536, 1024)]}


def launches(x, dtype, capability):
    """Every Triton kernel at the block sizes that it is launched with."""
    for T in (100, 3000):  # one segment, many segments
        yield linear_scan, (x(1, T, 96), x(1, T, 96), x(1, 96, dtype=torch.float32))
    yield linear_scan, (x(1, 100, 1), x(1, 100, 96))
    if dtype is torch.float32:
        yield linear_scan, (x(1, 3000, 8, dtype=torch.complex64), x(1, 3000, 8, dtype=torch.complex64))
